"""Regions of a face as boxes, which models of faces take beside the images."""

import jax
import numpy as np
from jaxtyping import Array, Float

REGIONS = ("eyes", "nose", "mouth", "jaw")

# Shares of the width and height of an aligned square crop: eyes level, the midline of the face upright at half the
# width, eyes at 46 % of the height, the tip of the nose at 64 %, the mouth at 82 %. These are the places of the
# five-point template that face recognition aligns to; the boxes around them are ours. All are symmetric, so that a
# mirrored image has the same ones.
CANONICAL_BOXES = (
    (0.16, 0.32, 0.84, 0.58),
    (0.34, 0.42, 0.66, 0.74),
    (0.28, 0.70, 0.72, 0.94),
    (0.12, 0.64, 0.88, 1.00),
)


def check_boxes(boxes: Float[np.ndarray, "B R 4"] | Float[Array, "B R 4"], regions: int = len(REGIONS)) -> None:
    """Raises `ValueError` for boxes that are none, naming the first: not finite, empty, or not inside the image.

    Of boxes that are traced only the shape is known.

    Args:
        boxes: `(left, top, right, bottom)` as shares of the image's width and height.
        regions: how many an image must have.
    """
    if boxes.ndim != 3 or boxes.shape[1:] != (regions, 4):
        raise ValueError(f"boxes must be (batch, {regions}, 4), got {boxes.shape}")
    if isinstance(boxes, jax.core.Tracer):
        return
    boxes = np.asarray(boxes)
    left, top, right, bottom = np.moveaxis(boxes, -1, 0)
    inside = (left >= 0) & (top >= 0) & (right <= 1) & (bottom <= 1)
    wrong = ~(inside & (left < right) & (top < bottom))
    if wrong.any():
        image, region = (int(place) for place in np.argwhere(wrong)[0])
        name = REGIONS[region] if regions == len(REGIONS) else f"region {region}"
        raise ValueError(
            f"boxes of image {image}, {name}: (left, top, right, bottom) must be from 0 to 1 with left < right and "
            f"top < bottom, got {tuple(boxes[image, region].tolist())}"
        )


def mirror_boxes(boxes: Float[np.ndarray, "*batch 4"]) -> Float[np.ndarray, "*batch 4"]:
    """The boxes of the mirrored image: left and right change places."""
    left, top, right, bottom = np.moveaxis(boxes, -1, 0)
    return np.stack([1 - right, top, 1 - left, bottom], axis=-1).astype(boxes.dtype)
