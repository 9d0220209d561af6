"""What a verification comes to as pictures: ROC curves, and where the scores of pairs lie; with Pillow alone."""

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from train.verification_metrics import Ranking, Roc, Scored
from zoo.face_regions import REGIONS
from zoo.panels import VIRIDIS, Frame, plain_heat, resized
from zoo.part_maps import AsymmetryMap, PartMap
from zoo.pictures import INK, MUTED, PAPER, RULE

TITLES = {"general": "Strangers", "twin": "Twins", "hard_twin": "Hard twins"}
# Genuine pairs, impostors; the kinds of the curves. Apart for those who do not tell red from green, too.
GENUINE, IMPOSTOR = "#1f9e89", "#d1495b"
CURVES = {"general": VIRIDIS[2], "twin": "#e07b00", "hard_twin": "#b5179e"}
# What a probability axis begins with: a FAR below it cannot be read off so few impostors.
LEAST_FAR = 1e-4
BINS = 60
WIDTH, MARGIN = 1200, 48
PLOT = 500
# Side of a panel of a map, and the outlines of regions on it.
TILE, BOX = 144, "#fde725"


def roc_picture(scored: Mapping[str, Scored], title: str) -> Image.Image:
    """The ROC curves of all kinds of pairs over a logarithmic FAR, 1200 x 680 pixels.

    Args:
        scored: what `train.verification.Verification.score` gives.
        title: at the head of the picture.
    """
    curves = {kind: Ranking(these.scores, these.pairs.genuine).roc() for kind, these in scored.items()}
    image, draw = _page(title, 680)
    left, top, width, height = MARGIN + 60, 100, 700, PLOT
    draw.rectangle((left, top, left + width, top + height), outline=RULE)
    for power in range(round(math.log10(LEAST_FAR)), 1):
        x = left + _place_of_far(10.0**power) * width
        draw.line((x, top, x, top + height), RULE)
        draw.text((x, top + height + 10), f"{100 * 10.0**power:g} %", MUTED, _font(15), anchor="ma")
    for share in np.linspace(0, 1, 6).tolist():
        y = top + (1 - share) * height
        draw.line((left, y, left + width, y), RULE)
        draw.text((left - 12, y), f"{100 * share:.0f} %", MUTED, _font(15), anchor="rm")
    chance = [(left + _place_of_far(far) * width, top + (1 - far) * height) for far in np.geomspace(LEAST_FAR, 1, 200)]
    draw.line(chance, MUTED, 1)
    for kind, roc in curves.items():
        draw.line(_points(roc, (left, top, width, height)), CURVES[kind], 3)
    draw.text((left + width / 2, top + height + 36), "impostors accepted (FAR)", INK, _font(16), anchor="ma")
    draw.text((left, top - 24), "genuine pairs accepted (TAR)", INK, _font(16))
    x = left + width + 50
    for row, (kind, roc) in enumerate(curves.items()):
        y = top + 20 + 130 * row
        draw.line((x, y + 10, x + 40, y + 10), CURVES[kind], 4)
        draw.text((x + 54, y), TITLES[kind], INK, _font(19))
        for line, text in enumerate(_facts(scored[kind], roc)):
            draw.text((x + 54, y + 30 + 22 * line), text, MUTED, _font(15))
    return image


def score_picture(scored: Mapping[str, Scored], title: str) -> Image.Image:
    """Histograms of the scores of genuine pairs and impostors, a panel for every kind of pairs, with the thresholds.

    Args:
        scored: what `train.verification.Verification.score` gives.
        title: at the head of the picture.
    """
    step = 220
    image, draw = _page(title, 150 + step * len(scored))
    every = np.concatenate([these.scores for these in scored.values()])
    low, high = float(every.min()), float(every.max())
    # All panels have one axis, a little wider than what is on it.
    pad = 0.02 * (high - low) + 1e-6
    edges = np.linspace(low - pad, high + pad, BINS + 1)
    left, width = MARGIN, WIDTH - 2 * MARGIN
    for row, (kind, these) in enumerate(scored.items()):
        top, height = 138 + step * row, step - 70
        parts = [(these.pairs.genuine, GENUINE), (~these.pairs.genuine, IMPOSTOR)]
        shares = [np.histogram(these.scores[part], edges)[0] / part.sum() for part, _ in parts]
        tallest = max(share.max() for share in shares)
        for share, (_, colour) in zip(shares, parts):
            outline = _steps(share / tallest, (left, top, width, height))
            draw.polygon(outline, f"{colour}60")
            draw.line(outline, colour, 2)
        draw.line((left, top + height, left + width, top + height), INK)
        place = (min(max(these.threshold, edges[0]), edges[-1]) - edges[0]) / (edges[-1] - edges[0])
        x = left + place * width
        draw.line((x, top - 6, x, top + height), INK, 2)
        side = "r" if place > 0.5 else "l"
        x += -6 if place > 0.5 else 6
        draw.text((x, top - 12), f"threshold {these.threshold:.3f}", MUTED, _font(14), anchor=f"{side}a")
        draw.text((left, top - 30), TITLES[kind], INK, _font(19))
        for value in _ticks(edges[0], edges[-1]):
            x = left + (value - edges[0]) / (edges[-1] - edges[0]) * width
            draw.text((x, top + height + 6), f"{value:.6g}", MUTED, _font(14), anchor="ma")
    x = WIDTH - MARGIN
    for text, colour in (("impostor pairs", IMPOSTOR), ("genuine pairs", GENUINE)):
        x -= round(_font(16).getlength(text))
        draw.text((x, 74), text, INK, _font(16))
        draw.rectangle((x - 26, 76, x - 10, 90), colour)
        x -= 56
    draw.text((MARGIN, 74), "cosine of a pair's embeddings; shares of each sort of pairs", MUTED, _font(16))
    return image


def contact_sheet(rows: Sequence[Sequence[np.ndarray]], names: Sequence[str], scale: int = 2) -> Image.Image:
    """Pictures in rows, each with a name before it.

    Args:
        rows: of uint8 (h, w, 3), all of one size.
        names: of the rows.
        scale: how many pixels a pixel becomes.
    """
    height, width = (scale * side for side in rows[0][0].shape[:2])
    before = 12 + round(max(_font(15).getlength(name) for name in names))
    image = Image.new("RGB", (before + max(map(len, rows)) * width, len(rows) * height), PAPER)
    draw = ImageDraw.Draw(image)
    for number, (row, name) in enumerate(zip(rows, names)):
        draw.text((6, number * height + height // 2), name, INK, _font(15), anchor="lm")
        for place, pixels in enumerate(row):
            tile = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            image.paste(tile, (before + place * width, number * height))
    return image


def map_picture(
    faces: UInt8[np.ndarray, "B h w c"],
    names: Sequence[str],
    parts: PartMap | None,
    asymmetry: AsymmetryMap | None,
    title: str,
) -> Image.Image:
    """A face a row: the picture with the boxes of its regions, where each region looked, where the halves differ.

    Args:
        faces: what the model saw.
        names: of the rows.
        parts, asymmetry: maps of these faces; None leaves their panels out.
        title: at the head of the picture.
    """
    heads, columns = ["what it sees"], []
    if parts is not None:
        heads += [f"{region} look at" for region in REGIONS]
        columns += [parts.heat(region) for region in range(len(REGIONS))]
    if asymmetry is not None:
        heads.append("the halves differ")
        columns.append(asymmetry.heat())
    before = MARGIN + 12 + round(max(_font(15).getlength(name) for name in names))
    step = TILE + 12
    image = Image.new("RGB", (max(WIDTH, before + step * len(heads) + MARGIN), 150 + step * len(faces)), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, 24), title, INK, _font(24))
    about = "Colours of a panel go from its own least to its greatest value; under them the face in grey."
    draw.text((MARGIN, 62), about, MUTED, _font(16))
    for column, head in enumerate(heads):
        draw.text((before + step * column, 106), head, INK, _font(16))
    for row, (face, name) in enumerate(zip(faces, names)):
        top, frame = 136 + step * row, Frame(face, TILE, (0.5, 0.5))
        draw.text((MARGIN, top + TILE / 2), name, INK, _font(15), anchor="lm")
        image.paste(resized(face, frame.size), (before, top))
        for left, upper, right, lower in [] if parts is None else (TILE * np.asarray(parts.boxes[row])).tolist():
            draw.rectangle((before + left, top + upper, before + right - 1, top + lower - 1), outline=BOX)
        for column, heat in enumerate(columns, 1):
            image.paste(plain_heat(heat[row], frame), (before + step * column, top))
    return image


def _facts(scored: Scored, roc: Roc) -> list[str]:
    genuine = int(scored.pairs.genuine.sum())
    return [
        f"AUC {roc.auc():.3f}",
        f"TAR {100 * roc.tar_at(0.01):.1f} % at 1 % FAR",
        f"{genuine:,} genuine, {len(scored.pairs) - genuine:,} impostors",
    ]


def _ticks(low: float, high: float) -> list[float]:
    """Five to eleven round numbers between two."""
    step = 10.0 ** math.floor(math.log10(high - low))
    step *= next(part for part in (0.1, 0.2, 0.5, 1) if (high - low) / (part * step) <= 10)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _place_of_far(far: float) -> float:
    """From 0 to 1 along the axis."""
    return 1 - math.log10(max(far, LEAST_FAR)) / math.log10(LEAST_FAR)


def _points(roc: Roc, box: tuple[int, int, int, int]) -> list[tuple[float, float]]:
    """The curve's corners: the TAR rises where the FAR does not, and the other way round."""
    left, top, width, height = box
    points = []
    before = 0.0
    for far, tar in zip(roc.far.tolist(), roc.tar.tolist()):
        x = left + _place_of_far(far) * width
        points += [(x, top + (1 - before) * height), (x, top + (1 - tar) * height)]
        before = tar
    return points


def _steps(shares: Float[np.ndarray, " n"], box: tuple[int, int, int, int]) -> list[tuple[float, float]]:
    """The outline of a histogram whose tallest bar is 1 or less."""
    left, top, width, height = box
    corners = [(float(left), float(top + height))]
    for place, share in enumerate(shares.tolist()):
        y = top + (1 - share) * height
        corners += [(left + width * place / len(shares), y), (left + width * (place + 1) / len(shares), y)]
    return [*corners, (float(left + width), float(top + height))]


def _page(title: str, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (WIDTH, height), PAPER)
    draw = ImageDraw.Draw(image, "RGBA")
    draw.text((MARGIN, 24), title, INK, _font(24))
    return image, draw


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)
