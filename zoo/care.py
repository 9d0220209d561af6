"""CARE Transformer (Zhou et al., CVPR 2025, arXiv:2411.16170): linear attention beside convolutions, and a memory.

Follows the official code (github.com/zhouyuan888888/CARE-Transformer), on which all published weights rest; where
the paper's text says less or something else, the code decides.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Float

from kernels import linear_attention
from kernels.dense import accumulator_dtype
from kernels.linear import FEATURE_MAPS
from zoo.care_weights import KEY_MAPS, PRETRAINED
from zoo.image_model import ImageModel, layers_of
from zoo.layers import (
    BatchNorm,
    DepthwiseConv,
    DropPath,
    Dtype,
    LayerNorm,
    Linear,
    PatchEmbed,
    PatchMerge,
    exact_gelu,
    mean_of_tokens,
    normal02_init,
    rematerialize,
)
from zoo.registry import Family, register
from zoo.watch import LinearMap, watched

_INIT = dict(kernel_init=normal02_init, bias_init=initializers.zeros)


class Attention(nn.Module):
    """Linear attention whose values are its input: no projection of values, none of the output.

    No norm comes before it either, so that it sees the residual stream as it is.
    """

    head_dim: int
    implementation: str | tuple[str, ...] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W g"]) -> Float[Array, "B H W g"]:
        b, h, w, g = x.shape
        qk = Linear(2 * g, name="qk", dtype=self.dtype, param_dtype=self.param_dtype)(x)
        heads = (b, h * w, g // self.head_dim, self.head_dim)
        query, key, value = (part.reshape(heads) for part in (qk[..., :g], qk[..., g:], x))
        if watched(self):
            phi, wide = FEATURE_MAPS["elu1"], accumulator_dtype(x.dtype)
            self.sow("attention", "map", LinearMap(phi(query.astype(wide)), phi(key.astype(wide)), (h, w)))
        return linear_attention(query, key, value, implementation=self.implementation).reshape(x.shape)


class Interaction(nn.Module):
    """Norm, expansion, GELU, depthwise 3x3, and back to the width of the input unless `project` is False."""

    ratio: int
    project: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B H W D"]:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        c = x.shape[-1]
        hidden = exact_gelu(Linear(self.ratio * c, name="fc1", **like)(BatchNorm(name="norm", **like)(x, train)))
        hidden = DepthwiseConv(3, name="conv", **_INIT, **like)(hidden)
        return Linear(c, name="fc2", **like)(hidden) if self.project else hidden


class Block(nn.Module):
    """A map of four equal groups of channels: memory, attention, local 3x3, local 7x7.

    The memory passes by the three mixers; the first interaction mixes what these make, the second all four
    groups. Both keep their input as a residual, and layer scale and the block's own shortcut come on top.

    Attributes:
        ratios: hidden width over input width of the two interactions.
        head_dim: of the attention; None puts two crossing strips of convolutions in its place.
        drop_path: rate of stochastic depth.
        last: the network's last block, which ends with the hidden channels of its second interaction: no
            projection, no residual, no layer scale, no shortcut.
    """

    ratios: tuple[int, int]
    head_dim: int | None
    drop_path: float
    last: bool = False
    implementation: str | tuple[str, ...] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B H W D"]:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        memory, attended, near, far = jnp.split(x, 4, axis=-1)
        if self.head_dim is None:
            tall = DepthwiseConv((11, 1), name="tall", **_INIT, **like)(attended)
            attended = tall + DepthwiseConv((1, 11), name="wide", **_INIT, **like)(attended)
        else:
            attend = dict(head_dim=self.head_dim, implementation=self.implementation)
            attended = Attention(name="attention", **attend, **like)(attended)
        near = DepthwiseConv(3, name="local3", **_INIT, **like)(near)
        far = DepthwiseConv(7, name="local7", **_INIT, **like)(far)
        mixed = jnp.concatenate([attended, near, far], axis=-1)
        mixed = mixed + Interaction(self.ratios[0], name="inter1", **like)(mixed, train)
        full = jnp.concatenate([memory, mixed], axis=-1)
        out = Interaction(self.ratios[1], not self.last, name="inter2", **like)(full, train)
        if self.last:
            return DropPath(self.drop_path)(out, train)
        gamma = self.param("gamma", initializers.constant(1e-6), (x.shape[-1],), self.param_dtype)
        return x + DropPath(self.drop_path)((full + out) * gamma.astype(out.dtype), train)


class CARE(ImageModel):
    """CARE Transformer for images of any height and width of at least the total stride, which need not divide.

    Training gives two sets of logits, `(classifier's, distillation classifier's)`, evaluation their mean. The last
    stage's output has more channels than its input (1024, for `care_s2` 1536): hidden channels of the last
    interaction, which nothing projects back.

    Attributes, beside those of every image model:
        depths: blocks of every stage.
        memory_dims: channels of one of the four groups (the first is the memory) of every stage's map.
        ratios: hidden over input width of the two interactions, for every stage.
        head_dims: of the attention of every stage; None for a stage without.
        patch: side of the stem's patches.
        distilled: whether there is a second classifier, which learns from a teacher.
        drop_path_last: whether stochastic depth drops the last block too. It has no shortcut, so that a dropped
            sample's features are all zero, and its logits a constant; the official training does so.
    """

    depths: tuple[int, ...] = (2, 4, 8, 4)
    memory_dims: tuple[int, ...] = (8, 16, 32, 64)
    ratios: tuple[tuple[int, int], ...] = ((2, 2), (2, 4), (4, 4), (4, 4))
    head_dims: tuple[int | None, ...] = (None, None, 16, 32)
    patch: int = 4
    distilled: bool = True
    drop_path_last: bool = True

    @property
    def feature_info(self) -> tuple[tuple[int, int], ...]:
        """Channels and total stride of every stage's output; the last block widens that of the last stage."""
        dims = [4 * memory for memory in self.memory_dims]
        dims[-1] *= self.ratios[-1][1]
        return tuple((dim, self.patch * 2**i) for i, dim in enumerate(dims))

    @property
    def least_size(self) -> tuple[int, int]:
        """The smallest height and width, of which one token is left in the end."""
        return (self.feature_info[-1][1],) * 2

    def drop_path_rates(self) -> list[float]:
        """The rate of every block, in order, growing linearly from 0."""
        rates = super().drop_path_rates()
        return rates if self.drop_path_last else [*rates[:-1], 0.0]

    def setup(self):
        stages = (self.depths, self.memory_dims, self.ratios, self.head_dims)
        if len(set(map(len, stages))) != 1:
            raise ValueError(
                "depths, memory_dims, ratios and head_dims must be as long as one another, got "
                + ", ".join(str(len(stage)) for stage in stages)
            )
        for memory, head_dim in zip(self.memory_dims, self.head_dims):
            if head_dim is not None and memory % head_dim:
                raise ValueError(f"head_dims must divide memory_dims or be None, got {head_dim} for {memory}")
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        rates = self.drop_path_rates()
        block = rematerialize(Block, self.remat, static_argnums=(2,))
        self.stem = PatchEmbed(4 * self.memory_dims[0], self.patch, **_INIT, **like)
        self.downsamples = [PatchMerge(4 * memory, **_INIT, **like) for memory in self.memory_dims[1:]]
        self.stages = [
            [
                block(
                    ratios=ratios,
                    head_dim=head_dim,
                    drop_path=rates[sum(self.depths[:stage]) + i],
                    last=stage == len(self.depths) - 1 and i == depth - 1,
                    implementation=self.implementation,
                    **like,
                )
                for i in range(depth)
            ]
            for stage, (depth, _, ratios, head_dim) in enumerate(zip(*stages))
        ]
        if self.features_only:
            return
        self.head_norm = LayerNorm(epsilon=1e-6, **like)
        if self.num_classes:
            self.head = Linear(self.num_classes, **like)
        if self.distilled:
            self.dist_head_norm = LayerNorm(epsilon=1e-6, **like)
            if self.num_classes:
                self.dist_head = Linear(self.num_classes, **like)

    def forward_head(self, features: Float[Array, "B h w D"], train: bool = False, pre_logits: bool = False):
        """Mean over the tokens, GELU, norm, classifier.

        Args:
            features: the last stage's output.
            train: with `distilled`, whether the two classifiers' logits are returned as a pair.
            pre_logits: stop before the classifiers.

        Returns:
            `(B, num_classes)`, with `distilled` the mean of both classifiers' logits, or in training the pair
            `(classifier's, distillation classifier's)`. With `pre_logits`, or without classes: what the
            classifier sees, `(B, D)`, with `distilled` the mean of what the two see.
        """
        pooled = exact_gelu(mean_of_tokens(features))
        outputs = [self.head_norm(pooled)]
        if self.distilled:
            outputs.append(self.dist_head_norm(pooled))
        if self.num_classes and not pre_logits:
            outputs[0] = self.head(outputs[0])
            if self.distilled:
                outputs[1] = self.dist_head(outputs[1])
                if train:
                    return tuple(outputs)
        return sum(outputs) / len(outputs)


_S1 = dict(depths=(3, 6, 10, 6), ratios=((2, 4), (2, 4), (4, 4), (4, 4)))

VARIANTS = {
    "care_s0": dict(),
    "care_s1": _S1,
    "care_s2": dict(_S1, memory_dims=(8, 16, 48, 96), ratios=((4, 4),) * 4),
    # Ours, for images of 8 to 64 pixels: every pixel is a token of the first stage.
    "care_nano": dict(
        depths=(2, 2),
        memory_dims=(8, 16),
        ratios=((2, 2), (2, 2)),
        head_dims=(None, 8),
        patch=1,
        num_classes=10,
        image_size=8,
        distilled=False,
    ),
}

# Matrices are split over `fsdp` on the side of the residual stream and over `tensor` on the other.
SHARDING_RULES = (
    (r".*/(qk|fc1)/kernel", ("fsdp", "tensor")),
    (r".*/fc2/kernel", ("tensor", "fsdp")),
    (r"params/(dist_)?head/kernel", ("fsdp", "tensor")),
    (r".*/(qk|fc1)/bias", ("tensor",)),
    (r"params/(dist_)?head/bias", ("tensor",)),
    (r".*/inter\d/conv/kernel", (None, None, None, "tensor")),
    (r".*/inter\d/conv/bias", ("tensor",)),
    (r"params/(stem|downsamples_\d+)/conv/kernel", (None, None, None, "fsdp")),
    (r".*/(tall|wide|local\d)/kernel", (None, None, None, "fsdp")),
    (r".*/(bias|scale|gamma|mean|var)", (None,)),
)


register(
    Family(
        name="care",
        module=CARE,
        variants=VARIANTS,
        pretrained=PRETRAINED,
        key_maps=KEY_MAPS,
        sharding_rules=SHARDING_RULES,
        layers=layers_of,
    )
)
