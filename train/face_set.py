"""What a data set for verification is: images of people, some of whom are twins."""

import bisect
import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from train import splits
from train.sources import Dataset, Source

# What an example says of its person beside the label.
ABOUT = ("twin", "hard", "validation")


@dataclasses.dataclass(frozen=True)
class FaceSet(Dataset):
    """One split, or a validation split and another one; a label is a person, an index into the arrays of people.

    Attributes, beside those of every image data set:
        labels: (N,) the person on each image.
        twins: (K,) every person's twin, -1 where there is none in the set.
        hard: (K,) whether the person and the twin are a hard pair.
        validation: (K,) whether the person is there to choose thresholds on, and not to be scored.
        detail: a line about the content for a person to read.
    """

    labels: Int[np.ndarray, " N"]
    twins: Int[np.ndarray, " K"]
    hard: Bool[np.ndarray, " K"]
    validation: Bool[np.ndarray, " K"]
    detail: str = ""

    def read(self, index: int) -> dict[str, Any]:
        """An example as of every image data set, and beside it `ABOUT` the person."""
        example = super().read(index)
        person = example["label"]
        about = (np.int32(self.twins[person]), np.bool_(self.hard[person]), np.bool_(self.validation[person]))
        return example | dict(zip(ABOUT, about))

    @property
    def pairs(self) -> Int[np.ndarray, "P 2"]:
        """The pairs of twins, the lower label first."""
        return pairs_of(self.twins)


def pairs_of(twins: Int[np.ndarray, " K"]) -> Int[np.ndarray, "P 2"]:
    """The pairs of twins, the lower label first, of every person's twin, -1 where there is none."""
    first = np.flatnonzero(twins > np.arange(len(twins)))
    return np.stack([first, twins[first]], 1)


def describe(labels: Int[np.ndarray, " N"], twins: Int[np.ndarray, " K"], hard: Bool[np.ndarray, " K"]) -> str:
    """A line about a set for a person to read."""
    twins_there = (twins >= 0).sum()
    return (
        f"{len(labels):,} images of {len(twins):,} people, {twins_there // 2:,} pairs of twins, "
        f"{(hard & (twins >= 0)).sum() // 2:,} of them hard"
    )


@dataclasses.dataclass(frozen=True)
class _Chained:
    """Examples of several sources one after the other; `people` is how many each of them knows."""

    sources: tuple[Source, ...]
    people: tuple[int, ...]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, index: int) -> dict[str, Any]:
        ends = np.cumsum([len(source) for source in self.sources]).tolist()
        which = bisect.bisect_right(ends, index)
        example = self.sources[which][index - (ends[which - 1] if which else 0)]
        return {**example, "label": example["label"] + sum(self.people[:which])}


def check_strangers(one: FaceSet, other: FaceSet) -> None:
    """Raises `ValueError` if somebody is in both of two sets, one of which is for scoring the other's faces."""
    if both := sorted(set(one.label_names) & set(other.label_names)):
        raise ValueError(
            f"{len(both)} people are both in the {one.name} and in the {other.name}, such as {both[0]!r}: those who "
            "are scored must be others than those who are learned from, for weights or thresholds"
        )


def with_validation(validation: FaceSet, scored: FaceSet) -> FaceSet:
    """Two splits as one set, the people of the first of which are there to choose thresholds on.

    Raises:
        ValueError: if a name is in both, or the images of one are of another shape.
    """
    check_strangers(validation, scored)
    if validation.image_shape != scored.image_shape:
        raise ValueError(
            f"the {validation.name} has images of shape {validation.image_shape}, the {scored.name} of shape "
            f"{scored.image_shape}: they must agree"
        )
    shift = validation.num_classes
    return FaceSet(
        name=f"{validation.name} and {scored.name}",
        source=_Chained((validation.source, scored.source), (shift, scored.num_classes)),
        fingerprint=splits.fingerprint("faces", validation.fingerprint, scored.fingerprint),
        num_classes=shift + scored.num_classes,
        label_names=(*validation.label_names, *scored.label_names),
        image_shape=scored.image_shape,
        channels=scored.channels,
        labels=np.concatenate([validation.labels, scored.labels + shift]),
        twins=np.concatenate([validation.twins, np.where(scored.twins < 0, -1, scored.twins + shift)]),
        hard=np.concatenate([validation.hard, scored.hard]),
        validation=np.arange(shift + scored.num_classes) < shift,
        detail=f"{scored.detail}; thresholds from {validation.detail}",
    )
