"""DCAL: Dual Cross-Attention Learning (Zhu et al., CVPR 2022, arXiv:2205.02151), for what differs in detail only.

Beside a ViT's self-attention (SA) it learns with global-local cross-attention (GLCA: the patches that count most ask
all) and, in training alone, with pair-wise cross-attention (PWCA: a second image's keys and values distract). There is
no official code. What the paper does not say is a field of the model, or told where it is decided.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from kernels.choices import check_choice
from kernels.cross import attention_rollout, pairwise_attention, select_tokens
from kernels.cross.rollout import HEAD_FUSIONS
from zoo.image_model import layers_of
from zoo.layers import Linear
from zoo.part_maps import RolloutMap
from zoo.registry import Family, register
from zoo.vit import SHARDING_RULES as BACKBONE_RULES
from zoo.vit import ViT
from zoo.vit_blocks import Block, Norm
from zoo.watch import watched

BRANCHES = ("sa", "glca", "pwca")


def dynamic_loss(losses: Sequence[Float[Array, ""]], weights: Float[Array, "branches"]) -> Float[Array, ""]:
    """The losses of the branches as one, with weights that are learned: the sum of (exp(-w) loss + w) / 2.

    Args:
        losses: one for each branch, in the order of `BRANCHES`.
        weights: the parameter `loss_weights` of a `DCAL`; of one whose loss is constant the best value is its log.

    Raises:
        ValueError: if there is not one loss for every weight.

    Source: FairMOT (arXiv:2004.01888), which the paper cites for its weights without a formula of its own.
    """
    if len(losses) != weights.shape[0]:
        raise ValueError(f"losses are {len(losses)}, weights are for {weights.shape[0]} branches")
    return 0.5 * sum(jnp.exp(-weight) * loss + weight for loss, weight in zip(losses, weights))


class DCAL(ViT):
    """A ViT with GLCA and PWCA.

    In training it returns the logits of every branch, `(sa, glca, pwca)`, whose losses `dynamic_loss` joins. PWCA runs
    SA's blocks and classifier once more, each image with the keys and values of another one of the batch, in the same
    stream, beside its own (the paper does not say where a partner's features come from, nor of a classifier for PWCA,
    whose target is SA's). `python -m train` trains it for classification; the paper's retrieval, by triplets of all
    branches' tokens, is not here.

    Attributes, beside those of a ViT; GLCA is a whole encoder block of its own, after the last block and before the
    last norm (the paper does not say where, nor what the block has; one block is the share of parameters that it
    reports, and it finds one block of GLCA and deep rollouts best):
        glca, pwca: whether there are these branches; PWCA, whose loss is of classes, with classes alone.
        ratio: share of the patches that ask in GLCA: 0.1 for classification, 0.3 for retrieval. The class token
            always asks; the paper does not say so, but its retrieval reads it.
        head_fusion: of the rollout over all blocks; the paper does not say.
        residual: share of the shortcut in the rollout.
        glca_token: what GLCA's classifier reads. `"class"`: the class token after the block, as the paper's retrieval
            does (inferred for classification). It asks all tokens by itself, so that after a single block the other
            queries reach nothing: `ratio`, `head_fusion` and `residual` then change neither the output nor a gradient.
            `"mean"` (ours): the mean of all tokens that asked, in which the selection counts.
        inference: `"probabilities"`: logits whose softmax is the mean of SA's and GLCA's probabilities.
            `"tokens"`: both class tokens, `(B, 2 * dim)`, for retrieval; so too with `num_classes=0`.
    """

    glca: bool = True
    pwca: bool = True
    ratio: float = 0.1
    head_fusion: str = "mean"
    residual: float = 0.5
    glca_token: str = "class"
    inference: str = "probabilities"

    def check(self) -> None:
        """Raises `ValueError` for fields that the model cannot have."""
        super().check()
        if self.distilled:
            raise ValueError("DCAL has one class token in every branch; distilled must be False")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be above 0 and at most 1, got {self.ratio}")
        check_choice("head_fusion", self.head_fusion, HEAD_FUSIONS)
        check_choice("glca_token", self.glca_token, ("class", "mean"))
        check_choice("inference", self.inference, ("probabilities", "tokens"))

    @property
    def branches(self) -> tuple[str, ...]:
        """Those of `BRANCHES` that training has."""
        return tuple(name for name in BRANCHES if getattr(self, name, True))

    def setup(self):
        super().setup()
        if self.features_only:
            return
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        if self.glca:
            self.global_local = GlobalLocal(
                num_heads=self.num_heads,
                grid=self.grid,
                mlp_ratio=self.mlp_ratio,
                qkv_bias=self.qkv_bias,
                drop_path=self.drop_path_rate,
                layer_scale=self.layer_scale,
                implementation=self.implementation,
                ratio=self.ratio,
                head_fusion=self.head_fusion,
                residual=self.residual,
                token=self.glca_token,
                **like,
            )
            self.glca_norm = Norm(**like)
        if self.num_classes:
            if self.glca:
                self.glca_head = Linear(self.num_classes, **like)
            self.loss_weights = self.param("loss_weights", initializers.zeros, (len(self.branches),), self.param_dtype)

    def forward_features(
        self, images: Float[Array, "B H W C"], train: bool = False, partner: Int[Array, "B"] | None = None
    ) -> Float[Array, "B branches D"]:
        """The class token of every branch before its norm, in training also PWCA's.

        Args:
            images: of the size that the model is made for.
            train: whether the model is in training.
            partner: in training, for every image the one of the batch that distracts it, an index outside the batch
                for none. None draws a permutation from the rng stream `"dropout"`, in which an image may be its own
                partner, which leaves it as in SA.

        Raises:
            ValueError: for partners without training with PWCA.
        """
        paired = train and self.pwca and self.num_classes > 0
        if partner is not None and not paired:
            raise ValueError(
                "partner is for training (train=True) of a model with pwca=True and num_classes above 0; leave it None"
            )
        tokens, weights = self.forward_tokens(images, train, return_weights=self.glca), None
        if self.glca:
            tokens, weights = tokens
        branches = [tokens[-1][:, 0]]
        if self.glca:
            branches.append(self.global_local(tokens[-1], weights, train))
        if paired:
            if partner is None:
                partner = jax.random.permutation(self.make_rng("dropout"), images.shape[0])
            attend = functools.partial(pairwise_attention, partner=partner, implementation=self.implementation)
            blocks = dict.fromkeys(range(sum(self.depths)), attend)
            branches.append(self.forward_tokens(images, train, blocks)[-1][:, 0])
        return jnp.stack(branches, axis=1)

    def forward_head(self, features: Float[Array, "B branches D"], train: bool = False, pre_logits: bool = False):
        """Norms and classifiers.

        Args:
            features: the output of `forward_features`, with the same `train`.
            train: whether the logits of all branches are returned, as a tuple.
            pre_logits: stop before the classifiers.

        Returns:
            In training a tuple of `(B, num_classes)`, one for each of `branches`. Else as `inference` says. With
            `pre_logits`, or without classes, the class tokens of SA and GLCA behind one another.
        """
        tokens = {
            name: (self.glca_norm if name == "glca" else self.head_norm)(features[:, i])
            for i, name in zip(range(features.shape[1]), self.branches)
        }
        if not self.num_classes or pre_logits or (self.inference == "tokens" and not train):
            return jnp.concatenate([tokens[name] for name in ("sa", "glca") if name in tokens], axis=-1)
        logits = [(self.glca_head if name == "glca" else self.head)(token) for name, token in tokens.items()]
        if train:
            return tuple(logits)
        # In float32, as the losses take them.
        shares = [jax.nn.log_softmax(branch.astype(jnp.promote_types(branch.dtype, jnp.float32))) for branch in logits]
        total = functools.reduce(jnp.logaddexp, shares) - jnp.log(float(len(shares)))
        return total.astype(logits[0].dtype)

    def join_losses(self, losses: Sequence[Float[Array, ""]]) -> Float[Array, ""]:
        """`dynamic_loss` of the branches' losses with the model's own weights."""
        return dynamic_loss(losses, self.loss_weights)

    def __call__(self, images: Float[Array, "B H W C"], train: bool = False, partner: Int[Array, "B"] | None = None):
        """What `forward_head` returns; with `features_only` a tuple of the stages' outputs."""
        if self.features_only:
            return tuple(self.forward_intermediates(images, train)[1:])
        return self.forward_head(self.forward_features(images, train, partner), train)


class GlobalLocal(nn.Module):
    """GLCA: an encoder block in which the class token and the patches that a rollout ranks first ask all tokens.

    What is not selected leaves out its queries, its shortcut and its MLP.

    Attributes:
        ratio, head_fusion, residual: see `DCAL`; token: its `glca_token`; all others are those of a `zoo.vit.Block`.
    """

    num_heads: int
    grid: tuple[int, int]
    mlp_ratio: float
    qkv_bias: bool
    drop_path: float
    layer_scale: float | None
    ratio: float
    head_fusion: str
    residual: float
    token: str
    implementation: str | tuple[str, ...] | None = None
    dtype: object = None
    param_dtype: object = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "B N D"], weights: Sequence[Float[Array, "B H N N"]], train: bool
    ) -> Float[Array, "B D"]:
        """The class token after this block, or the mean of all tokens that asked.

        Args:
            tokens: those after the last block.
            weights: of all blocks' attention, first block first.
            train: whether the model is in training.
        """
        scores = attention_rollout(weights, head_fusion=self.head_fusion, residual=self.residual, token=0)
        rows = select_tokens(scores, self.ratio)
        if watched(self):
            self.sow("attention", "map", RolloutMap(scores[:, 1:].reshape(-1, *self.grid), rows[:, 1:] - 1))
        block = Block(
            num_heads=self.num_heads,
            grid=self.grid,
            mlp_ratio=self.mlp_ratio,
            qkv_bias=self.qkv_bias,
            drop_path=self.drop_path,
            layer_scale=self.layer_scale,
            implementation=self.implementation,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="block",
        )
        asked = block(tokens, train, None, False, rows)
        return asked[:, 0] if self.token == "class" else asked.mean(1)


_TINY = dict(dim=192, num_heads=3)
_SMALL = dict(dim=384, num_heads=6)

VARIANTS = {
    # Images of 448 pixels are those of the paper's fine-grained classification.
    "dcal_deit_tiny": dict(_TINY, image_size=448),
    "dcal_deit_small": dict(_SMALL, image_size=448),
    "dcal_deit_base": dict(image_size=448),
    "dcal_vit_base": dict(image_size=448),
    # Ours, for images of 8 x 8 pixels: 16 patches of 2 x 2, of which 4 ask in GLCA.
    "dcal_nano": dict(image_size=8, depths=(3,), dim=64, num_heads=4, patch=2, num_classes=10, ratio=0.25),
}

SHARDING_RULES = (
    (r"params/glca_head/kernel", ("fsdp", "tensor")),
    (r"params/glca_head/bias", ("tensor",)),
    (r"params/loss_weights", (None,)),
    *BACKBONE_RULES,
)


register(
    Family(
        name="dcal",
        module=DCAL,
        variants=VARIANTS,
        pretrained={},
        key_maps={},
        sharding_rules=SHARDING_RULES,
        layers=layers_of,
    )
)
