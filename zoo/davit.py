"""DaViT: Dual Attention Vision Transformers (Ding et al., ECCV 2022, arXiv:2204.03645).

Attention inside windows of tokens and attention between channels take turns. Follows the official code
(github.com/dingmyu/davit), which timm's `davit.py` reproduces; also the vision towers of Florence-2
(arXiv:2311.06242), which differ in the window, the downsampling and the channel attention.
"""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import channel_attention, window_attention
from zoo.davit_weights import KEY_MAPS, PRETRAINED
from zoo.image_model import ImageModel, layers_of
from zoo.layers import (
    Conv,
    DepthwiseConv,
    DropPath,
    Dtype,
    LayerNorm,
    Linear,
    Mlp,
    Remat,
    mean_of_tokens,
    pad_to_multiple,
    rematerialize,
)
from zoo.registry import Family, register
from zoo.watch import ChannelMap, WindowMap, watched

ChannelAttentionKind = Literal["davit", "florence2"]


class WindowAttention(nn.Module):
    """Multi-head attention inside windows, no shift, no position bias (section 3.1).

    The map is zero-padded *before* the projection and nothing is masked, so the filled tokens' queries, keys
    and values are the projection's bias, and they take part in the softmax.
    """

    num_heads: int
    window: int
    implementation: str | tuple[str, ...] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        c = x.shape[-1]
        qkv = Linear(3 * c, name="qkv", **like)
        bias = qkv(jnp.zeros((1, c), x.dtype))[0]
        window, watching = (self.window, self.window), watched(self)
        out = window_attention(
            qkv(x),
            num_heads=self.num_heads,
            window=window,
            pad=bias,
            implementation=self.implementation,
            return_weights=watching,
        )
        if watching:
            out, weights = out
            self.sow("attention", "map", WindowMap(weights, x.shape[1:3], window, "block"))
        return Linear(c, name="proj", **like)(out)


class ChannelAttention(nn.Module):
    """Attention between the channels of each group, over all tokens (section 3.3).

    The paper prints softmax(Q^T K / sqrt(d)) V^T; its code, and so every checkpoint, lets *k* ask, *v* be
    matched and *q* be mixed. Florence-2's towers use the printed roles and scale by tokens ** -0.5.
    """

    num_heads: int
    kind: ChannelAttentionKind = "davit"
    implementation: str | tuple[str, ...] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        b, h, w, c = x.shape
        qkv = Linear(3 * c, name="qkv", **like)(x).reshape(b, h * w, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        watching = watched(self)
        how = dict(implementation=self.implementation, return_weights=watching)
        if self.kind == "davit":
            out = channel_attention(k, v, q, **how)
        else:
            out = channel_attention(q, k, v, scale=(h * w) ** -0.5, **how)
        if watching:
            out, weights = out
            magnitude = jnp.sqrt(jnp.square(out).mean(-1)).reshape(b, h, w, self.num_heads)
            self.sow("attention", "map", ChannelMap(weights, magnitude))
        return Linear(c, name="proj", **like)(out.reshape(b, h, w, c))


class Block(nn.Module):
    """Position encoding, attention, position encoding, MLP (figure 3).

    The position encodings are depthwise convolutions added to their input; stochastic depth spares them.
    """

    attention: nn.Module
    drop_path: float
    mlp_ratio: float
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B H W C"]:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = x + DepthwiseConv(3, name="cpe1", **like)(x)
        attended = self.attention(LayerNorm(name="norm1", **like)(x))
        x = x + DropPath(self.drop_path)(attended, train)
        x = x + DepthwiseConv(3, name="cpe2", **like)(x)
        hidden = Mlp(int(self.mlp_ratio * x.shape[-1]), name="mlp", **like)(LayerNorm(name="norm2", **like)(x))
        return x + DropPath(self.drop_path)(hidden, train)


class DualBlock(nn.Module):
    """A spatial block, then a channel block.

    `drop_path` holds the rates of the two.
    """

    num_heads: int
    window: int
    mlp_ratio: float
    drop_path: tuple[float, float]
    channel_attention: ChannelAttentionKind
    remat: Remat = "none"
    implementation: str | tuple[str, ...] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def setup(self):
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        attend = dict(num_heads=self.num_heads, implementation=self.implementation, **like)
        block = rematerialize(Block, self.remat, static_argnums=(2,))
        self.spatial = block(
            WindowAttention(window=self.window, parent=None, **attend),
            self.drop_path[0],
            self.mlp_ratio,
            **like,
        )
        self.channel = block(
            ChannelAttention(kind=self.channel_attention, parent=None, **attend),
            self.drop_path[1],
            self.mlp_ratio,
            **like,
        )

    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B H W C"]:
        return self.channel(self.spatial(x, train), train)


class Stem(nn.Module):
    """Zero padding to a multiple of the stride, an overlapping strided convolution, then the norm."""

    features: int
    kernel_size: int
    strides: int
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w D"]:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = pad_to_multiple(x, self.strides)
        x = Conv(self.features, self.kernel_size, self.strides, self.kernel_size // 2, name="conv", **like)(x)
        return LayerNorm(name="norm", **like)(x)


class Downsample(nn.Module):
    """The norm, then a convolution of stride 2: 2x2 on a map padded to even sizes, or 3x3 with padding 1."""

    features: int
    kernel_size: int
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w D"]:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = LayerNorm(name="norm", **like)(x)
        overlaps = self.kernel_size % 2
        if not overlaps:
            x = pad_to_multiple(x, self.kernel_size)
        return Conv(self.features, self.kernel_size, 2, self.kernel_size // 2 * overlaps, name="conv", **like)(x)


class DaViT(ImageModel):
    """DaViT for images of any height and width.

    Attributes, beside those of every image model:
        depths: dual blocks (a spatial and a channel block each) of every stage.
        dims: channels of every stage.
        num_heads: attention heads, and channel groups, of every stage.
        window: side of an attention window in tokens.
        mlp_ratio: hidden width of an MLP over its input width.
        stem_kernel, stem_strides: of the first convolution.
        down_kernel: 2 or 3, side of the kernel between stages.
        channel_attention: `"davit"`, or `"florence2"` for the roles and scale of Florence-2's towers.
        drop_path_schedule: stochastic depth grows linearly from 0; `"timm"`, both halves of a dual block share a
            rate; `"official"`, rates grow from one half to the next.
    """

    depths: tuple[int, ...] = (1, 1, 3, 1)
    dims: tuple[int, ...] = (96, 192, 384, 768)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    mlp_ratio: float = 4.0
    stem_kernel: int = 7
    stem_strides: int = 4
    down_kernel: int = 2
    channel_attention: ChannelAttentionKind = "davit"
    drop_path_schedule: Literal["timm", "official"] = "timm"

    def drop_path_rates(self) -> list[tuple[float, float]]:
        """The rates of the spatial and the channel half of every dual block, in order."""
        if self.drop_path_schedule == "timm":
            return [(rate, rate) for rate in super().drop_path_rates()]
        if self.drop_path_schedule != "official":
            raise ValueError(f"drop_path_schedule must be 'timm' or 'official', got {self.drop_path_schedule!r}")
        halves = 2 * sum(self.depths)
        rates = [self.drop_path_rate * i / (halves - 1) for i in range(halves)]
        return list(zip(rates[::2], rates[1::2]))

    @property
    def feature_info(self) -> tuple[tuple[int, int], ...]:
        """Channels and total stride of every stage's output."""
        return tuple((dim, self.stem_strides * 2**i) for i, dim in enumerate(self.dims))

    def setup(self):
        if not len(self.depths) == len(self.dims) == len(self.num_heads):
            raise ValueError(
                f"depths, dims and num_heads must be as long as one another, got {len(self.depths)}, "
                f"{len(self.dims)} and {len(self.num_heads)}"
            )
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        rates = iter(self.drop_path_rates())
        self.stem = Stem(self.dims[0], self.stem_kernel, self.stem_strides, **like)
        self.downsamples = [Downsample(dim, self.down_kernel, **like) for dim in self.dims[1:]]
        self.stages = [
            [
                DualBlock(
                    num_heads=heads,
                    window=self.window,
                    mlp_ratio=self.mlp_ratio,
                    drop_path=next(rates),
                    channel_attention=self.channel_attention,
                    remat=self.remat,
                    implementation=self.implementation,
                    **like,
                )
                for _ in range(depth)
            ]
            for depth, heads in zip(self.depths, self.num_heads)
        ]
        if not self.features_only:
            self.head_norm = LayerNorm(**like)
            if self.num_classes:
                self.head = Linear(self.num_classes, **like)

    def forward_head(
        self, features: Float[Array, "B h w D"], train: bool = False, pre_logits: bool = False
    ) -> Float[Array, "B out"]:
        """Mean over the tokens, norm, classifier: `(B, num_classes)`, or `(B, dims[-1])` without it."""
        pooled = self.head_norm(mean_of_tokens(features))
        return self.head(pooled) if self.num_classes and not pre_logits else pooled


_SMALL = dict(depths=(1, 1, 9, 1))
_BASE = dict(_SMALL, dims=(128, 256, 512, 1024), num_heads=(4, 8, 16, 32))
_HUGE = dict(_SMALL, dims=(256, 512, 1024, 2048), num_heads=(8, 16, 32, 64))
_FLORENCE2 = dict(num_classes=0, window=12, down_kernel=3, channel_attention="florence2")

VARIANTS = {
    "davit_tiny": dict(),
    "davit_small": _SMALL,
    "davit_base": _BASE,
    "davit_large": dict(_SMALL, dims=(192, 384, 768, 1536), num_heads=(6, 12, 24, 48)),
    "davit_huge": _HUGE,
    "davit_giant": dict(depths=(1, 1, 12, 3), dims=(384, 768, 1536, 3072), num_heads=(12, 24, 48, 96)),
    "davit_base_fl": {**_BASE, **_FLORENCE2},
    "davit_huge_fl": {**_HUGE, **_FLORENCE2},
    # Ours, for images of 8 to 64 pixels: full resolution in the first stage, windows of 4 x 4.
    "davit_nano": dict(
        depths=(1, 1),
        dims=(32, 64),
        num_heads=(1, 2),
        window=4,
        stem_kernel=3,
        stem_strides=1,
        num_classes=10,
        image_size=8,
    ),
}

# Matrices are split over `fsdp` on the side of the residual stream and over `tensor` on the other.
SHARDING_RULES = (
    (r".*/(qkv|fc1)/kernel", ("fsdp", "tensor")),
    (r".*/(proj|fc2)/kernel", ("tensor", "fsdp")),
    (r"params/head/kernel", ("fsdp", "tensor")),
    (r".*/(qkv|fc1)/bias", ("tensor",)),
    (r"params/head/bias", ("tensor",)),
    (r"params/(stem|downsamples_\d+)/conv/kernel", (None, None, None, "fsdp")),
    (r".*/cpe\d/kernel", (None, None, None, "fsdp")),
    (r".*/(bias|scale)", (None,)),
)


register(
    Family(
        name="davit",
        module=DaViT,
        variants=VARIANTS,
        pretrained=PRETRAINED,
        key_maps=KEY_MAPS,
        sharding_rules=SHARDING_RULES,
        layers=layers_of,
    )
)
