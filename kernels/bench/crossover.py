"""From which length on a variant is faster than softmax attention."""

import dataclasses
import math
from collections.abc import Sequence

from kernels.bench.rows import Row

SOFTMAX = "softmax"


@dataclasses.dataclass(frozen=True)
class Crossover:
    """Where the time of a variant and that of softmax attention cross.

    Attributes:
        variant: its label.
        implementation: the variant's; softmax is the fastest there is at every length.
        direction, dtype: of both.
        length: tokens at which they cross; None if they do not in the range.
        faster: whether the variant is the faster one beyond the crossing, or all through.
        shortest, longest: the range.
        only: softmax was out of memory from this length on, None if never.
    """

    variant: str
    implementation: str
    direction: str
    dtype: str
    length: float | None
    faster: bool
    shortest: int
    longest: int
    only: int | None = None

    def __str__(self) -> str:
        return f"{self.variant} ({self.implementation}, {self.direction}, {self.dtype}): {self.verdict}"

    @property
    def verdict(self) -> str:
        """In words, from which length on it is the faster or the slower one."""
        if self.length is not None:
            said = f"{'faster' if self.faster else 'slower'} beyond {self.length:.0f} tokens"
        else:
            said = f"{'faster' if self.faster else 'slower'} at every length from {self.shortest} to {self.longest}"
        if self.only is not None:
            said += f"; softmax is out of memory at {self.only}"
        return said


def crossovers(rows: Sequence[Row]) -> list[Crossover]:
    """The crossings of all variants that were timed at two lengths and more, between lengths by a power law."""
    sweep = [row for row in rows if row.length is not None and row.family != "part"]
    softmax = [row for row in sweep if row.variant == SOFTMAX]
    groups = dict.fromkeys(
        (row.label, row.implementation, row.direction, row.dtype, row.pattern, row.device)
        for row in sweep
        if row.variant != SOFTMAX and row.median_ms is not None
    )
    found = []
    for label, implementation, direction, dtype, pattern, device in groups:
        same = [
            r for r in softmax if (r.direction, r.dtype, r.pattern, r.device) == (direction, dtype, pattern, device)
        ]
        times = {
            row.length: row.median_ms
            for row in sweep
            if (row.label, row.implementation, row.direction, row.dtype) == (label, implementation, direction, dtype)
            and row.median_ms is not None
        }
        limits: dict[int, float] = {}
        for row in same:
            if row.median_ms is not None:
                limits[row.length] = min(row.median_ms, limits.get(row.length, math.inf))
        full = [row.length for row in same if row.status == "out of memory" and row.length not in limits]
        lengths = sorted(set(times) & (set(limits) | set(full)))
        if len(lengths) < 2:
            continue
        # Above 0 where the variant is faster.
        gain = {n: math.log(limits[n] / times[n]) if n in limits else math.inf for n in lengths}
        length = _last_crossing(lengths, gain)
        found.append(
            Crossover(
                *(label, implementation, direction, dtype, length, gain[lengths[-1]] > 0),
                *(lengths[0], lengths[-1], min(full, default=None)),
            )
        )
    return found


def _last_crossing(lengths: Sequence[int], gain: dict[int, float]) -> float | None:
    for a, b in reversed(list(zip(lengths, lengths[1:]))):
        if (gain[a] > 0) != (gain[b] > 0):
            if math.isinf(gain[b]):
                return float(b)
            share = gain[a] / (gain[a] - gain[b])
            return math.exp(math.log(a) + share * (math.log(b) - math.log(a)))
    return None
