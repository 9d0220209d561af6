"""Layers that several models share. Each owns parameters and names; the arithmetic is plain jax."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Float

from kernels import depthwise_conv2d
from kernels.dense import accumulator_dtype

Dtype = Any
Initializer = Callable[..., Any]
Remat = Literal["none", "full", "dots"]

# torch's default for convolutions: uniform within 1 / sqrt(fan_in).
torch_conv_init = initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# timm's trunc_normal_(std=.02) cuts at +-2, a hundred standard deviations out: a plain normal.
normal02_init = initializers.normal(0.02)
# flax's defaults are epsilon 1e-6 and the variance E[x^2] - E[x]^2, which cancels where the mean is large.
LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)


def exact_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """GELU, `x` times the normal distribution's share below `x`, with the error function and not its tanh form.

    Written with erf as torch does it, in float32 (float64 for float64). `jax.nn.gelu` takes erfc, which is exact also
    in the tail, where `x` below -3 comes out below 0.005, and costs a CPU three times as much.

    Source: Hendrycks and Gimpel (arXiv:1606.08415), section 2.
    """
    wide = x.astype(accumulator_dtype(x.dtype))
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def tanh_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """GELU in its tanh form, an approximation within 5e-4 of `exact_gelu`; some checkpoints are trained with it."""
    return jax.nn.gelu(x, approximate=True)


def torch_bias_init(fan_in: int) -> Initializer:
    """torch's default for the bias of a convolution: uniform within `1 / sqrt(fan_in)`."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def rematerialize(block: type[nn.Module], remat: Remat, *, static_argnums: tuple[int, ...] = ()):
    """A block class that recomputes its activations in the backward pass.

    Args:
        block: the module class.
        remat: `"none"` keeps everything, `"full"` keeps the block's input only, `"dots"` also keeps the
            results of matrix products without batch dimensions.
        static_argnums: positions, `self` being 0, of arguments of `__call__` that are not arrays.
    """
    policies = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    if remat == "none":
        return block
    if remat not in policies:
        raise ValueError(f"remat must be 'none', 'full' or 'dots', got {remat!r}")
    return nn.remat(block, policy=policies[remat], static_argnums=static_argnums)


class Linear(nn.Module):
    """`x @ kernel + bias` over the last axis; `kernel` is `(in, features)`.

    Leading axes are folded into one: with more of them the CPU's gradient is several times slower.
    """

    features: int
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = normal02_init
    bias_init: Initializer = initializers.zeros

    @nn.compact
    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = x.reshape(-1, x.shape[-1]) @ kernel
        if bias is not None:
            y = y + bias
        return y.reshape(*x.shape[:-1], self.features)


class Conv(nn.Module):
    """Two-dimensional convolution; padding, bias and initial values are torch's unless told otherwise.

    Attributes:
        features: output channels.
        kernel_size, strides: side lengths in pixels, one number or (rows, columns).
        padding: zeros on every side, or `"SAME"` as TensorFlow means it: the odd zero at the bottom and right.
        use_bias: whether there is one.
        kernel_init, bias_init: initial values; None for the bias takes torch's.
    """

    features: int
    kernel_size: int | tuple[int, int]
    strides: int | tuple[int, int] = 1
    padding: int | Literal["SAME"] = 0
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = torch_conv_init
    bias_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w out"]:
        k, s, c = _pair(self.kernel_size), _pair(self.strides), x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (*k, c, self.features), self.param_dtype)
        bias = None
        if self.use_bias:
            bias_init = self.bias_init or torch_bias_init(k[0] * k[1] * c)
            bias = self.param("bias", bias_init, (self.features,), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        if k == s and self.padding == 0:
            y = _patchwise(x, kernel)
        else:
            pad = self.padding if self.padding == "SAME" else ((self.padding, self.padding),) * 2
            y = jax.lax.conv_general_dilated(x, kernel, s, pad, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y if bias is None else y + bias


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _patchwise(x, kernel):
    """A convolution whose patches do not overlap: one matrix product, several times faster on a CPU."""
    b, h, w, c = x.shape
    kh, kw, _, features = kernel.shape
    rows, cols = h // kh, w // kw
    x = x[:, : rows * kh, : cols * kw].reshape(b, rows, kh, cols, kw, c).transpose(0, 1, 3, 2, 4, 5)
    return (x.reshape(-1, kh * kw * c) @ kernel.reshape(-1, features)).reshape(b, rows, cols, features)


class DepthwiseConv(nn.Module):
    """Depthwise convolution; `kernel` is `(kh, kw, 1, C)`.

    Attributes:
        kernel_size, strides: side lengths in pixels, one number or (rows, columns).
        padding: None for `kernel_size // 2` zeros on every side, which keeps the size of an odd kernel; else as
            `kernels.depthwise_conv2d` takes it.
        use_bias: whether there is one.
        kernel_init, bias_init: initial values; None for the bias takes torch's.
    """

    kernel_size: int | tuple[int, int]
    strides: int | tuple[int, int] = 1
    padding: int | str | tuple[tuple[int, int], tuple[int, int]] | None = None
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = torch_conv_init
    bias_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        (kh, kw), c = _pair(self.kernel_size), x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (kh, kw, 1, c), self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init or torch_bias_init(kh * kw), (c,), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        padding = ((kh // 2, kh // 2), (kw // 2, kw // 2)) if self.padding is None else self.padding
        return depthwise_conv2d(x, kernel, bias, strides=self.strides, padding=padding)


class BatchNorm(nn.BatchNorm):
    """Batch normalisation over all axes but the last; in training the batch is that of all devices.

    The running average keeps `momentum` of the old value: torch's momentum of 0.1 is 0.9 here. Of the variance
    it takes the biased estimate, as TensorFlow does. Statistics are float32, or float64 where the parameters are.
    """

    epsilon: float = 1e-5
    momentum: float = 0.9
    # flax's default, E[x^2] - E[x]^2, cancels where the mean is large.
    use_fast_variance: bool = False

    def __post_init__(self):
        if self.param_dtype == jnp.float64:
            self.force_float32_reductions = False
        super().__post_init__()

    def __call__(self, x: Float[Array, "*batch C"], train: bool) -> Float[Array, "*batch C"]:
        return super().__call__(x, use_running_average=not train)


class PatchEmbed(nn.Module):
    """A convolution over patches that do not overlap, then a batch norm.

    What is left over at the bottom and the right is dropped.
    """

    features: int
    patch: int
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = torch_conv_init
    bias_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w D"]:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        init = dict(kernel_init=self.kernel_init, bias_init=self.bias_init)
        x = Conv(self.features, self.patch, self.patch, name="conv", **init, **like)(x)
        return BatchNorm(name="norm", **like)(x, train)


class PatchMerge(nn.Module):
    """A batch norm, then a convolution over patches of 2x2 tokens; an odd row or column at the end is dropped."""

    features: int
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = torch_conv_init
    bias_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w D"]:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        init = dict(kernel_init=self.kernel_init, bias_init=self.bias_init)
        x = BatchNorm(name="norm", **like)(x, train)
        return Conv(self.features, 2, 2, name="conv", **init, **like)(x)


class SqueezeExcite(nn.Module):
    """Scales every channel by a gate that is computed from the means of all channels.

    Source: Hu et al., arXiv:1709.01507, section 3; with the SiLU that EfficientNet has between the two layers.
    """

    hidden: int
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = normal02_init

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=self.kernel_init)
        squeezed = mean_of_tokens(x)
        gate = Linear(x.shape[-1], name="fc2", **like)(jax.nn.silu(Linear(self.hidden, name="fc1", **like)(squeezed)))
        return x * jax.nn.sigmoid(gate)[:, None, None, :]


class Mlp(nn.Module):
    """Linear, activation, Linear, back to the width of the input."""

    hidden: int
    activation: Callable[[Array], Array] = exact_gelu
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        hidden = self.activation(Linear(self.hidden, name="fc1", **like)(x))
        return Linear(x.shape[-1], name="fc2", **like)(hidden)


class DropPath(nn.Module):
    """Stochastic depth: drops a whole sample's residual branch with probability `rate`, else scales it up.

    Draws from the rng stream `"dropout"`, only in training and only for a positive rate.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "B *rest"], train: bool) -> Float[Array, "B *rest"]:
        if not train or self.rate == 0.0:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, shape)
        return jnp.where(keep, x / (1.0 - self.rate), 0)


def pad_to_multiple(x: Float[Array, "B H W C"], multiple: int) -> Float[Array, "B h w C"]:
    """Zeros at the bottom and the right, up to the next multiple of a side length."""
    h, w = x.shape[1:3]
    if h % multiple == 0 and w % multiple == 0:
        return x
    return jnp.pad(x, ((0, 0), (0, -h % multiple), (0, -w % multiple), (0, 0)))


def unit(vectors: Float[Array, "*shape"], axis: int = -1) -> Float[Array, "*shape"]:
    """Vectors of length 1 along an axis, in at least float32; zeros stay zeros, with a finite gradient."""
    vectors = vectors.astype(accumulator_dtype(vectors.dtype))
    square = jnp.square(vectors).sum(axis, keepdims=True)
    # No embedding is as short as this.
    return vectors * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


def mean_of_tokens(x: Float[Array, "B H W C"]) -> Float[Array, "B C"]:
    """Mean over height and width, summed in float32 (float64 for float64)."""
    return x.mean(axis=(1, 2), dtype=accumulator_dtype(x.dtype)).astype(x.dtype)
