"""Shapes of operands, a layer, and how many operations they cost in closed form."""

import math

import jax
import jax.numpy as jnp


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
