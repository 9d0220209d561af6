"""What models that look at parts of an image attended to; sown and read as the maps of `zoo.watch` are."""

from typing import Any

import flax.struct
import numpy as np
from jaxtyping import Float, Int


@flax.struct.dataclass
class RolloutMap:
    """Which patches an attention rollout ranks first (DCAL).

    Attributes:
        scores: `(B, h, w)`: how much every patch counts in the class token through all layers; they sum to 1 less
            what falls to the class token itself.
        selected: `(B, R)`: row-major places of the selected patches, best first.
    """

    scores: Any
    selected: Any

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return tuple(self.scores.shape[1:])

    def places(self) -> Int[np.ndarray, "B R 2"]:
        """(row, column) of the selected patches, best first."""
        return np.stack(np.divmod(np.asarray(self.selected), self.shape[1]), axis=-1)


@flax.struct.dataclass
class PartMap:
    """Where the regions of an image looked (AHAN's part attention).

    Attributes:
        weights: `(B, regions, scales, h, w)`: the attention of a region's queries at a scale to every patch, the
            mean over queries and heads; sums to 1 less what goes to the class token.
        mixing: `(regions, scales)`: how much each scale counts in a region; rows sum to 1.
        boxes: `(B, regions, 4)`: where the regions are, (left, top, right, bottom) from 0 to 1.
    """

    weights: Any
    mixing: Any
    boxes: Any

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return tuple(self.weights.shape[3:])

    def heat(self, region: int, scale: int | None = None) -> Float[np.ndarray, "B h w"]:
        """Where a region looked at one of the scales, or at all of them as they are mixed; both counted from 0."""
        weights = np.asarray(self.weights, np.float32)[:, region]
        if scale is not None:
            return weights[:, scale]
        return np.einsum("s,bshw->bhw", np.asarray(self.mixing, np.float32)[region], weights)


@flax.struct.dataclass
class AsymmetryMap:
    """Where the halves of an image differ (AHAN's asymmetry stream).

    Attributes:
        difference: `(B, h, w / 2)`: the mean over channels of the absolute difference of what a patch of the left
            half and its mirror image found in the other half.
    """

    difference: Any

    def heat(self) -> Float[np.ndarray, "B h w"]:
        """The difference on the whole map, the same on both sides."""
        half = np.asarray(self.difference, np.float32)
        return np.concatenate([half, half[:, :, ::-1]], axis=2)
