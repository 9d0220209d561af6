"""Learning what comes next in rows of tokens: text, pixels in raster order, tasks of recall."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

Variables = Any
Batch = dict[str, Array]

# What a batch of sequences may hold beside tokens, targets and weights, all of it arguments of the model.
INPUTS = ("segments", "source", "source_mask")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the targets at the positions that count, and the losses that the model sows beside it.

    Attributes:
        label_smoothing: share of the target spread evenly over the vocabulary.
        packed: whether rows hold several documents, so that the model is told which tokens belong to which.
        state: names of the model's collections that training updates without a gradient.
    """

    label_smoothing: float = 0.0
    packed: bool = True
    state: tuple[str, ...] = ()

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        return {}

    def prepare(self, batch: Batch, key: Key[Array, ""]) -> Batch:
        return batch

    def inputs(self, batch: Batch) -> dict[str, Array]:
        """The model's arguments."""
        left_out = () if self.packed else ("segments",)
        names = [name for name in ("tokens", *INPUTS) if name in batch and name not in left_out]
        return {name: batch[name] for name in names}

    def loss(self, model: nn.Module, variables: Variables, batch: Batch, key: Key[Array, ""]):
        logits, mutated = model.apply(
            variables, **self.inputs(batch), train=True, rngs={"dropout": key}, mutable=[*self.state, "losses"]
        )
        weights = batch["weights"]
        count = jnp.maximum(weights.sum(), 1)
        targets = batch["targets"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        if self.label_smoothing:
            even = jax.nn.logsumexp(logits, -1) - logits.mean(-1)
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * even
        loss = (losses * weights).sum() / count
        accuracy = ((logits.argmax(-1) == targets) * weights).sum() / count
        metrics = {"loss": loss, "accuracy": accuracy}
        if beside := jax.tree.leaves(mutated.pop("losses", {})):
            metrics["auxiliary_loss"] = sum(beside)
            metrics["loss"] = loss = loss + metrics["auxiliary_loss"]
        return loss, (metrics, mutated)

    def evaluate(self, model: nn.Module, variables: Variables, batch: Batch) -> dict[str, Array]:
        logits = model.apply(variables, **self.inputs(batch))
        weights = batch["weights"] * batch["mask"][:, None]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        right = logits.argmax(-1) == batch["targets"]
        counted = weights > 0
        sums = {
            "count": counted.sum(),
            "loss": (losses * weights).sum(),
            "accuracy": (right & counted).sum(),
            "rows": (batch["mask"] & counted.any(-1)).sum(),
            "accuracy_row": (batch["mask"] & counted.any(-1) & (right | ~counted).all(-1)).sum(),
        }
        if "bytes" in batch:
            sums["bytes"] = jnp.where(batch["mask"], batch["bytes"], 0).sum()
        return sums

    def summarize(self, totals: dict[str, Any]) -> dict[str, float]:
        """Means over the counted positions, over whole rows, and bits per byte of text or per dimension."""
        nats = totals["loss"]
        found = {name: totals[name] / totals["count"] for name in ("loss", "accuracy")}
        found["accuracy_row"] = totals["accuracy_row"] / max(totals["rows"], 1)
        if "bytes" in totals:
            found["bits_per_byte"] = nats / math.log(2) / totals["bytes"]
        else:
            found["bits_per_token"] = nats / math.log(2) / totals["count"]
        return found
