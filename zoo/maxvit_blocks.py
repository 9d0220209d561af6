"""The parts of a MaxViT: stem, attention in windows and grids, and the block (arXiv:2204.01697, section 3)."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Float

from kernels import window_attention
from kernels.window import Partition
from zoo.layers import (
    BatchNorm,
    Conv,
    DropPath,
    Dtype,
    LayerNorm,
    Linear,
    Mlp,
    exact_gelu,
    normal02_init,
    tanh_gelu,
)
from zoo.mbconv import MBConv
from zoo.relative_bias import RelativeBiasMlp, expand_table
from zoo.watch import WindowMap, watched


@dataclasses.dataclass(frozen=True)
class Design:
    """What the official models and timm's own do differently.

    Attributes:
        conv_bias: whether the stem's convolutions, the shortcuts and MBConv's last projection have a bias.
        conv_padding: of the 3x3 convolutions, `"SAME"` or zeros on every side.
        conv_activation, mlp_activation: of stem and MBConv, and of the MLPs.
        expand_input: as in `MBConv`.
        batch_norm_epsilon, batch_norm_momentum, layer_norm_epsilon: as `BatchNorm` and `LayerNorm` have them.
    """

    conv_bias: bool
    conv_padding: int | Literal["SAME"]
    conv_activation: Callable[[Array], Array]
    mlp_activation: Callable[[Array], Array]
    expand_input: bool
    batch_norm_epsilon: float
    batch_norm_momentum: float
    layer_norm_epsilon: float


DESIGNS = {
    "official": Design(
        conv_bias=True,
        conv_padding="SAME",
        conv_activation=tanh_gelu,
        mlp_activation=tanh_gelu,
        expand_input=False,
        batch_norm_epsilon=1e-3,
        batch_norm_momentum=0.99,
        layer_norm_epsilon=1e-5,
    ),
    "timm": Design(
        conv_bias=False,
        conv_padding=1,
        conv_activation=jax.nn.silu,
        mlp_activation=exact_gelu,
        expand_input=True,
        batch_norm_epsilon=1e-5,
        batch_norm_momentum=0.9,
        layer_norm_epsilon=1e-6,
    ),
}


@dataclasses.dataclass(frozen=True)
class AttentionFields:
    """What all attention blocks of a model share; see `MaxViT`."""

    design: Design
    head_dim: int
    window: tuple[int, int]
    mlp_ratio: float
    relative_bias: Literal["table", "mlp"]
    layer_scale: float | None
    implementation: str | tuple[str, ...] | None


class RelativeAttention(nn.Module):
    """Multi-head attention inside windows or grids with a bias for every offset (section 3.1)."""

    shared: AttentionFields
    partition: Partition
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B H W C"]:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        c, window = x.shape[-1], self.shared.window
        heads = c // self.shared.head_dim
        if self.shared.relative_bias == "mlp":
            table = RelativeBiasMlp(heads, window, name="relative_bias", **like)(train)
        else:
            shape = (heads, *(2 * side - 1 for side in window))
            table = self.param("relative_position_bias_table", normal02_init, shape, self.param_dtype)
        watching = watched(self)
        out = window_attention(
            Linear(3 * c, name="qkv", **like)(x),
            num_heads=heads,
            window=window,
            partition=self.partition,
            bias=expand_table(table),
            implementation=self.shared.implementation,
            return_weights=watching,
        )
        if watching:
            out, weights = out
            self.sow("attention", "map", WindowMap(weights, x.shape[1:3], window, self.partition))
        return Linear(c, name="proj", **like)(out)


class AttentionBlock(nn.Module):
    """Norm, attention, norm, MLP, each pair with a shortcut (section 3.2)."""

    shared: AttentionFields
    partition: Partition
    drop_path: float
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B H W C"]:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        design, c = self.shared.design, x.shape[-1]

        def norm(name, x):
            return LayerNorm(epsilon=design.layer_norm_epsilon, name=name, **like)(x)

        def add(x, branch, name):
            if self.shared.layer_scale is not None:
                init = initializers.constant(self.shared.layer_scale)
                branch = branch * self.param(name, init, (c,), self.param_dtype).astype(branch.dtype)
            return x + DropPath(self.drop_path)(branch, train)

        attention = RelativeAttention(self.shared, self.partition, name="attention", **like)
        x = add(x, attention(norm("norm1", x), train), "layer_scale1")
        mlp = Mlp(int(self.shared.mlp_ratio * c), design.mlp_activation, name="mlp", **like)
        return add(x, mlp(norm("norm2", x)), "layer_scale2")


class Block(nn.Module):
    """MBConv, block attention, grid attention (figure 2); all five residual branches share a drop rate."""

    shared: AttentionFields
    features: int
    strides: int
    drop_path: float
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w D"]:
        like = dict(drop_path=self.drop_path, dtype=self.dtype, param_dtype=self.param_dtype)
        design = self.shared.design
        x = MBConv(
            self.features,
            self.strides,
            expand_input=design.expand_input,
            padding=design.conv_padding,
            activation=design.conv_activation,
            use_bias=design.conv_bias,
            epsilon=design.batch_norm_epsilon,
            momentum=design.batch_norm_momentum,
            name="mbconv",
            **like,
        )(x, train)
        x = AttentionBlock(self.shared, "block", name="block", **like)(x, train)
        return AttentionBlock(self.shared, "grid", name="grid", **like)(x, train)


class Stem(nn.Module):
    """Two 3x3 convolutions, the first one strided and followed by norm and activation, the second by nothing."""

    features: tuple[int, int]
    strides: int
    design: Design
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w D"]:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        design = self.design
        conv = dict(padding=design.conv_padding, use_bias=design.conv_bias, **like)
        conv |= dict(kernel_init=normal02_init, bias_init=initializers.zeros)
        norm = BatchNorm(epsilon=design.batch_norm_epsilon, momentum=design.batch_norm_momentum, name="norm1", **like)
        x = Conv(self.features[0], 3, self.strides, name="conv1", **conv)(x)
        x = design.conv_activation(norm(x, train))
        return Conv(self.features[1], 3, name="conv2", **conv)(x)
