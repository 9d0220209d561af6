"""Learning to tell whether two images show the same person, twins among them."""

import dataclasses
import functools
import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array, Float, Int, Key

from kernels.dense import accumulator_dtype
from train import margins, triplets, verification_metrics
from train.face_set import ABOUT, FaceSet
from train.mixing import normalize

Variables = Any
Batch = dict[str, Array]

# Where a train step keeps what a task has beside the model.
TASK = "task"
# A loss's own margin, that of its paper.
MARGINS = {"arcface": 0.5, "cosface": 0.35, "adaface": 0.4}
# What a model calls the rows of a batch that show the twins.
TWIN_INDEX = "twin_index"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["twins"],
    meta_fields=[
        *("num_people", "width", "mean", "std", "loss_name", "scale", "margin", "easy_margin", "triplet_weight"),
        *("triplet_margin", "negative", "max_impostors", "replicates", "dtype"),
    ],
)
@dataclasses.dataclass(frozen=True)
class Verification:
    """Embeddings that a margin loss over the people of training and a triplet loss bring apart.

    Loss: that of the margin plus `triplet_weight` times that of the triplets. The weights of the people are the task's
    own parameters: they train with the model, are kept in a run's checkpoints, and are no part of the model. A model
    that takes `twin_index` is given it in training: for every image the row of one of the twin, -1 where there is none
    in the batch.

    Attributes:
        num_people: K, of training.
        width: E, of the embeddings.
        mean, std: per channel, for inputs scaled to [0, 1].
        twins: (K,) int32, every person's twin, -1 where there is none.
        loss_name: a key of `MARGINS`.
        scale, margin, easy_margin: see `train.margins`.
        triplet_weight: 0 leaves the triplets out.
        triplet_margin, negative: see `train.triplets`.
        max_impostors: see `train.pairs.pair_lists`; replicates: see `train.verification_metrics.measure`.
        dtype: of the images given to the model.
    """

    num_people: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    twins: Any
    loss_name: str = "arcface"
    scale: float = 64.0
    margin: float = 0.5
    easy_margin: bool = False
    triplet_weight: float = 0.1
    triplet_margin: float = 0.5
    negative: str = "hardest"
    max_impostors: int = 100_000
    replicates: int = 1000
    dtype: Any = jnp.float32

    @classmethod
    def from_config(cls, config: ml_collections.ConfigDict, model: nn.Module, dataset: FaceSet) -> "Verification":
        """The task as a config describes it.

        Raises:
            ValueError: for a model that gives no embeddings.
        """
        settings = config.verification
        given = jax.eval_shape(
            lambda inputs: model.apply(model.init(jax.random.key(0), **inputs), **inputs), model.example_inputs()
        )
        if not isinstance(given, jax.ShapeDtypeStruct) or len(given.shape) != 2:
            raise ValueError(
                f"config.model.name {config.model.name!r} gives {given}; verification needs embeddings, one per image"
            )
        return cls(
            num_people=dataset.num_classes,
            width=given.shape[1],
            mean=tuple(config.data.mean),
            std=tuple(config.data.std),
            twins=jnp.asarray(dataset.twins, jnp.int32),
            loss_name=settings.loss,
            scale=settings.scale,
            margin=MARGINS[settings.loss] if settings.margin is None else settings.margin,
            easy_margin=settings.easy_margin,
            triplet_weight=settings.triplet_weight,
            triplet_margin=settings.triplet_margin,
            negative=settings.negative,
            max_impostors=settings.max_impostors,
            replicates=settings.replicates,
            dtype=jnp.dtype(config.dtype),
        )

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Weights of the people, (E, K) float32, drawn from N(0, 0.01 ** 2); their length is nothing to the loss."""
        weights = 0.01 * jax.random.normal(key, (self.width, self.num_people))
        state = margins.first_norm_statistics() if self.loss_name == "adaface" else {}
        return {"params": {"people": weights}, "state": state}

    def prepare(self, batch: Batch, key: Key[Array, ""]) -> Batch:
        images = normalize(batch["image"], self.mean, self.std, self.dtype)
        return {"image": images, "label": batch["label"]}

    def loss(self, model: nn.Module, variables: Variables, batch: Batch, key: Key[Array, ""]):
        labels, beside = batch["label"], variables[TASK]
        weights = variables["params"][TASK]["people"]
        rest = {name: value for name, value in variables.items() if name != TASK}
        rest["params"] = {name: value for name, value in variables["params"].items() if name != TASK}
        twins = self.twins[labels]
        given = {}
        if takes_twins(model):
            index, present = triplets.twin_rows(labels, twins)
            given[TWIN_INDEX] = jnp.where(present, index, -1)
        embeddings, state = model.apply(
            rest, batch["image"], train=True, rngs={"dropout": key}, mutable=["batch_stats"], **given
        )
        embeddings = embeddings.astype(accumulator_dtype(embeddings.dtype))
        cosines = margins.class_cosines(embeddings, weights)
        logits, beside = self.logits(cosines, labels, embeddings, beside)
        identity = margins.margin_loss(logits, labels)
        metrics = {"margin_loss": identity, "accuracy": (cosines.argmax(-1) == labels).mean(dtype=jnp.float32)}
        loss = identity
        if self.triplet_weight:
            masks = triplets.triplet_masks(labels, twins, self.negative)
            triplet, share = triplets.batch_hard_triplet(embeddings, *masks, margin=self.triplet_margin)
            metrics |= {"triplet_loss": triplet, "triplet_share": share}
            loss = loss + self.triplet_weight * triplet
        return loss, ({"loss": loss, **metrics}, {**state, TASK: beside})

    def logits(
        self,
        cosines: Float[Array, "B K"],
        labels: Int[Array, " B"],
        embeddings: Float[Array, "B E"],
        statistics: dict[str, Array],
    ) -> tuple[Float[Array, "B K"], dict[str, Array]]:
        """The logits with their margin, and the new statistics of norms, which AdaFace alone has."""
        how = dict(scale=self.scale, margin=self.margin)
        if self.loss_name == "arcface":
            return margins.arcface_logits(cosines, labels, easy_margin=self.easy_margin, **how), statistics
        if self.loss_name == "cosface":
            return margins.cosface_logits(cosines, labels, **how), statistics
        norms = jnp.linalg.norm(embeddings, axis=-1)
        statistics = margins.update_norm_statistics(statistics, norms)
        return margins.adaface_logits(cosines, labels, norms, statistics, **how), statistics

    def evaluate(self, model: nn.Module, variables: Variables, batch: Batch) -> dict[str, Array]:
        """The embeddings of a batch, and what is known of the people."""
        images = normalize(batch["image"], self.mean, self.std, self.dtype)
        embeddings = model.apply(variables, images).astype(jnp.float32)
        return {"embedding": embeddings, **{name: batch[name] for name in ("label", *ABOUT, "mask")}}

    def score(self, totals: dict[str, np.ndarray]) -> dict[str, verification_metrics.Scored]:
        """The pairs of all images with their scores.

        Raises:
            ValueError: as `train.verification_metrics.score` does; for embeddings that are not finite.
        """
        rows = {name: totals[name][totals["mask"]] for name in ("embedding", "label", *ABOUT)}
        if not np.isfinite(rows["embedding"]).all():
            raise ValueError("the model gives embeddings that are not finite")
        return verification_metrics.score(
            rows["embedding"],
            rows["label"],
            rows["twin"],
            rows["hard"],
            rows["validation"],
            max_impostors=self.max_impostors,
        )

    def summarize(self, totals: dict[str, Any]) -> dict[str, float]:
        """`train.verification_metrics.summary` of all images."""
        return verification_metrics.summary(self.score(totals), replicates=self.replicates)


def takes_twins(model: nn.Module) -> bool:
    """Whether a model looks at the twin in training."""
    return TWIN_INDEX in inspect.signature(type(model).__call__).parameters
