"""RandAugment as timm spells and scales it: a policy such as `rand-m9-mstd0.5-inc1`, on PIL images.

Source: Cubuk et al., RandAugment, arXiv 1909.13719. The paper fixes the magnitude and applies every chosen
operation; the published ImageNet recipes use timm's form, which this file follows: each chosen operation is
applied with probability 0.5, its magnitude has normal noise, and in the "increasing" set every operation gets
stronger with it.
"""

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from train.draws import choose
from zoo.preprocess import for_mode
from zoo.registry import nearest

MAX_LEVEL = 10.0

INCREASING_OPS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "PosterizeIncreasing",
    "SolarizeIncreasing",
    "SolarizeAdd",
    "ColorIncreasing",
    "ContrastIncreasing",
    "BrightnessIncreasing",
    "SharpnessIncreasing",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)
OPS = tuple(name.removesuffix("Increasing") for name in INCREASING_OPS)


def _point(image: Image.Image, table: list[int]) -> Image.Image:
    return image.point(table * len(image.getbands()))


def _solarize_add(image: Image.Image, addend: int) -> Image.Image:
    return _point(image, [min(255, i + addend) if i < 128 else i for i in range(256)])


def _posterize(image: Image.Image, bits: int) -> Image.Image:
    # ImageOps.posterize refuses 0 bits, which PosterizeIncreasing asks for at level 10: an image of zeros.
    mask = 256 - 2 ** (8 - bits)
    return _point(image, [i & mask for i in range(256)])


def _affine(image: Image.Image, matrix: tuple, **how) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, **how)


def _shear_x(image: Image.Image, factor: float, **how) -> Image.Image:
    return _affine(image, (1, factor, 0, 0, 1, 0), **how)


def _shear_y(image: Image.Image, factor: float, **how) -> Image.Image:
    return _affine(image, (1, 0, 0, factor, 1, 0), **how)


def _translate_x(image: Image.Image, fraction: float, **how) -> Image.Image:
    return _affine(image, (1, 0, fraction * image.width, 0, 1, 0), **how)


def _translate_y(image: Image.Image, fraction: float, **how) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, fraction * image.height), **how)


def _enhance(enhancer: Callable) -> Callable:
    return lambda image, factor: enhancer(image).enhance(factor)


def _increasing_factor(fraction: float, sign: int) -> float:
    """An enhancement factor that moves away from 1 (no change), but stays away from 0 (nothing left)."""
    return max(0.1, 1.0 + sign * (fraction * 0.9))


@dataclasses.dataclass(frozen=True)
class _Op:
    """One operation: what it does to an image, and with what at which level.

    `argument` maps (level / 10, sign) to the operation's argument. Only a `signed` one has a direction to
    choose, and only a `geometric` one fills uncovered pixels and resamples.
    """

    apply: Callable
    argument: Callable | None = None
    signed: bool = False
    geometric: bool = False


def _geometric(apply: Callable, extent: float) -> _Op:
    return _Op(apply, lambda fraction, sign: sign * (fraction * extent), signed=True, geometric=True)


def _enhancing(enhancer: Callable) -> _Op:
    return _Op(_enhance(enhancer), lambda fraction, sign: fraction * 1.8 + 0.1)


def _enhancing_more(enhancer: Callable) -> _Op:
    return _Op(_enhance(enhancer), _increasing_factor, signed=True)


_TABLE = {
    "AutoContrast": _Op(ImageOps.autocontrast),
    "Equalize": _Op(ImageOps.equalize),
    "Invert": _Op(ImageOps.invert),
    "Rotate": _geometric(Image.Image.rotate, 30.0),
    "Posterize": _Op(_posterize, lambda fraction, sign: int(fraction * 4)),
    "PosterizeIncreasing": _Op(_posterize, lambda fraction, sign: 4 - int(fraction * 4)),
    "Solarize": _Op(ImageOps.solarize, lambda fraction, sign: min(256, int(fraction * 256))),
    "SolarizeIncreasing": _Op(ImageOps.solarize, lambda fraction, sign: 256 - min(256, int(fraction * 256))),
    "SolarizeAdd": _Op(_solarize_add, lambda fraction, sign: min(128, int(fraction * 110))),
    "Color": _enhancing(ImageEnhance.Color),
    "ColorIncreasing": _enhancing_more(ImageEnhance.Color),
    "Contrast": _enhancing(ImageEnhance.Contrast),
    "ContrastIncreasing": _enhancing_more(ImageEnhance.Contrast),
    "Brightness": _enhancing(ImageEnhance.Brightness),
    "BrightnessIncreasing": _enhancing_more(ImageEnhance.Brightness),
    "Sharpness": _enhancing(ImageEnhance.Sharpness),
    "SharpnessIncreasing": _enhancing_more(ImageEnhance.Sharpness),
    "ShearX": _geometric(_shear_x, 0.3),
    "ShearY": _geometric(_shear_y, 0.3),
    "TranslateXRel": _geometric(_translate_x, 0.45),
    "TranslateYRel": _geometric(_translate_y, 0.45),
}


def _lookup(name: str) -> _Op:
    if name not in _TABLE:
        raise ValueError(f"ops: unknown operation {name!r}{nearest(name, _TABLE)}")
    return _TABLE[name]


def apply_op(
    name: str,
    image: Image.Image,
    level: float,
    sign: int = 1,
    fill: tuple[int, ...] = (128, 128, 128),
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Applies one operation at a given strength.

    Args:
        name: one of `OPS` or `INCREASING_OPS`.
        image: mode "RGB" or "L". On "L", Color and ColorIncreasing change nothing, as grey has no saturation.
        level: strength from 0 to 10. Rotations reach 30 degrees, shears 0.3, translations 0.45 of the side.
        sign: +1 or -1, the direction of rotations, shears and translations, and whether an "Increasing"
            enhancement raises or lowers its property; the other operations have none.
        fill: colour of the pixels that the image does not cover any more, one value per channel.
        resample: how rotations, shears and translations interpolate.

    Returns:
        An image of the same mode and size.

    Raises:
        ValueError: for an unknown name.
    """
    op = _lookup(name)
    arguments = () if op.argument is None else (op.argument(level / MAX_LEVEL, sign),)
    how = {"resample": resample, "fillcolor": for_mode(fill)} if op.geometric else {}
    return op.apply(image, *arguments, **how)


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """The policy: `num_layers` operations drawn with replacement, each applied with probability `prob`.

    Attributes:
        fill: colour of uncovered pixels, one value per channel.
        resample: the interpolations from which each geometric operation draws one.
        ops: names of the operations to draw from.
        num_layers: how many are drawn per image.
        prob: the probability with which each one drawn is applied.
        magnitude: mean strength.
        magnitude_std: standard deviation of the strength; infinite draws it uniformly from [0, magnitude].
        magnitude_max: every strength drawn is clipped to [0, magnitude_max].
    """

    fill: tuple[int, ...]
    resample: tuple[Image.Resampling, ...]
    ops: tuple[str, ...] = OPS
    num_layers: int = 2
    prob: float = 0.5
    magnitude: float = MAX_LEVEL
    magnitude_std: float = 0.0
    magnitude_max: float = MAX_LEVEL

    def __post_init__(self):
        for name in self.ops:
            _lookup(name)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Augments one image of mode "RGB" or "L"; every draw comes from `rng`."""
        names = [choose(rng, self.ops) for _ in range(self.num_layers)]
        for name in names:
            if self.prob < 1.0 and rng.random() > self.prob:
                continue
            level = self._level(rng)
            op = _TABLE[name]
            sign = -1 if op.signed and rng.random() > 0.5 else 1
            resample = choose(rng, self.resample) if op.geometric else self.resample[0]
            image = apply_op(name, image, level, sign, self.fill, resample)
        return image

    def _level(self, rng: np.random.Generator) -> float:
        level = self.magnitude
        if math.isinf(self.magnitude_std):
            level *= rng.random()
        elif self.magnitude_std > 0:
            level = rng.normal(level, self.magnitude_std)
        return max(0.0, min(level, self.magnitude_max))


# key: (field of RandAugment, type, what to write)
_SECTIONS = {
    "m": ("magnitude", float, "a number such as m9"),
    "n": ("num_layers", int, "a whole number such as n2"),
    "p": ("prob", float, "a probability such as p0.5"),
    "mstd": ("magnitude_std", float, "a number such as mstd0.5"),
    "mmax": ("magnitude_max", float, "a number such as mmax20"),
    "inc": ("ops", int, "inc0 or inc1"),
}


def rand_augment(config: str, fill: tuple[int, ...], resample: tuple[Image.Resampling, ...]) -> RandAugment:
    """Reads a policy in timm's notation.

    Args:
        config: "rand" and, after a hyphen each and in any order, `m` magnitude (10), `n` operations per image
            (2), `p` probability of each (0.5), `mstd` standard deviation of the magnitude (0; over 100:
            uniform from 0 to m), `mmax` upper clip of the magnitude (10), `inc1` for the operations that all
            get stronger with magnitude.
        fill, resample: as in `RandAugment`.

    Raises:
        ValueError: for another policy, an unknown section or a value that cannot be read.
    """
    policy, *sections = config.split("-")
    if policy != "rand":
        raise ValueError(
            f"auto_augment: unknown policy {policy!r} in {config!r}; known: rand (as rand-m9-mstd0.5-inc1)"
        )
    fields = {}
    for section in sections:
        key, value = re.fullmatch(r"([a-zA-Z]*)(.*)", section).groups()
        if key not in _SECTIONS:
            raise ValueError(f"auto_augment: unknown section {section!r} in {config!r}{nearest(key, _SECTIONS)}")
        field, kind, wanted = _SECTIONS[key]
        try:
            fields[field] = kind(value)
        except ValueError:
            raise ValueError(f"auto_augment: section {section!r} in {config!r} should be {wanted}") from None
    if "ops" in fields:
        fields["ops"] = INCREASING_OPS if fields["ops"] else OPS
    if not 0 <= fields.get("prob", 0.5) <= 1:
        raise ValueError(f"auto_augment: p in {config!r} should be from 0 to 1, got {fields['prob']}")
    if fields.get("magnitude_std", 0.0) > 100:
        fields["magnitude_std"] = math.inf
    return RandAugment(fill, resample, **fields)
