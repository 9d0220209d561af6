"""What has become slower since an earlier run, by more than both runs vary."""

import dataclasses
from collections.abc import Sequence

from kernels.bench.rows import Row

# A difference below this part of the time is none, however little the samples vary.
LEAST = 0.05


@dataclasses.dataclass(frozen=True)
class Change:
    """A row in two runs.

    Attributes:
        row: of the new run.
        old: the same in the old one.
        verdict: `"slower"`, `"faster"`, `"same"`, `"lost"` (it had a time and has none) or `"found"`.
    """

    row: Row
    old: Row
    verdict: str

    @property
    def is_regression(self) -> bool:
        return self.verdict in ("slower", "lost")

    def __str__(self) -> str:
        row, old = self.row, self.old
        what = f"{row.label} ({row.implementation}, {row.direction}, {row.dtype}, {row.shape})"
        if self.verdict == "lost":
            return f"{what}: {row.status}, was {old.median_ms:.3g} ms"
        if self.verdict == "found":
            return f"{what}: {row.median_ms:.3g} ms, was {old.status}"
        ratio = row.median_ms / old.median_ms
        return (
            f"{what}: {row.median_ms:.3g} ms ({row.p20_ms:.3g} to {row.p80_ms:.3g}), was {old.median_ms:.3g} "
            f"({old.p20_ms:.3g} to {old.p80_ms:.3g}): {ratio:.2f} times"
        )


def compare(new: Sequence[Row], old: Sequence[Row]) -> list[Change]:
    """The rows that both runs have, in the order of the new one.

    A row is slower if its middle percentiles, 20th to 80th, lie wholly above the old ones, its median is further from
    the old one than both runs spread together, and by more than `LEAST`.
    """
    before = {row.key: row for row in old}
    return [Change(row, before[row.key], _verdict(row, before[row.key])) for row in new if row.key in before]


def _verdict(row: Row, old: Row) -> str:
    if old.median_ms is None:
        return "same" if row.median_ms is None else "found"
    if row.median_ms is None:
        # That a device is missing today says nothing about the kernel.
        return "same" if row.status == "not measured" else "lost"
    noise = (row.p80_ms - row.p20_ms) + (old.p80_ms - old.p20_ms)
    difference = row.median_ms - old.median_ms
    if abs(difference) <= max(noise, LEAST * old.median_ms):
        return "same"
    if difference > 0:
        return "slower" if row.p20_ms > old.p80_ms else "same"
    return "faster" if row.p80_ms < old.p20_ms else "same"
