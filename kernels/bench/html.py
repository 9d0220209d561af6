"""The page: plots and tables in one file that asks no network for anything."""

import pathlib
from collections.abc import Sequence
from html import escape
from typing import Any

from kernels.bench import recall, text
from kernels.bench.crossover import SOFTMAX, Crossover
from kernels.bench.plots import Line, Mark, element, plot
from kernels.bench.rows import Row
from kernels.bench.table import HEADINGS, groups

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1280px; padding: 12px; color: #1a1a1a; }
h1 { font-size: 1.4em; margin: .3em 0; }
h2 { font-size: 1.15em; margin: 1.6em 0 .4em; }
h3 { font-size: 1em; margin: 1.2em 0 .3em; overflow-wrap: anywhere; }
p, li, dd { max-width: 75ch; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1em 1em; margin: .5em 0; }
dt { color: #555; }
dd { margin: 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); gap: 16px; }
figure { margin: 0; border: 1px solid #ddd; border-radius: 6px; padding: 8px; }
figcaption { font-weight: 600; margin-bottom: 4px; }
svg.plot { width: 100%; height: auto; display: block; }
svg text { font: 11.5px system-ui, sans-serif; fill: #333; }
svg .axis { fill: #555; }
svg .grid { stroke: #e4e4e4; }
svg .line { stroke-width: 1.8; }
svg .limit { stroke: #777; stroke-width: 1.4; stroke-dasharray: 6 3; }
svg .mark { fill: none; stroke: #000; stroke-width: 1.6; pointer-events: all; }
.wide { overflow-x: auto; border: 1px solid #ddd; border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 4px 8px; text-align: left; border-bottom: 1px solid #eee; white-space: nowrap; }
th { background: #f6f6f6; cursor: pointer; }
th[aria-sort=ascending]::after { content: " \\2191"; }
th[aria-sort=descending]::after { content: " \\2193"; }
td.number { text-align: right; }
td:first-child, th:first-child { position: sticky; left: 0; background: #fff; }
th:first-child { background: #f6f6f6; }
td.reason { white-space: normal; min-width: 220px; color: #8a1c1c; }
tr.away td.reason { color: #666; }
@media (max-width: 600px) {
  body { padding: 8px; } dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .4em; }
  th, td { padding: 4px 6px; font-size: 13px; } .fine { display: none; } }
"""
# A click on a column's title sorts by it, another one the other way round; what has no value stays below.
SCRIPT = """
document.querySelectorAll('th').forEach(function (th) {
  function sort() {
    var table = th.closest('table'), body = table.tBodies[0], column = th.cellIndex;
    var up = th.getAttribute('aria-sort') !== 'ascending';
    table.querySelectorAll('th').forEach(function (other) { other.removeAttribute('aria-sort'); });
    th.setAttribute('aria-sort', up ? 'ascending' : 'descending');
    var rows = Array.prototype.slice.call(body.rows).map(function (row) {
      var cell = row.cells[column], value = cell.getAttribute('data-value');
      return [value === null ? cell.textContent.trim() : value, row];
    });
    rows.sort(function (a, b) {
      if (a[0] === '' || b[0] === '') { return (a[0] === '' ? 1 : 0) - (b[0] === '' ? 1 : 0); }
      var x = parseFloat(a[0]), y = parseFloat(b[0]);
      var order = isNaN(x) || isNaN(y) ? a[0].localeCompare(b[0]) : x - y;
      return up ? order : -order;
    });
    rows.forEach(function (pair) { body.appendChild(pair[1]); });
  }
  th.tabIndex = 0;
  th.addEventListener('click', sort);
  th.addEventListener('keydown', function (event) { if (event.key === 'Enter') { sort(); } });
});
"""
# Title, value to sort by, text, whether it is a number, whether a narrow screen goes without.
COLUMNS = (
    ("variant", lambda r: r.label, lambda r: r.label, False, False),
    ("by", lambda r: r.implementation, lambda r: r.implementation, False, False),
    ("pass", lambda r: r.direction, lambda r: text.PASS[r.direction], False, False),
    ("ms", lambda r: r.median_ms or r.estimate_ms, text.milliseconds, True, False),
    (
        "20 to 80 %",
        lambda r: r.p20_ms,
        lambda r: "" if r.p20_ms is None else f"{r.p20_ms:.3g} to {r.p80_ms:.3g}",
        True,
        True,
    ),
    ("call alone, ms", lambda r: r.wall_ms, lambda r: "" if r.wall_ms is None else f"{r.wall_ms:.3g}", True, True),
    (
        "FLOP/s",
        lambda r: r.flops_per_s,
        lambda r: "" if r.flops_per_s is None else text.amount(r.flops_per_s),
        True,
        False,
    ),
    ("times floor", lambda r: r.times_floor, text.floor, True, False),
    (
        "memory",
        lambda r: r.peak_bytes,
        lambda r: "" if r.peak_bytes is None else text.amount(r.peak_bytes, "B"),
        True,
        False,
    ),
    (
        "kept",
        lambda r: r.residual_bytes,
        lambda r: "" if r.residual_bytes is None else text.amount(r.residual_bytes, "B"),
        True,
        True,
    ),
    (
        "state",
        lambda r: r.state_bytes,
        lambda r: "" if r.state_bytes is None else text.amount(r.state_bytes, "B"),
        True,
        True,
    ),
    ("compile, s", lambda r: r.compile_s, lambda r: "" if r.compile_s is None else f"{r.compile_s:.1f}", True, True),
    ("error", lambda r: r.error, text.error, True, False),
    ("bits", lambda r: r.bit_equal, lambda r: {None: "", True: "equal", False: "differ"}[r.bit_equal], False, True),
    ("", lambda r: r.status, lambda r: _reason(r), False, False),
)


def _reason(row: Row) -> str:
    if row.status == "ok":
        return row.reason or ""
    return row.status if row.reason is None else f"{row.status}: {row.reason}"


def write_html(path: str, meta: dict[str, Any], rows: Sequence[Row], crossovers: Sequence[Crossover]) -> None:
    pathlib.Path(path).write_text(page(meta, rows, crossovers), encoding="utf-8")


def page(meta: dict[str, Any], rows: Sequence[Row], crossovers: Sequence[Crossover]) -> str:
    """The whole document, well-formed XML too."""
    title = f"Attention benchmark: {meta['suite']}, {meta['device']}"
    head = element("meta", charset="utf-8") + element(
        "meta", name="viewport", content="width=device-width, initial-scale=1"
    )
    head += element("title", escape(title)) + element("style", STYLE)
    body = element("h1", escape(title)) + _about(meta)
    figures = [*_lengths(rows, crossovers), *_rooflines(meta, rows)]
    figures += [_figure(title, drawn) for title, drawn in recall.figures(rows)]
    body += element("div", "".join(figures), class_="plots") if figures else ""
    if crossovers:
        body += element("h2", "Against softmax attention, by length") + _crossings(crossovers)
    body += element("h2", "All rows") + element("p", "A click on a column's title sorts by it.")
    columns = (*COLUMNS[:-1], *recall.page_columns(rows), COLUMNS[-1])
    body += "".join(element("h3", escape(heading)) + _table(found, columns) for heading, found in groups(rows))
    body += element("script", SCRIPT)
    return "<!DOCTYPE html>\n" + element("html", element("head", head) + element("body", body), lang="en") + "\n"


def _about(meta: dict[str, Any]) -> str:
    told = {
        "measured": f"{meta['date']}, commit {meta['commit']}, jax {meta['jax']}, Python {meta['python']}",
        "host": f"{meta['host']}, {meta['cores']} cores",
        "times": f"median of {meta['repeats']} samples or less; {meta['method']}"
        if meta["repeats"]
        else meta["method"],
        "floor": f"operands and results moved once, or the products that are needed, at {meta['limits']}",
        "errors": meta["error_bounds"]
        and f"from float64, by the largest value; a row beyond {meta['error_bounds']} has no time",
        "peers": "; ".join(f"{name}: {version}" for name, version in meta["peers"].items()),
    }
    told = {name: what for name, what in told.items() if what}
    return element("dl", "".join(element("dt", name) + element("dd", escape(what)) for name, what in told.items()))


def _table(rows: Sequence[Row], columns: Sequence[tuple]) -> str:
    def cell(row, value, said, is_number, is_fine, is_reason):
        kinds = [name for name, is_it in (("number", is_number), ("fine", is_fine), ("reason", is_reason)) if is_it]
        found = value(row)
        attributes = {"class_": " ".join(kinds)} if kinds else {}
        # An element without content would not be closed in HTML.
        return element("td", escape(said(row)) or " ", data_value="" if found is None else found, **attributes)

    titles = "".join(element("th", title or " ", **({"class_": "fine"} if fine else {})) for title, *_, fine in columns)
    lines = []
    for row in rows:
        cells = (cell(row, *column[1:], is_reason=column is columns[-1]) for column in columns)
        lines.append(element("tr", "".join(cells), **({"class_": "away"} if row.status == "not measured" else {})))
    table = element("table", element("thead", element("tr", titles)) + element("tbody", "".join(lines)))
    return element("div", table, class_="wide")


def _crossings(crossovers: Sequence[Crossover]) -> str:
    """A line per variant and implementation, a column per direction and dtype."""
    kinds = list(dict.fromkeys((c.direction, c.dtype) for c in crossovers))
    told: dict[tuple[str, str], dict[tuple[str, str], Crossover]] = {}
    for c in crossovers:
        told.setdefault((c.variant, c.implementation), {})[c.direction, c.dtype] = c
    titles = ("variant", "by", *(f"{direction}, {dtype}" for direction, dtype in kinds))
    lines = []
    for (variant, implementation), found in told.items():
        cells = element("td", escape(variant)) + element("td", escape(implementation))
        for kind in kinds:
            cells += element("td", escape(found[kind].verdict) if kind in found else " ")
        lines.append(element("tr", cells))
    head = element("tr", "".join(element("th", title) for title in titles))
    table = element("table", element("thead", head) + element("tbody", "".join(lines)))
    return element("div", table, class_="wide")


def _figure(title: str, drawn: str) -> str:
    return element("figure", element("figcaption", escape(title)) + drawn) if drawn else ""


def _lengths(rows: Sequence[Row], crossovers: Sequence[Crossover]) -> list[str]:
    """Time and memory against length, one figure for causal and one for noncausal attention."""
    sweep = [row for row in rows if row.length is not None and row.median_ms is not None and row.family != "part"]
    figures = []
    for pattern, direction, dtype in dict.fromkeys((r.pattern, r.direction, r.dtype) for r in sweep):
        found = [r for r in sweep if (r.pattern, r.direction, r.dtype) == (pattern, direction, dtype)]
        named = dict.fromkeys((r.variant, r.implementation) for r in found)
        curves = {}
        for variant, implementation in named:
            of_one = [r for r in found if (r.variant, r.implementation) == (variant, implementation)]
            if len({r.length for r in of_one}) > 1:
                name = variant if implementation == "xla" else f"{variant} ({implementation})"
                curves[name] = sorted(of_one, key=lambda r: r.length)
        if not curves:
            continue
        here = [c for c in crossovers if (c.direction, c.dtype) == (direction, dtype) and c.length is not None]
        what = f"{pattern}, {direction}, {dtype}"
        for title, value, unit, marks in (
            (f"Time by length: {what}", lambda r: r.median_ms, "ms", _marks(curves, here)),
            (f"Memory by length: {what}", lambda r: r.peak_bytes, "bytes", []),
        ):
            lines = [
                Line(
                    name,
                    [(r.length, value(r)) for r in curve if value(r)],
                    [f"{name}, {r.length} tokens: {value(r):.4g} {unit}" for r in curve if value(r)],
                )
                for name, curve in curves.items()
            ]
            drawn = plot(
                title,
                lines,
                x="tokens" + (" (ring: where a variant crosses softmax)" if marks else ""),
                y=unit,
                x_text=lambda v: f"{v:.0f}",
                y_text=text.amount,
                base=2,
                marks=marks,
            )
            figures.append(_figure(title, drawn))
    return figures


def _marks(curves: dict[str, list[Row]], crossovers: Sequence[Crossover]) -> list[Mark]:
    softmax = [(r.length, r.median_ms) for name, curve in curves.items() if name == SOFTMAX for r in curve]
    labels = {(r.label, r.implementation) for curve in curves.values() for r in curve}
    marks = []
    for crossover in crossovers:
        if (crossover.variant, crossover.implementation) not in labels:
            continue
        for (a, low), (b, high) in zip(softmax, softmax[1:]):
            if a <= crossover.length <= b:
                y = low * (high / low) ** ((crossover.length - a) / (b - a))
                marks.append(Mark(crossover.length, y, str(crossover)))
    return marks


def _rooflines(meta: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """Every row with a time, under what the device can do."""
    figures = []
    for dtype, rate in meta["rates"].items():
        found = [r for r in rows if r.dtype == dtype and r.flops_per_s]
        if not found:
            continue
        lines = []
        for family in dict.fromkeys(r.family for r in found):
            of_family = [r for r in found if r.family == family]
            points = [(r.flops / r.bytes, r.flops_per_s) for r in of_family]
            notes = [f"{r.label}, {r.implementation}, {r.direction}, {r.shape}: {text.floor(r)}" for r in of_family]
            lines.append(Line(HEADINGS[family], points, notes, joined=False))
        intensities = [x for line in lines for x, _ in line.points]
        ridge = rate / meta["bandwidth"]
        low, high = min(*intensities, ridge) / 1.5, max(*intensities, ridge) * 1.5
        roof = Line("limit", [(low, low * meta["bandwidth"]), (ridge, rate), (high, rate)])
        title = f"Roofline, {dtype}: what was reached of what the device can do"
        drawn = plot(
            title,
            lines,
            x="FLOPs per byte that has to be moved",
            y="FLOP/s",
            x_text=text.short,
            y_text=text.amount,
            limits=[roof],
        )
        figures.append(_figure(title, drawn))
    return figures
