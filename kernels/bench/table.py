"""The table in the terminal: a hundred columns, a block for every shape."""

import functools
import itertools
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from kernels.bench import recall, text
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
    "image model": "Models of images",
    "language model": "Models of sequences",
    "recall": "Recall after training",
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
# Of whole models: longer names, what they do in a second, and no errors.
MODEL_COLUMNS = (
    ("", 25, False, lambda row: row.label),
    COLUMNS[1],
    *COLUMNS[2:6],
    ("per s", 8, True, recall.rate),
    ("of floor", 10, True, lambda row: text.floor(row).replace("memory", "mem").replace("compute", "comp")),
    COLUMNS[7],
)
MODELS = ("image model", "language model")
# Of variants whose recall is known, in the place of their FLOP/s.
SCORED_COLUMNS = (
    *COLUMNS[:5],
    ("MQAR, %", 7, True, lambda row: "" if row.mqar is None else f"{100 * row.mqar:.1f}"),
    *COLUMNS[6:],
)
# Of what was trained, with less of its speed.
RECALL_COLUMNS = (
    ("", 20, False, lambda row: row.label),
    COLUMNS[2],
    ("MQAR, %", 17, True, lambda row: recall.score(row, "mqar")),
    ("passkey, %", 17, True, lambda row: recall.score(row, "passkey")),
    ("state", 9, True, lambda row: _state(row)),
    *COLUMNS[3:5],
    ("per s", 7, True, recall.rate),
)
Columns = Sequence[tuple[str, int, bool, Callable[[Row], str]]]


def _state(row: Row) -> str:
    """Its bytes, marked where they are not those of most."""
    if row.state_bytes is None:
        return ""
    return text.amount(row.state_bytes, "B") + ("  " if row.equal_state else " *")


def _columns(rows: Sequence[Row]) -> Columns:
    """What the rows of a group say."""
    family = rows[0].family
    if family in MODELS:
        return MODEL_COLUMNS
    if family == "recall":
        return RECALL_COLUMNS
    return COLUMNS if all(row.mqar is None for row in rows) else SCORED_COLUMNS


def _cells(values: Sequence[str], columns: Columns) -> str:
    line = " ".join(
        value[:width].rjust(width) if right else value[:width].ljust(width)
        for value, (_, width, right, _) in zip(values, columns)
    )
    return line.rstrip()


def _line(row: Row, columns: Columns) -> list[str]:
    """A row; what was not timed says why instead of its time."""
    if row.status in ("ok", "estimate"):
        marks = [] if row.bit_equal in (True, None) else ["    runs differ in bits"]
        if row.status == "ok" and row.reason is not None:
            marks += textwrap.wrap(row.reason, WIDTH, initial_indent="    ", subsequent_indent="    ")
        return [_cells([value(row) for *_, value in columns], columns), *marks]
    before = 1 + next(place for place, (title, *_) in enumerate(columns) if title == "pass")
    named = _cells([value(row) for *_, value in columns[:before]], columns)
    said = row.status if row.reason is None else f"{row.status}: {row.reason}"
    if row.status == "wrong":
        said = f"WRONG, no time given: {row.reason}"
    indent = sum(width + 1 for _, width, _, _ in columns[:before])
    first, *rest = textwrap.wrap(said, WIDTH - indent) or [""]
    return [named.ljust(indent - 1) + " " + first, *(" " * indent + line for line in rest)]


def _order(names: Sequence[str], row: Row) -> tuple[Any, ...]:
    """The fastest first in each direction; of models one after the other; of what was trained, who recalls best."""
    if row.family in MODELS:
        return names.index(row.op), row.direction, text.speed(row)
    if row.family == "recall":
        return row.direction != "training", -(row.mqar or 0.0)
    return row.direction, text.speed(row)


def groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows that stand together under a heading, in the order of `_order`."""
    order = {row.family: None for row in rows}
    found = []
    for family in order:
        of_family = [row for row in rows if row.family == family]
        kinds = dict.fromkeys((row.shape, row.dtype) for row in of_family)
        for shape, dtype in kinds:
            together = [row for row in of_family if (row.shape, row.dtype) == (shape, dtype)]
            names = list(dict.fromkeys(row.op for row in together))
            together.sort(key=functools.partial(_order, names))
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
    for heading, found in groups(rows):
        here, away = _elsewhere(found)
        columns = _columns(found)
        lines += [heading, _cells([title for title, *_ in columns], columns), "-" * WIDTH]
        for row in here:
            lines += _line(row, columns)
        lines += [*away, ""]
    if crossovers:
        lines += ["Against softmax attention, by length", "-" * WIDTH]
        lines += [line for crossover in crossovers for line in _told(crossover)]
        lines.append("")
    return "\n".join(lines + _legend(meta, rows))


def _told(crossover: Crossover) -> list[str]:
    return textwrap.wrap(str(crossover), WIDTH, initial_indent="  ", subsequent_indent="    ")


def _legend(meta: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    families = {row.family for row in rows}
    of_ops = families - {*MODELS, "recall"}
    told = []
    if meta["repeats"]:
        samples = f"median of {meta['repeats']} samples or less, ± half of their 20th to 80th percentile"
        told.append(("ms", f"{samples}; {meta['method']}"))
    if any(row.status == "estimate" for row in rows):
        told.append(("~", "an estimate, from the FLOPs and bytes of a program that was compiled and has not run"))
    if of_ops:
        told.append(("pass", "forward: outputs; +backward: outputs and all gradients in one program"))
    else:
        told.append(("pass", "inference: outputs; training: a step with its gradients and its update"))
        told.append(("per s", "images or tokens by the time"))
    if any(row.mqar is not None for row in rows):
        told.append(("MQAR", "values told right for keys that were given before, mean of seeds (worst..best)"))
        told.append(("passkey", "digits told right of a key that noise hides, likewise; state: what a decoder carries"))
        told.append(("*", "the state is not as large as that of most, so that these are not compared at equal state"))
    if families - {"recall"}:
        told.append(
            ("FLOP/s", "products that the mathematics needs by the time; nothing masked or computed twice counts")
        )
        told.append(
            (
                "of floor",
                "the time by the least possible: operands and results moved once, or those products, whichever takes "
                f"longer (memory, compute). Limits: {meta['limits']}",
            )
        )
        told.append(("memory", "operands, results and temporaries, as the compiler planned them"))
    if of_ops:
        told.append(("error", f"largest difference from float64 by the largest value; {meta['error_bounds']} may be"))
    width = max(len(name) for name, _ in told)
    return [
        line
        for name, what in told
        for line in textwrap.wrap(
            what, WIDTH, initial_indent=name.ljust(width + 2), subsequent_indent=" " * (width + 2)
        )
    ]
