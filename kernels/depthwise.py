"""Depthwise convolution, in the form that is fast on the platform the program is lowered for."""

import difflib
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from kernels import compat
from kernels.dense import accumulator_dtype

FORMS = ("conv", "shift")
# One fused loop keeps this many kernel taps' sums at a time: they share the loads of the output's gradient,
# and with more of them the compiler stops keeping the sums in registers.
TAPS_PER_LOOP = 4
# Rows are summed this many at a time: enough to make the intermediate small, few enough to be unrolled.
MAX_FOLD = 16

Pads = tuple[tuple[int, int], tuple[int, int]]


def depthwise_conv2d(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "kh kw 1 C"],
    bias: Float[Array, " C"] | None = None,
    *,
    strides: int | tuple[int, int] = 1,
    padding: str | int | Sequence[Sequence[int]] = "SAME",
    form: str | None = None,
) -> Float[Array, "B h w C"]:
    """Convolution of every channel with its own filter (a cross-correlation, as in every deep-learning library).

    Args:
        x: `(B, H, W, C)`.
        kernel: `(kh, kw, 1, C)`, flax's layout for `feature_group_count=C`; the dtype of `x`.
        bias: `(C,)`, the dtype of `x`, or None.
        strides: of the window, one number or `(rows, columns)`.
        padding: zeros around the image. `"SAME"`: as TensorFlow does it, an output of `ceil(size / stride)`,
            the odd zero at the bottom and right; a number for every side; or
            `((top, bottom), (left, right))`.
        form: None takes the faster one for the platform that the program is lowered for. `"conv"` is
            `lax.conv_general_dilated`. `"shift"` is a sum of shifted products, on a CPU many times faster,
            forward and backward; like None it has a gradient of its own, so that forward-mode
            differentiation (`jax.jvp`) raises and wants `form="conv"`.

    Returns:
        `(B, h, w, C)` in the dtype of `x`. The shifted form sums in float32 (float64 for float64).

    Raises:
        TypeError: if the dtypes differ.
        ValueError: for a kernel or bias that does not fit the channels, strides below 1, padding that is
            negative or of another form, an empty output, an unknown form.
    """
    window, pads = _check(x, kernel, bias, strides, padding, form)
    if form == "conv":
        y = _conv(x, kernel, window, pads)
    else:
        y = _depthwise(*compat.match_varying(x, kernel), window, pads, form)
    return y if bias is None else y + bias


def _check(x, kernel, bias, strides, padding, form) -> tuple[tuple[int, int], Pads]:
    """The strides and the padding as pairs, or an error that says what is wrong."""
    if form is not None and form not in FORMS:
        close = difflib.get_close_matches(str(form), FORMS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: None, {', '.join(map(repr, FORMS))}"
        raise ValueError(f"depthwise_conv2d: unknown form {form!r}; {hint}")
    if x.ndim != 4:
        raise ValueError(f"depthwise_conv2d: x must be (B, H, W, C), got shape {x.shape}")
    channels = x.shape[-1]
    if kernel.ndim != 4 or kernel.shape[2:] != (1, channels):
        raise ValueError(
            f"depthwise_conv2d: kernel must be (kh, kw, 1, {channels}) for x of shape {x.shape}, got {kernel.shape}"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"depthwise_conv2d: bias must be ({channels},) for x of shape {x.shape}, got {bias.shape}")
    for name, array in (("kernel", kernel), ("bias", bias)):
        if array is not None and array.dtype != x.dtype:
            raise TypeError(
                f"depthwise_conv2d: {name} is {array.dtype} and x is {x.dtype}; cast them to the same dtype"
            )
    window = (strides, strides) if isinstance(strides, int) else tuple(strides)
    if len(window) != 2 or min(window) < 1:
        raise ValueError(f"depthwise_conv2d: strides must be one or two numbers of at least 1, got {strides!r}")
    size, taps = x.shape[1:3], kernel.shape[:2]
    if padding == "SAME":
        total = [max((math.ceil(n / s) - 1) * s + k - n, 0) for n, s, k in zip(size, window, taps)]
        pads = tuple((t // 2, t - t // 2) for t in total)
    elif isinstance(padding, int):
        pads = ((padding, padding),) * 2
    elif np.shape(padding) == (2, 2):
        pads = tuple(tuple(side) for side in padding)
    else:
        hint = "; did you mean 0?" if padding == "VALID" else ""
        raise ValueError(
            "depthwise_conv2d: padding must be 'SAME', a number or ((top, bottom), (left, right)), "
            f"got {padding!r}{hint}"
        )
    if min(min(side) for side in pads) < 0:
        raise ValueError(f"depthwise_conv2d: padding must not be negative, got {padding!r}")
    if any(k < 1 or n + sum(p) < k for n, p, k in zip(size, pads, taps)):
        raise ValueError(
            f"depthwise_conv2d: a {taps[0]}x{taps[1]} kernel does not fit into {size[0]}x{size[1]} pixels "
            f"with padding {pads}; pad more or use a smaller kernel"
        )
    return window, pads


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _depthwise(x, kernel, strides, pads, form):
    shift = functools.partial(_shift, strides=strides, pads=pads)
    if form == "shift":
        return shift(x, kernel)
    conv = functools.partial(_conv, strides=strides, pads=pads)
    return lax.platform_dependent(x, kernel, cpu=shift, default=conv)


def _forward(x, kernel, strides, pads, form):
    return _depthwise(x, kernel, strides, pads, form), (x, kernel)


def _backward(strides, pads, form, residuals, dy):
    shift = functools.partial(_shift_gradient, strides=strides, pads=pads)
    if form == "shift":
        return shift(*residuals, dy)

    def conv(x, kernel, dy):
        return jax.vjp(functools.partial(_conv, strides=strides, pads=pads), x, kernel)[1](dy)

    return lax.platform_dependent(*residuals, dy, cpu=shift, default=conv)


_depthwise.defvjp(_forward, _backward)


def _conv(x, kernel, strides, pads):
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


# Four facts about XLA's CPU compiler shape what follows (jax 0.10 and 0.12; where a GELU comes before or a layer
# norm behind the convolution, each costs a factor of 2 or more if ignored):
# - Padding every product instead of the image saves a copy, but lets it pull whatever made the image into
#   every one of the products. So the image is padded first.
# - The middle tap, a slice that is the unpadded image again, is read from there, and if that is elementwise
#   work, the work is done again, badly vectorized, in the loop over the taps. Hence the barrier in `_pad`.
# - Elementwise work around a matrix product or a reduction goes to YNNPACK, taps included, for which it then
#   copies out every tap. A slice ends such a group, so one row too many is computed and cut off.
# - A reduction to one number per channel runs channel by channel; see `_kernel_gradient`.
#
# The functions are jitted so that the many products are traced once for all layers of one shape.


@functools.partial(jax.jit, static_argnames=("strides", "pads"))
def _shift(x, kernel, strides, pads):
    spans = zip(x.shape[1:3], kernel.shape, strides, pads)
    height, width = ((n + sum(pad) - k) // s + 1 for n, k, s, pad in spans)
    size = (height + 1, width)
    padded = _pad_for(x, kernel, size, strides, pads)
    return _window(_correlate(padded, kernel, size, strides), (0, 0), (height, width))


@functools.partial(jax.jit, static_argnames=("strides", "pads"))
def _shift_gradient(x, kernel, dy, strides, pads):
    batch, *extent, channels = x.shape
    starts, out = [lo for lo, _ in pads], dy.shape[1:3]

    # Per axis, with i = stride * m + r: row stride * u + r of the padded image's gradient is the sum over m of
    # dy[u - m] * kernel[stride * m + r], for every remainder r a correlation of stride 1 with a flipped part
    # of the kernel. The image's own rows lie between u = first and u = last.
    first = [lo // s for lo, s in zip(starts, strides)]
    last = [(lo + n - 1) // s for lo, n, s in zip(starts, extent, strides)]
    size = (last[0] - first[0] + 2, last[1] - first[1] + 1)
    reach = [(k - 1) // s for k, s in zip(kernel.shape, strides)]
    margins = [(m - a, a + rows - n) for m, a, rows, n in zip(reach, first, size, out)]
    dy_padded = _pad(dy, margins)
    parts = []
    for row, column in np.ndindex(*strides):
        part = kernel[row :: strides[0], column :: strides[1]][::-1, ::-1]
        offset = tuple(m + 1 - k for m, k in zip(reach, part.shape))
        parts.append(_correlate(dy_padded, part, size, offset=offset))
    dx = jnp.stack(parts).reshape(*strides, batch, *size, channels).transpose(2, 3, 0, 4, 1, 5)
    dx = dx.reshape(batch, size[0] * strides[0], size[1] * strides[1], channels)
    dx = _window(dx, [lo - s * a for lo, s, a in zip(starts, strides, first)], extent)

    if min(min(side) for side in margins) >= 0:
        # A copy of dy that exists anyway: whatever made dy is then not repeated for every row of taps.
        dy = _window(dy_padded, [lo for lo, _ in margins], out)
    return dx, _kernel_gradient(x, kernel, dy, strides, pads).astype(kernel.dtype)


def _kernel_gradient(x, kernel, dy, strides, pads):
    """Sums of `x * dy` over batch, rows and columns, one for every tap: `(kh, kw, 1, C)`, not yet cast.

    One reduction over all three axes would run channel by channel, with a stride of C. So rows are first
    folded, a few at a time, which the compiler unrolls and vectorizes over the channels provided that several
    sums are folded at once; the rest is a product with ones.
    """
    acc = accumulator_dtype(x.dtype)
    kh, kw, _, channels = kernel.shape
    batch, height, width, _ = dy.shape
    rows, fold = _fold(height)
    padded = _pad_for(x, kernel, (rows, width), strides, pads)
    dy = _pad(dy, ((0, rows - height), (0, 0))).astype(acc)
    ones = jnp.ones((batch, 1, rows // fold * width), acc)
    sums = []
    for i in range(kh):
        for columns in np.array_split(np.arange(kw), -(-kw // TAPS_PER_LOOP)):
            products = [_window(padded, (i, int(j)), (rows, width), strides).astype(acc) * dy for j in columns]
            products = [p.reshape(batch, fold, rows // fold, width, channels) for p in products]
            for folded in _sum_together(products, axis=1):
                rest = folded.reshape(batch, -1, channels)
                sums.append(jnp.matmul(ones, rest, precision=lax.Precision.HIGHEST))
    # The batch comes last, once for all taps: where it is sharded this is the one exchange between devices.
    return jnp.concatenate(sums, axis=1).sum(0).reshape(kernel.shape)


def _fold(rows: int) -> tuple[int, int]:
    """How many rows to pad to, and the divisor of that number by which to fold them."""
    if rows <= MAX_FOLD:
        return rows, rows
    padded, fold = min((-(-rows // fold) * fold, -fold) for fold in range(MAX_FOLD // 2, MAX_FOLD + 1))
    return padded, -fold


def _sum_together(arrays, axis: int):
    zeros = [jnp.zeros((), a.dtype) for a in arrays]
    return lax.reduce(arrays, zeros, lambda a, b: [p + q for p, q in zip(a, b)], (axis,))


def _correlate(padded, kernel, size, strides=(1, 1), offset=(0, 0)):
    """The sum over the taps of window times tap, taken in the accumulator's dtype."""
    acc = accumulator_dtype(padded.dtype)
    products = [
        _window(padded, (offset[0] + i, offset[1] + j), size, strides).astype(acc) * kernel[i, j, 0].astype(acc)
        for i, j in np.ndindex(*kernel.shape[:2])
    ]
    if not products:  # a stride larger than the kernel: no tap reads these rows
        return jnp.zeros((padded.shape[0], *size, padded.shape[-1]), padded.dtype)
    return functools.reduce(jnp.add, products).astype(padded.dtype)


def _window(x, start, size, strides=(1, 1)):
    """`size` rows and columns of `x`, `strides` apart."""
    stop = [a + (n - 1) * s + 1 for a, n, s in zip(start, size, strides)]
    return lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *strides, 1))


def _pad_for(x, kernel, size, strides, pads):
    """`x` with exactly the zeros around it that an output of `size` reads."""
    spans = zip(x.shape[1:3], kernel.shape, strides, pads, size)
    return _pad(x, [(lo, (n - 1) * s + k - lo - extent) for extent, k, s, (lo, _), n in spans])


def _pad(x, margins):
    """Zeros around rows and columns; a negative margin crops."""
    if not any(any(side) for side in margins):
        return x
    config = [(0, 0, 0), *((lo, hi, 0) for lo, hi in margins), (0, 0, 0)]
    return lax.optimization_barrier(lax.pad(x, jnp.zeros((), x.dtype), config))
