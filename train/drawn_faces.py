"""Drawn faces: what distinguishes people and twins, and what differs from one photograph to the next; numpy alone.

A face has coordinates of its own, u to the right of the image and v downwards, (0, 0) below the eyes, the chin near
v = 1. v = 0 is at 52 % of the image's height, so that eyes, nose and mouth are where aligned crops have them. Whatever
is inherited is the same on both sides, at u and -u; private marks are on one side only.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, UInt8

# Inherited: name -> the range of its uniform distribution.
SHAPE = {
    "width": (0.66, 0.84),
    "jaw": (-0.05, 0.3),
    "cheek": (-0.06, 0.08),
    "hairline": (-0.72, -0.45),
    "hair_sides": (0.06, 0.22),
    "eye_spacing": (0.24, 0.34),
    "eye_height": (-0.18, -0.06),
    "eye_width": (0.085, 0.125),
    "eye_open": (0.04, 0.065),
    "brow_height": (0.11, 0.18),
    "brow_thickness": (0.018, 0.04),
    "brow_tilt": (-0.15, 0.15),
    "nose_length": (0.24, 0.38),
    "nose_width": (0.07, 0.13),
    "mouth_height": (0.5, 0.62),
    "mouth_width": (0.16, 0.28),
    "lip_thickness": (0.03, 0.06),
}
# Inherited: colours between two, then moved at random by SHADE in every channel.
COLOURS = {
    "skin": ((0.42, 0.28, 0.2), (0.93, 0.76, 0.65)),
    "hair": ((0.08, 0.06, 0.05), (0.72, 0.55, 0.32)),
    "iris": ((0.2, 0.12, 0.07), (0.35, 0.5, 0.62)),
    "lips": ((0.55, 0.25, 0.24), (0.82, 0.45, 0.43)),
}
SHADE = 0.03
# Inherited: blots of the skin, each with its image on the other side; from these (u, v, size, depth) to those.
BLOTS, LEAST_BLOT, GREATEST_BLOT = 6, (0.0, -0.5, 0.06, -0.14), (0.55, 0.8, 0.16, 0.14)

# Private: moles and scars, in so many of the places, each of which is there left and right. A place is a box from
# (u, v) to (u, v) within the face and away from eyes, nostrils and mouth.
MARKS, MARK_SIZE, MARK_DEPTH = 4, (0.045, 0.075), (0.6, 1.0)
PLACES = ((0.1, -0.46, 0.42, -0.38), (0.22, 0.12, 0.5, 0.4), (0.32, 0.4, 0.46, 0.6), (0.08, 0.74, 0.3, 0.84))
# Private: how much brow height, eye opening and mouth corners may differ from one side to the other.
ASYMMETRY = (0.12, 0.48, 0.12)


@dataclasses.dataclass(frozen=True)
class Genes:
    """What twins share.

    Attributes:
        shape: a number by name, see `SHAPE`.
        colours: from 0 to 1 by name, see `COLOURS`.
        blots: (u, v, size, depth) of each, u >= 0.
    """

    shape: dict[str, float]
    colours: dict[str, Float[np.ndarray, "3"]]
    blots: list[list[float]]


@dataclasses.dataclass(frozen=True)
class Person:
    """Genes, and what is the person's own.

    Attributes:
        genes: shared with the twin.
        marks: (u, v, size, depth) of each; a mark is on one side.
        asymmetry: of brow height, eye opening and mouth corner, right minus left.
    """

    genes: Genes
    marks: list[list[float]]
    asymmetry: list[float]


# What differs between photographs: name -> how far it goes either way from that of a frontal, evenly lit one.
# `turn` and `nod` are of the head, `tilt` is of the image in radians, `zoom` its magnification; shifts are in halves of
# the image's side, `light_x` and `light_y` slopes of brightness over it, `gain` is brightness, `warmth` red against
# blue.
REACH = {
    "turn": 0.25,
    "nod": 0.15,
    "tilt": 0.06,
    "zoom": 0.03,
    "shift_x": 0.025,
    "shift_y": 0.025,
    "light_x": 0.15,
    "light_y": 0.1,
    "gain": 0.1,
    "warmth": 0.03,
    "smile": 0.5,
}
# Upper ends: standard deviation of the blur in pixels at a side of 48, and of the noise of pixels from 0 to 1.
BLUR, NOISE = 0.4, 0.015
GROUND = (0.2, 0.8)


def draw_genes(rng: np.random.Generator) -> Genes:
    """The genes of a family."""
    shape = {name: float(rng.uniform(*ends)) for name, ends in SHAPE.items()}
    colours = {}
    for name, (dark, bright) in COLOURS.items():
        mixed = np.asarray(dark) + rng.random() * np.subtract(bright, dark)
        colours[name] = np.clip(mixed + rng.normal(0, SHADE, 3), 0.02, 0.98).astype(np.float32)
    return Genes(shape, colours, rng.uniform(LEAST_BLOT, GREATEST_BLOT, (BLOTS, 4)).tolist())


def draw_person(genes: Genes, rng: np.random.Generator, strength: float | int) -> Person:
    """Someone with these genes.

    Args:
        genes: what is inherited.
        rng: of what is not.
        strength: factor of the depth of marks and of the asymmetry; with 0 twins look the same.
    """
    chosen = rng.permutation(2 * len(PLACES))[:MARKS]
    boxes, side = np.asarray(PLACES)[chosen // 2], np.where(chosen % 2, 1, -1)
    u, v = rng.uniform(boxes[:, :2], boxes[:, 2:]).T
    marks = np.stack([side * u, v, rng.uniform(*MARK_SIZE, MARKS), strength * rng.uniform(*MARK_DEPTH, MARKS)], 1)
    return Person(genes, marks.tolist(), (strength * np.asarray(ASYMMETRY) * rng.uniform(-1, 1, 3)).tolist())


def portrait(person: Person, size: int) -> Float[np.ndarray, "size size 3"]:
    """The person frontal, evenly lit and sharp, colours from 0 to 1."""
    still = {name: np.zeros((1, 1, 1), np.float32) for name in REACH}
    return np.moveaxis(_painted(person, size, still, np.full((3, 1, 1, 1), 0.5, np.float32))[:, 0], 0, -1)


def photographs(
    person: Person, size: int, count: int, rng: np.random.Generator, nuisance: float | int = 1.0
) -> UInt8[np.ndarray, "count size size 3"]:
    """Pictures of a person, all taken in different conditions.

    Args:
        person: who.
        size: side in pixels.
        count: how many.
        rng: of the conditions.
        nuisance: factor of all that moves or spoils the face.
    """
    shot = {
        name: (nuisance * rng.uniform(-reach, reach, (count, 1, 1))).astype(np.float32) for name, reach in REACH.items()
    }
    blur, noise = (nuisance * rng.uniform(0, most, count) for most in (BLUR, NOISE))
    images = _painted(person, size, shot, rng.uniform(*GROUND, (3, count, 1, 1)).astype(np.float32))
    for index, deviation in enumerate(blur.tolist()):
        images[:, index] = _blurred(images[:, index], size / 48 * deviation)
    images += noise.astype(np.float32)[:, None, None] * rng.standard_normal(images.shape, np.float32)
    return np.ascontiguousarray(np.moveaxis((np.clip(images, 0, 1) * 255 + 0.5).astype(np.uint8), 0, -1))


def _painted(person: Person, size: int, shot: dict[str, np.ndarray], ground: np.ndarray) -> np.ndarray:
    """The lit face before blur and noise, (3, n, size, size): the colours first, which is faster."""
    y, x = (np.mgrid[:size, :size].astype(np.float32) + 0.5) * (2 / size) - 1
    face = _face(person, shot["smile"], *_on_face(x, y, shot), ground, 2 / size)
    light = (1 + shot["gain"]) * (1 + shot["light_x"] * x + shot["light_y"] * y)
    return face * (light * (1 + shot["warmth"] * _coloured((1, 0, -1))))


def _on_face(x, y, shot):
    """The face's coordinates of an image's points: shift, zoom and tilt undone, then the turn of a round head."""
    x, y = (x - shot["shift_x"]) / (1 + shot["zoom"]), (y - shot["shift_y"]) / (1 + shot["zoom"])
    cos, sin = np.cos(shot["tilt"]), np.sin(shot["tilt"])
    u, v = cos * x + sin * y, cos * y - sin * x - 0.04
    # What is nearer to the viewer, the middle of the face, moves the most.
    near = np.maximum(1 - u * u - 0.5 * v * v, 0)
    return u - 0.25 * shot["turn"] * near, v - 0.2 * shot["nod"] * near


def _face(person: Person, smile, u, v, ground, soft):
    """Colours at points of the face, painted from what is behind to what is in front; edges are `soft` wide."""
    shape, colours = person.genes.shape, person.genes.colours
    brow_lift, eye_lift, mouth_lift = person.asymmetry
    eye_v, nose_v = shape["eye_height"], shape["eye_height"] + shape["nose_length"]

    width = shape["width"] * (1 - shape["jaw"] * np.maximum(v, 0) + shape["cheek"] * np.cos(3 * v))
    rim = (np.sqrt((u / width) ** 2 + (v / 0.98) ** 2) - 1) * shape["width"]
    skin = _inside(rim, soft)
    hair = _ellipse(u, v, 0, -0.14, shape["width"] + shape["hair_sides"], 0.98, soft)
    image = ground + hair * (_coloured(colours["hair"]) - ground)
    _over(image, colours["skin"], skin)
    cap = hair * _inside(v - shape["hairline"] - 0.25 * u * u, 2 * soft)
    _over(image, colours["hair"], cap)
    skin *= 1 - cap

    relief = 1 - 0.25 * np.clip(1 + rim / 0.25, 0, 1) ** 2
    relief += 0.1 * _spot(u, v, 0, nose_v - 0.1, 0.05, 0.14)
    mirrored = np.abs(u)
    for at_u, at_v, spread, depth in person.genes.blots:
        relief += depth * (_spot(u, v, at_u, at_v, spread, spread) + _spot(u, v, -at_u, at_v, spread, spread))
    relief -= 0.3 * _spot(mirrored, v, shape["eye_spacing"], eye_v, 1.3 * shape["eye_width"], 1.6 * shape["eye_open"])
    relief -= 0.16 * _spot(mirrored, v, 0.6 * shape["nose_width"], nose_v - 0.14, 0.03, 0.12)
    relief -= 0.55 * _spot(mirrored, v, 0.55 * shape["nose_width"], nose_v + 0.03, 0.035, 0.022)
    image *= 1 + skin * (relief - 1)

    side = np.sign(u)
    opening = shape["eye_open"] * (1 + eye_lift * side) * (1 - 0.2 * np.maximum(smile, 0))
    white = _ellipse(mirrored, v, shape["eye_spacing"], eye_v, shape["eye_width"], opening, soft)
    iris = 0.85 * shape["eye_open"]
    _over(image, (0.92, 0.91, 0.9), white)
    _over(image, colours["iris"], white * _ellipse(mirrored, v, shape["eye_spacing"], eye_v, iris, iris, soft))
    _over(image, (0.04, 0.04, 0.04), white * _spot(mirrored, v, shape["eye_spacing"], eye_v, 0.4 * iris, 0.4 * iris))
    out = mirrored - shape["eye_spacing"]
    brow_v = eye_v - shape["brow_height"] + shape["brow_tilt"] * out - brow_lift * side
    brow = _inside(np.abs(out) - 0.14, 3 * soft) * _inside(np.abs(v - brow_v) - shape["brow_thickness"], soft)
    _over(image, 0.7 * colours["hair"], 0.85 * brow)

    along = u / shape["mouth_width"]
    lips_v = v - shape["mouth_height"] + 0.05 * smile * along * along - mouth_lift * along
    wide = shape["mouth_width"] * (1 + 0.12 * smile)
    _over(image, colours["lips"], 0.9 * _ellipse(u, lips_v, 0, 0, wide, shape["lip_thickness"], soft))
    _over(image, 0.4 * colours["lips"], _inside(np.abs(u) - wide, soft) * np.exp(-0.5 * (lips_v / 0.012) ** 2))

    marks = np.ones_like(skin)
    for at_u, at_v, spread, depth in person.marks:
        marks *= 1 - depth * _spot(u, v, at_u, at_v, spread, spread)
    return image * (1 + skin * (marks - 1))


def _over(image, colour, alpha) -> None:
    """Lays a colour over the image where `alpha` is 1."""
    image += alpha * (_coloured(colour) - image)


def _coloured(colour):
    return np.asarray(colour, np.float32)[:, None, None, None]


def _inside(distance, soft):
    """1 where the distance to an outline is negative, with an edge of width `soft`."""
    return np.clip(0.5 - distance / soft, 0, 1)


def _ellipse(u, v, at_u, at_v, wide, high, soft):
    distance = np.sqrt(((u - at_u) / wide) ** 2 + ((v - at_v) / high) ** 2) - 1
    return _inside(distance * high, soft)


def _spot(u, v, at_u, at_v, wide, high):
    return np.exp(-0.5 * (((u - at_u) / wide) ** 2 + ((v - at_v) / high) ** 2))


def _blurred(image, deviation):
    """Convolution with a normal distribution, the edges continued."""
    reach = max(1, round(3 * deviation))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(deviation, 1e-3)) ** 2).astype(np.float32)
    kernel /= kernel.sum()
    size = image.shape[-1]
    padded = np.pad(image, ((0, 0), (reach, reach), (reach, reach)), mode="edge")
    rows = sum(k * padded[:, i : i + size] for i, k in enumerate(kernel))
    return sum(k * rows[..., i : i + size] for i, k in enumerate(kernel))
