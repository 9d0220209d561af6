"""Images as sequences: their pixels row by row, each predicted from those before it."""

import dataclasses

import numpy as np
from etils import epath

from train import sources, splits
from train.generated import need, sequence
from train.sequences import Example, SequenceSet, check_index, shifted


@dataclasses.dataclass(frozen=True)
class Raster:
    """Grey images of one shape as sequences of their levels, from the top left on; `levels` begins each of them."""

    dataset: sources.Dataset
    levels: int

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        check_index(index, len(self))
        image = self.dataset.read(index)["image"]
        # 0 .. 255 to 0 .. levels - 1 in integers, rounded to nearest.
        targets = ((image.ravel().astype(np.int32) * (self.levels - 1) + 127) // 255).astype(np.int32)
        return sequence(shifted(targets, self.levels), targets, np.ones(len(targets), bool))


def open_raster(name: str, *, split: str, levels: int = 17, path: epath.PathLike | None = None) -> SequenceSet:
    """Opens one split of a data set of grey images for autoregressive modelling.

    Args:
        name, split, path: as in `train.sources.open_source`; "digits" gives 64 positions, and 17 levels are exactly
            those that the digits have.
        levels: pixels are 0 .. levels - 1; the id `levels` is what the first pixel is predicted from.

    Raises:
        ValueError: as `open_source` does; images in colour or of different shapes; fewer than 2 or more than 256
            levels.
    """
    need(2 <= levels <= 256, f"levels={levels}", "from 2 to 256")
    dataset = sources.open_source(name, split=split, path=path)
    need(
        dataset.image_shape is not None and dataset.channels == 1,
        f"the {dataset.name} has images of shape {dataset.image_shape or 'unknown'} with {dataset.channels} channels",
        "a sequence of pixels needs one shape and one channel",
    )
    height, width, _ = dataset.image_shape
    return SequenceSet(
        name=f"{dataset.name} in raster order",
        source=Raster(dataset, levels),
        fingerprint=splits.fingerprint(f"raster:{name}:{split}", dataset.fingerprint, str(levels)),
        vocab_size=levels + 1,
        length=height * width,
        detail=f"{len(dataset):,} images of {height} x {width} pixels with {levels} levels",
        chance=1 / levels,
    )
