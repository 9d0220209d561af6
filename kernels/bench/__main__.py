"""Times every attention variant against what the device can do at most, and checks it against float64.

    python -m kernels.bench --suite quick
    python -m kernels.bench --suite kernels --json rows.json
    python -m kernels.bench --suite variants --ops softmax,retention,delta --html variants.html
    python -m kernels.bench --suite quick --against rows.json

Rows that are wrong have no time. The exit code is 0 if every row that could be measured is right and, with --against,
none has become slower; 1 if not; 2 says that an argument or a file is wrong.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

import jax

from kernels.bench import against, html, rows, suites
from kernels.bench.crossover import crossovers
from kernels.bench.estimate import estimate
from kernels.bench.limits import limits
from kernels.bench.measure import Plan, measure
from kernels.bench.meta import meta
from kernels.bench.table import table


@dataclasses.dataclass(frozen=True)
class Effort:
    """Samples of a row, seconds of the shorter half of a sample, seconds after which three samples will do."""

    repeats: int
    target: float
    budget: float


EFFORTS = {"quick": Effort(7, 0.01, 1.0), "kernels": Effort(15, 0.03, 8.0), "variants": Effort(9, 0.02, 2.0)}


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


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
    made.add_argument("--suite", default="quick", metavar="NAME", help=f"one of {', '.join(suites.SUITES)} (quick)")
    made.add_argument("--ops", type=_names, default=[], metavar="A,B", help="functions or variants: softmax,GLA")
    made.add_argument("--size", metavar="NAME", help="small or full shapes; by default small on a CPU, else full")
    made.add_argument("--shapes", type=_names, default=[], metavar="A,B", help="parts of shapes: N512 or 8192x3")
    made.add_argument("--dtypes", type=_names, metavar="A,B", help="float32 (on a CPU), bfloat16 (elsewhere)")
    made.add_argument("--repeats", type=_count, metavar="N", help="samples of every row, if they do not take too long")
    made.add_argument("--json", metavar="FILE", help="all rows and how they were taken")
    made.add_argument("--csv", metavar="FILE", help="all rows")
    made.add_argument("--html", metavar="FILE", help="a page with tables to sort and with plots")
    made.add_argument("--against", metavar="OLD.json", help="an earlier run, on the same device, to compare with")
    made.add_argument("--topology", metavar="NAME", help="estimates for TPUs that are not here, such as v5e:2x2")
    return made


def run(arguments: argparse.Namespace) -> int:
    """Measures and writes what was asked for; the exit code."""
    old = rows.read_json(arguments.against) if arguments.against else None
    here = "cpu" if jax.default_backend() == "cpu" and not arguments.topology else "accelerator"
    size = arguments.size or ("small" if here == "cpu" else "full")
    dtypes = suites.checked_dtypes(arguments.dtypes or ["float32" if here == "cpu" else "bfloat16"])
    cases = suites.chosen(arguments.suite, size, arguments.ops, arguments.shapes)
    effort = EFFORTS[arguments.suite]
    if arguments.repeats:
        effort = dataclasses.replace(effort, repeats=arguments.repeats)

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if arguments.topology:
        device, bounds, found = estimate(cases, dtypes, arguments.topology, tell)
    else:
        device = jax.devices()[0]
        bounds = limits(device, dtypes)
        plan = Plan(dtypes, effort.repeats, effort.target, effort.budget, bounds)
        found = measure(cases, plan, tell)
    about = meta(device, bounds, arguments.suite, size, effort.repeats, found)
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
    if old is not None:
        code = max(code, _compare(found, *old))
    return code


def _compare(found: list[rows.Row], before: dict, old: list[rows.Row]) -> int:
    changes = against.compare(found, old)
    if not changes:
        raise ValueError(f"no row of the earlier run, on {before.get('device')}, is one of this run's")
    print(f"\nAgainst the run of {before.get('date')}, commit {before.get('commit')}: {len(changes)} rows are in both")
    for verdict in ("slower", "lost", "faster", "found"):
        for change in changes:
            if change.verdict == verdict:
                print(f"  {verdict}: {change}")
    regressions = sum(change.is_regression for change in changes)
    print(f"  {regressions} regressions" if regressions else "  no regression")
    return 1 if regressions else 0


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
