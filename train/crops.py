"""Which part of an image is used: random crops, and the box that random erasing removes."""

import dataclasses
import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from train.draws import below, choose, uniform
from zoo.preprocess import Pixels, as_pil, as_pixels, center_crop, for_mode, resize, resize_to_cover

CroppedPixels = UInt8[np.ndarray, "height width c"]


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """A crop of random area and aspect ratio, resized to `size`.

    Attributes:
        size: (height, width) of the result.
        scale: range of the crop's share of the image's area.
        ratio: range of the crop's width / height, drawn uniformly in its logarithm.
        resample: the interpolations of which one is drawn.

    Source: Szegedy et al., arXiv 1409.4842, section 6, in the form of torchvision and timm: ten tries, then
    the largest central crop within the range of ratios.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    resample: tuple[Image.Resampling, ...]

    def __call__(self, image: Pixels, rng: np.random.Generator) -> CroppedPixels:
        """A random part of the image, at `size`."""
        top, left, height, width = self.box(rng, *image.shape[:2])
        part = as_pil(image[top : top + height, left : left + width])
        return as_pixels(resize(part, self.size, choose(rng, self.resample)))

    def box(self, rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
        """Draws the crop's (top, left, height, width) in an image of the given size."""
        for _ in range(10):
            area = uniform(rng, *self.scale) * (height * width)
            ratio = math.exp(uniform(rng, math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return below(rng, height - h + 1), below(rng, width - w + 1), h, w
        h, w = height, width
        if width / height < self.ratio[0]:
            h = round(width / self.ratio[0])
        elif width / height > self.ratio[1]:
            w = round(height * self.ratio[1])
        return (height - h) // 2, (width - w) // 2, h, w


@dataclasses.dataclass(frozen=True)
class RandomShiftCrop:
    """A crop of `size` from the image with a border of `pad` pixels around it, optionally rotated and zoomed.

    Attributes:
        size: (height, width) of the result, and of the image: one of another size is resized to cover it, and
            its centre taken.
        pad: how far, in pixels, the crop may reach over the image's edges.
        rotate: largest rotation about the crop's centre, in degrees, drawn uniformly in both directions.
        zoom: range of the magnification, drawn uniformly in its logarithm.
        fill: colour outside of the image, one value per channel.
        resample: the interpolations of which one is drawn for resizing, and one for rotating and zooming.
    """

    size: tuple[int, int]
    pad: int
    rotate: float
    zoom: tuple[float, float]
    fill: tuple[int, ...]
    resample: tuple[Image.Resampling, ...]

    def __call__(self, image: Pixels, rng: np.random.Generator) -> CroppedPixels:
        """The crop, moved by whole pixels, or by any distance where a rotation or zoom has to interpolate."""
        if image.shape[:2] != self.size:
            resized = resize_to_cover(as_pil(image), self.size, choose(rng, self.resample))
            image = as_pixels(center_crop(resized, self.size, self.fill))
        if self.rotate == 0 and self.zoom == (1.0, 1.0):
            return self._shift(image, rng)
        return as_pixels(self._transform(as_pil(image), rng))

    def _shift(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        h, w = self.size
        top, left = below(rng, 2 * self.pad + 1) - self.pad, below(rng, 2 * self.pad + 1) - self.pad
        out = np.empty_like(image)
        out[...] = self.fill
        y0, y1, x0, x1 = max(top, 0), min(top + h, h), max(left, 0), min(left + w, w)
        out[y0 - top : y1 - top, x0 - left : x1 - left] = image[y0:y1, x0:x1]
        return out

    def _transform(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        h, w = self.size
        center_y = h / 2 + self.pad * uniform(rng, -1.0, 1.0)
        center_x = w / 2 + self.pad * uniform(rng, -1.0, 1.0)
        angle = math.radians(uniform(rng, -self.rotate, self.rotate))
        zoom = math.exp(uniform(rng, math.log(self.zoom[0]), math.log(self.zoom[1])))
        cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
        x_row = (cos, sin, center_x - cos * w / 2 - sin * h / 2)
        y_row = (-sin, cos, center_y + sin * w / 2 - cos * h / 2)
        resample = choose(rng, self.resample)
        affine = Image.Transform.AFFINE
        return image.transform((w, h), affine, x_row + y_row, resample, fillcolor=for_mode(self.fill))


@dataclasses.dataclass(frozen=True)
class RandomErasing:
    """Draws the box of an image that is to be erased; the device fills it.

    Attributes:
        prob: the probability that there is one.
        area: range of the box's share of the image's area.
        aspect: range of its height / width, drawn uniformly in its logarithm.

    Source: Zhong et al., arXiv 1708.04896, algorithm 1, with timm's ranges and its ten tries.
    """

    prob: float
    area: tuple[float, float] = (0.02, 1 / 3)
    aspect: tuple[float, float] = (0.3, 1 / 0.3)

    def box(self, rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
        """Draws (top, left, height, width) of the box, all 0 for none."""
        if self.prob == 0 or rng.random() > self.prob:
            return 0, 0, 0, 0
        for _ in range(10):
            area = uniform(rng, *self.area) * (height * width)
            aspect = math.exp(uniform(rng, math.log(self.aspect[0]), math.log(self.aspect[1])))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w < width and h < height:
                return below(rng, height - h + 1), below(rng, width - w + 1), h, w
        return 0, 0, 0, 0
