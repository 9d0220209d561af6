"""Pages that show what a model attends to: every picture with the maps of each stage's last block drawn over it."""

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from zoo import panels
from zoo.panels import Frame
from zoo.watch import ChannelMap, DenseMap, LinearMap, RoutedMap, WindowMap

INK, MUTED, RULE, PAPER = "#15181f", "#626a78", "#d4d8df", "#ffffff"
WIDTH, MARGIN, GAP = 1600, 52, 24
# Widths of panels are multiples of STEP: 7, 14 or 28 tokens a side then have whole pixels.
STEP, WIDEST = 28, 448
# Pages of no more panels than this have them side by side, others a column for every stage.
IN_A_ROW = 4
HEADING, TITLE, BAR, NUMBERS, BETWEEN = 64, 26, 14, 24, 30


@dataclasses.dataclass(frozen=True)
class Subject:
    """A picture of the page.

    Attributes:
        pixels: what the model saw, at any resolution.
        name: written over it.
        lines: written under it, what the model made of it: texts with their shares of 1, best first.
    """

    pixels: UInt8[np.ndarray, "h w c"]
    name: str = ""
    lines: Sequence[tuple[str, float]] = ()


@dataclasses.dataclass(frozen=True)
class Stage:
    """The last block with attention of a stage; both counted from 1, as papers do."""

    number: int
    block: int
    maps: tuple[Any, ...]

    @property
    def shows_received(self) -> bool:
        """Whether there is a panel of what tokens receive beside that of the one kind of attention."""
        return len(self.maps) == 1 and not isinstance(self.maps[0], ChannelMap)


@dataclasses.dataclass(frozen=True)
class Panel:
    """A picture with what is written around it: a title above, a scale below."""

    title: str
    image: Image.Image
    low: str
    high: str
    colours: tuple[str, ...] = panels.INFERNO


@dataclasses.dataclass(frozen=True)
class Column:
    """Panels under one another with a heading of two lines."""

    heading: str
    about: str
    panels: tuple[Panel, ...]


def attention_page(
    subjects: Sequence[Subject],
    maps: Mapping[str, Any],
    *,
    title: str,
    subtitle: str = "",
    token: tuple[float, float] = (0.5, 0.5),
) -> Image.Image:
    """One section per picture: the picture, and a panel per stage and kind of attention in the stage's last block.

    Where blocks have one kind of attention, a second row shows how much every token is attended to.

    Args:
        subjects: the pictures, in the order of the maps' batch.
        maps: what `zoo.attention_maps` returns for them.
        title, subtitle: at the head of the page.
        token: row and column, from 0 to 1, of the place whose token is the query.

    Returns:
        An RGB image, 1600 pixels wide.

    Raises:
        ValueError: if there is no map of a stage, or a coordinate is not from 0 to 1.
    """
    if len(token) != 2 or not all(0 <= place <= 1 for place in token):
        raise ValueError(f"token must be a (row, column), both from 0 to 1, got {token}")
    stages = _stages(maps)
    if not stages:
        raise ValueError("maps holds none of a stage (paths as 'stages_0_0/...'): there is nothing to draw")
    count = sum(len(stage.maps) + stage.shows_received for stage in stages)
    in_a_row = count <= IN_A_ROW
    columns = 1 + (count if in_a_row else len(stages))
    width = min((WIDTH - 2 * MARGIN - (columns - 1) * GAP) // columns // STEP * STEP, WIDEST)
    lefts = [round(left) for left in np.linspace(MARGIN, WIDTH - MARGIN - width, columns)]
    parts = [_head(title, subtitle)]
    for index, subject in enumerate(subjects):
        frame = Frame(subject.pixels, width, token)
        parts.append(_section(subject, _columns(stages, frame, index, in_a_row), frame, lefts))
    parts.append(_foot(stages))
    page = Image.new("RGB", (WIDTH, sum(part.height for part in parts)), PAPER)
    top = 0
    for part in parts:
        page.paste(part, (0, top))
        top += part.height
    return page


def last_blocks(maps: Mapping[str, Any]) -> dict[str, Any]:
    """Of the maps of every stage those of its last block with attention, which are what a page shows."""
    places = {path: _place(path) for path in maps if _place(path)}
    last = dict(sorted(places.values()))
    return {path: maps[path] for path, (stage, block) in places.items() if last[stage] == block}


def _place(path: str) -> tuple[int, int] | None:
    """Stage and block of a path, counted from 0."""
    found = re.match(r"stages_(\d+)_(\d+)/", path)
    return (int(found[1]), int(found[2])) if found else None


def _stages(maps: Mapping[str, Any]) -> list[Stage]:
    blocks: dict[tuple[int, int], list[Any]] = {}
    for path, found in last_blocks(maps).items():
        blocks.setdefault(_place(path), []).append(found)
    return [Stage(stage + 1, block + 1, tuple(found)) for (stage, block), found in sorted(blocks.items())]


def kind_of(found: Any) -> str:
    """What an attention map is called on a page."""
    match found:
        case WindowMap():
            name = "window" if found.partition == "block" else "grid"
            return f"{name} {_times(found.window)}, {_heads(found)}"
        case RoutedMap():
            regions = found.regions[0] * found.regions[1]
            return f"routed to {found.indices.shape[-1]} of {regions} regions, {_heads(found)}"
        case ChannelMap():
            groups = found.values.shape[-1]
            return f"{groups} channel group{'s' * (groups > 1)}"
        case LinearMap():
            return f"linear, {_heads(found)}"
        case DenseMap():
            return f"all tokens, {_heads(found)}"
    raise TypeError(f"found must be a map of zoo.attention_maps, got {type(found).__name__}")


def _columns(stages: Sequence[Stage], frame: Frame, index: int, in_a_row: bool) -> list[Column]:
    made = []
    for stage in stages:
        about = f"block {stage.block}, {_times(stage.maps[0].shape)} tokens"
        column = Column(f"Stage {stage.number}", about, _panels(stage, frame, index))
        if in_a_row:
            first, *others = column.panels
            made += [dataclasses.replace(column, panels=(first,)), *(Column("", "", (panel,)) for panel in others)]
        else:
            made.append(column)
    return made


def _panels(stage: Stage, frame: Frame, index: int) -> tuple[Panel, ...]:
    made = []
    for found in stage.maps:
        if isinstance(found, ChannelMap):
            image = panels.groups(found, index, frame)
            made.append(Panel(kind_of(found), image, "least", "greatest of the group", panels.VIRIDIS))
        else:
            image, scale = panels.heat(found, index, frame)
            made.append(Panel(kind_of(found), image, *map(_percent, scale)))
    if stage.shows_received:
        image, scale = panels.received(stage.maps[0], index, frame)
        made.append(Panel("received, mean of all queries", image, *map(_percent, scale)))
    return tuple(made)


def _section(subject: Subject, columns: Sequence[Column], frame: Frame, lefts: Sequence[int]) -> Image.Image:
    width, height = frame.size
    row_height = TITLE + height + BAR + NUMBERS + BETWEEN
    caption = _caption(subject.lines, width)
    top, rows = HEADING + TITLE, max(len(column.panels) for column in columns)
    total = max(HEADING + rows * row_height, top + height + 2 * BETWEEN + caption.height)
    image = Image.new("RGB", (WIDTH, total), PAPER)
    draw = ImageDraw.Draw(image)
    _heading(draw, lefts[0], "Input", subject.name, width)
    image.paste(panels.photograph(frame), (lefts[0], top))
    image.paste(caption, (lefts[0], top + height + BETWEEN))
    for left, column in zip(lefts[1:], columns):
        _heading(draw, left, column.heading, column.about, width)
        for row, panel in enumerate(column.panels):
            y = HEADING + row * row_height
            draw.text((left, y), _fitted(panel.title, 17, width), INK, _font(17))
            image.paste(panel.image, (left, y + TITLE))
            y += TITLE + height + BAR
            bar = panels.colour_map(np.tile(np.linspace(0, 1, width), (BAR - 4, 1)), panel.colours)
            image.paste(Image.fromarray(bar), (left, y - BAR + 4))
            draw.text((left, y + 3), panel.low, MUTED, _font(15))
            draw.text((left + width, y + 3), panel.high, MUTED, _font(15), anchor="ra")
    return image


def _heading(draw: ImageDraw.ImageDraw, left: int, text: str, about: str, width: int) -> None:
    draw.text((left, 0), text, INK, _font(23))
    draw.text((left, 30), _fitted(about, 16, width), MUTED, _font(16))


def _caption(lines: Sequence[tuple[str, float]], width: int) -> Image.Image:
    """The model's answers, each with its share as a number and as a bar."""
    step, column = 38, 66
    image = Image.new("RGB", (width, max(step * len(lines), 1)), PAPER)
    draw = ImageDraw.Draw(image)
    for row, (text, share) in enumerate(lines):
        y = row * step
        draw.text((0, y), _fitted(text, 16, width - column), INK, _font(16))
        draw.text((width, y), _percent(share), INK, _font(16), anchor="ra")
        draw.rectangle((0, y + 23, width - 1, y + 26), RULE)
        if round(width * share):
            draw.rectangle((0, y + 23, round(width * share) - 1, y + 26), panels.VIRIDIS[3])
    return image


def _head(title: str, subtitle: str) -> Image.Image:
    image = Image.new("RGB", (WIDTH, 150), PAPER)
    draw = ImageDraw.Draw(image)
    across = WIDTH - 2 * MARGIN
    draw.text((MARGIN, 40), _fitted(title, 34, across), INK, _font(34))
    draw.text((MARGIN, 86), _fitted(subtitle, 18, across), MUTED, _font(18))
    draw.line((MARGIN, 124, WIDTH - MARGIN, 124), RULE, 1)
    return image


def _foot(stages: Sequence[Stage]) -> Image.Image:
    """What the signs mean, of those that the page has."""
    kinds = {type(found) for stage in stages for found in stage.maps}
    notes = []
    if kinds - {ChannelMap}:
        notes.append("Colours: share of the query's attention, mean over heads, between the two numbers under a panel.")
    if ChannelMap in kinds:
        notes.append("Channel groups: root mean square of a group's output at every token, each on its own scale.")
    signs = [(panels.sign("query"), "query token")]
    partitions = {found.partition for stage in stages for found in stage.maps if isinstance(found, WindowMap)}
    parted = (("windows", "block" in partitions), ("grid cells", "grid" in partitions), ("regions", RoutedMap in kinds))
    if borders := [name for name, present in parted if present]:
        signs.append((panels.sign("borders"), "borders of " + " and ".join(borders)))
        signs.append((panels.sign("reach"), "what the query can attend to, magnified where small"))
    image = Image.new("RGB", (WIDTH, 84 + 26 * len(notes)), PAPER)
    draw = ImageDraw.Draw(image)
    draw.line((MARGIN, 0, WIDTH - MARGIN, 0), RULE, 1)
    left = MARGIN
    for picture, text in signs:
        image.paste(picture, (left, 18))
        draw.text((left + picture.width + 10, 20), text, MUTED, _font(16))
        left += picture.width + 10 + round(_font(16).getlength(text)) + 36
    for row, note in enumerate(notes):
        draw.text((MARGIN, 54 + 26 * row), note, MUTED, _font(16))
    return image


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def _fitted(text: str, size: int, width: int) -> str:
    """The text in characters that Pillow's own font has, cut off where it is wider than `width` pixels."""
    text = unicodedata.normalize("NFKD", text)
    text = "".join(c if " " <= c <= "~" else "?" for c in text if not unicodedata.combining(c))
    if _font(size).getlength(text) <= width:
        return text
    while text and _font(size).getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _heads(found: Any) -> str:
    return f"{found.heads} head{'s' * (found.heads > 1)}"


def _times(sides: tuple[int, int]) -> str:
    return f"{sides[0]} x {sides[1]}"


def _percent(share: Float[np.ndarray, ""] | float) -> str:
    value = 100 * float(share)
    return f"{value:.1f} %" if value >= 1 or not value else f"{value:#.2g} %"
