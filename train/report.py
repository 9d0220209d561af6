"""A run as one page: what it was, how it learned, where its time went, what is left of it.

    python -m train.report runs/digits            # writes runs/digits/report.html

The page needs nothing else: the plots are drawn into it. It may be asked for while the run goes on. Exit codes: 0 done,
2 there is no run in the directory, or it cannot be read or written.
"""

from __future__ import annotations

import html
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from etils import epath

from train import checkpoints, commands, metrics
from zoo.formats.orbax_dir import CheckpointError
from zoo.tables import scaled

PAGE = "report.html"
# Width and height of a plot, and the room around it for the numbers.
WIDTH, HEIGHT, LEFT, BELOW = 420, 200, 56, 24
# Blue and vermilion are told apart by everyone (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# More points are drawn as means of neighbours.
MOST_POINTS = 600
DETAILS = ("_low", "_high", "_pairs", "_threshold")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .8em; border-bottom: 1px solid #ddd }
th { text-align: left } td + td { text-align: right } figure { display: inline-block; margin: 0 1em 1em 0 }
figcaption { font-weight: 600 } svg text { font: 11px system-ui, sans-serif; fill: #555 } pre { overflow-x: auto }
"""


def read_lines(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The whole lines of `metrics.jsonl`.

    Raises:
        ValueError: there are none.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"there is no run in {workdir}: {path} does not exist")
    found = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    if not found:
        raise ValueError(f"{path} has no lines yet")
    return [json.loads(line) for line in found]


def series(lines: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, int | float]]]:
    """Step and value of every metric that is a number, in the order of the lines; what is not finite is left out."""
    found: dict[str, list[tuple[int, int | float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and value is not None:
                found.setdefault(name, []).append((line["step"], value))
    return found


def seconds(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds of each phase, and those of work done twice, summed over the processes that trained one after another."""
    total: dict[str, float] = {}
    last: dict[str, Any] = {}
    timed = [line for line in lines if any(name.startswith("seconds/") for name in line)]
    for line in [*timed, {}]:
        # A process counts from zero: where the sum falls, another one began.
        if last and _wall(line) < _wall(last):
            for name in metrics.PHASES:
                total[name] = total.get(name, 0.0) + last.get(f"seconds/{name}", 0.0)
            lost = last.get("goodput/lost", 0.0) * _wall(last)
            total["lost"] = total.get("lost", 0.0) + lost
            total["step"] -= lost
        last = line
    return total


def _wall(line: dict[str, Any]) -> float:
    return sum(line.get(f"seconds/{name}", 0.0) for name in metrics.PHASES)


def plot(title: str, curves: dict[str, list[tuple[int, int | float]]]) -> str:
    """Curves over the step as SVG, on a logarithmic scale where all values are positive and differ a hundredfold."""
    values = [value for curve in curves.values() for _, value in curve]
    steps = [step for curve in curves.values() for step, _ in curve]
    log = min(values) > 0 and max(values) / min(values) >= 100
    scale = math.log10 if log else float
    low, high = scale(min(values)), scale(max(values))
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - margin * (not log), high + margin * (not log)
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def at(step: int | float, value: int | float) -> str:
        x = LEFT + (step - first) / (last - first) * (WIDTH - LEFT - 8)
        return f"{x:.1f},{8 + (high - scale(value)) / ((high - low) or 1) * (HEIGHT - BELOW - 8):.1f}"

    parts = []
    for index in range(5):
        level = low + index / 4 * (high - low)
        y = 8 + (1 - index / 4) * (HEIGHT - BELOW - 8)
        shown = f"{10**level if log else level:.3g}"
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{shown}</text>')
    for step, anchor in ((first, "start"), (last, "end")):
        x = at(step, min(values)).partition(",")[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - 8}" text-anchor="{anchor}">{step:,}</text>')
    for (name, curve), colour in zip(curves.items(), COLOURS):
        points = " ".join(at(*point) for point in _thinned(curve))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
            if len(curve) > 1
            else '<circle cx="{}" cy="{}" r="3" fill="{}"/>'.format(*points.split(","), colour)
        )
        if len(curves) > 1:
            y = 20 + 13 * list(curves).index(name)
            parts.append(
                f'<text x="{WIDTH - 12}" y="{y}" text-anchor="end" style="fill: {colour}">{html.escape(name)}</text>'
            )
    return (
        f'<figure><figcaption>{html.escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img">{"".join(parts)}</svg></figure>'
    )


def _thinned(curve: list[tuple[int, int | float]]) -> list[tuple[float, ...]]:
    size = -(-len(curve) // MOST_POINTS)
    groups = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [tuple(sum(part) / len(group) for part in zip(*group)) for group in groups]


def _table(rows: Sequence[Sequence[Any]], head: Sequence[str] = ()) -> str:
    def row(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + (row(head, "th") if head else "") + "".join(row(cells, "td") for cells in rows) + "</table>"


def page(workdir: epath.PathLike) -> str:
    """The page of a run.

    Raises:
        ValueError: there is no run, or it has not logged anything yet.
        OSError: it cannot be read.
    """
    workdir = epath.Path(workdir)
    lines = read_lines(workdir)
    found = series(lines)
    config = json.loads((workdir / "config.json").read_text()) if (workdir / "config.json").exists() else {}
    last = lines[-1]["step"]
    name = config.get("model", {}).get("name", workdir.name)
    where = f"{workdir}: step {last:,}" + (f" of {config['total_steps']:,}" if "total_steps" in config else "")
    parts = [f"<h1>{html.escape(name)}</h1>", f"<p>{html.escape(where)}</p>"]

    evaluated = {key: curve for key, curve in found.items() if key.startswith("eval/") and not key.endswith(DETAILS)}
    if evaluated:
        best = [max, min]
        rows = [
            (key.removeprefix("eval/"), f"{curve[-1][1]:.6g}", f"{best['loss' in key](v for _, v in curve):.6g}")
            for key, curve in evaluated.items()
        ]
        parts += ["<h2>Evaluation</h2>", _table(rows, ("metric", "last", "best"))]
    parts.append("<h2>Training</h2>")
    losses = {key: found[key] for key in found if key.endswith("loss") and key.startswith(("train/", "eval/"))}
    groups = [("loss", losses), ("accuracy", {key: found[key] for key in found if key.endswith("accuracy")})]
    grouped = {key for _, group in groups for key in group}
    single = [key for key in found if key.startswith("train/") and key not in grouped]
    speed = [key for key in found if key.endswith("_per_second") or key == "mfu" or key.startswith("memory/")]
    groups += [(key, {key: found[key]}) for key in single + speed]
    parts += [plot(title, curves) for title, curves in groups if curves]

    if spent := seconds(lines):
        whole = sum(spent.values())
        rows = [
            (phase, f"{value:.1f}", f"{value / whole:.1%}" if whole else "")
            for phase, value in sorted(spent.items(), key=lambda item: -item[1])
        ]
        words = "Useful are the steps; lost is work that was done again after a restart."
        parts += ["<h2>Time</h2>", f"<p>{words}</p>", _table(rows, ("phase", "seconds", "share"))]
    try:
        _, steps = checkpoints.find(workdir)
        rows = [(step.step, f"{scaled(step.size)}B", step.state) for step in steps]
        parts += ["<h2>Checkpoints</h2>", _table(rows, ("step", "size", "state"))]
    except CheckpointError:
        parts.append("<p>There are no checkpoints.</p>")
    parts += ["<h2>Config</h2>", f"<pre>{html.escape(json.dumps(config, indent=1))}</pre>"]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(name)}</title>'
    return f"{head}<style>{STYLE}</style>" + "\n".join(parts) + "</html>\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: its arguments; None means those of the process.

    Returns:
        The exit code: 0 done, 2 there is no run, or it cannot be read or written.
    """
    parser = commands.parser("train.report", __doc__)
    parser.add_argument("workdir", metavar="WORKDIR", help="directory of a run")
    parser.add_argument("--out", metavar="FILE", help=f"where the page goes; default: WORKDIR/{PAGE}")
    arguments = parser.parse_args(argv)
    out = epath.Path(arguments.out) if arguments.out else epath.Path(arguments.workdir) / PAGE
    try:
        out.write_text(page(arguments.workdir))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
