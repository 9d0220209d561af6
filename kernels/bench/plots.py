"""Plots as SVG: logarithmic axes, lines with points, and a legend below, all legible on a telephone."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from html import escape

# Told apart also without red and green (Okabe and Ito), then once more with dashes.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a6761d", "#56b4e9", "#332288", "#777777")
WIDTH, HEIGHT = 400, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 40
LEGEND_LINE = 17
# More than these do not fit into one of two columns.
LEGEND_LETTERS = 24

Number = int | float


@dataclasses.dataclass(frozen=True)
class Line:
    """Points `(x, y)` under a name; a `note` for each is shown where a pointer rests."""

    name: str
    points: Sequence[tuple[Number, Number]]
    notes: Sequence[str] = ()
    joined: bool = True


@dataclasses.dataclass(frozen=True)
class Mark:
    """A ring at a point that matters, with what it says."""

    x: Number
    y: Number
    note: str


def element(tag: str, inside: str = "", **attributes) -> str:
    """An XML element; `_` in attributes stands for a hyphen and at their end for nothing."""
    given = "".join(f' {k.rstrip("_").replace("_", "-")}="{escape(str(v))}"' for k, v in attributes.items())
    return f"<{tag}{given}>{inside}</{tag}>" if inside else f"<{tag}{given}/>"


def _text(x, y, said: str, **attributes) -> str:
    return element("text", escape(said), x=f"{x:.1f}", y=f"{y:.1f}", **attributes)


class _Axis:
    """From values to pixels, by their logarithm."""

    def __init__(self, values: Sequence[Number], start: Number, stop: Number, base: int):
        low, high = math.log(min(values)), math.log(max(values))
        margin = max(0.04 * (high - low), 0.1)
        self.low, self.high = low - margin, high + margin
        self.start, self.stop, self.base = start, stop, base

    def __call__(self, value: Number) -> float:
        share = (math.log(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Powers of the base within the axis, at most seven; if they are few, some of their multiples as well."""
        first = math.ceil(self.low / math.log(self.base) - 1e-9)
        last = math.floor(self.high / math.log(self.base) + 1e-9)
        step = max(1, -(-(last - first + 1) // 7))
        powers = [float(self.base) ** n for n in range(first, last + 1, step)]
        for multiples in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            if self.base == 10 and len(powers) < 3:
                finer = [m * 10.0**n for n in range(first - 1, last + 1) for m in multiples]
                powers = [value for value in finer if self.low <= math.log(value) <= self.high]
        return powers


class _FlatAxis(_Axis):
    """From values to pixels, in proportion, from 0 on."""

    def __init__(self, values: Sequence[Number], start: Number, stop: Number):
        self.low, self.high, self.start, self.stop = 0.0, 1.04 * max(*values, 1e-9), start, stop

    def __call__(self, value: Number) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """A quarter of a power of ten apart, or all of it."""
        step = 10.0 ** math.floor(math.log10(self.high))
        step = step / 4 if self.high < 2 * step else step
        return [step * n for n in range(int(self.high / step) + 1)]


def plot(
    title: str,
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    x_text: Callable[[Number], str],
    y_text: Callable[[Number], str],
    base: int = 10,
    marks: Sequence[Mark] = (),
    limits: Sequence[Line] = (),
    flat: bool = False,
) -> str:
    """One plot.

    Args:
        title: what it shows.
        lines: in the order of their colours; those without points are left out.
        x, y: titles of the axes.
        x_text, y_text: how a value is written at a tick.
        base: of the ticks along x.
        marks: rings.
        limits: lines in grey, without points.
        flat: whether the axis upwards is linear, from 0 on.
    """
    lines = [line for line in lines if line.points]
    points = [point for line in (*lines, *limits) for point in line.points] + [(m.x, m.y) for m in marks]
    if not points:
        return ""
    across = _Axis([p[0] for p in points], LEFT, WIDTH - RIGHT, base)
    values = [p[1] for p in points]
    up = _Axis(values, HEIGHT - BOTTOM, TOP, 10) if not flat else _FlatAxis(values, HEIGHT - BOTTOM, TOP)
    parts = [element("title", escape(title))]
    for value in across.ticks():
        at = f"{across(value):.1f}"
        parts.append(element("line", x1=at, x2=at, y1=TOP, y2=HEIGHT - BOTTOM, class_="grid"))
        parts.append(_text(across(value), HEIGHT - BOTTOM + 14, x_text(value), text_anchor="middle"))
    for value in up.ticks():
        at = f"{up(value):.1f}"
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(_text(LEFT - 4, up(value) + 4, y_text(value), text_anchor="end"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x, text_anchor="middle", class_="axis"))
    parts.append(_text(4, 10, y, class_="axis"))
    for limit in limits:
        parts.append(_path(limit.points, across, up, class_="limit"))
    for number, line in enumerate(lines):
        parts.append(_drawn(line, number, across, up))
    for mark in marks:
        ring = element("title", escape(mark.note))
        parts.append(element("circle", ring, cx=f"{across(mark.x):.1f}", cy=f"{up(mark.y):.1f}", r=6, class_="mark"))
    columns = 1 if any(len(line.name) > LEGEND_LETTERS for line in lines) else 2
    parts += [_legend(line, number, columns) for number, line in enumerate(lines)]
    height = HEIGHT + LEGEND_LINE * -(-len(lines) // columns) + 4
    return element("svg", "".join(parts), viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=title, class_="plot")


def _style(number: int) -> dict[str, str]:
    style = {"stroke": COLOURS[number % len(COLOURS)]}
    dashes = number // len(COLOURS)
    return style | ({"stroke_dasharray": ("5 3", "2 2", "8 2 2 2")[(dashes - 1) % 3]} if dashes else {})


def _path(points, across, up, **attributes) -> str:
    d = "M" + "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in points)
    return element("path", d=d, fill="none", **attributes)


def _drawn(line: Line, number: int, across, up) -> str:
    parts = []
    if line.joined and len(line.points) > 1:
        parts.append(_path(line.points, across, up, class_="line", **_style(number)))
    for i, (x, y) in enumerate(line.points):
        note = element("title", escape(line.notes[i] if line.notes else line.name))
        colour = COLOURS[number % len(COLOURS)]
        parts.append(element("circle", note, cx=f"{across(x):.1f}", cy=f"{up(y):.1f}", r=3, fill=colour))
    return "".join(parts)


def _legend(line: Line, number: int, columns: int) -> str:
    """One entry below the plot: a piece of its line or one of its points, and its name."""
    left = 8 + (number % columns) * (WIDTH / 2)
    top = HEIGHT + 6 + LEGEND_LINE * (number // columns)
    if line.joined:
        ends = dict(x1=f"{left:.1f}", x2=f"{left + 20:.1f}", y1=top - 4, y2=top - 4)
        sign = element("line", **ends, class_="line", **_style(number))
    else:
        sign = element("circle", cx=f"{left + 10:.1f}", cy=top - 4, r=3, fill=COLOURS[number % len(COLOURS)])
    return sign + _text(left + 26, top, line.name)
