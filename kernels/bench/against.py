"""What has become slower since an earlier run, by more than both runs vary."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kernels.bench.rows import Row

# A difference below this part of the time is none, however little the samples vary.
LEAST = 0.05
# How often a row that seems slower is measured again, and has to seem slower every time.
RECHECKS = 2
# A machine whose own rates are below this part of what they were is slower itself.
SLOWER = 0.8


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

    A row is slower if its median is above the old one by more than `LEAST`, and its 20th to 80th percentiles lie
    above the old ones by more than both spread towards each other.
    """
    before = {row.key: row for row in old}
    return [Change(row, before[row.key], _verdict(row, before[row.key])) for row in new if row.key in before]


def confirmed(changes: Sequence[Change], again: Callable[[Sequence[Row]], Sequence[Row]]) -> list[Change]:
    """The changes, with what seemed a regression measured again: a busy machine slows a row down once, not always.

    Args:
        changes: what `compare` found.
        again: measures rows once more, of which it may lose some.

    Returns:
        The same changes in their order. What is a regression was one in every measurement, and has the fastest of them;
        what is none has the measurement that was none.
    """
    found = list(changes)
    for _ in range(RECHECKS):
        places = {change.row.key: place for place, change in enumerate(found) if change.is_regression}
        if not places:
            break
        for row in again([found[place].row for place in places.values()]):
            if row.key not in places:
                continue
            change = found[places[row.key]]
            verdict = _verdict(row, change.old)
            if verdict not in ("slower", "lost") or _is_faster(row, change.row):
                found[places[row.key]] = Change(row, change.old, verdict)
    return found


def slower_machine(about: Mapping[str, Any], before: Mapping[str, Any]) -> str | None:
    """A sentence if the machine itself, by its copy and its matrix product, is slower than it was; else None."""
    rates = [(about.get("bandwidth"), before.get("bandwidth"), "copies")]
    rates += [(rate, (before.get("rates") or {}).get(dtype), "multiplies") for dtype, rate in about["rates"].items()]
    shares = {does: now / then for now, then, does in rates if now and then and now < SLOWER * then}
    if not shares:
        return None
    said = " and ".join(f"{does} at {share:.2f}" for does, share in shares.items())
    return f"this machine {said} of the rate that it had then: rows may be slower without any change to them"


def _is_faster(row: Row, other: Row) -> bool:
    return row.median_ms is not None and (other.median_ms is None or row.median_ms < other.median_ms)


def _verdict(row: Row, old: Row) -> str:
    if old.median_ms is None:
        return "same" if row.median_ms is None else "found"
    if row.median_ms is None:
        # That a device is missing today says nothing about the kernel.
        return "same" if row.status == "not measured" else "lost"
    difference = row.median_ms - old.median_ms
    if abs(difference) <= LEAST * old.median_ms:
        return "same"
    if difference > 0:
        return "slower" if _is_apart(old, row) else "same"
    return "faster" if _is_apart(row, old) else "same"


def _is_apart(low: Row, high: Row) -> bool:
    """Whether the middle percentiles of `high` lie above those of `low` by more than both spread towards each other.

    However much they spread, what takes twice the time of almost all samples of the other takes longer.
    """
    spread = (high.median_ms - high.p20_ms) + (low.p80_ms - low.median_ms)
    return high.p20_ms - low.p80_ms > min(spread, low.p80_ms)
