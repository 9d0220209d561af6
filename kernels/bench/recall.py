"""What a variant recalls after training beside how fast it is: scores of `--suite recall`, joined to rows of speed."""

from collections.abc import Sequence
from typing import Any

from kernels.bench import text
from kernels.bench.plots import Line, plot
from kernels.bench.rows import Row

SCORES = ("mqar", "passkey")
TITLES = {"mqar": "MQAR", "passkey": "passkey"}
# Implementations that are the project's own.
OURS = ("zoo", "xla", "pallas_tpu", "pallas_triton", "pallas_mosaic_gpu")
FIELDS = (*(f"{score}{end}" for score in SCORES for end in ("", "_low", "_high")), "seeds", "equal_state")


def join(rows: Sequence[Row], scores: Sequence[Row]) -> None:
    """Gives the causal rows of a variant what a model of it recalls, by the widest of those that were trained.

    Raises:
        ValueError: if none of the scores is of a variant in the rows.
    """
    of_variant = {row.variant: row for row in scores if row.mqar is not None}
    joined = False
    for row in rows:
        if row.pattern == "self causal" and row.variant in of_variant:
            joined = True
            for field in FIELDS:
                setattr(row, field, getattr(of_variant[row.variant], field))
    if not joined:
        raise ValueError(f"--recall has scores of {', '.join(of_variant) or 'nothing'}, which no row here is of")


def score(row: Row, name: str) -> str:
    """The mean in percent, and between which values the seeds are; nothing where there is none."""
    mean, low, high = (getattr(row, f"{name}{end}") for end in ("", "_low", "_high"))
    return "" if mean is None else f"{100 * mean:.1f} ({100 * low:.3g}..{100 * high:.3g})"


def figures(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Recall against time of the rows that have both, as titles and plots: one for each task, direction and dtype."""
    found = []
    scored = [row for row in rows if row.mqar is not None and row.median_ms is not None and row.implementation in OURS]
    for dtype, direction in dict.fromkeys((row.dtype, row.direction) for row in scored):
        here = [row for row in scored if (row.dtype, row.direction) == (dtype, direction)]
        longest = max((row.length or 0 for row in here), default=0)
        here = [row for row in here if (row.length or 0) == longest]
        for name in SCORES:
            lines = [
                Line(
                    row.variant if row.equal_state else f"{row.variant} ({text.amount(row.state_bytes, 'B')} of state)",
                    [(row.median_ms, 100 * getattr(row, name))],
                    [f"{row.label}, {row.shape}: {score(row, name)} %, {row.median_ms:.3g} ms"],
                    joined=False,
                )
                for row in here
                if getattr(row, name) is not None
            ]
            title = f"Recall against time: {TITLES[name]}, {direction}, {dtype}, at equal state where none is said"
            drawn = plot(title, lines, x="ms", y="%", x_text=text.short, y_text=text.short, flat=True)
            found.append((title, drawn))
    return found


def page_columns(rows: Sequence[Row]) -> tuple[tuple[Any, ...], ...]:
    """Columns of the page's tables, as `kernels.bench.html.COLUMNS`, that any of the rows has something for."""
    columns = (
        ("per second", _rate, rate, True, False),
        ("parameters", lambda r: r.parameters, lambda r: text.amount(r.parameters) if r.parameters else "", True, True),
        ("MQAR, %", lambda r: r.mqar, lambda r: score(r, "mqar"), True, False),
        ("passkey, %", lambda r: r.passkey, lambda r: score(r, "passkey"), True, False),
    )
    return tuple(column for column in columns if any(column[1](row) is not None for row in rows))


def _rate(row: Row) -> float | None:
    return row.images_per_s if row.tokens_per_s is None else row.tokens_per_s


def rate(row: Row) -> str:
    """Images or tokens per second."""
    found = _rate(row)
    return "" if found is None else text.amount(found)
