"""Single random numbers, each made from one `rng.random()`: several times faster than `rng.integers`."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number in [low, high)."""
    return low + (high - low) * rng.random()


def below(rng: np.random.Generator, n: int) -> int:
    """A whole number from 0 to n - 1."""
    return int(rng.random() * n)


def choose(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    """One of the options; nothing is drawn where there is only one."""
    return options[below(rng, len(options))] if len(options) > 1 else options[0]
