"""Images as a model sees them: decoding, resize and centre crop, equal to timm's pixel for pixel.

The number of values in `mean`, 1 or 3, is the number of channels of the images, which `decode` brings about.
"""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from zoo.registry import IMAGENET_MEAN, PretrainedCfg, nearest

INTERPOLATIONS = {filter.name.lower(): filter for filter in Image.Resampling}
PIL_MODES = {1: "L", 3: "RGB"}
Entries = dict[str, np.ndarray | np.generic]
Pixels = UInt8[np.ndarray, "h w c"]


def decode(image: bytes | np.ndarray, *, channels: int, name: str) -> UInt8[np.ndarray, "H W C"]:
    """An image's pixels with the wanted number of channels.

    Grey becomes colour by repetition, colour grey by ITU-R 601 luma; an alpha channel is dropped.

    Args:
        image: an encoded file (whatever PIL reads, 8 bits a channel), or uint8 (H, W) or (H, W, 1, 3 or 4).
        channels: 1 or 3.
        name: what an error calls the image.

    Returns:
        uint8 (H, W, channels), not to be written to.

    Raises:
        ValueError: the image cannot be decoded or is not one of the kinds above; it contains `name`.
    """
    if channels not in PIL_MODES:
        raise ValueError(f"channels={channels!r}: must be 1 or 3")
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim < 2 or image.shape[2:] not in ((), (1,), (3,), (4,)):
            raise ValueError(
                f"{name} has shape {image.shape} and dtype {image.dtype}; "
                "uint8 of (H, W) or (H, W, 1, 3 or 4) is needed"
            )
        if image.shape[2:] == (channels,):
            return image
        pixels = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    else:
        try:
            pixels = Image.open(io.BytesIO(image))
            pixels.load()
        # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error and more for broken files.
        except Exception as error:
            reason = "no format that PIL knows" if isinstance(error, UnidentifiedImageError) else error
            raise ValueError(f"{name} cannot be decoded ({len(image)} bytes): {reason}") from error
    if pixels.mode.startswith(("I", "F")):
        raise ValueError(f"{name} has more than 8 bits a channel (PIL mode {pixels.mode!r}): convert it to 8 bits")
    if "transparency" in pixels.info:
        # PIL warns of palette images with several transparent colours unless they pass through RGBA.
        pixels = pixels.convert("RGBA")
    array = np.asarray(pixels.convert(PIL_MODES[channels]))
    return array[..., None] if channels == 1 else array


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Resize and crop without any randomness; see `eval_transform`."""

    size: tuple[int, int]
    crop_pct: float
    resample: Image.Resampling
    crop_mode: str
    mean: tuple[float, ...]

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator | None = None) -> Entries:
        """Transforms {"image", "label"} to {"image" uint8 (h, w, c), "label" int32}; `rng` is not used."""
        return {"image": self.pixels(example["image"]), "label": np.int32(example["label"])}

    def pixels(self, image: np.ndarray) -> Pixels:
        """The pixels that the model sees, before normalisation, of a decoded image."""
        channels = len(self.mean)
        check_pixels(image, channels)
        height, width = (math.floor(side / self.crop_pct) for side in self.size)
        fill = colour_of(self.mean) if self.crop_mode == "border" else (0,) * channels
        resized = _RESIZE[self.crop_mode](as_pil(image), (height, width), self.resample)
        return as_pixels(center_crop(resized, self.size, fill))


def eval_transform(
    size: int | tuple[int, int],
    crop_pct: float = 0.875,
    interpolation: str = "bicubic",
    crop_mode: str = "center",
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
) -> EvalTransform:
    """The preprocessing that a published accuracy was measured with, equal to timm's pixel for pixel.

    Args:
        size: side of the result, or (height, width).
        crop_pct: the share of the resized image's side that the crop keeps.
        interpolation: one of `INTERPOLATIONS`.
        crop_mode: "center" resizes the shorter side to size / crop_pct and crops the centre; "squash" resizes
            both sides to it; "border" resizes the longer side to it and fills the rest with `mean`.
        mean: one value from 0 to 1 per channel, see the head of this file; only "border" uses the values.

    Raises:
        ValueError: for an unknown name or a value out of range.
    """
    if crop_mode not in _RESIZE:
        raise ValueError(f"crop_mode: unknown mode {crop_mode!r}{nearest(crop_mode, _RESIZE)}")
    if not crop_pct > 0:
        raise ValueError(f"crop_pct: expected a number above 0, such as 0.95, got {crop_pct}")
    resample = resampling(interpolation)
    return EvalTransform(size_pair(size), crop_pct, resample, crop_mode, mean_tuple(mean))


def published_transform(cfg: PretrainedCfg, image_size: int | tuple[int, int] | None = None) -> EvalTransform:
    """The preprocessing of published weights; `image_size` takes the place of the one that they came with."""
    size = cfg.image_size if image_size is None else image_size
    return eval_transform(size, cfg.crop_pct, cfg.interpolation, cfg.crop_mode, mean=cfg.mean)


def as_pil(image: Pixels) -> Image.Image:
    """Pixels with 1 or 3 channels as a Pillow image of mode "L" or "RGB"."""
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def as_pixels(image: Image.Image) -> Pixels:
    """A Pillow image's pixels; read-only."""
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def resize(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """Resizes to `size`, a (height, width)."""
    return image if image.size == size[::-1] else image.resize(size[::-1], resample)


def resize_to_cover(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """Resizes, keeping the aspect ratio, so that the image just covers `size`."""
    height, width = image.height, image.width
    if size[0] != size[1]:
        ratio = min(height / size[0], width / size[1])
        return resize(image, (round(height / ratio), round(width / ratio)), resample)
    # A square target rounds the longer side down, as torchvision does; the other case is timm's own.
    side, longer = size[0], int(size[0] * max(height, width) / min(height, width))
    return resize(image, (side, longer) if height < width else (longer, side), resample)


def resize_to_fit(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """Resizes, keeping the aspect ratio, so that the image just fits into `size`."""
    ratio = max(image.height / size[0], image.width / size[1])
    return resize(image, (max(1, round(image.height / ratio)), max(1, round(image.width / ratio))), resample)


def center_crop(image: Image.Image, size: tuple[int, int], fill: tuple[int, ...]) -> Image.Image:
    """Crops the centre to `size` (height, width); where the image is smaller, pads it with `fill` first."""
    height, width = size
    dy, dx = max(height - image.height, 0), max(width - image.width, 0)
    if dy or dx:
        border = (dx // 2, dy // 2, (dx + 1) // 2, (dy + 1) // 2)
        image = ImageOps.expand(image, border, for_mode(fill))
    # round() takes halves to the even number, as the crops of the published accuracies do.
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def for_mode(fill: tuple[int, ...]) -> int | tuple[int, ...]:
    """A colour as Pillow wants it: a bare number for one channel."""
    return fill[0] if len(fill) == 1 else fill


_RESIZE = {"center": resize_to_cover, "squash": resize, "border": resize_to_fit}


def check_pixels(image: np.ndarray, channels: int) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != channels:
        raise ValueError(
            f"image: expected uint8 pixels of shape (h, w, {channels}), as `mean` has {channels} values, "
            f"got {image.dtype} of shape {image.shape}"
        )


def size_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"size: expected a side or a (height, width) of at least 1 pixel, got {size}")
    return height, width


def mean_tuple(mean: Sequence[float]) -> tuple[float, ...]:
    if len(mean) not in (1, 3) or not all(0 <= m <= 1 for m in mean):
        raise ValueError(f"mean: expected one value (grey) or three (RGB) from 0 to 1, got {tuple(mean)}")
    return tuple(float(m) for m in mean)


def colour_of(mean: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(round(255 * m) for m in mean)


def resampling(interpolation: str) -> Image.Resampling:
    """Pillow's filter by its name; an unknown one raises `ValueError`."""
    if interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"interpolation: unknown interpolation {interpolation!r}{nearest(interpolation, INTERPOLATIONS)}"
        )
    return INTERPOLATIONS[interpolation]
