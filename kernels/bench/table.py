"""The table in the terminal: a hundred columns, a block for every shape."""

import itertools
import textwrap
from collections.abc import Sequence
from typing import Any

from kernels.bench import text
from kernels.bench.crossover import Crossover
from kernels.bench.rows import Row

WIDTH = 100
HEADINGS = {
    "window": "Attention in small windows",
    "gather": "Attention to chosen blocks",
    "image": "Attention on feature maps",
    "sequence": "Attention on sequences",
    "scan": "Recurrences on sequences",
    "memory": "Memories that learn while they read",
    "part": "What mixers have besides",
}
# Title, width, whether it is flush right, and the text of a row.
COLUMNS = (
    ("", 21, False, lambda row: row.label),
    ("by", 13, False, lambda row: row.implementation),
    ("pass", 9, False, lambda row: text.PASS[row.direction]),
    ("ms", 7, True, text.milliseconds),
    ("", 5, True, text.spread),
    ("FLOP/s", 7, True, lambda row: "" if row.flops_per_s is None else text.amount(row.flops_per_s)),
    ("of floor", 13, True, text.floor),
    ("memory", 8, True, lambda row: "" if row.peak_bytes is None else text.amount(row.peak_bytes, "B")),
    ("error", 6, True, text.error),
)


def _cells(values: Sequence[str]) -> str:
    line = " ".join(
        value[:width].rjust(width) if right else value[:width].ljust(width)
        for value, (_, width, right, _) in zip(values, COLUMNS)
    )
    return line.rstrip()


def _line(row: Row) -> list[str]:
    """A row; what was not timed says why instead of its time."""
    if row.status in ("ok", "estimate"):
        marks = [] if row.bit_equal in (True, None) else ["    runs differ in bits"]
        if row.status == "ok" and row.reason is not None:
            marks += textwrap.wrap(row.reason, WIDTH, initial_indent="    ", subsequent_indent="    ")
        return [_cells([value(row) for *_, value in COLUMNS]), *marks]
    named = _cells([value(row) for *_, value in COLUMNS[:3]] + [""] * (len(COLUMNS) - 3))
    said = row.status if row.reason is None else f"{row.status}: {row.reason}"
    if row.status == "wrong":
        said = f"WRONG, no time given: {row.reason}"
    indent = sum(width + 1 for _, width, _, _ in COLUMNS[:3])
    first, *rest = textwrap.wrap(said, WIDTH - indent) or [""]
    return [named.ljust(indent - 1) + " " + first, *(" " * indent + line for line in rest)]


def groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows that stand together under a heading, the fastest first in each direction."""
    order = {row.family: None for row in rows}
    found = []
    for family in order:
        of_family = [row for row in rows if row.family == family]
        kinds = dict.fromkeys((row.shape, row.dtype) for row in of_family)
        for shape, dtype in kinds:
            together = [row for row in of_family if (row.shape, row.dtype) == (shape, dtype)]
            together.sort(key=lambda row: (row.direction, text.speed(row)))
            found.append((f"{HEADINGS[family]}: {shape}, {dtype}", together))
    return found


def _elsewhere(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Rows to print, and one line for those that want another device."""
    here = [row for row in rows if row.status != "not measured"]
    away = [row for row in rows if row.status == "not measured"]
    away.sort(key=lambda row: row.reason or "")
    lines = []
    for reason, found in itertools.groupby(away, lambda row: row.reason):
        names = dict.fromkeys(f"{row.implementation} ({row.variant})" for row in found)
        lines.append(f"not measured, {reason}: {', '.join(names)}")
    return here, [
        part for line in lines for part in textwrap.wrap(line, WIDTH - 2, initial_indent="  ", subsequent_indent="    ")
    ]


def table(meta: dict[str, Any], rows: Sequence[Row], crossovers: Sequence[Crossover] = ()) -> str:
    """All rows, and below them what the columns mean."""
    named = meta["host"] if meta["platform"] == "cpu" else f"{meta['device']}; host {meta['host']}"
    lines = textwrap.wrap(f"{named}, {meta['cores']} cores; jax {meta['jax']}; {meta['date']}", WIDTH) + [""]
    titles = _cells([title for title, *_ in COLUMNS])
    for heading, found in groups(rows):
        here, away = _elsewhere(found)
        lines += [heading, titles, "-" * WIDTH]
        for row in here:
            lines += _line(row)
        lines += [*away, ""]
    if crossovers:
        lines += ["Against softmax attention, by length", "-" * WIDTH]
        lines += [line for crossover in crossovers for line in _told(crossover)]
        lines.append("")
    return "\n".join(lines + _legend(meta, any(row.status == "estimate" for row in rows)))


def _told(crossover: Crossover) -> list[str]:
    return textwrap.wrap(str(crossover), WIDTH, initial_indent="  ", subsequent_indent="    ")


def _legend(meta: dict[str, Any], estimated: bool) -> list[str]:
    told = [
        (
            "ms",
            f"median of {meta['repeats']} samples or less, ± half of their 20th to 80th percentile; {meta['method']}",
        ),
        ("pass", "forward: outputs; +backward: outputs and all gradients in one program"),
        ("FLOP/s", "products that the mathematics needs by the time; nothing masked or computed twice counts"),
        (
            "of floor",
            "the time by the least possible: operands and results moved once, or those products, whichever takes "
            f"longer (memory, compute). Limits: {meta['limits']}",
        ),
        ("memory", "operands, results and temporaries, as the compiler planned them"),
        ("error", f"largest difference from float64 by the largest value; {meta['error_bounds']} may be"),
    ]
    if estimated:
        told.insert(1, ("~", "an estimate, from the FLOPs and bytes of a program that was compiled and has not run"))
    width = max(len(name) for name, _ in told)
    return [
        line
        for name, what in told
        for line in textwrap.wrap(
            what, WIDTH, initial_indent=name.ljust(width + 2), subsequent_indent=" " * (width + 2)
        )
    ]
