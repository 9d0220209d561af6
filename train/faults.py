"""Does to small training runs what happens to long ones, and prints what was lost: a table of R1 to R11.

    python -m train.faults                             # about twenty minutes on two cores
    python -m train.faults --only R1 --kills 200       # an hour
    python -m train.faults --json > faults.json

Real processes train a tiny DaViT on the digits, on a CPU with eight pretended devices. They are killed at random
moments, told to stop, starved of disk and torn from one another; their checkpoints are damaged, and what they resume is
compared to the bit with what was not disturbed. Progress goes to stderr. Exit codes: 0 every figure holds, 1 one does
not, 2 the arguments are wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from train import commands

# Whether a relative norm is rounding.
ROUNDING = 1e-6
# Without batch statistics.
ACCUMULATED = ("davit_nano", "vit_nano")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        says: what has to hold.
        measure: from an empty directory and the command's arguments to figures.
        holds: whether they are as they have to be.
    """

    says: str
    measure: Callable[[pathlib.Path, argparse.Namespace], dict[str, Any]]
    holds: Callable[[dict[str, Any]], bool]


def _of(module: str, function: str, *arguments: str, **settings: Any) -> Callable[..., dict[str, Any]]:
    """A measurement of another module, which is imported only after the devices are chosen; with these arguments."""

    def measure(place: pathlib.Path, given: argparse.Namespace) -> dict[str, Any]:
        of = getattr(importlib.import_module(f"train.{module}"), function)
        return of(place, **settings, **{name: getattr(given, name) for name in arguments})

    return measure


def _starved(place: pathlib.Path, given: argparse.Namespace) -> dict[str, Any]:
    return {kind: _of("fault_runs", "starved", kind=kind)(place / kind, given) for kind in ("full", "gone")}


def _accumulated(place: pathlib.Path, given: argparse.Namespace) -> dict[str, Any]:
    measures = {name: _of("fault_checks", "accumulated", name=name) for name in ACCUMULATED}
    return {name: max(measure(place, given).values()) for name, measure in measures.items()}


def _processes(place: pathlib.Path, given: argparse.Namespace) -> dict[str, Any]:
    found = {
        str(count): _of("fault_runs", "processes", count=count)(place / str(count), given)["distance"]
        for count in (2, 4)
    }
    return {**found, "one of two killed": _of("fault_runs", "torn")(place / "torn", given)}


def _planned(place: pathlib.Path, given: argparse.Namespace) -> dict[str, Any]:
    return importlib.import_module("train.plan_all").nanos()


FIGURES = {
    "R1": Figure(
        "killed at random moments: every restart succeeds, no wrong value, at most one save lost, nothing left over",
        _of("fault_runs", "kills", "kills", "seed"),
        lambda found: found["saves_lost"] <= 1 and not (found["failed"] or found["wrong"] or found["left"]),
    ),
    "R2": Figure(
        "a flipped bit, truncation, empty or missing file or item: detected, named, passed over",
        _of("fault_checks", "damage", "places", "seed"),
        lambda found: not (found["undetected"] or found["unnamed"] or found["wrong"]) and found["restarted"],
    ),
    "R3": Figure(
        "cut at every step: bit-equal to a run without interruption",
        _of("fault_checks", "cut", total=6),
        lambda found: not found["differ"],
    ),
    "R4": Figure(
        "saved on 8 devices, restored on other meshes: bit-equal",
        _of("fault_checks", "meshes"),
        lambda found: not found["differ"],
    ),
    "R5": Figure(
        "the order of examples for 1, 2, 4 and 8 processes, also when going on with another number",
        _of("fault_checks", "order"),
        lambda found: not found["differ"],
    ),
    "R6": Figure(
        "SIGTERM twice with 1 GB of state: saved, exit code 143, within 30 s",
        _of("fault_runs", "preempted"),
        lambda found: found["saved"] and found["code"] == 143 and found["seconds"] <= 30 and found["gigabytes"] >= 1,
    ),
    "R7": Figure(
        "a full disk, a folder that is gone: the run ends within one save interval with one line, and nothing is lost",
        _starved,
        lambda found: all(
            each["code"] == 1 and each["named"] and each["intervals"] <= 2 and each["newest"] and each["restarted"]
            for each in found.values()
        ),
    ),
    "R8": Figure(
        "NaN at a step: named by the next log, and the newest checkpoint is finite",
        _of("fault_checks", "not_finite", at=(2, 3, 5, 8)),
        lambda found: not found["wrong"],
    ),
    "R9": Figure(
        "accumulation over 2, 4, 8 parts: largest distance of the gradients",
        _accumulated,
        lambda found: max(found.values()) <= ROUNDING,
    ),
    "R10": Figure(
        "one small model of every family compiles for four TPU v5e that are not there, and fits",
        _planned,
        lambda found: found["fit"] == found["planned"] == found["models"] and not found["failed"],
    ),
    "R11": Figure(
        "2 and 4 processes against one: distance of the states after a step; one killed: the other ends in a minute",
        _processes,
        lambda found: (
            max(found["2"], found["4"]) <= ROUNDING
            and found["one of two killed"]["seconds"] <= 60
            and all(found["one of two killed"][name] for name in ("codes", "named", "restarted"))
        ),
    ),
}


def campaign(only: Sequence[str], place: pathlib.Path, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measures figures one after the other.

    Returns:
        For each its `figures`, whether it `holds`, the `seconds` it took, and an `error` where it ended with one.
    """
    results = {}
    for name in only:
        print(f"{name}: {FIGURES[name].says}", file=sys.stderr, flush=True)
        begun = time.monotonic()
        where = place / name
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir(parents=True)
        found, error = {}, ""
        try:
            found = FIGURES[name].measure(where, arguments)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        holds = not error and bool(FIGURES[name].holds(found))
        results[name] = dict(holds=holds, seconds=round(time.monotonic() - begun, 1), figures=found)
        if error:
            results[name]["error"] = error
        print(f"{name}: {'holds' if holds else 'DOES NOT HOLD'} {_words(found)}{error}", file=sys.stderr, flush=True)
    return results


def _words(found: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} ({_words(value)})"
        if isinstance(value, dict)
        else f"{name.replace('_', ' ')} {value:.1e}"
        if isinstance(value, float) and value < 1e-3
        else f"{name.replace('_', ' ')} {value}"
        for name, value in found.items()
    )


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """The results as a table."""
    rows = ["| id | what has to hold | found | seconds |", "|---|---|---|---|"]
    for name, result in results.items():
        found = _words(result["figures"]) or result.get("error", "")
        mark = "" if result["holds"] else "**does not hold**: "
        rows.append(f"| {name} | {FIGURES[name].says} | {mark}{found} | {result['seconds']:.0f} |")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: its arguments; None means those of the process.

    Returns:
        The exit code: 0 every figure holds, 1 one does not, 2 the arguments are wrong.
    """
    parser = commands.parser("train.faults", __doc__)
    parser.add_argument("--only", metavar="ID,ID", help=f"some of {', '.join(FIGURES)}; default: all")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="R1: kills (default: 20)")
    parser.add_argument("--places", type=int, default=20, metavar="N", help="R2: places for each damage (default: 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments and the places")
    parser.add_argument("--workdir", metavar="DIR", help="where the runs are kept; default: a folder that is removed")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    arguments = parser.parse_args(argv)
    only = arguments.only.split(",") if arguments.only else list(FIGURES)
    if unknown := [name for name in only if name not in FIGURES]:
        parser.error(f"--only: no {', '.join(unknown)}; there are {', '.join(FIGURES)}")
    # Before jax is imported.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
        os.environ["XLA_FLAGS"] = flags.strip()
    from train import host

    host.cache_compiled_programs()
    if arguments.workdir:
        results = campaign(only, pathlib.Path(arguments.workdir).absolute(), arguments)
    else:
        with tempfile.TemporaryDirectory(prefix="faults-") as place:
            results = campaign(only, pathlib.Path(place), arguments)
    print(json.dumps(results) if arguments.json else markdown(results))
    return 0 if all(result["holds"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
