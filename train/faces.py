"""Data sets for verification by name: the built-in drawn twins, or a folder of people with a list of twins.

A folder has one directory of images per person, lists of who is in which split, and who is whose twin:

    root/images/PERSON/*.jpg    also .jpeg, .png, .webp, .bmp; faces cut out and aligned
    root/SPLIT.txt              train.txt, validation.txt, test.txt: a person a line
    root/pairs.csv              a head line `identity,twin`, then a pair of twins a line, in either order or in both

Whoever is not in `pairs.csv` has no twin. A third column `hard`, 0 or 1, marks the pairs that are scored as hard twins
too. People whom no split lists may lie in the folder; twins who are both listed must be in one split.
"""

import csv
import io
from collections.abc import Sequence

import numpy as np
from etils import epath

from train import splits, twins
from train.face_set import FaceSet, describe, with_validation
from train.sources import IMAGE_SUFFIXES, SIZES_IN_FINGERPRINT, FolderSource, subdirectories
from zoo.registry import nearest

LAYOUT = "the layout should be images/PERSON/*.jpg, SPLIT.txt and pairs.csv"
PAIRS_FILE = "pairs.csv"
NAMES = ("twins", "people")


def open_faces(name: str, *, split: str, path: epath.PathLike | None = None, **options: int | float) -> FaceSet:
    """Opens a split of a data set for verification.

    Args:
        name: "twins", which are drawn (see `train.twins.Twins` for the options), or "people", a folder.
        split: a split, or "A+B": the people of B are scored at thresholds that are chosen on those of A.
        path: the folder.
        **options: of the drawn twins.

    Raises:
        ValueError: an unknown name or split, a missing or superfluous path or option, a folder that contradicts itself.
        FileNotFoundError: nothing is there.
    """
    if name not in NAMES:
        raise ValueError(f"unknown data set {name!r} for verification{nearest(name, NAMES)}")
    if name == "twins" and path is not None:
        raise ValueError(f"data path {str(path)!r} was given, but 'twins' is built in and takes none")
    if name == "people" and options:
        raise ValueError(f"the folder of people takes no options, got {', '.join(sorted(options))}")
    first, *others = split.split("+")
    if len(others) > 1:
        raise ValueError(f"split {split!r} joins {1 + len(others)} splits; it takes A, or A+B with thresholds from A")
    if others:
        parts = (open_faces(name, split=part, path=path, **options) for part in (first, *others))
        return with_validation(*parts)
    if name == "twins":
        return twins.open_twins(split=split, **options)
    return open_people(splits.required_path(path, name, "the directory that holds images and pairs.csv"), split)


def open_people(root: epath.Path, split: str) -> FaceSet:
    """Opens a split of a folder of people, laid out as the head of this file says.

    Raises:
        FileNotFoundError: there is no such folder, or no images or list of pairs in it.
        ValueError: an unknown split; a person who is listed twice, has no directory or no image; a pair that names
            someone unknown, someone twice or one person alone; twins in different splits.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"data path {str(root)!r} is not a directory; {LAYOUT}")
    for wanted in (root / "images", root / PAIRS_FILE):
        if not wanted.exists():
            raise FileNotFoundError(f"{str(root)!r} has no {wanted.name}; {LAYOUT}")
    people = subdirectories(root / "images")
    listed = _split_lists(root, people)
    if split not in listed:
        raise ValueError(f"{splits.unknown_split(split, sorted(listed), f'the folder {str(root)!r}')}; {LAYOUT}")
    twin_of, hard_ones = _read_pairs(root / PAIRS_FILE, people)
    mine = listed[split]
    _check_twins_are_together(root, listed, twin_of)
    files, labels = [], []
    for label, person in enumerate(mine):
        found = sorted(entry.name for entry in (root / "images" / person).iterdir())
        found = [file for file in found if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith(".")]
        if not found:
            raise ValueError(
                f"{person!r} of split {split!r} has no image in {str(root / 'images' / person)!r}: looked for "
                f"{', '.join(IMAGE_SUFFIXES)}"
            )
        files += [f"{person}/{file}" for file in found]
        labels += [label] * len(found)
    place = {person: label for label, person in enumerate(mine)}
    twins_here = np.asarray([place.get(twin_of.get(person), -1) for person in mine])
    hard = np.asarray([person in hard_ones for person in mine])
    # A look at every file is slow on a remote disk, so the sizes are a sample; the names are all there.
    sample = files[:: -(-len(files) // SIZES_IN_FINGERPRINT)]
    sizes = [f"{file} {(root / 'images' / file).stat().length}" for file in sample]
    pairs = [f"{person} {twin_of.get(person)} {person in hard_ones}" for person in mine]
    return FaceSet(
        name=f"people of {root / split}",
        source=FolderSource(root / "images", tuple(files), tuple(labels)),
        fingerprint=splits.fingerprint(f"people:{split}:{len(files)} images", *pairs, *files, *sizes),
        num_classes=len(mine),
        label_names=tuple(mine),
        image_shape=None,
        channels=3,
        labels=np.asarray(labels),
        twins=twins_here,
        hard=hard,
        validation=np.zeros(len(mine), bool),
        detail=describe(np.asarray(labels), twins_here, hard),
    )


def _split_lists(root: epath.Path, people: Sequence[str]) -> dict[str, list[str]]:
    """Who is in which split."""
    listed, owner, known = {}, {}, set(people)
    for path in sorted(root.glob("*.txt")):
        split = path.name.removesuffix(".txt")
        lines = path.read_text().removeprefix("\ufeff").splitlines()
        names = [line.strip() for line in lines if line.strip()]
        if not names:
            raise ValueError(f"{path.name} of {str(root)!r} lists nobody")
        for name in names:
            if name not in known:
                raise ValueError(
                    f"{path.name} names {name!r}, who has no directory in images{nearest(name, people)}; every .txt "
                    "there lists the people of a split"
                )
            if name in owner:
                raise ValueError(f"{name!r} is listed in {owner[name]}.txt and again in {path.name}: once is enough")
            owner[name] = split
        listed[split] = names
    return listed


def _read_pairs(path: epath.Path, people: Sequence[str]) -> tuple[dict[str, str], set[str]]:
    """Everyone's twin, and who is of a hard pair."""
    rows = list(csv.reader(io.StringIO(path.read_text().removeprefix("\ufeff"))))
    head = [cell.strip().lower() for cell in rows[0]] if rows else []
    if head not in (["identity", "twin"], ["identity", "twin", "hard"]):
        raise ValueError(f"{path.name} begins with {','.join(head)!r}; its head must be identity,twin or with ,hard")
    twin_of, hard_ones, known = {}, {}, set(people)
    for number, row in enumerate(rows[1:], 2):
        cells, where = [cell.strip() for cell in row], f"line {number} of {path.name}"
        if not any(cells):
            continue
        if len(cells) != len(head):
            raise ValueError(f"{where} has {len(cells)} cells, {len(head)} are wanted: {','.join(row)!r}")
        pair = cells[:2]
        for name in pair:
            if name not in known:
                raise ValueError(f"{where} names {name!r}, who has no directory in images{nearest(name, people)}")
        if pair[0] == pair[1]:
            raise ValueError(f"{where} makes {pair[0]!r} a twin of their own")
        if len(head) == 3 and cells[2] not in ("0", "1"):
            raise ValueError(f"{where}: hard must be 0 or 1, got {cells[2]!r}")
        for name, twin in (pair, pair[::-1]):
            if twin_of.setdefault(name, twin) != twin:
                raise ValueError(
                    f"{where} makes {twin!r} the twin of {name!r}, whose twin is {twin_of[name]!r} already: there "
                    "are pairs only, the same from both sides"
                )
            hard = cells[2:] == ["1"]
            if hard_ones.setdefault(name, hard) != hard:
                raise ValueError(f"{where} contradicts another line in whether {pair[0]!r} and {pair[1]!r} are hard")
    return twin_of, {name for name, hard in hard_ones.items() if hard}


def _check_twins_are_together(root: epath.Path, listed: dict[str, list[str]], twin_of: dict[str, str]) -> None:
    owner = {name: split for split, names in listed.items() for name in names}
    for name, twin in twin_of.items():
        if name in owner and twin in owner and owner[name] != owner[twin]:
            raise ValueError(
                f"the twins {name!r} and {twin!r} of {str(root)!r} are in different splits, {owner[name]!r} and "
                f"{owner[twin]!r}: a face that training knows would be scored"
            )
