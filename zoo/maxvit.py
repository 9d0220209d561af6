"""MaxViT: Multi-Axis Vision Transformer (Tu et al., ECCV 2022, arXiv:2204.01697).

Every block is an MBConv, attention inside windows of neighbouring tokens, and attention inside grids of tokens that
lie as far apart as the map allows. Follows the official code (github.com/google-research/maxvit), which timm's
`maxvit_*_tf_*` models of `maxxvit.py` reproduce; and timm's own `maxvit_*_rw_*`, designed before that code was out.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.image_model import ImageModel, layers_of
from zoo.layers import LayerNorm, Linear, mean_of_tokens, rematerialize
from zoo.maxvit_blocks import DESIGNS, AttentionFields, Block, Stem
from zoo.maxvit_weights import KEY_MAPS, PRETRAINED
from zoo.registry import Family, register


class MaxViT(ImageModel):
    """MaxViT for images whose sides are multiples of the total stride times the window.

    Attributes, beside those of every image model:
        image_size: also what the window follows from where none is given.
        depths: blocks of every stage.
        dims: channels of every stage.
        head_dim: channels of an attention head; divides `dims`.
        strides: of every stage's first block.
        stem_dims, stem_strides: channels of the stem's two convolutions, and its stride.
        window: side, or (height, width), of an attention window and of a grid, in tokens; None: as large as the last
            stage's map.
        mlp_ratio: hidden width of an MLP over its input width.
        design: `"official"`, or `"timm"` for its own models; see `DESIGNS`.
        relative_bias: `"table"`, or `"mlp"` that computes the table and so knows every window.
        layer_scale: what the factors of the attention blocks' branches start from; None: there are none.
        hidden_head: whether a layer with tanh stands before the classifier; the norm is then behind the mean over
            tokens, else before it.
        drop_path_schedule: stochastic depth grows linearly from 0 for the first block; `"official"`, it would reach
            `drop_path_rate` one block after the last; `"timm"`, with the last.
        norm_momentum: share of the old value that the running statistics of batch norms keep; None: the design's.
    """

    image_size: int | tuple[int, int] | None = 224
    depths: tuple[int, ...] = (2, 2, 5, 2)
    dims: tuple[int, ...] = (64, 128, 256, 512)
    head_dim: int = 32
    strides: tuple[int, ...] = (2, 2, 2, 2)
    stem_dims: tuple[int, int] = (64, 64)
    stem_strides: int = 2
    window: int | tuple[int, int] | None = None
    mlp_ratio: float = 4.0
    design: Literal["official", "timm"] = "official"
    relative_bias: Literal["table", "mlp"] = "table"
    layer_scale: float | None = None
    hidden_head: bool = True
    drop_path_schedule: Literal["official", "timm"] = "official"
    norm_momentum: float | None = None

    @property
    def feature_info(self) -> tuple[tuple[int, int], ...]:
        """Channels and total stride of every stage's output."""
        totals = [self.stem_strides * math.prod(self.strides[: i + 1]) for i in range(len(self.strides))]
        return tuple(zip(self.dims, totals))

    @property
    def window_size(self) -> tuple[int, int]:
        """Height and width of a window and of a grid, in tokens."""
        if self.window is not None:
            return (self.window, self.window) if isinstance(self.window, int) else tuple(self.window)
        sides = self.image_size or 224
        sides = (sides, sides) if isinstance(sides, int) else tuple(sides)
        stride = self.feature_info[-1][1]
        fitting = tuple(max(1, (side + stride // 2) // stride) * stride for side in sides)
        if sides != fitting:
            raise ValueError(
                f"image_size={self.image_size}: where no window is given, both sides must be multiples of {stride}, "
                f"the window being that much smaller; the nearest that fits is {fitting[0]}x{fitting[1]}"
            )
        return sides[0] // stride, sides[1] // stride

    @property
    def size_multiple(self) -> tuple[int, int]:
        """What the images' heights and widths must be multiples of: then every stage divides into windows."""
        stride = self.feature_info[-1][1]
        height, width = self.window_size
        return stride * height, stride * width

    def drop_path_rates(self) -> list[float]:
        """The rate of every block, in order; the official ones stop short of `drop_path_rate`."""
        if self.drop_path_schedule == "timm":
            return super().drop_path_rates()
        if self.drop_path_schedule != "official":
            raise ValueError(f"drop_path_schedule must be 'official' or 'timm', got {self.drop_path_schedule!r}")
        blocks = sum(self.depths)
        return [self.drop_path_rate * i / blocks for i in range(blocks)]

    def setup(self):
        if not len(self.depths) == len(self.dims) == len(self.strides):
            raise ValueError(
                f"depths, dims and strides must be as long as one another, got {len(self.depths)}, "
                f"{len(self.dims)} and {len(self.strides)}"
            )
        if any(dim % self.head_dim for dim in self.dims):
            raise ValueError(f"dims must be multiples of head_dim={self.head_dim}, got {self.dims}")
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        design = DESIGNS[self.design]
        if self.norm_momentum is not None:
            design = dataclasses.replace(design, batch_norm_momentum=self.norm_momentum)
        shared = AttentionFields(
            design,
            self.head_dim,
            self.window_size,
            self.mlp_ratio,
            self.relative_bias,
            self.layer_scale,
            self.implementation,
        )
        rates = iter(self.drop_path_rates())
        block = rematerialize(Block, self.remat, static_argnums=(2,))
        self.stem = Stem(self.stem_dims, self.stem_strides, design, **like)
        self.stages = [
            [block(shared, dim, 1 if j else stride, next(rates), **like) for j in range(depth)]
            for depth, dim, stride in zip(self.depths, self.dims, self.strides)
        ]
        self.downsamples = []
        if not self.features_only:
            self.head_norm = LayerNorm(epsilon=design.layer_norm_epsilon, **like)
            if self.hidden_head:
                self.pre_logits = Linear(self.dims[-1], **like)
            if self.num_classes:
                self.head = Linear(self.num_classes, **like)

    def forward_head(
        self, features: Float[Array, "B h w D"], train: bool = False, pre_logits: bool = False
    ) -> Float[Array, "B out"]:
        """Mean over the tokens, norms, classifier: `(B, num_classes)`, or `(B, dims[-1])` without it."""
        if self.hidden_head:
            hidden = jnp.tanh(self.pre_logits(self.head_norm(mean_of_tokens(features))))
        else:
            hidden = mean_of_tokens(self.head_norm(features))
        return self.head(hidden) if self.num_classes and not pre_logits else hidden


_DIMS, _DEPTHS = (96, 192, 384, 768), (2, 6, 14, 2)
_OFFICIAL = {
    "tiny": dict(),
    "small": dict(dims=_DIMS),
    "base": dict(depths=_DEPTHS, dims=_DIMS),
    "large": dict(depths=_DEPTHS, dims=(128, 256, 512, 1024), stem_dims=(128, 128)),
    "xlarge": dict(depths=_DEPTHS, dims=(192, 384, 768, 1536), stem_dims=(192, 192)),
}
_TINY = dict(stem_dims=(32, 64), design="timm", hidden_head=False, drop_path_schedule="timm")
_PICO = dict(_TINY, dims=(32, 64, 128, 256), stem_dims=(24, 32))
_NANO = dict(_TINY, depths=(1, 2, 3, 1))
_MLP = dict(relative_bias="mlp")
_SMALL = dict(_TINY, dims=_DIMS, layer_scale=1e-6, **_MLP)
_BASE = dict(_TINY, depths=_DEPTHS, dims=_DIMS, hidden_head=True, **_MLP)

VARIANTS = {
    **{
        f"maxvit_{name}_tf_{side}": dict(fields, image_size=side)
        for name, fields in _OFFICIAL.items()
        for side in (224, 384, 512)
    },
    "maxvit_pico_rw_256": dict(_PICO, image_size=256),
    "maxvit_nano_rw_256": dict(_NANO, image_size=256),
    "maxvit_tiny_rw_224": dict(_TINY, image_size=224),
    "maxvit_tiny_rw_256": dict(_TINY, image_size=256),
    "maxvit_rmlp_pico_rw_256": dict(_PICO, image_size=256, **_MLP),
    "maxvit_rmlp_nano_rw_256": dict(_NANO, image_size=256, **_MLP),
    "maxvit_rmlp_tiny_rw_256": dict(_TINY, image_size=256, **_MLP),
    "maxvit_rmlp_small_rw_224": dict(_SMALL, image_size=224),
    "maxvit_rmlp_small_rw_256": dict(_SMALL, image_size=256),
    "maxvit_rmlp_base_rw_224": dict(_BASE, image_size=224),
    "maxvit_rmlp_base_rw_384": dict(_BASE, image_size=384),
    # Ours, for images of 8 x 8 pixels: full resolution in the stem and the first stage, windows of 4 x 4.
    "maxvit_nano": dict(
        image_size=8,
        depths=(1, 1),
        dims=(32, 64),
        strides=(1, 2),
        stem_dims=(32, 32),
        stem_strides=1,
        num_classes=10,
        # The official 0.99 lags behind by more steps than a short training has.
        norm_momentum=0.9,
    ),
}

# Matrices are split over `fsdp` on the side of the residual stream and over `tensor` on the other.
SHARDING_RULES = (
    (r".*/(qkv|fc1|expand)/kernel", ("fsdp", "tensor")),
    (r".*/(proj|fc2|project)/kernel", ("tensor", "fsdp")),
    (r"params/(head|pre_logits)/kernel", ("fsdp", "tensor")),
    (r".*/shortcut/kernel", (None, "fsdp")),
    (r".*/(qkv|fc1)/bias", ("tensor",)),
    (r"params/(head|pre_logits)/bias", ("tensor",)),
    (r"params/stem/conv\d/kernel", (None, None, None, "fsdp")),
    (r".*/depthwise/kernel", (None, None, None, "tensor")),
    (r".*/relative_position_bias_table", ("tensor", None, None)),
    (r".*/(bias|scale|mean|var|layer_scale\d)", (None,)),
)


register(
    Family(
        name="maxvit",
        module=MaxViT,
        variants=VARIANTS,
        pretrained=PRETRAINED,
        key_maps=KEY_MAPS,
        sharding_rules=SHARDING_RULES,
        layers=layers_of,
    )
)
