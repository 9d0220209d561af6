"""Times every attention variant against what the device can do at most, and checks it against float64.

    python -m kernels.bench --suite quick
    python -m kernels.bench --suite kernels --json rows.json
    python -m kernels.bench --suite variants --ops softmax,retention,delta --html variants.html
    python -m kernels.bench --suite quick --against rows.json
    python -m kernels.bench --suite models --json models.json
    python -m kernels.bench --suite recall --workdir runs/recall --json recall.json
    python -m kernels.bench --suite variants --recall recall.json --html variants.html

Whole models are timed, and mixers trained, by programs of the package train. Rows that are wrong have no time. Rows
that seem slower than those of --against are measured again before they are called so. The exit code is 0 if every row
that could be measured is right and, with --against, none has become slower; 1 if not; 2 says that an argument or a file
is wrong.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from kernels.bench import against, children, html, recall, rows, suites
from kernels.bench.crossover import crossovers
from kernels.bench.estimate import estimate
from kernels.bench.limits import limits
from kernels.bench.measure import Effort, Plan, measure
from kernels.bench.meta import meta
from kernels.bench.table import table
from kernels.choices import check_choice, names

EFFORTS = {"quick": Effort(7, 0.01, 1.0), "kernels": Effort(15, 0.03, 8.0), "variants": Effort(9, 0.02, 2.0)}
SUITES = (*suites.SUITES, *children.MODULES)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 3:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of samples, which is 3 or more")
    return int(text)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--suite", default="quick", metavar="NAME", help=f"one of {', '.join(SUITES)} (quick)")
    made.add_argument("--ops", type=names, default=[], metavar="A,B", help="functions, variants or models: softmax")
    made.add_argument("--size", metavar="NAME", help="small or full shapes; by default small on a CPU, else full")
    made.add_argument("--shapes", type=names, default=[], metavar="A,B", help="parts of shapes: N512 or 8192x3")
    made.add_argument("--dtypes", type=names, metavar="A,B", help="float32 (on a CPU), bfloat16 (elsewhere)")
    made.add_argument("--repeats", type=_count, metavar="N", help="samples of every row, if they do not take too long")
    made.add_argument("--json", metavar="FILE", help="all rows and how they were taken")
    made.add_argument("--csv", metavar="FILE", help="all rows")
    made.add_argument("--html", metavar="FILE", help="a page with tables to sort and with plots")
    made.add_argument("--against", metavar="OLD.json", help="an earlier run, on the same device, to compare with")
    made.add_argument("--topology", metavar="NAME", help="estimates for TPUs that are not here, such as v5e:2x2")
    made.add_argument("--workdir", metavar="DIR", help="where --suite recall keeps what it trains (runs/recall)")
    made.add_argument("--recall", metavar="RECALL.json", help="a run of --suite recall, whose scores join the rows")
    return made


def check(arguments: argparse.Namespace) -> None:
    """Raises `ValueError` for what does not go together, rather than leave any of it out."""
    suite = arguments.suite
    check_choice("suite", suite, SUITES)
    if arguments.size:
        check_choice("size", arguments.size, suites.SIZES)
    if arguments.dtypes:
        suites.checked_dtypes(arguments.dtypes)
    if arguments.workdir and suite != "recall":
        raise ValueError(f"--workdir is where --suite recall keeps what it trains; --suite {suite} trains nothing")
    if arguments.recall and suite in children.MODULES:
        raise ValueError(f"--recall joins scores to variants of attention, of which --suite {suite} has no rows")
    if arguments.topology and suite == "recall":
        raise ValueError("--topology is for estimates of speed; --suite recall trains, on the device that is here")
    for name in ("repeats", "against"):
        if arguments.topology and getattr(arguments, name):
            raise ValueError(f"--{name} is about times; with --topology nothing runs that could be timed")


def run(arguments: argparse.Namespace) -> int:
    """Measures and writes what was asked for; the exit code."""
    check(arguments)
    old = rows.read_json(arguments.against) if arguments.against else None
    scores = rows.read_json(arguments.recall)[1] if arguments.recall else None
    about, found, again = (_models if arguments.suite in children.MODULES else _cases)(arguments)
    if scores is not None:
        recall.join(found, scores)
    changes = None if old is None else _changes(found, old, again)
    crossed = crossovers(found)
    print(table(about, found, crossed))
    if arguments.json:
        rows.write_json(arguments.json, about, found)
    if arguments.csv:
        rows.write_csv(arguments.csv, found)
    if arguments.html:
        html.write_html(arguments.html, about, found, crossed)
    bad = [row for row in found if row.status in ("wrong", "failed")]
    code = 1 if bad else 0
    if changes is not None:
        code = max(code, _told(changes, about, old[0]))
    return code


Found = tuple[dict[str, Any], list[rows.Row], Callable[[Sequence[rows.Row]], list[rows.Row]]]


def _cases(arguments: argparse.Namespace) -> Found:
    """Ops: what is known of the run, its rows, and a function that measures some of them again."""
    here = "cpu" if jax.default_backend() == "cpu" and not arguments.topology else "accelerator"
    size = arguments.size or ("small" if here == "cpu" else "full")
    dtypes = suites.checked_dtypes(arguments.dtypes or ["float32" if here == "cpu" else "bfloat16"])
    cases = suites.chosen(arguments.suite, size, arguments.ops, arguments.shapes)
    effort = EFFORTS[arguments.suite]
    if arguments.repeats:
        effort = dataclasses.replace(effort, repeats=arguments.repeats)
    if arguments.topology:
        device, bounds, found = estimate(cases, dtypes, arguments.topology, _tell)
        repeats, again = 0, None
    else:
        device = jax.devices()[0]
        bounds = limits(device, dtypes)
        plan = Plan(dtypes, effort.repeats, effort.target, effort.budget, bounds)
        found, repeats = measure(cases, plan, _tell), effort.repeats

        def again(some: Sequence[rows.Row]) -> list[rows.Row]:
            keys = frozenset(row.key for row in some)
            theirs = [case for case in cases if any((case.variant, case.shape, case.pattern) == _of(r) for r in some)]
            return measure(theirs, dataclasses.replace(plan, wanted=keys), _tell)

    return meta(device, bounds, arguments.suite, size, repeats, found), found, again


def _of(row: rows.Row) -> tuple[str, str, str]:
    return row.variant, row.shape, row.pattern


def _models(arguments: argparse.Namespace) -> Found:
    """The same of whole models, which another process measures."""

    def words(ops: Sequence[str]) -> list[str]:
        given = {name: getattr(arguments, name) for name in ("size", "shapes", "dtypes", "repeats", "topology")}
        given |= {"ops": ops, "workdir": arguments.workdir}
        texts = {name: ",".join(value) if isinstance(value, list) else value for name, value in given.items() if value}
        return [word for name, text in texts.items() for word in (f"--{name}", str(text))]

    about, found = children.run(arguments.suite, words(arguments.ops))

    def again(some: Sequence[rows.Row]) -> list[rows.Row]:
        return children.run(arguments.suite, words(list(dict.fromkeys(row.op for row in some))))[1]

    return about, found, again


def _changes(found: list[rows.Row], old: tuple[dict, list[rows.Row]], again: Callable) -> list[against.Change]:
    """What differs from an earlier run; rows that were measured again take the places of the first ones."""
    changes = against.compare(found, old[1])
    if not changes:
        raise ValueError(f"no row of the earlier run, on {old[0].get('device')}, is one of this run's")

    def told(some: Sequence[rows.Row]) -> list[rows.Row]:
        _tell(f"{len(some)} rows seem slower than before and are measured again")
        return again(some)

    changes = against.confirmed(changes, told)
    taken = {change.row.key: change.row for change in changes}
    found[:] = [taken.get(row.key, row) for row in found]
    return changes


def _told(changes: Sequence[against.Change], about: dict, before: dict) -> int:
    """Prints the comparison; the exit code."""
    print(f"\nAgainst the run of {before.get('date')}, commit {before.get('commit')}: {len(changes)} rows are in both")
    slowed = against.slower_machine(about, before)
    if slowed is not None:
        print(f"  {slowed}")
    for verdict in ("slower", "lost", "faster", "found"):
        for change in changes:
            if change.verdict == verdict:
                print(f"  {verdict}: {change}")
    regressions = sum(change.is_regression for change in changes)
    print(f"  {regressions} regressions" if regressions else "  no regression")
    return 1 if regressions else 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; arguments of the process if None. Returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        return run(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
