"""Scores a model on a data set, counting every example exactly once."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from train.sharding import place_batch


def evaluate(
    eval_step: Callable[[Any, Any], dict[str, jax.Array]],
    variables: Any,
    batches: Iterable[dict[str, np.ndarray]],
    rows: NamedSharding,
) -> dict[str, float]:
    """Means over all unmasked examples.

    Args:
        eval_step: `(variables, batch) -> sums`, `count` among them.
        variables: what the model takes.
        batches: padded and masked batches (`train.data.eval_iterator`), this process's rows of each.
        rows: sharding of a batch.

    Returns:
        Every sum of `eval_step` but `count`, divided by the count; integers are added exactly, floats in float64.
    """
    totals: dict[str, Any] = {}
    for batch in batches:
        sums = jax.device_get(eval_step(variables, place_batch(batch, rows)))
        for name, value in sums.items():
            totals[name] = totals.get(name, 0) + value.item()
    count = totals.pop("count")
    return {name: total / count for name, total in totals.items()}
