"""BiFormer's attention modules: routed, plain, and what stands in for them (arXiv:2303.08810, section 3.2).

Follows the official code (github.com/rayleizhu/BiFormer), in which there are two forms of the routed attention that
differ where the map does not divide into regions: `ops/bra_legacy.py`, of all released weights but one, and
`ops/bra_nchw.py`.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import attention, bilevel_attention, region_descriptors, route_regions
from kernels.bilevel import KvDownsampleMode, pooled_region
from zoo.layers import DepthwiseConv, Dtype, Linear
from zoo.watch import DenseMap, RoutedMap, watched

RoutingCode = Literal["legacy", "nchw"]
# Stages of plain attention have eight heads, whatever `head_dim` says.
PLAIN_HEADS = 8


class RoutedAttention(nn.Module):
    """Bi-level routing attention with a depthwise convolution of the values, LePE, beside it (section 3.2).

    Logits are scaled by the width of all heads together, `C ** -0.5`, in the router and in the attention.

    Attributes:
        n_win: regions along a side of the map; the code `"nchw"` rounds their size down, and where that leaves
            tokens over it makes more regions.
        topk: regions that each region attends to.
        auto_pad: of the code `"legacy"`, fill the map up with zeros before the projection, so that the filled tokens'
            queries, keys and values are the projection's bias, and take part in everything.
    """

    num_heads: int
    n_win: int
    topk: int
    side_dwconv: int = 5
    code: RoutingCode = "legacy"
    kv_downsample_mode: KvDownsampleMode = "identity"
    kv_per_win: int | None = None
    kv_downsample_ratio: int | None = None
    soft_routing: bool = False
    diff_routing: bool = False
    param_routing: bool = False
    auto_pad: bool = False
    implementation: str | tuple[str, ...] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        h, w, c = x.shape[1:]
        if self.auto_pad:
            x = jnp.pad(x, ((0, 0), (0, -h % self.n_win), (0, -w % self.n_win), (0, 0)))
        region = (x.shape[1] // self.n_win, x.shape[2] // self.n_win)
        qkv = Linear(3 * c, name="qkv", **like)(x)

        query, key = jnp.split(region_descriptors(qkv[..., : 2 * c], region), 2, axis=-1)
        if self.param_routing:
            # The router chooses: its products are as exact as those of `route_regions`.
            with jax.default_matmul_precision("highest"):
                embed = Linear(c, name="router", dtype=query.dtype, param_dtype=self.param_dtype)
                query, key = embed(query), embed(key)
        indices, route_weights = route_regions(query, key, k=self.topk, differentiable=self.diff_routing)
        pool = dict(
            kv_downsample_mode=self.kv_downsample_mode,
            kv_per_win=self.kv_per_win,
            kv_downsample_ratio=self.kv_downsample_ratio,
        )
        options = dict(
            num_heads=self.num_heads,
            region=region,
            pad="zeros" if self.code == "nchw" else None,
            route_weights=route_weights if self.soft_routing else None,
            **pool,
        )
        if watched(self):
            out, weights = bilevel_attention(qkv, indices, implementation="xla", return_weights=True, **options)
            grid = tuple(-(-side // r) for side, r in zip(x.shape[1:3], region))
            keys = pooled_region(region, **pool)
            self.sow("attention", "map", RoutedMap(weights, indices, (h, w), grid, region, keys))
        else:
            out = bilevel_attention(qkv, indices, implementation=self.implementation, **options)
        if self.side_dwconv:
            out = out + DepthwiseConv(self.side_dwconv, name="lepe", **like)(qkv[..., 2 * c :])
        return Linear(c, name="proj", **like)(out[:, :h, :w])


class PlainAttention(nn.Module):
    """Attention of all tokens to all, eight heads, without a bias on queries, keys and values.

    Attributes:
        lepe: what the depthwise convolution beside it reads: the input `"x"` (top-k code -2), the values `"v"`
            (code -1 of `"nchw"`), or None for no such convolution (code -1).
    """

    lepe: Literal["x", "v"] | None
    side_dwconv: int = 5
    implementation: str | tuple[str, ...] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        b, h, w, c = x.shape
        qkv = Linear(3 * c, use_bias=False, name="qkv", **like)(x)
        heads = (b, h * w, PLAIN_HEADS, c // PLAIN_HEADS)
        query, key, value = (part.reshape(heads) for part in jnp.split(qkv, 3, axis=-1))
        if watched(self):
            out, weights = attention(query, key, value, implementation="xla", return_weights=True)
            self.sow("attention", "map", DenseMap(weights, (h, w)))
        else:
            out = attention(query, key, value, implementation=self.implementation)
        out = out.reshape(b, h, w, c)
        if self.lepe and self.side_dwconv:
            read = x if self.lepe == "x" else qkv[..., 2 * c :]
            out = out + DepthwiseConv(self.side_dwconv, name="lepe", **like)(read)
        return Linear(c, name="proj", **like)(out)


class ConvStandIn(nn.Module):
    """What stands where attention was, top-k code 0: a depthwise convolution between two linear layers."""

    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        c = x.shape[-1]
        mixed = DepthwiseConv(5, name="mix", **like)(Linear(c, name="qkv", **like)(x))
        return Linear(c, name="proj", **like)(mixed)
