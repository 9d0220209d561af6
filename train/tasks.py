"""What a batch means: its loss and its metrics. The loop and the step know nothing of images or text."""

import dataclasses
import functools
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, Key

import zoo
from kernels.dense import accumulator_dtype
from train.distill import distillation_loss
from train.face_set import FaceSet
from train.mixing import mixup_cutmix, normalize, one_hot_smooth, random_erase
from train.next_token import NextToken
from train.sequences import SequenceSet
from train.sources import Dataset
from train.verification import TASK, Verification
from zoo import registry
from zoo.dcal import DCAL
from zoo.pretrained import abstract_variables

__all__ = ["TASK", "Batch", "Classify", "Distill", "Task", "make", "without_teacher"]

Variables = Any
Batch = dict[str, Array]
Logits = Float[Array, "B K"] | tuple[Float[Array, "B K"], ...]


@runtime_checkable
class Task(Protocol):
    """A kind of training: what it makes of a batch, what it minimises, what it counts.

    A task is a pytree, an argument of the compiled step, so that arrays which it holds are no constants there.
    """

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """What it has beside the model: `params`, trained, and `state`, which `loss` updates; `{}` for nothing."""

    def prepare(self, batch: Batch, key: Key[Array, ""]) -> Batch:
        """The batch as the model sees it (augmentation that runs on the device)."""

    def loss(self, model: nn.Module, variables: Variables, batch: Batch, key: Key[Array, ""]):
        """The mean loss over a prepared batch, then `(metrics, new model state)`.

        In `variables` the task's own params are those of `params[TASK]`, and its state is under `TASK`, as it is in the
        new model state.
        """

    def evaluate(self, model: nn.Module, variables: Variables, batch: Batch) -> dict[str, Array]:
        """Sums over the unmasked examples of a batch, and arrays of a row for every example, masked ones too."""

    def summarize(self, totals: dict[str, Any]) -> dict[str, float]:
        """The metrics of a whole data set, from the sums over all its batches, and all their rows in order."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Classify:
    """Image classification by softmax cross-entropy, with soft targets where mixing or smoothing is on.

    A model of several heads returns the logits of each in training, and its `join_losses` makes one loss of theirs.

    Attributes:
        num_classes: classes.
        mean, std: per channel, for inputs scaled to [0, 1].
        label_smoothing: share of the target spread evenly over all classes.
        mixup, cutmix: alpha of each one's Beta distribution, 0 for off; mix_prob: share of batches mixed;
            mix_switch_prob: share of those that take cutmix where both are on.
        erase_mode: what random erasing fills with; None: nothing is erased.
        dtype: of the images given to the model.
    """

    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    mix_switch_prob: float = 0.5
    erase_mode: str | None = None
    dtype: Any = jnp.float32

    @classmethod
    def from_config(cls, config: ml_collections.ConfigDict, num_classes: int) -> "Classify":
        """The task as a config describes it."""
        return cls(
            num_classes=num_classes,
            mean=tuple(config.data.mean),
            std=tuple(config.data.std),
            label_smoothing=config.loss.label_smoothing,
            mixup=config.augment.mixup,
            cutmix=config.augment.cutmix,
            mix_prob=config.augment.mix_prob,
            mix_switch_prob=config.augment.mix_switch_prob,
            erase_mode=config.augment.erase_mode if config.augment.erase_prob else None,
            dtype=jnp.dtype(config.dtype),
        )

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        return {}

    def prepare(self, batch: Batch, key: Key[Array, ""]) -> Batch:
        images = normalize(batch["image"], self.mean, self.std, accumulator_dtype(self.dtype))
        if self.erase_mode is not None:
            images = random_erase(images, batch["erase_box"], batch["erase_seed"], self.erase_mode)
        targets = one_hot_smooth(batch["label"], self.num_classes, self.label_smoothing)
        if self.mixup or self.cutmix:
            images, targets = mixup_cutmix(
                key,
                images,
                targets,
                mixup_alpha=self.mixup,
                cutmix_alpha=self.cutmix,
                prob=self.mix_prob,
                switch_prob=self.mix_switch_prob,
            )
        return {"image": images.astype(self.dtype), "target": targets, "label": batch["label"]}

    def loss(self, model: nn.Module, variables: Variables, batch: Batch, key: Key[Array, ""]):
        heads, state = model.apply(
            variables, batch["image"], train=True, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        heads = jax.tree.map(lambda logits: logits.astype(accumulator_dtype(logits.dtype)), heads)
        losses = self.losses(heads, batch)
        loss = losses[0] if len(losses) == 1 else model.apply(variables, losses, method="join_losses")
        logits = sum(heads) / len(heads) if isinstance(heads, tuple) else heads
        accuracy = (logits.argmax(-1) == batch["label"]).mean(dtype=jnp.float32)
        return loss, ({"loss": loss, "accuracy": accuracy}, state)

    def losses(self, heads: Logits, batch: Batch) -> list[Float[Array, ""]]:
        """The mean losses over a batch, of each of the model's heads."""
        return [optax.softmax_cross_entropy(logits, batch["target"]).mean() for logits in jax.tree.leaves(heads)]

    def evaluate(self, model: nn.Module, variables: Variables, batch: Batch) -> dict[str, Array]:
        images = normalize(batch["image"], self.mean, self.std, self.dtype)
        logits = model.apply(variables, images).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        # Rank by how many classes score higher: ties count against nobody's favour and need no sort.
        own = jnp.take_along_axis(logits, batch["label"][:, None], axis=-1)
        rank = (logits > own).sum(-1)
        mask = batch["mask"]
        return {
            "count": mask.sum(),
            "loss": jnp.where(mask, losses, 0.0).sum(),
            "accuracy": (mask & (logits.argmax(-1) == batch["label"])).sum(),
            "accuracy_top5": (mask & (rank < 5)).sum(),
        }

    def summarize(self, totals: dict[str, Any]) -> dict[str, float]:
        """The means over the examples."""
        return {name: total / totals["count"] for name, total in totals.items() if name != "count"}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["teacher_variables"],
    meta_fields=[
        *(field.name for field in dataclasses.fields(Classify)),
        *("teacher", "teacher_mean", "teacher_std", "kind", "alpha", "temperature"),
    ],
)
@dataclasses.dataclass(frozen=True)
class Distill(Classify):
    """Classification that also learns what a teacher says of the same images, mixed and erased as they are.

    Attributes:
        teacher: a model with the same classes and channels; its variables are `teacher_variables`.
        teacher_mean, teacher_std: of the images that it wants.
        kind, alpha, temperature: see `train.distill.distillation_loss`.
    """

    teacher: nn.Module | None = None
    teacher_variables: Any = None
    teacher_mean: tuple[float, ...] = ()
    teacher_std: tuple[float, ...] = ()
    kind: str = "hard"
    alpha: float = 0.5
    temperature: float = 1.0

    def prepare(self, batch: Batch, key: Key[Array, ""]) -> Batch:
        prepared = super().prepare(batch, key)
        images = prepared["image"].astype(jnp.float32) * jnp.asarray(self.std) + jnp.asarray(self.mean)
        images = (images - jnp.asarray(self.teacher_mean)) / jnp.asarray(self.teacher_std)
        logits = self.teacher.apply(self.teacher_variables, images.astype(self.dtype))
        return {**prepared, "teacher": logits.astype(jnp.float32)}

    def losses(self, heads: Logits, batch: Batch) -> list[Float[Array, ""]]:
        """One loss, in which the last of two heads is the one that is taught."""
        how = dict(kind=self.kind, alpha=self.alpha, temperature=self.temperature)
        return [distillation_loss(heads, batch["target"], batch["teacher"], **how)]


def without_teacher(config: ml_collections.ConfigDict, model: nn.Module, dataset: Dataset | SequenceSet) -> Task:
    """The task that a config describes, but for a classifier's teacher: all that evaluation needs."""
    if isinstance(dataset, FaceSet):
        return Verification.from_config(config, model, dataset)
    if not isinstance(dataset, SequenceSet):
        return Classify.from_config(config, model.num_classes)
    return NextToken(
        label_smoothing=config.loss.label_smoothing,
        packed=dataset.packed,
        state=tuple(sorted(set(abstract_variables(model)) - {"params"})),
    )


def make(
    config: ml_collections.FrozenConfigDict, model: nn.Module, dataset: Dataset | SequenceSet, *, planned: bool = False
) -> Task:
    """The task that a config describes, a classifier's teacher loaded, or `planned`: its variables only shapes.

    Raises:
        ValueError: for a teacher of other classes or channels than the model, or one that takes no such images.
        WeightsError: if the teacher's weights do not fit.
    """
    task = without_teacher(config, model, dataset)
    settings = config.distill
    if not settings.teacher:
        return task
    if isinstance(model, DCAL):
        raise ValueError(f"config.distill.teacher {settings.teacher!r}: the branches of DCAL learn from labels alone")
    name, tag = registry.split_tag(settings.teacher)
    fields = dict(image_size=model.image_size, dtype=task.dtype)
    if planned:
        fields |= dict(num_classes=model.num_classes, in_chans=model.in_chans)
        known = registry.family_of(name).module.__dataclass_fields__
        teacher = zoo.create_model(name, **{field: value for field, value in fields.items() if field in known})
        variables = abstract_variables(teacher)
    else:
        teacher, variables, _ = zoo.load_pretrained(settings.teacher, settings.weights, **fields)
    for field in ("num_classes", "in_chans"):
        theirs, ours = getattr(teacher, field), getattr(model, field)
        if theirs != ours:
            raise ValueError(f"config.distill.teacher {name} has {field} {theirs}, the model has {ours}")
    cfg = registry.pretrained_cfg(tag) if tag else config.data
    return Distill(
        **vars(task),
        teacher=teacher,
        teacher_variables=variables,
        teacher_mean=tuple(cfg.mean),
        teacher_std=tuple(cfg.std),
        kind=settings.kind,
        alpha=settings.alpha,
        temperature=settings.temperature,
    )
