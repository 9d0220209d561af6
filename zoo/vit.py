"""ViT: Vision Transformer (Dosovitskiy et al., ICLR 2021, arXiv:2010.11929) and DeiT, the same model trained otherwise.

Patches are tokens, with a class token before them and learned positions; blocks of attention and MLP follow, each
behind its norm. Follows the official code (github.com/google-research/vision_transformer) as timm's
`vision_transformer.py` reproduces it; DeiT's distillation token (arXiv:2012.12877) and the layer scale of DeiT III
(arXiv:2204.07118) follow github.com/facebookresearch/deit.
"""

from collections.abc import Mapping

from jaxtyping import Array, Float

from zoo.image_model import ImageModel, layers_of
from zoo.layers import Linear, rematerialize
from zoo.registry import Family, register
from zoo.vit_blocks import Attend, Block, Norm, Stem
from zoo.vit_weights import KEY_MAPS, PRETRAINED


class ViT(ImageModel):
    """Vision Transformer for images of one size, that of its position embeddings.

    `zoo.load_pretrained` resamples these for another `image_size`. With `distilled`, training gives two sets of
    logits, `(classifier's, distillation classifier's)`, evaluation their mean.

    Attributes, beside those of every image model:
        image_size: sides are multiples of the patch; None stands for 224.
        depths: blocks of every stage. Stages are nothing but the places after which there is a feature map: (12,)
            has that of the last block, (3, 3, 3, 3) are the same twelve blocks with four of them.
        dim: channels.
        num_heads: attention heads, divides `dim`.
        patch: side of a patch in pixels.
        mlp_ratio: hidden width of an MLP over its input width.
        qkv_bias: whether queries, keys and values have a bias.
        distilled: whether there are a distillation token and its classifier, which learns from a teacher.
        embed_class: whether class and distillation tokens have position embeddings; DeiT III has none.
        layer_scale: what the factors of every block's two branches start from; None: there are none.
        position_std: standard deviation of the position embeddings at the start.
    """

    image_size: int | tuple[int, int] | None = 224
    depths: tuple[int, ...] = (12,)
    dim: int = 768
    num_heads: int = 12
    patch: int = 16
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    distilled: bool = False
    embed_class: bool = True
    layer_scale: float | None = None
    position_std: float = 0.02

    def check(self) -> None:
        """Raises `ValueError` for fields that the model cannot have."""
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads must divide dim, got {self.num_heads} and {self.dim}")
        super().check()

    @property
    def feature_info(self) -> tuple[tuple[int, int], ...]:
        """Channels and total stride of every stage's output."""
        return ((self.dim, self.patch),) * len(self.depths)

    @property
    def size_multiple(self) -> tuple[int, int]:
        """What the images' heights and widths must be multiples of."""
        return self.patch, self.patch

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.input_size()
        return height // self.patch, width // self.patch

    @property
    def prefix_tokens(self) -> int:
        """How many tokens stand before those of the patches: the class token, the distillation token."""
        return 1 + self.distilled

    def check_image_size(self, height: int, width: int) -> None:
        """Raises `ValueError` for a size that the model cannot take; the message names the one that it can."""
        super().check_image_size(height, width)
        made_for = self.input_size()
        if (height, width) != made_for:
            raise ValueError(
                f"{type(self).__name__} as configured takes {made_for[0]}x{made_for[1]} pixels, got {height}x{width};"
                f" image_size=({height}, {width}) makes it for these, and load_pretrained resamples its positions"
            )

    def setup(self):
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        rates = iter(self.drop_path_rates())
        block = rematerialize(Block, self.remat, static_argnums=(2, 3, 4))
        self.stem = Stem(self.dim, self.patch, self.distilled, self.embed_class, self.position_std, **like)
        self.stages = [
            [
                block(
                    num_heads=self.num_heads,
                    grid=self.grid,
                    mlp_ratio=self.mlp_ratio,
                    qkv_bias=self.qkv_bias,
                    drop_path=next(rates),
                    layer_scale=self.layer_scale,
                    implementation=self.implementation,
                    **like,
                )
                for _ in range(depth)
            ]
            for depth in self.depths
        ]
        if self.features_only:
            return
        self.head_norm = Norm(**like)
        if self.num_classes:
            self.head = Linear(self.num_classes, **like)
            if self.distilled:
                self.dist_head = Linear(self.num_classes, **like)

    def forward_tokens(
        self,
        images: Float[Array, "B H W C"],
        train: bool = False,
        attend: Mapping[int, Attend] | None = None,
        return_weights: bool = False,
    ):
        """All tokens after the stem and after every stage, before the last norm.

        Args:
            images: of the size that the model is made for.
            train: whether the model is in training.
            attend: number of a block, from 0 over all stages, to what takes the place of its attention, see
                `zoo.vit_blocks.Attention`.
            return_weights: also return every block's weights.

        Returns:
            A list of `(B, prefix_tokens + patches, dim)`; with `return_weights` a pair with a list of `(B, heads,
            tokens, tokens)`, one for every block, float32 (float64 for float64), or as `attend` has them.

        Raises:
            ValueError: for images of another size, or numbers of blocks that there are not.
        """
        blocks, attend = sum(self.depths), attend or {}
        if unknown := sorted(set(attend) - set(range(blocks))):
            raise ValueError(f"attend: there is no block {unknown[0]}, they are numbered from 0 to {blocks - 1}")
        self.check_images(images)
        x = self.stem(images, train)
        tokens, weights = [x], []
        for stage in self.stages:
            for block in stage:
                x = block(x, train, attend.get(len(weights)), return_weights)
                x, found = x if return_weights else (x, None)
                weights.append(found)
            tokens.append(x)
        return (tokens, weights) if return_weights else tokens

    def patch_map(self, tokens: Float[Array, "B T D"]) -> Float[Array, "B h w D"]:
        """The tokens of the patches where they lie in the image."""
        return tokens[:, self.prefix_tokens :].reshape(tokens.shape[0], *self.grid, tokens.shape[-1])

    def forward_intermediates(
        self, images: Float[Array, "B H W C"], train: bool = False
    ) -> list[Float[Array, "B h w D"]]:
        """The patches' tokens after the stem and after every stage, each `(B, h, w, dim)`, before the last norm."""
        return [self.patch_map(tokens) for tokens in self.forward_tokens(images, train)]

    def forward_features(self, images: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B T D"]:
        """All tokens after the last block, `(B, prefix_tokens + patches, dim)`, before the last norm."""
        return self.forward_tokens(images, train)[-1]

    def forward_head(self, features: Float[Array, "B T D"], train: bool = False, pre_logits: bool = False):
        """Norm, class token, classifier; with `distilled` the distillation token and its classifier too.

        Args:
            features: the output of `forward_features`.
            train: with `distilled`, whether the two classifiers' logits are returned as a pair.
            pre_logits: stop before the classifiers.

        Returns:
            `(B, num_classes)`, with `distilled` the mean of both classifiers' logits, or in training the pair
            `(classifier's, distillation classifier's)`. With `pre_logits`, or without classes: what the
            classifier sees, `(B, dim)`, with `distilled` the mean of what the two see.
        """
        # The norm sees every token by itself: those of the patches do not need it.
        normed = self.head_norm(features[:, : self.prefix_tokens])
        outputs = [normed[:, i] for i in range(self.prefix_tokens)]
        if self.num_classes and not pre_logits:
            heads = (self.head, self.dist_head) if self.distilled else (self.head,)
            outputs = [head(token) for head, token in zip(heads, outputs)]
            if self.distilled and train:
                return tuple(outputs)
        return sum(outputs) / len(outputs)


_TINY = dict(dim=192, num_heads=3)
_SMALL = dict(dim=384, num_heads=6)
_MEDIUM = dict(dim=512, num_heads=8)
_LARGE = dict(depths=(24,), dim=1024, num_heads=16)
_HUGE = dict(depths=(32,), dim=1280, num_heads=16)
_SIZES = dict(tiny=_TINY, small=_SMALL, base={}, large=_LARGE)
_DEIT3 = dict(embed_class=False, layer_scale=1e-6)

VARIANTS = {
    **{
        f"vit_{size}_patch16_{side}": dict(fields, image_size=side)
        for size, fields in _SIZES.items()
        for side in (224, 384)
    },
    "vit_base_patch32_224": dict(patch=32),
    "vit_base_patch32_384": dict(patch=32, image_size=384),
    **{
        f"deit_{size}{kind}_patch16_{side}": dict(_SIZES[size], distilled=bool(kind), image_size=side)
        for size, side in (("tiny", 224), ("small", 224), ("base", 224), ("base", 384))
        for kind in ("", "_distilled")
    },
    **{
        f"deit3_{size}_patch16_{side}": dict(fields, image_size=side, **_DEIT3)
        for size, fields in dict(small=_SMALL, medium=_MEDIUM, base={}, large=_LARGE).items()
        for side in ((224,) if size == "medium" else (224, 384))
    },
    "deit3_huge_patch14_224": dict(_HUGE, patch=14, **_DEIT3),
    # Ours, for images of 8 x 8 pixels: 16 patches of 2 x 2, whose positions count from the start: from 0.02 a short
    # training does not find out where they lie.
    "vit_nano": dict(image_size=8, depths=(4,), dim=64, num_heads=4, patch=2, position_std=0.5, num_classes=10),
}

# Matrices are split over `fsdp` on the side of the residual stream and over `tensor` on the other.
SHARDING_RULES = (
    (r".*/(qkv|fc1)/kernel", ("fsdp", "tensor")),
    (r".*/(proj|fc2)/kernel", ("tensor", "fsdp")),
    (r"params/(dist_)?head/kernel", ("fsdp", "tensor")),
    (r".*/(qkv|fc1)/bias", ("tensor",)),
    (r"params/(dist_)?head/bias", ("tensor",)),
    (r"params/stem/conv/kernel", (None, None, None, "fsdp")),
    (r"params/stem/pos_embed", (None, "fsdp")),
    (r".*/(bias|scale|layer_scale\d|cls_token|dist_token)", (None,)),
)


register(
    Family(
        name="vit",
        module=ViT,
        variants=VARIANTS,
        pretrained=PRETRAINED,
        key_maps=KEY_MAPS,
        sharding_rules=SHARDING_RULES,
        layers=layers_of,
    )
)
