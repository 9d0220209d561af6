"""Random image transforms on the host: one example in, uint8 pixels of one size out.

A transform is a frozen dataclass, so that worker processes can take it and a run's settings can be printed;
the functions `train_transform` and `random_crop_pad` check settings and build one. Pixels
are Pillow's, and every parameter is drawn as timm draws it, in timm's order, so that a recipe that was
published with timm means the same here. Normalisation, the fill of erased boxes, mixup and cutmix happen on
the device (`train/mixing.py`).

The number of values in `mean`, 1 or 3, is the number of channels of the images, which `zoo.preprocess.decode`
brings about. Everything works on grey images: what only changes colour (saturation) leaves them as they are.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from train.crops import RandomErasing, RandomResizedCrop, RandomShiftCrop
from train.draws import uniform
from train.randaugment import RandAugment, rand_augment
from zoo.preprocess import (
    INTERPOLATIONS,
    Entries,
    as_pil,
    as_pixels,
    check_pixels,
    colour_of,
    mean_tuple,
    size_pair,
)
from zoo.registry import IMAGENET_MEAN, nearest

# The others are filters for resizing only.
_AFFINE = (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


@dataclasses.dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast and saturation scaled by random factors, in random order.

    Attributes:
        strength: per property s, its factor is uniform in [max(0, 1 - s), 1 + s].
    """

    strength: tuple[float, float, float]

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Jitters one image of mode "RGB" or "L"."""
        order = rng.permutation(3)
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        factors = [uniform(rng, max(0.0, 1.0 - s), 1.0 + s) if s else None for s in self.strength]
        for i in order:
            if factors[i] is not None:
                image = enhancers[i](image).enhance(factors[i])
        return image


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Random crop, flips, colour, choice of a box to erase; see `train_transform` and `random_crop_pad`."""

    crop: RandomResizedCrop | RandomShiftCrop
    hflip: float
    vflip: float
    color: ColorJitter | RandAugment | None
    erasing: RandomErasing
    channels: int

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator) -> Entries:
        """Augments one example; every draw comes from `rng`, so that its state decides the result.

        Args:
            example: "image" (uint8 pixels, (h, w, c)), "label" and "index".

        Returns:
            "image" uint8 (h, w, c), "label" int32, "index" int32, "erase_box" int32 (4,) as top, left,
            height, width with size 0 for none, and "erase_seed" uint32, the key of the noise in the box.

        Raises:
            ValueError: where the image is not uint8 (h, w, c), c the number of values in `mean`.
        """
        check_pixels(example["image"], self.channels)
        image = self.crop(example["image"], rng)
        if self.hflip or self.vflip or self.color:
            image = as_pixels(self._flip_and_color(as_pil(image), rng))
        box = self.erasing.box(rng, *self.crop.size)
        seed = rng.integers(2**32, dtype=np.uint32) if box[2] else 0
        return {
            "image": image,
            "label": np.int32(example["label"]),
            "index": np.int32(example["index"]),
            "erase_box": np.array(box, np.int32),
            "erase_seed": np.uint32(seed),
        }

    def _flip_and_color(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        if self.hflip and rng.random() < self.hflip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.vflip and rng.random() < self.vflip:
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        return self.color(image, rng) if self.color else image


def train_transform(
    size: int | tuple[int, int],
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "random",
    hflip: float = 0.5,
    vflip: float = 0.0,
    color_jitter: float | Sequence[float] = 0.4,
    auto_augment: str | None = None,
    erase_prob: float = 0.0,
    mean: Sequence[float] = IMAGENET_MEAN,
) -> TrainTransform:
    """The augmentation of ImageNet recipes: random-resized crop, flips, colour, random erasing.

    Args:
        size: side of the result, or (height, width).
        scale: range of the crop's share of the image's area.
        ratio: range of the crop's width / height.
        interpolation: one of `INTERPOLATIONS`, or "random" for bilinear or bicubic by chance.
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip.
        color_jitter: strength for brightness, contrast and saturation, or one each. As in timm it is switched
            off where `auto_augment` is on.
        auto_augment: a RandAugment policy such as "rand-m9-mstd0.5-inc1", see `train/randaugment.py`.
        erase_prob: probability of erasing a box.
        mean: one value from 0 to 1 per channel, see the head of this file; RandAugment fills uncovered pixels
            with it.

    Raises:
        ValueError: for an unknown name or a value out of range.
    """
    resample = _resampling(interpolation)
    crop = RandomResizedCrop(size_pair(size), _range("scale", scale), _range("ratio", ratio), resample)
    return _finish(crop, resample, hflip, vflip, color_jitter, auto_augment, erase_prob, mean_tuple(mean))


def random_crop_pad(
    size: int | tuple[int, int],
    *,
    pad: int,
    rotate: float = 0.0,
    zoom: tuple[float, float] = (1.0, 1.0),
    fill: int = 0,
    interpolation: str = "bilinear",
    hflip: float = 0.0,
    vflip: float = 0.0,
    color_jitter: float | Sequence[float] = 0.0,
    auto_augment: str | None = None,
    erase_prob: float = 0.0,
    mean: Sequence[float] = IMAGENET_MEAN,
) -> TrainTransform:
    """The augmentation of small images: a shifted, rotated and zoomed crop, flips, colour, random erasing.

    Args:
        size: side of the result, or (height, width). An image of another size is resized to cover it, and its
            centre taken, before anything else.
        pad: how far, in pixels, the crop may reach over the image's edges.
        rotate: largest rotation in degrees.
        zoom: range of the magnification.
        fill: value of all channels outside of the image, from 0 to 255.
        interpolation: of resizing, rotations and zooms, see `train_transform`.
        hflip, vflip, color_jitter, auto_augment, erase_prob, mean: as in `train_transform`.

    Raises:
        ValueError: for an unknown name or a value out of range.
    """
    size = size_pair(size)
    if not 0 <= pad < min(size):
        raise ValueError(f"pad: expected a number of pixels from 0 to less than size={size}, got {pad}")
    if not 0 <= rotate <= 180:
        raise ValueError(f"rotate: expected degrees from 0 to 180, got {rotate}")
    if not 0 <= fill <= 255:
        raise ValueError(f"fill: expected a value from 0 to 255, got {fill}")
    mean, resample = mean_tuple(mean), _resampling(interpolation)
    if rotate or tuple(zoom) != (1.0, 1.0):
        _check_affine(resample, "rotate or zoom")
    crop = RandomShiftCrop(size, pad, float(rotate), _range("zoom", zoom), (fill,) * len(mean), resample)
    return _finish(crop, resample, hflip, vflip, color_jitter, auto_augment, erase_prob, mean)


def _finish(crop, resample, hflip, vflip, color_jitter, auto_augment, erase_prob, mean) -> TrainTransform:
    for name, prob in (("hflip", hflip), ("vflip", vflip), ("erase_prob", erase_prob)):
        if not 0 <= prob <= 1:
            raise ValueError(f"{name}: expected a probability from 0 to 1, got {prob}")
    jitter = color_jitter if isinstance(color_jitter, Sequence) else (color_jitter,) * 3
    if len(jitter) != 3 or min(jitter) < 0:
        raise ValueError(
            f"color_jitter: expected a number of at least 0, or three of them for brightness, contrast and "
            f"saturation, got {color_jitter}"
        )
    color = None
    if auto_augment:
        _check_affine(resample, "auto_augment")
        color = rand_augment(auto_augment, colour_of(mean), resample)
    elif any(jitter):
        color = ColorJitter(tuple(float(s) for s in jitter))
    return TrainTransform(crop, hflip, vflip, color, RandomErasing(erase_prob), len(mean))


def _range(name: str, bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = bounds
    if not 0 < low <= high:
        raise ValueError(f"{name}: expected (low, high) with 0 < low <= high, got {bounds}")
    return float(low), float(high)


def _resampling(interpolation: str) -> tuple[Image.Resampling, ...]:
    if interpolation == "random":
        return Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
    if interpolation not in INTERPOLATIONS:
        known = [*INTERPOLATIONS, "random"]
        raise ValueError(f"interpolation: unknown interpolation {interpolation!r}{nearest(interpolation, known)}")
    return (INTERPOLATIONS[interpolation],)


def _check_affine(resample: tuple[Image.Resampling, ...], with_what: str) -> None:
    for option in resample:
        if option not in _AFFINE:
            known = ", ".join(repr(name) for name, filter in INTERPOLATIONS.items() if filter in _AFFINE)
            raise ValueError(
                f"interpolation: {option.name.lower()!r} can only resize; with {with_what} take one of {known}"
            )
