"""Shapes of operands, a layer, and how many operations they cost in closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def dense(x, w):
    return jnp.tanh(x @ w)


def products(*lengths):
    """Operations of a matrix product, or of several at once: a multiply and an add for each term."""
    return 2 * math.prod(lengths)


def softmax_flops(rows, n):
    """n maxima (the first against -inf), n differences, n - 1 sums, n divisions a row; the exp is not in it."""
    return rows * (n + n + (n - 1) + n)


def taps_inside(size, kernel, stride, pad):
    """How many (output, tap) pairs of a one-dimensional convolution read a pixel and not the padding."""
    outputs = (size + 2 * pad - kernel) // stride + 1
    return sum(0 <= o * stride + k - pad < size for o in range(outputs) for k in range(kernel))


def davit_products(model, size):
    """Multiply-adds of DaViT by formulas, for sizes without padded windows.

    Returns:
        Those of the linear layers, of attention, of the convolutions between stages, of the depthwise
        convolutions, and of the stem; the last two as pairs: all of them, and those with a real pixel.
    """
    side = size // model.stem_strides
    kernel, first = model.stem_kernel, model.in_chans * model.dims[0]
    stem = (side * kernel) ** 2 * first, taps_inside(size, kernel, model.stem_strides, kernel // 2) ** 2 * first
    linear, attended, down, depthwise = model.dims[-1] * model.num_classes, 0, 0, np.zeros(2, int)
    for i, (c, heads, depth) in enumerate(zip(model.dims, model.num_heads, model.depths)):
        side = side // 2 if i else side
        n = side**2
        assert side % model.window == 0
        linear += depth * 2 * n * 12 * c**2
        attended += depth * 2 * n * c * (model.window**2 + c // heads)
        depthwise += depth * 4 * c * np.array([9 * n, taps_inside(side, 3, 1, 1) ** 2])
        down += n * 4 * model.dims[i - 1] * c if i else 0
    return linear, attended, down, depthwise.tolist(), stem
