"""Searches block sizes of the kernels on this device, and stores what is faster than the defaults.

    python -m kernels.tune --op window --budget 120

The kernels of the benchmark's `kernels` suite are traced at its shapes; every block size that one of them asks for is
doubled and halved, alone, for as long as that makes the gradient's program faster. A choice counts if it computes
what float64 computes, and is faster than the default by more than both vary. It goes into kernels/tuning.json with
its times, device and date.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any

import jax

from kernels import tuning
from kernels.bench import suites
from kernels.bench.case import Case
from kernels.bench.limits import limits
from kernels.bench.measure import Plan, measure, platform
from kernels.bench.programs import compiled_case
from kernels.bench.rows import Row

Blocks = dict[str, Any]


def uses_of(case: Case, dtype: str, implementation: str) -> list[tuning.Use]:
    """The block sizes that the kernels of a case ask for, each bucket once."""
    found: dict[str, tuning.Use] = {}
    for use in compiled_case(case, dtype, "forward+backward", implementation, "tune").uses:
        found.setdefault(json.dumps([use.op, use.shape], sort_keys=True), use)
    return list(found.values())


def neighbours(blocks: Blocks) -> Iterator[Blocks]:
    """Every size doubled and halved, alone; what is no positive integer stays."""
    for name, size in blocks.items():
        if isinstance(size, int) and not isinstance(size, bool) and size > 0:
            yield blocks | {name: 2 * size}
            if size > 1:
                yield blocks | {name: size // 2}


def search(start: Blocks, timed: Callable[[Blocks], Row], deadline: float) -> tuple[Blocks, Row, Row]:
    """The fastest blocks that steps from `start` find, each step to a faster neighbour.

    Args:
        start: the defaults.
        timed: measures a choice; its row has no time where the choice does not work.
        deadline: by `time.monotonic()`, after which nothing new is tried.

    Returns:
        The blocks, their row and that of the start.
    """
    first = timed(start)
    best, row = start, first
    tried = [start]
    improved = first.median_ms is not None
    while improved:
        improved = False
        for blocks in neighbours(best):
            if blocks in tried or time.monotonic() > deadline:
                continue
            tried.append(blocks)
            found = timed(blocks)
            if found.median_ms is not None and found.p80_ms < row.p20_ms:
                best, row, improved = blocks, found, True
                break
    return best, row, first


def tune(
    cases: Sequence[Case], dtypes: Sequence[str], budget: float, tell: Callable[[str], None] = print
) -> list[tuning.Entry]:
    """Entries for what is faster than the defaults on the default device.

    Args:
        cases: what to tune for.
        dtypes: of their operands.
        budget: seconds for all of them together.
        tell: gets a line for every bucket.
    """
    device, deadline = jax.devices()[0], time.monotonic() + budget
    plan = Plan([], 9, 0.02, 2.0, limits(device, dtypes), ("forward+backward",), with_peers=False)
    entries: dict[str, tuning.Entry] = {}
    for case in cases:
        kernels = [i for i in case.table if i.name.startswith("pallas") and platform() in i.platforms]
        for dtype, implementation in ((d, i) for d in dtypes for i in kernels):
            only = dataclasses.replace(case, table=(implementation,))
            try:
                uses = uses_of(case, dtype, implementation.name)
            except NotImplementedError as error:
                tell(f"{case.label}, {case.shape}, {dtype}: {error}")
                continue
            for use in uses:
                key = json.dumps([use.op, use.shape], sort_keys=True)
                if key in entries or time.monotonic() > deadline:
                    continue
                timed = _measured(only, dtype, plan, use)
                blocks, row, first = search(use.default, timed, deadline)
                tell(f"{use.op} {use.shape}: {blocks} {row.median_ms} ms, default {first.median_ms} ms")
                if blocks != use.default:
                    changed = {name: size for name, size in blocks.items() if size != use.default[name]}
                    entries[key] = _entry(device, use, changed, row, first)
    return list(entries.values())


def _measured(case: Case, dtype: str, plan: Plan, use: tuning.Use) -> Callable[[Blocks], Row]:
    def timed(blocks: Blocks) -> Row:
        with tuning.trying(use.op, use.shape, blocks):
            return measure([case], dataclasses.replace(plan, dtypes=[dtype]))[0]

    return timed


def _entry(device: Any, use: tuning.Use, blocks: Blocks, row: Row, first: Row) -> tuning.Entry:
    return tuning.Entry(
        device=device.device_kind.lower(),
        op=use.op,
        shape=use.shape,
        blocks=blocks,
        median_ms=round(row.median_ms, 5),
        default_ms=round(first.median_ms, 5),
        jax=metadata.version("jax"),
        date=datetime.date.today().isoformat(),
    )


def store(entries: Sequence[tuning.Entry], file: pathlib.Path = tuning.FILE) -> None:
    """Adds entries to the file; one of the same device, op and bucket is replaced."""

    def key(entry: tuning.Entry):
        return entry.device, entry.op, json.dumps(entry.shape, sort_keys=True)

    kept = {key(entry): entry for entry in (*tuning.entries(file), *entries)}
    file.write_text(json.dumps([dataclasses.asdict(kept[k]) for k in sorted(kept)], indent=1) + "\n")
    with contextlib.suppress(AttributeError):
        tuning.entries.cache_clear()


def main(argv: Sequence[str] | None = None) -> int:
    """Tunes for this device; arguments of the process if None. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--op", help="a function or variant, such as window or GLA; all by default")
    parser.add_argument("--budget", type=float, default=120.0, metavar="SECONDS", help="for all of it (120)")
    parser.add_argument("--dtypes", default="bfloat16", metavar="A,B", help="of the operands (bfloat16)")
    arguments = parser.parse_args(argv)
    try:
        cases = suites.chosen("kernels", "full", [arguments.op] if arguments.op else [])
        dtypes = suites.checked_dtypes(arguments.dtypes.split(","))
        if not any(i.name.startswith("pallas") and platform() in i.platforms for case in cases for i in case.table):
            print(f"nothing to tune: no kernel of these runs on {platform()}")
            return 0
        entries = tune(cases, dtypes, arguments.budget)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if entries:
        store(entries)
    print(f"{len(entries)} block sizes stored in {tuning.FILE}" if entries else "the defaults are as fast as any tried")
    return 0


if __name__ == "__main__":
    sys.exit(main())
