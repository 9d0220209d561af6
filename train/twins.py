"""Made-up twins: drawn faces that general verification tells apart with ease and verification of twins does not."""

import concurrent.futures
import dataclasses
import functools
import os

import numpy as np
from jaxtyping import Bool, Float, UInt8

from train import drawn_faces, splits
from train.face_set import FaceSet, describe
from train.generated import need
from train.sources import ArraySource
from zoo.registry import nearest

SPLITS = ("train", "validation", "test")
# A pair is hard when its difference is among the smallest so many of the split.
HARD_SHARE = 1 / 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Twins:
    """Which people there are and how they are photographed.

    Twins share their genes: the shape of the face, its colours, and blots of the skin that are the same on both sides.
    What they do not share is on one side only: marks, and slight differences between the sides. Every person has
    pictures in different pose, light, sharpness and mood. The people of the splits are others.

    Attributes:
        pairs, validation_pairs, test_pairs: pairs of twins in the splits.
        singles: people of the training split who have no twin; as many in the others for their number of pairs.
        images: pictures of a person in training; eval_images: in the other splits.
        size: side of the pictures in pixels.
        difficulty: from 0 to 1; what is private is drawn with a strength of 1 - difficulty, so that at 1 twins look the
            same.
        nuisance: factor of all that differs between pictures of one person.
        seed: of everything.
    """

    pairs: int = 160
    validation_pairs: int = 40
    test_pairs: int = 80
    singles: int = 32
    images: int = 16
    eval_images: int = 8
    size: int = 48
    difficulty: float | int = 0.5
    nuisance: float | int = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("pairs", "validation_pairs", "test_pairs", "images", "eval_images"):
            need(getattr(self, name) >= 1, f"{name}={getattr(self, name)}", "at least 1")
        for name in ("singles", "nuisance", "seed"):
            need(getattr(self, name) >= 0, f"{name}={getattr(self, name)}", "at least 0")
        need(self.size >= 16, f"size={self.size}", "at least 16, below which there is no face to see")
        need(0 <= self.difficulty <= 1, f"difficulty={self.difficulty}", "from 0 to 1")

    def families(self, split: str) -> tuple[int, int, int]:
        """Pairs and singles of a split, and the pictures of each person."""
        pairs = {"train": self.pairs, "validation": self.validation_pairs, "test": self.test_pairs}[split]
        return pairs, round(self.singles * pairs / self.pairs), self.images if split == "train" else self.eval_images


def open_twins(*, split: str, **options: int | float) -> FaceSet:
    """Draws one split.

    Args:
        split: "train", "validation" or "test".
        **options: fields of `Twins`.

    Returns:
        The pictures of the first person, then those of the second and so on; 2 i and 2 i + 1 are twins, those without
        a twin come last. A pair is hard if it is in the third of the split with the smallest `difference`.

    Raises:
        ValueError: for an unknown split or option, or an option out of range.
    """
    if split not in SPLITS:
        raise splits.unknown_split(split, SPLITS, "the drawn twins")
    known = {field.name: field.type for field in dataclasses.fields(Twins)}
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"the drawn twins have no option {name!r}{nearest(name, known)}")
        right = isinstance(value, known[name]) and not isinstance(value, bool)
        need(right, f"{name}={value!r}", "a whole number" if known[name] is int else "a number")
    settings = Twins(**options)
    pairs, singles, count = settings.families(split)
    images, hard = _drawn(settings, split)
    labels = np.repeat(np.arange(2 * pairs + singles), count)
    twins = np.concatenate([np.arange(2 * pairs) ^ 1, np.full(singles, -1)])
    return FaceSet(
        name=f"drawn twins {split}",
        source=ArraySource(images, labels),
        fingerprint=splits.fingerprint(f"twins:{split}", repr(settings)),
        num_classes=len(twins),
        label_names=tuple(f"{split}_{person}" for person in range(len(twins))),
        image_shape=images.shape[1:],
        channels=3,
        labels=labels,
        twins=twins,
        hard=hard,
        validation=np.zeros(len(twins), bool),
        detail=describe(labels, twins, hard),
    )


def people(settings: Twins, split: str) -> list[drawn_faces.Person]:
    """The people of a split, 2 i and 2 i + 1 being twins."""
    pairs, singles, _ = settings.families(split)
    found = []
    for family in range(pairs + singles):
        genes = drawn_faces.draw_genes(_stream(settings, split, 0, family))
        for member in range(2 if family < pairs else 1):
            rng = _stream(settings, split, 1, family, member)
            found.append(drawn_faces.draw_person(genes, rng, 1 - settings.difficulty))
    return found


def difference(one: drawn_faces.Person, other: drawn_faces.Person, size: int) -> float:
    """The root mean square difference of two people's pixels (0 to 1), both frontal, evenly lit and sharp."""
    apart = drawn_faces.portrait(one, size) - drawn_faces.portrait(other, size)
    return float(np.sqrt(np.square(apart).mean()))


def hardest(differences: Float[np.ndarray, " P"]) -> Bool[np.ndarray, " P"]:
    """The third of pairs with the smallest differences, at least one; of equals the earlier ones."""
    hard = np.zeros(len(differences), bool)
    hard[np.argsort(differences, kind="stable")[: max(1, int(HARD_SHARE * len(differences)))]] = True
    return hard


# A comparison opens the same splits again and again.
@functools.lru_cache(maxsize=6)
def _drawn(settings: Twins, split: str) -> tuple[UInt8[np.ndarray, "N h w 3"], Bool[np.ndarray, " K"]]:
    """The pictures, not to be written to, and which people are of a hard pair."""
    everyone = people(settings, split)
    pairs, _, count = settings.families(split)

    def taken(person: int) -> UInt8[np.ndarray, "count h w 3"]:
        rng = _stream(settings, split, 2, person)
        return drawn_faces.photographs(everyone[person], settings.size, count, rng, settings.nuisance)

    # Numpy lets go of the interpreter's lock while it computes.
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        images = np.concatenate(list(pool.map(taken, range(len(everyone)))))
    images.setflags(write=False)
    apart = [difference(everyone[2 * i], everyone[2 * i + 1], settings.size) for i in range(pairs)]
    hard = np.zeros(len(everyone), bool)
    hard[: 2 * pairs] = np.repeat(hardest(np.asarray(apart)), 2)
    return images, hard


def _stream(settings: Twins, split: str, *key: int) -> np.random.Generator:
    sequence = np.random.SeedSequence(settings.seed, spawn_key=(SPLITS.index(split), *key))
    return np.random.Generator(np.random.PCG64(sequence))
