"""Single panels: attention drawn over a picture, with Pillow and numpy alone."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw

from zoo.watch import ChannelMap, RoutedMap, WindowMap

# matplotlib's perceptually uniform maps of these names at ten equal steps.
INFERNO = ("#000004", "#1b0c41", "#4a0c6b", "#781c6d", "#a52c60", "#cf4446", "#ed6925", "#fb9b06", "#f7d13d", "#fcffa4")
VIRIDIS = ("#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725")

Size = tuple[int, int]
Box = tuple[int, int, int, int]
TokenHeat = Float[np.ndarray, "rows columns"]
TokenMask = Bool[np.ndarray, "rows columns"]
# Pictures of fewer pixels a side are shown with their edges, and what lies over them too.
TINY_SIDE = 64
# A query's reach that is below this share of either side is shown magnified in a corner of this share.
SMALL, INSET = 0.3, 0.42


@dataclasses.dataclass(frozen=True)
class Frame:
    """What all panels of one picture have in common.

    Attributes:
        pixels: the picture.
        width: of a panel, in pixels; its height follows from the picture.
        token: row and column of the query, from 0 to 1.
    """

    pixels: UInt8[np.ndarray, "h w c"]
    width: int
    token: tuple[float, float]

    @property
    def size(self) -> Size:
        """Width and height of a panel."""
        height, width = self.pixels.shape[:2]
        return self.width, max(1, round(self.width * height / width))

    def token_on(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The query's row and column on a map of that shape."""
        return tuple(min(int(place * side), side - 1) for place, side in zip(self.token, shape))


def colour_map(values: Float[np.ndarray, "*shape"], anchors: Sequence[str] = INFERNO) -> UInt8[np.ndarray, "*shape 3"]:
    """Colours of values from 0 to 1, linear between the anchors."""
    table = np.asarray([[int(anchor[i : i + 2], 16) for i in (1, 3, 5)] for anchor in anchors], float)
    places = np.linspace(0, 1, len(anchors))
    return np.stack([np.interp(values, places, channel) for channel in table.T], -1).round().astype(np.uint8)


def photograph(frame: Frame) -> Image.Image:
    """The picture itself with the query's place."""
    image = resized(frame.pixels, frame.size)
    width, height = frame.size
    x, y = round(frame.token[1] * width), round(frame.token[0] * height)
    _mark(ImageDraw.Draw(image), (x - 6, y - 6, x + 6, y + 6))
    return image


def heat(found: Any, index: int, frame: Frame) -> tuple[Image.Image, tuple[float, float]]:
    """What the query attends to, and the least and greatest weight among what it can attend to."""
    token = frame.token_on(found.shape)
    values, reach = found.heat(token)[index], found.reach(token)[index]
    return _overlaid(found, values, reach, frame, token)


def received(found: Any, index: int, frame: Frame) -> tuple[Image.Image, tuple[float, float]]:
    """What every token receives, and the least and the greatest of it."""
    return _overlaid(found, found.received()[index], np.ones(found.shape, bool), frame, None)


def plain_heat(values: TokenHeat, frame: Frame) -> Image.Image:
    """Values at every token over the dimmed picture, from the least to the greatest."""
    everywhere = np.ones(values.shape, bool)
    return _blended(frame.pixels, _scaled(values, everywhere)[0], everywhere, frame.size, INFERNO)


def groups(found: ChannelMap, index: int, frame: Frame) -> Image.Image:
    """The magnitude of every channel group over the picture, one tile each."""
    values = np.asarray(found.values[index], np.float32)
    count = values.shape[-1]
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    width, height = frame.size
    gap = 4 if columns > 1 else 0
    tile = ((width - gap * (columns - 1)) // columns, (height - gap * (columns - 1)) // columns)
    left = (width - columns * tile[0] - gap * (columns - 1)) // 2
    top = (height - rows * tile[1] - gap * (rows - 1)) // 2
    image = Image.new("RGB", frame.size, "#ffffff")
    everywhere = np.ones(found.shape, bool)
    for group in range(count):
        row, column = divmod(group, columns)
        picture = _blended(frame.pixels, _scaled(values[..., group], everywhere)[0], everywhere, tile, VIRIDIS)
        image.paste(picture, (left + column * (tile[0] + gap), top + row * (tile[1] + gap)))
    return image


def sign(name: str) -> Image.Image:
    """A small picture of a sign for the legend: `"query"`, `"borders"` or `"reach"`."""
    image = Image.new("RGB", (36, 22), "#4a4d55")
    draw = ImageDraw.Draw(image)
    if name == "query":
        _mark(draw, (12, 5, 23, 16))
    elif name == "borders":
        for x in (6, 18, 30):
            draw.line((x, 0, x, 22), "#9b9ea5", 1)
        draw.line((0, 11, 36, 11), "#9b9ea5", 1)
    else:
        _frame(draw, (8, 4, 27, 17))
    return image


def _overlaid(
    found: Any, values: TokenHeat, reach: TokenMask, frame: Frame, token: tuple[int, int] | None
) -> tuple[Image.Image, tuple[float, float]]:
    strength, scale = _scaled(values, reach)

    def at(size: Size) -> Image.Image:
        smooth = not isinstance(found, WindowMap | RoutedMap)
        image = _blended(frame.pixels, strength, reach, size, INFERNO, smooth)
        _draw_borders(image, found)
        draw = ImageDraw.Draw(image)
        if not _is_scattered(found) and not reach.all():
            _outline(draw, reach, size)
        if token is not None:
            _mark(draw, _cell(token, found.shape, size))
        return image

    image = at(frame.size)
    rows, columns = (np.flatnonzero(reach.any(axis)).tolist() for axis in (1, 0))
    extent = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    shares = (extent[1] - extent[0]) / found.shape[0], (extent[3] - extent[2]) / found.shape[1]
    if max(shares) < SMALL:
        _magnify(image, at, extent, found.shape, token)
    return image, scale


def _scaled(values: TokenHeat, reach: TokenMask) -> tuple[TokenHeat, tuple[float, float]]:
    """Values with the least of those in reach at 0 and the greatest at 1, and these two."""
    low, high = float(values[reach].min()), float(values[reach].max())
    spread = high - low
    return np.clip((values - low) / spread, 0, 1) if spread else np.full_like(values, 0.5), (low, high)


def resized(pixels: UInt8[np.ndarray, "h w c"], size: Size) -> Image.Image:
    """A picture at another (width, height), in RGB; one of few pixels keeps their edges."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
    return image.resize(size, Image.Resampling.NEAREST if _is_tiny(pixels) else Image.Resampling.LANCZOS)


def _is_tiny(pixels: UInt8[np.ndarray, "h w c"]) -> bool:
    return max(pixels.shape[:2]) < TINY_SIDE


def _blended(
    pixels: UInt8[np.ndarray, "h w c"],
    strength: TokenHeat,
    reach: TokenMask,
    size: Size,
    colours: Sequence[str],
    smooth: bool = True,
) -> Image.Image:
    """The picture in dim grey, under colours that cover it the more the stronger they are."""
    grey = np.asarray(resized(pixels, size).convert("L"), np.float32)[..., None]
    smooth = smooth and not _is_tiny(pixels)
    method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    strength = np.clip(np.asarray(Image.fromarray(strength.astype(np.float32)).resize(size, method)), 0, 1)
    inside = np.asarray(Image.fromarray(reach).resize(size, Image.Resampling.NEAREST), np.float32)
    opacity = (inside * (0.45 + 0.45 * strength))[..., None]
    base = 18 + 0.42 * grey
    return Image.fromarray((base + opacity * (colour_map(strength, colours) - base)).round().astype(np.uint8))


def _is_scattered(found: Any) -> bool:
    return isinstance(found, WindowMap) and found.partition == "grid"


def _draw_borders(image: Image.Image, found: Any) -> None:
    """Thin lines around windows, regions, or the cells of which a grid takes one token each."""
    if isinstance(found, RoutedMap):
        cell = found.region
    elif isinstance(found, WindowMap):
        cell = found.window
        if _is_scattered(found):
            cell = tuple(-(-side // step) for side, step in zip(found.shape, found.window))
    else:
        return
    lines = Image.new("RGBA", image.size)
    draw = ImageDraw.Draw(lines)
    for row in range(cell[0], found.shape[0], cell[0]):
        y = round(row * image.height / found.shape[0])
        draw.line((0, y, image.width, y), (255, 255, 255, 90))
    for column in range(cell[1], found.shape[1], cell[1]):
        x = round(column * image.width / found.shape[1])
        draw.line((x, 0, x, image.height), (255, 255, 255, 90))
    image.paste(lines, (0, 0), lines)


def _outline(draw: ImageDraw.ImageDraw, reach: TokenMask, size: Size) -> None:
    """Lines where the reach ends, be it at the edge of the map."""
    walled = np.pad(reach, 1)
    upright = [(r - 1, r, c, c) for r, c in np.argwhere(walled[:, 1:] != walled[:, :-1]).tolist()]
    level = [(r, r, c - 1, c) for r, c in np.argwhere(walled[1:] != walled[:-1]).tolist()]
    segments = [_box(*where, reach.shape, size) for where in upright + level]
    last = size[0] - 2, size[1] - 2
    segments = [tuple(min(max(at, 1), last[i % 2]) for i, at in enumerate(segment)) for segment in segments]
    for colour, width in (("#000000", 4), ("#ffffff", 2)):
        for segment in segments:
            draw.line(segment, colour, width)


def _magnify(
    image: Image.Image,
    at: Callable[[Size], Image.Image],
    extent: tuple[int, int, int, int],
    shape: tuple[int, int],
    token: tuple[int, int] | None,
) -> None:
    """Puts what is in `extent` (rows, then columns), magnified, into the corner that is farthest from it.

    Corners where it would hide the extent or the query do not count; where all would, nothing is magnified.
    """
    small = _box(*extent, shape, image.size)
    factor = INSET * min(image.width / (small[2] - small[0]), image.height / (small[3] - small[1]))
    size = round(image.width * factor), round(image.height * factor)
    inset = at(size).crop(_box(*extent, shape, size))
    visible = [small]
    if token is not None:
        visible.append(_cell(token, shape, image.size))
    edge = 8
    corners = [
        (left, top, left + inset.width, top + inset.height)
        for left in (edge, image.width - inset.width - edge)
        for top in (edge, image.height - inset.height - edge)
    ]
    corners = [corner for corner in corners if not any(_overlap(corner, box) for box in visible)]
    if not corners:
        return
    large = max(corners, key=lambda corner: sum(abs(a - b) for a, b in zip(corner, small)))
    draw = ImageDraw.Draw(image)
    for x, y in ((0, 3), (2, 1)) if (large[0] > small[0]) == (large[1] > small[1]) else ((0, 1), (2, 3)):
        draw.line((small[x], small[y], large[x], large[y]), "#ffffff", 1)
    image.paste(inset, large[:2])
    _frame(draw, large)


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _box(top: int, bottom: int, left: int, right: int, shape: tuple[int, int], size: Size) -> Box:
    """(x, y, x, y) in pixels of tokens `[top, bottom)` by `[left, right)`."""
    x, y = size[0] / shape[1], size[1] / shape[0]
    return round(left * x), round(top * y), round(right * x), round(bottom * y)


def _cell(token: tuple[int, int], shape: tuple[int, int], size: Size) -> Box:
    return _box(token[0], token[0] + 1, token[1], token[1] + 1, shape, size)


def _mark(draw: ImageDraw.ImageDraw, box: Box) -> None:
    """A square around the query that stays visible on any ground."""
    grow = max(0, 5 - (box[2] - box[0]) // 2)
    box = box[0] - grow, box[1] - grow, box[2] - 1 + grow, box[3] - 1 + grow
    for inset, colour in ((-1, "#000000"), (0, "#00e5ff"), (1, "#00e5ff"), (2, "#000000")):
        draw.rectangle((box[0] + inset, box[1] + inset, box[2] - inset, box[3] - inset), outline=colour)


def _frame(draw: ImageDraw.ImageDraw, box: Box) -> None:
    for grow, colour in ((2, "#000000"), (1, "#ffffff"), (0, "#ffffff")):
        draw.rectangle((box[0] - grow, box[1] - grow, box[2] - 1 + grow, box[3] - 1 + grow), outline=colour)
