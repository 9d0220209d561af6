"""Learned absolute position embeddings: one vector for every token of a grid, resampled for grids of another size."""

import math

import numpy as np
from jaxtyping import Float, Shaped

from zoo.transforms import Axes, Shape

# The free parameter of the cubic kernel where there is antialiasing, as in PIL and torch; without it torch takes -0.75.
CUBIC = -0.5


class Positions(Axes):
    """torch's `(1, tokens, D)` as `(tokens, D)`, for a grid of tokens, rows and columns.

    The tensor does not tell its grid, which is taken for a square one. Where another grid has as many tokens as a
    square one, it would pass for that unnoticed, so there this raises `ValueError`.
    """

    def __init__(self, grid: tuple[int, int]):
        super().__init__("1 n d -> n d")
        self._grid = grid

    def source_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        rows, columns = self._grid
        side = math.isqrt(rows * columns)
        if rows != columns and side**2 == rows * columns:
            raise ValueError(
                f"image_size: {rows} x {columns} position embeddings have the shape of {side} x {side}, which these "
                "names cannot tell apart; naming='zoo' keeps them as they are, or take an image_size of another shape"
            )
        return super().source_shapes(shape)


def resize_positions(
    positions: Shaped[np.ndarray, "..."], shape: Shape, method: str, *, grid: tuple[int, int], prefix: int
) -> Float[np.ndarray, "..."]:
    """Position embeddings of a square grid for another grid.

    Args:
        positions: `(prefix + side ** 2, D)`.
        shape: `(prefix + rows * columns, D)`.
        method: `"bicubic"` as timm does it, or `"bilinear"`; both antialiased, with half-pixel centres.
        grid: rows and columns.
        prefix: how many positions at the start are those of tokens outside the grid, and stay as they are.

    Returns:
        float64 of that shape.

    Raises:
        ValueError: for positions that are not those of a square grid, other channels, or another method.

    Source: timm, `resample_abs_pos_embed`, which computes in float32.
    """
    if method not in _KERNELS:
        raise ValueError(f"position embeddings are resized by {' or '.join(map(repr, _KERNELS))}, not by {method!r}")
    side = math.isqrt(max(len(positions) - prefix, 0))
    if positions.ndim != 2 or positions.shape[1] != shape[1] or prefix + side**2 != len(positions):
        raise ValueError(
            f"only {prefix} and a square number of positions of {shape[1]} channels can be resized, not "
            f"{positions.shape}"
        )
    wide = positions.astype(np.float64)
    rows, columns = (_weights(side, target, method) for target in grid)
    on_grid = np.einsum("yh,hwd,xw->yxd", rows, wide[prefix:].reshape(side, side, -1), columns, optimize=True)
    return np.concatenate([wide[:prefix], on_grid.reshape(-1, shape[1])])


def _weights(source: int, target: int, method: str) -> Float[np.ndarray, "target source"]:
    """Rows sum to 1; the kernel is as wide as a target pixel where that is larger than a source pixel."""
    scale = max(source / target, 1.0)
    centres = (np.arange(target) + 0.5) * source / target - 0.5
    weights = _KERNELS[method](np.abs(centres[:, None] - np.arange(source)) / scale)
    return weights / weights.sum(1, keepdims=True)


def _cubic(x):
    """Source: Keys, "Cubic convolution interpolation for digital image processing" (1981), equation 15."""
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = CUBIC * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def _linear(x):
    return np.maximum(1 - x, 0)


_KERNELS = {"bicubic": _cubic, "bilinear": _linear}
