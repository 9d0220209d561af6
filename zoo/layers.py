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
        bias = (
            self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        )
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = x.reshape(-1, x.shape[-1]) @ kernel
        if bias is not None:
            y = y + bias
        return y.reshape(*x.shape[:-1], self.features)


class Conv(nn.Module):
    """Two-dimensional convolution with torch's defaults for padding and initial values.

    Attributes:
        features: output channels.
        kernel_size, strides: side lengths in pixels, the same both ways.
        padding: zeros on every side.
    """

    features: int
    kernel_size: int
    strides: int = 1
    padding: int = 0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w out"]:
        k, s, c = self.kernel_size, self.strides, x.shape[-1]
        kernel = self.param("kernel", torch_conv_init, (k, k, c, self.features), self.param_dtype)
        bias = self.param("bias", torch_bias_init(k * k * c), (self.features,), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        if k == s and not self.padding:
            # Patches that do not overlap: one matrix product, several times faster on a CPU.
            b, h, w, _ = x.shape
            x = (
                x[:, : h // k * k, : w // k * k]
                .reshape(b, h // k, k, w // k, k, c)
                .transpose(0, 1, 3, 2, 4, 5)
            )
            y = x.reshape(-1, k * k * c) @ kernel.reshape(-1, self.features)
            return y.reshape(b, h // k, w // k, self.features) + bias
        pad = ((self.padding, self.padding),) * 2
        y = jax.lax.conv_general_dilated(x, kernel, (s, s), pad, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + bias


class DepthwiseConv(nn.Module):
    """Depthwise convolution, stride 1, zero padding that keeps the size; `kernel` is `(k, k, 1, C)`."""

    kernel_size: int
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        k, c = self.kernel_size, x.shape[-1]
        kernel = self.param("kernel", torch_conv_init, (k, k, 1, c), self.param_dtype)
        bias = self.param("bias", torch_bias_init(k * k), (c,), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return depthwise_conv2d(x, kernel, bias, padding=k // 2)


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
