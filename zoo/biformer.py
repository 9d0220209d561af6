"""BiFormer: vision transformers with bi-level routing attention (Zhu et al., CVPR 2023, arXiv:2303.08810).

Regions of the feature map choose the regions that they attend to. Follows the official code
(github.com/rayleizhu/BiFormer).
"""

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.bilevel import KvDownsampleMode
from zoo.biformer_attention import PLAIN_HEADS, ConvStandIn, PlainAttention, RoutedAttention, RoutingCode
from zoo.biformer_weights import KEY_MAPS, PRETRAINED
from zoo.image_model import ImageModel, layers_of
from zoo.layers import (
    BatchNorm,
    Conv,
    DepthwiseConv,
    DropPath,
    Dtype,
    LayerNorm,
    Linear,
    Mlp,
    PatchEmbed,
    PatchMerge,
    exact_gelu,
    mean_of_tokens,
    rematerialize,
)
from zoo.registry import Family, register


class Block(nn.Module):
    """Position encoding, attention, MLP (figure 3).

    The position encoding is a depthwise convolution added to its input; stochastic depth spares it.
    """

    attention: nn.Module
    drop_path: float
    mlp_ratio: float
    position_conv: bool
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B H W C"]:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        if self.position_conv:
            x = x + DepthwiseConv(3, name="pos_embed", **like)(x)
        attended = self.attention(LayerNorm(epsilon=1e-6, name="norm1", **like)(x))
        x = x + DropPath(self.drop_path)(attended, train)
        normed = LayerNorm(epsilon=1e-6, name="norm2", **like)(x)
        hidden = Mlp(int(self.mlp_ratio * x.shape[-1]), name="mlp", **like)(normed)
        return x + DropPath(self.drop_path)(hidden, train)


class Stem(nn.Module):
    """Two overlapping convolutions with a norm each and a GELU between them."""

    features: int
    strides: tuple[int, int]
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w D"]:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = Conv(self.features // 2, 3, self.strides[0], 1, name="conv1", **like)(x)
        x = exact_gelu(BatchNorm(name="norm1", **like)(x, train))
        x = Conv(self.features, 3, self.strides[1], 1, name="conv2", **like)(x)
        return BatchNorm(name="norm2", **like)(x, train)


class Downsample(nn.Module):
    """An overlapping convolution of stride 2, then a norm."""

    features: int
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w D"]:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = Conv(self.features, 3, 2, 1, name="conv", **like)(x)
        return BatchNorm(name="norm", **like)(x, train)


class BiFormer(ImageModel):
    """BiFormer.

    The released models take sides that are multiples of 112, so that every routed stage divides into regions; with
    `auto_pad` any size, and with the code `"nchw"` any whose routed maps have at least `n_win` tokens a side.

    Attributes, beside those of every image model:
        dims: channels of every stage.
        head_dim: channels of a head in routed stages.
        topks: what the blocks of every stage are. A positive number: routed attention to so many regions; -1: plain
            attention (with LePE under the code `"nchw"`); -2: plain attention with LePE read from its input; 0: a
            convolution.
        n_win: regions along a side of the map in routed stages.
        mlp_ratio: hidden width of an MLP over its input width.
        side_dwconv: side of the LePE kernel; 0 leaves it out.
        stem_strides: of the two convolutions of the stem.
        swin_layout: Swin-T's stem and downsampling, without position convolutions (the models STL).
        code: `"legacy"` or `"nchw"`, which of the official attention codes to follow.
        kv_downsample_mode: how regions' keys and values are pooled, see `kernels.bilevel_attention`.
        kv_per_wins, kv_downsample_ratios: one entry per stage for the modes that need it; those of stages that are
            not routed are not looked at.
        soft_routing: scale the chosen keys and values by the router's softmax.
        diff_routing: let the gradient through the router; wants `soft_routing`.
        param_routing: a linear layer on the regions' descriptors; wants `diff_routing`.
        auto_pad: fill up maps that do not divide into regions.
    """

    depths: tuple[int, ...] = (2, 2, 8, 2)
    dims: tuple[int, ...] = (64, 128, 256, 512)
    head_dim: int = 32
    topks: tuple[int, ...] = (1, 4, 16, -2)
    n_win: int = 7
    mlp_ratio: float = 3.0
    side_dwconv: int = 5
    stem_strides: tuple[int, int] = (2, 2)
    swin_layout: bool = False
    code: RoutingCode = "legacy"
    kv_downsample_mode: KvDownsampleMode = "identity"
    kv_per_wins: tuple[int, ...] | None = None
    kv_downsample_ratios: tuple[int, ...] | None = None
    soft_routing: bool = False
    diff_routing: bool = False
    param_routing: bool = False
    auto_pad: bool = False

    @property
    def feature_info(self) -> tuple[tuple[int, int], ...]:
        """Channels and total stride of every stage's output."""
        return tuple((dim, math.prod(self.stem_strides) * 2**i) for i, dim in enumerate(self.dims))

    @property
    def _routed_side(self) -> int:
        """A side of the image that gives the last routed stage one token per region."""
        strides = [stride for (_, stride), topk in zip(self.feature_info, self.topks) if topk > 0]
        return self.n_win * strides[-1] if strides else 1

    @property
    def size_multiple(self) -> tuple[int, int]:
        """What heights and widths must be multiples of."""
        return (1, 1) if self.auto_pad or self.code == "nchw" else (self._routed_side,) * 2

    @property
    def least_size(self) -> tuple[int, int]:
        """The smallest height and width that the model takes."""
        least = 1 if self.auto_pad else self._routed_side
        # Patches that do not overlap need their whole stride, other convolutions a single pixel.
        return (max(least, self.feature_info[-1][1] if self.swin_layout else 1),) * 2

    def _check(self):
        lengths = {name: len(getattr(self, name)) for name in ("depths", "dims", "topks")}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"depths, dims and topks must be as long as one another, got {lengths}")
        if self.code not in ("legacy", "nchw"):
            raise ValueError(f"code must be 'legacy' or 'nchw', got {self.code!r}")
        for topk, dim in zip(self.topks, self.dims):
            if topk < -2 or (self.code == "nchw" and topk in (0, -2)):
                known = "positive or -1" if self.code == "nchw" else "positive, 0, -1 or -2"
                raise ValueError(f"topks must be {known} for code={self.code!r}, got {topk} in {self.topks}")
            if topk > self.n_win**2:
                raise ValueError(f"topks must not exceed n_win ** 2 = {self.n_win**2} regions, got {topk}")
            width = self.head_dim if topk > 0 else PLAIN_HEADS
            if topk and dim % width:
                what = f"head_dim={width}" if topk > 0 else f"the {width} heads of plain attention"
                raise ValueError(f"dims must be multiples of {what} where topks is {topk}, got {dim}")
        if self.diff_routing and not self.soft_routing:
            raise ValueError("diff_routing without soft_routing is not defined; set soft_routing=True as well")
        if self.param_routing and not self.diff_routing:
            raise ValueError("param_routing would get no gradient; set diff_routing=True and soft_routing=True as well")
        if self.code == "nchw":
            for name, plain in (("auto_pad", False), ("soft_routing", False), ("kv_downsample_mode", "identity")):
                if getattr(self, name) != plain:
                    why = "which pads by itself; leave it out" if name == "auto_pad" else "use code='legacy'"
                    raise ValueError(f"{name}={getattr(self, name)!r} does not go with code='nchw', {why}")

    def _attention(self, stage: int) -> nn.Module:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        topk = self.topks[stage]
        if topk == 0:
            return ConvStandIn(parent=None, **like)
        common = dict(side_dwconv=self.side_dwconv, implementation=self.implementation, parent=None, **like)
        if topk < 0:
            return PlainAttention("v" if self.code == "nchw" else {-1: None, -2: "x"}[topk], **common)
        return RoutedAttention(
            num_heads=self.dims[stage] // self.head_dim,
            n_win=self.n_win,
            topk=topk,
            code=self.code,
            kv_downsample_mode=self.kv_downsample_mode,
            kv_per_win=self.kv_per_wins and self.kv_per_wins[stage],
            kv_downsample_ratio=self.kv_downsample_ratios and self.kv_downsample_ratios[stage],
            soft_routing=self.soft_routing,
            diff_routing=self.diff_routing,
            param_routing=self.param_routing,
            auto_pad=self.auto_pad,
            **common,
        )

    def setup(self):
        self._check()
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        rates = iter(self.drop_path_rates())
        if self.swin_layout:
            self.stem = PatchEmbed(self.dims[0], math.prod(self.stem_strides), **like)
        else:
            self.stem = Stem(self.dims[0], self.stem_strides, **like)
        downsample = PatchMerge if self.swin_layout else Downsample
        self.downsamples = [downsample(dim, **like) for dim in self.dims[1:]]
        block = rematerialize(Block, self.remat, static_argnums=(2,))
        self.stages = [
            [block(self._attention(i), next(rates), self.mlp_ratio, not self.swin_layout, **like) for _ in range(depth)]
            for i, depth in enumerate(self.depths)
        ]
        if not self.features_only:
            self.head_norm = BatchNorm(**like)
            if self.num_classes:
                self.head = Linear(self.num_classes, **like)

    def forward_head(
        self, features: Float[Array, "B h w D"], train: bool = False, pre_logits: bool = False
    ) -> Float[Array, "B out"]:
        """Norm, mean over the tokens, classifier: `(B, num_classes)`, or `(B, dims[-1])` without it."""
        pooled = mean_of_tokens(self.head_norm(features, train))
        return self.head(pooled) if self.num_classes and not pre_logits else pooled


_SMALL = dict(depths=(4, 4, 18, 4))
_WIDE = dict(dims=(96, 192, 384, 768))
_STL = dict(_WIDE, depths=(2, 2, 6, 2), mlp_ratio=4.0, swin_layout=True)

VARIANTS = {
    "biformer_tiny": dict(),
    "biformer_small": _SMALL,
    "biformer_base": {**_SMALL, **_WIDE},
    "biformer_stl": _STL,
    "biformer_stl_nchw": dict(_STL, code="nchw", topks=(1, 4, 16, -1)),
    # Ours, for images of 8 to 64 pixels: full resolution in the first stage, 4 x 4 regions.
    "biformer_nano": dict(
        depths=(1, 1),
        dims=(32, 64),
        topks=(4, -2),
        n_win=4,
        stem_strides=(1, 1),
        num_classes=10,
        image_size=8,
    ),
}

# Matrices are split over `fsdp` on the side of the residual stream and over `tensor` on the other. The router's
# logits are sums over the channels of all heads, so its layer gives every device of `tensor` all of them.
SHARDING_RULES = (
    (r".*/(qkv|fc1)/kernel", ("fsdp", "tensor")),
    (r".*/(proj|fc2)/kernel", ("tensor", "fsdp")),
    (r".*/router/kernel", ("tensor", "fsdp")),
    (r"params/head/kernel", ("fsdp", "tensor")),
    (r".*/(qkv|fc1)/bias", ("tensor",)),
    (r"params/head/bias", ("tensor",)),
    (r"params/(stem/conv\d?|downsamples_\d+/conv)/kernel", (None, None, None, "fsdp")),
    (r".*/(pos_embed|lepe|mix)/kernel", (None, None, None, "fsdp")),
    (r".*/(bias|scale|mean|var)", (None,)),
)


register(
    Family(
        name="biformer",
        module=BiFormer,
        variants=VARIANTS,
        pretrained=PRETRAINED,
        key_maps=KEY_MAPS,
        sharding_rules=SHARDING_RULES,
        layers=layers_of,
        evaluated="raw",
    )
)
