"""AHAN: Asymmetric Hierarchical Attention Network (AAAI 2026, arXiv:2602.21503), which tells identical twins apart.

A ViT, beside it a stream of parts (HCA) and one of asymmetry (FAAM), and, in training alone, keys and values of the
anchor's own twin among those of the anchor (TA-PWCA). There is no public code, and the paper's equations were not at
hand; what is certain is told by tags:

- [S], reported by summaries of the paper: the backbone ViT-B/16, the three streams, four regions at three scales whose
  weights are a softmax, the flipped right half with attention both ways and the absolute difference, TA-PWCA in layers
  6 to 9 with probability 0.5.
- [I], inferred here: a field of the model where there is a choice. Without a field: queries of HCA and FAAM pass a norm
  of their own, a region's queries are averaged before scales are mixed, the fusion is one linear map.

Sizes beside the ViT-B/16 at 224 x 224 (85.8 M parameters, 17.6 G MACs): the default adds 38.5 % of the parameters and
21.6 % of the MACs, its twelve cross-attentions alone 33.0 % and 18.8 %; summaries report 33 % and 36 %, see
`hca_layout`. `tests/test_ahan.py` has every layout in closed form.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.choices import check_choice
from kernels.cross import pairwise_attention
from zoo.ahan_streams import LAYOUTS, SHARINGS, FacialAsymmetry, HierarchicalCrossAttention
from zoo.face_regions import CANONICAL_BOXES, REGIONS, check_boxes
from zoo.image_model import layers_of
from zoo.layers import BatchNorm, Dtype, Linear, normal02_init, unit
from zoo.registry import Family, register
from zoo.vit import SHARDING_RULES as BACKBONE_RULES
from zoo.vit import ViT


class AHAN(ViT):
    """AHAN for square crops of aligned faces.

    `embed` gives an image's embedding, and so does the call without classes. Embeddings are compared by their cosine,
    and have a norm of their own, from which losses may read an image's quality. With classes the call gives the cosines
    to the weights of all identities, `params/identities/kernel` `(embedding_dim, num_classes)`, times `logit_scale`.

    TA-PWCA has no parameter and no trace in inference: an anchor's queries see its own keys and values and, in some
    layers, those of its twin, in the same stream, in one softmax. Without a twin in the batch an anchor sees itself.

    Attributes, beside those of a ViT:
        embedding_dim: width of the embedding [I]; 512 is usual.
        embedding_norm: whether a batch norm ends the embedding [I].
        hca, faam: whether there are these streams; without both an embedding is that of the backbone's class token.
        scales: sides of the squares of a region's cells that become one query: down-sampling by 1, 2 and 4 [S].
        region_cells: side of the square that a region is resampled to [I]. 8 makes 64, 16 and 4 queries.
        sampling_ratio: samples of a cell along each side, as in RoI-align.
        hca_sharing: which of the twelve cross-attentions share their projections [I]. The reported 33 % more parameters
            are those of twelve independent ones, but also of others, see `hca_layout`.
        hca_layout: what a cross-attention is made of [I]. `"attention"` has projections of query, key, value and
            output, no shortcut, no MLP. `"projections"` has none of the output; with both directions of FAAM
            (`faam_shared=False`) likewise and the fusion that is 33 % too. So are whole encoder blocks, `"block"`, one
            for every region (`hca_sharing="scales"`).
        hca_class_token: whether the class token is among what regions look at, "global tokens" [I].
        faam_shared: whether FAAM's two directions have the same projections [I].
        faam_layout: `"attention"` or `"projections"` [I].
        cross_heads: attention heads of HCA and FAAM, None for those of the backbone [I].
        stream_stage: which stage's tokens HCA and FAAM read [I]. -1 is the last; other places need `depths` of more
            parts.
        stream_norm: whether they pass the backbone's last norm before [I]; without it their keys and values have none.
        pair_probability: of a step having TA-PWCA, 0.5 [S]; 0 never has it.
        pair_layers: the first and the last layer that has it, 6 and 9 [S], counted from 1 [I].
        pair_coin: `"step"`: one draw for the whole batch, `"image"`: one for every image [I].
        pair_gradient: whether gradients pass through the twin's keys and values [I].
        logit_scale: factor on the cosines of classes.
    """

    num_classes: int = 0
    embedding_dim: int = 512
    embedding_norm: bool = True
    hca: bool = True
    faam: bool = True
    scales: tuple[int, ...] = (1, 2, 4)
    region_cells: int = 8
    sampling_ratio: int = 2
    hca_sharing: str = "none"
    hca_layout: str = "attention"
    hca_class_token: bool = True
    faam_shared: bool = True
    faam_layout: str = "attention"
    cross_heads: int | None = None
    stream_stage: int = -1
    stream_norm: bool = True
    pair_probability: float = 0.5
    pair_layers: tuple[int, int] = (6, 9)
    pair_coin: str = "step"
    pair_gradient: bool = True
    logit_scale: float = 64.0

    def check(self) -> None:
        """Raises `ValueError` for fields that the model cannot have."""
        super().check()
        if self.distilled:
            raise ValueError("AHAN has one class token; distilled must be False")
        check_choice("hca_sharing", self.hca_sharing, SHARINGS)
        check_choice("hca_layout", self.hca_layout, LAYOUTS)
        check_choice("faam_layout", self.faam_layout, LAYOUTS[:2])
        check_choice("pair_coin", self.pair_coin, ("step", "image"))
        for name in ("embedding_dim", "region_cells", "sampling_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.scales:
            raise ValueError("scales must name at least one, got none")
        for scale in self.scales:
            if scale < 1 or self.region_cells % scale:
                raise ValueError(f"scales must divide region_cells={self.region_cells}, got {scale}")
        if self.dim % (self.cross_heads or self.num_heads):
            raise ValueError(f"cross_heads must divide dim={self.dim} or be None, got {self.cross_heads}")
        if not 0 <= self.pair_probability <= 1:
            raise ValueError(f"pair_probability must be from 0 to 1, got {self.pair_probability}")
        first, last = self.pair_layers if len(self.pair_layers) == 2 else (0, 0)
        if not 1 <= first <= last <= sum(self.depths):
            raise ValueError(
                f"pair_layers must be the first and the last of the layers 1 to {sum(self.depths)}, got "
                f"{self.pair_layers}"
            )
        if not -len(self.depths) <= self.stream_stage < len(self.depths):
            raise ValueError(f"stream_stage must be one of {len(self.depths)} stages, got {self.stream_stage}")

    @property
    def size_multiple(self) -> tuple[int, int]:
        """What the images' heights and widths must be multiples of; FAAM wants an even number of columns."""
        return self.patch, self.patch * (2 if self.faam else 1)

    def setup(self):
        super().setup()
        if self.features_only:
            return
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        attend = dict(num_heads=self.cross_heads or self.num_heads, implementation=self.implementation, **like)
        if self.hca:
            self.parts = HierarchicalCrossAttention(
                regions=len(REGIONS),
                scales=self.scales,
                cells=self.region_cells,
                sampling_ratio=self.sampling_ratio,
                sharing=self.hca_sharing,
                layout=self.hca_layout,
                mlp_ratio=self.mlp_ratio,
                **attend,
            )
        if self.faam:
            self.asymmetry = FacialAsymmetry(shared=self.faam_shared, layout=self.faam_layout, **attend)
        self.fusion = Linear(self.embedding_dim, **like)
        if self.embedding_norm:
            self.fusion_norm = BatchNorm(**like)
        if self.num_classes:
            self.identities = CosineHead(self.num_classes, self.logit_scale, **like)

    def forward_features(
        self,
        images: Float[Array, "B H W C"],
        train: bool = False,
        boxes: Float[Array, "#B R 4"] | None = None,
        twin_index: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B D"]:
        """The class token, the four regions and the asymmetry signature behind one another.

        Args:
            images: `(B, H, W, C)`, normalised, of the size that the model is made for.
            train: whether the model is in training.
            boxes: `(B, 4, 4)` or `(1, 4, 4)`: (left, top, right, bottom) of `REGIONS`, as shares of the image's width
                and height; None for `CANONICAL_BOXES`, those of aligned faces. The values of boxes that are at hand
                (not traced) are checked.
            twin_index: in training, for every image the place in the batch of one of the anchor's twin; an index
                outside the batch, such as -1, for none. None: there are no twins. Draws from the rng stream
                `"dropout"`.

        Returns:
            `(B, dim * (1 + 4 * hca + faam))`.

        Raises:
            ValueError: for boxes that are none, or `twin_index` without training.
        """
        if twin_index is not None and not train:
            raise ValueError("twin_index is for training (train=True) alone; leave it None")
        boxes = self._boxes(boxes, images.shape[0])
        tokens = self.forward_tokens(images, train, self._paired(twin_index, images.shape[0]))
        streams = [self.head_norm(tokens[-1][:, 0])]
        # From the front the first output is the stem's.
        read = tokens[1:][self.stream_stage]
        if self.stream_norm and (self.hca or self.faam):
            read = self.head_norm(read)
        if self.hca:
            looked_at = read if self.hca_class_token else read[:, self.prefix_tokens :]
            streams.append(self.parts(self.patch_map(read), looked_at, boxes))
        if self.faam:
            streams.append(self.asymmetry(self.patch_map(read)))
        return jnp.concatenate(streams, axis=-1)

    def _boxes(self, boxes, batch: int):
        if boxes is None:
            boxes = jnp.asarray([CANONICAL_BOXES], jnp.float32)
        else:
            check_boxes(boxes)
        if boxes.shape[0] not in (1, batch):
            raise ValueError(f"boxes are for {boxes.shape[0]} images, there are {batch}")
        return jnp.broadcast_to(boxes, (batch, *boxes.shape[1:]))

    def _paired(self, twin_index, batch: int):
        """What takes the place of the attention of the blocks with TA-PWCA, by number."""
        if twin_index is not None and twin_index.shape != (batch,):
            raise ValueError(f"twin_index must be ({batch},), one for every image, got {twin_index.shape}")
        if twin_index is None or not self.pair_probability:
            return None
        coins = jax.random.bernoulli(
            self.make_rng("dropout"), self.pair_probability, () if self.pair_coin == "step" else (batch,)
        )
        present = coins & (twin_index >= 0) & (twin_index < batch)
        index = jnp.where(present, twin_index, jnp.arange(batch))

        def attend(query, key, value, return_weights):
            # Gathered here, so that their gradient can be stopped.
            twin = key[index], value[index]
            if not self.pair_gradient:
                twin = jax.lax.stop_gradient(twin)
            how = "xla" if return_weights else self.implementation
            return pairwise_attention(
                query, key, value, twin, present, implementation=how, return_weights=return_weights
            )

        first, last = self.pair_layers
        return dict.fromkeys(range(first - 1, last), attend)

    def forward_head(
        self, features: Float[Array, "B D"], train: bool = False, pre_logits: bool = False
    ) -> Float[Array, "B out"]:
        """Fusion, batch norm, cosines to the classes.

        Args:
            features: the output of `forward_features`.
            train: whether the model is in training.
            pre_logits: stop before the classes.

        Returns:
            `(B, num_classes)`; with `pre_logits`, or without classes, the embedding, `(B, embedding_dim)`.
        """
        embedding = self.fusion(features)
        if self.embedding_norm:
            embedding = self.fusion_norm(embedding, train)
        return self.identities(embedding) if self.num_classes and not pre_logits else embedding

    def embed(
        self,
        images: Float[Array, "B H W C"],
        train: bool = False,
        boxes: Float[Array, "#B R 4"] | None = None,
        twin_index: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B E"]:
        """The embedding of every image, `(B, embedding_dim)`; arguments as of `forward_features`."""
        return self.forward_head(self.forward_features(images, train, boxes, twin_index), train, pre_logits=True)

    def __call__(
        self,
        images: Float[Array, "B H W C"],
        train: bool = False,
        boxes: Float[Array, "#B R 4"] | None = None,
        twin_index: Int[Array, "B"] | None = None,
    ):
        """What `forward_head` returns, or with `features_only` the stages' outputs; see `forward_features`."""
        if self.features_only:
            return tuple(self.forward_intermediates(images, train)[1:])
        return self.forward_head(self.forward_features(images, train, boxes, twin_index), train)


class CosineHead(nn.Module):
    """Cosines to the weights of classes, times a factor; `kernel` is `(E, classes)`."""

    num_classes: int
    scale: float
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B E"]) -> Float[Array, "B classes"]:
        kernel = self.param("kernel", normal02_init, (x.shape[-1], self.num_classes), self.param_dtype)
        return (self.scale * (unit(x, 1) @ unit(kernel, 0))).astype(x.dtype)


VARIANTS = {
    "ahan_vit_b16": dict(),
    # Ours, for images of 48 x 48 pixels: 36 patches of 8 x 8.
    "ahan_nano": dict(
        image_size=48,
        depths=(4,),
        dim=64,
        num_heads=4,
        patch=8,
        embedding_dim=64,
        region_cells=4,
        pair_layers=(2, 3),
        num_classes=10,
    ),
}

SHARDING_RULES = (
    (r"params/parts/.*/(query|key|value|fc1)/kernel", (None, "fsdp", "tensor")),
    (r"params/parts/.*/(proj|fc2)/kernel", (None, "tensor", "fsdp")),
    (r"params/parts/.*/(query|key|value|fc1)/bias", (None, "tensor")),
    (r"params/parts/.*/(bias|scale)", (None, None)),
    (r".*/(query|key|value)(_left|_right)?/kernel", ("fsdp", "tensor")),
    (r".*/(query|key|value)(_left|_right)?/bias", ("tensor",)),
    (r".*/proj_(left|right)/kernel", ("tensor", "fsdp")),
    (r"params/fusion/kernel", ("fsdp", "tensor")),
    (r"params/fusion/bias", ("tensor",)),
    (r"params/identities/kernel", ("fsdp", "tensor")),
    (r"params/parts/scale_logits", (None, None)),
    (r"batch_stats/.*", (None,)),
    *BACKBONE_RULES,
)


register(
    Family(
        name="ahan",
        module=AHAN,
        variants=VARIANTS,
        pretrained={},
        key_maps={},
        sharding_rules=SHARDING_RULES,
        layers=layers_of,
    )
)
