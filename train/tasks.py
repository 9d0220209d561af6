"""What a batch means: its loss and its metrics. The loop and the step know nothing of images or text."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Key

from train.mixing import mixup_cutmix, normalize, one_hot_smooth, random_erase

Variables = Any
Batch = dict[str, Array]


@runtime_checkable
class Task(Protocol):
    """A kind of training: what it makes of a batch, what it minimises, what it counts."""

    def prepare(self, batch: Batch, key: Key[Array, ""]) -> Batch:
        """The batch as the model sees it (augmentation that runs on the device)."""

    def loss(self, model: nn.Module, variables: Variables, batch: Batch, key: Key[Array, ""]):
        """The mean loss over a prepared batch, then `(metrics, new model state)`."""

    def evaluate(self, model: nn.Module, variables: Variables, batch: Batch) -> dict[str, Array]:
        """Sums over the unmasked examples of a batch; `count` among them."""


@dataclasses.dataclass(frozen=True)
class Classify:
    """Image classification by softmax cross-entropy, with soft targets where mixing or smoothing is on.

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
    def from_config(cls, config: ml_collections.FrozenConfigDict, num_classes: int) -> "Classify":
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

    def prepare(self, batch: Batch, key: Key[Array, ""]) -> Batch:
        images = normalize(batch["image"], self.mean, self.std)
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
        logits, state = model.apply(
            variables, batch["image"], train=True, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        logits = logits.astype(jnp.float32)
        loss = optax.softmax_cross_entropy(logits, batch["target"]).mean()
        accuracy = (logits.argmax(-1) == batch["label"]).mean(dtype=jnp.float32)
        return loss, ({"loss": loss, "accuracy": accuracy}, state)

    def evaluate(self, model: nn.Module, variables: Variables, batch: Batch) -> dict[str, Array]:
        images = normalize(batch["image"], self.mean, self.std).astype(self.dtype)
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
