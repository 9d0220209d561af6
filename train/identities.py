"""Batches for verification: several images of each of several people, most of them together with their twins."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Int

from train.face_set import pairs_of
from train.generated import need


@dataclasses.dataclass(frozen=True)
class IdentityOrder:
    """Which images make a batch, a pure function of its number; so a run that goes on needs no more than that.

    A batch is cut into `parts` that go through the model one after another, part m being rows m, m + parts, ... (as
    `train.step` cuts it), and positives, negatives and twins are looked for within a part. So every part is made for
    itself: a share of its people are whole pairs of twins, drawn at random from all pairs; the others are drawn from
    everyone else, no two of them twins. Of every person it has as many images, different ones unless there are fewer.

    Attributes:
        labels: (N,) the person on each image.
        twins: (K,) every person's twin, -1 where there is none.
        batch_size: images of a batch.
        parts: parts of a batch.
        images: of each person in a part.
        twin_share: share of a part's people who are there with their twin, rounded to whole pairs: 0.75 is twins to
            others as 3 to 1, as the paper on twins oversamples them (summaries say no more than "3:1").
        seed: of all draws.

    Raises:
        ValueError: for a part that the images do not divide, or that wants more pairs or people than there are.
    """

    labels: Int[np.ndarray, " N"]
    twins: Int[np.ndarray, " K"]
    batch_size: int
    parts: int = 1
    images: int = 4
    twin_share: float = 0.75
    seed: int = 0

    def __post_init__(self) -> None:
        need(self.images >= 1, f"images={self.images}", "at least 1")
        need(0 <= self.twin_share <= 1, f"twin_share={self.twin_share}", "from 0 to 1")
        rows, rest = divmod(self.batch_size, self.parts)
        need(
            rows > 0 and rest == 0 and rows % self.images == 0,
            f"batch_size={self.batch_size} in {self.parts} parts with {self.images} images of a person",
            f"a multiple of {self.parts * self.images} can be shared out",
        )
        pairs, others = self.people
        there = len(self._pairs)
        need(
            pairs <= there,
            f"a batch wants {pairs} pairs of twins",
            f"there are {there}; lower twin_share or batch_size",
        )
        need(
            pairs > 0 or self.twin_share == 0,
            f"twin_share={self.twin_share} of {rows // self.images} people",
            "that is no pair; a larger batch, fewer images of a person or twin_share=0 will do",
        )
        left = there - pairs + int((self.twins < 0).sum())
        need(others <= left, f"a batch wants {others} people beside its pairs", f"there are {left} without their twins")

    @property
    def people(self) -> tuple[int, int]:
        """Pairs of a part, and people without their twin."""
        people = self.batch_size // self.parts // self.images
        pairs = min(round(people * self.twin_share / 2), people // 2)
        return pairs, people - 2 * pairs

    @functools.cached_property
    def _pairs(self) -> Int[np.ndarray, "P 2"]:
        return pairs_of(self.twins)

    @functools.cached_property
    def _rows(self) -> list[Int[np.ndarray, " n"]]:
        return [np.flatnonzero(self.labels == person) for person in range(len(self.twins))]

    def __call__(self, number: int) -> Int[np.ndarray, " batch"]:
        """The images of batch `number`, counted from 0 at the start of training."""
        parts = [self._part(number, part) for part in range(self.parts)]
        return np.stack(parts, 1).ravel()

    def _part(self, number: int, part: int) -> Int[np.ndarray, " rows"]:
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(number, part))))
        pairs, others = self.people
        people = self._pairs[rng.permutation(len(self._pairs))[:pairs]].ravel().tolist()
        taken, wanted = set(people), len(people) + others
        for person in rng.permutation(len(self.twins)).tolist():
            if len(people) == wanted:
                break
            if person not in taken:
                people.append(person)
                taken |= {person, int(self.twins[person])}
        chosen = [np.resize(rng.permutation(self._rows[person]), self.images) for person in people]
        return np.concatenate(chosen)
