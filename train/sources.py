"""Image data sets by name: the built-in digits, a folder of images, whatever TFDS prepared as ArrayRecord."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from etils import epath

from train import prepared, splits
from zoo.preprocess import decode
from zoo.registry import nearest

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
LAYOUT = "the layout should be split/class_name/*.jpg"
SIZES_IN_FINGERPRINT = 1024


@runtime_checkable
class Source(Protocol):
    """Random access to examples.

    An example is a dict of "image" (uint8 array (H, W, C), not to be written to, or the bytes of an encoded file),
    "label" (int) and perhaps "file" (str), which an error about the example should name.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One split of a data set.

    Attributes:
        name: what error messages call it.
        source: its examples.
        fingerprint: tells from the content whether two data sets are the same, wherever they are stored.
        num_classes: labels are 0 .. num_classes - 1.
        label_names: one name per class.
        image_shape: (H, W, C) where all images share it, else None.
        channels: of the images: 1 or 3. Single images may differ (a grey JPEG among colour ones).
    """

    name: str
    source: Source
    fingerprint: str
    num_classes: int
    label_names: tuple[str, ...]
    image_shape: tuple[int, int, int] | None
    channels: int

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> dict[str, Any]:
        """An example decoded: {"image": uint8 (H, W, channels), not to be written to; "label": int; "index": int}.

        Raises:
            ValueError: if the image cannot be decoded; the message names the example, and its file if there is one.
        """
        example = self.source[index]
        name = f"example {index} of the {self.name}" + (f" ({example['file']})" if "file" in example else "")
        image = decode(example["image"], channels=self.channels, name=name)
        return {"image": image, "label": example["label"], "index": index}


def open_source(name: str, *, split: str, path: epath.PathLike | None = None) -> Dataset:
    """Opens one split of a data set for random access. Nothing is ever downloaded.

    Args:
        name: one of
            "digits": the 1,797 handwritten digits (8, 8, 1) that scikit-learn carries;
            "folder": the files path/split/class_name/*.jpg (also .jpeg, .png, .webp, .bmp);
            "tfds": the prepared TFDS data set whose version directory is `path`;
            "tfds:NAME[/CONFIG][:VERSION]": the same, found by name in the TFDS data directory `path`; None
            means $TFDS_DATA_DIR or else ~/tensorflow_datasets.
        split: for the digits "train" or "test"; "first1437" or "last360", their natural split by writers; or
            "test_last360", those of "test" that lie in "last360";
            a folder's name; a TFDS split such as "train[:90%]".
        path: a local path or a URL that `etils.epath` knows, such as gs://bucket/dir.

    Returns:
        The data set.

    Raises:
        ValueError: an unknown name or split, a missing or superfluous path, no images, no labels.
        FileNotFoundError: nothing is there; for a TFDS data set it says how to prepare it.
        NotImplementedError: a TFDS data set in another format than ArrayRecord; it says how to convert it.
    """
    if name == "digits":
        if path is not None:
            raise ValueError(f"data path {str(path)!r} was given, but 'digits' is built in and takes none")
        return _open_digits(split)
    if name == "folder":
        return _open_folder(splits.required_path(path, name, "the directory that holds split/class_name/*.jpg"), split)
    if name == "tfds" or (name.startswith("tfds:") and name != "tfds:"):
        return _open_tfds(prepared.open_prepared(name, split=split, path=path))
    raise ValueError(f"unknown data set {name!r}{nearest(name, ['digits', 'folder', 'tfds', 'tfds:NAME'])}")


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images in memory: `images` uint8 (N, H, W, C), `labels` (N,)."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": int(self.labels[index])}


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    # scikit-learn takes two seconds to import, which only those who want the digits should pay.
    from sklearn.datasets import load_digits

    digits = load_digits()
    levels = digits.images.astype(np.int64)
    # 0 .. 16 to 0 .. 255 in integers, rounded to nearest.
    images = ((255 * levels + 8) // 16).astype(np.uint8)[..., None]
    return images, digits.target.astype(np.int64)


def _open_digits(split: str) -> Dataset:
    images, labels = _digits()
    stored = json.loads((epath.resource_path("train") / "digits_split.json").read_text())
    test = np.asarray(stored["test"])
    places = np.arange(len(images))
    parts = {
        "train": np.setdiff1d(places, test),
        "test": test,
        "first1437": places[:-360],
        "last360": places[-360:],
        "test_last360": np.intersect1d(test, places[-360:]),
    }
    if split not in parts:
        raise splits.unknown_split(split, list(parts), "'digits'")
    images, labels = images[parts[split]], labels[parts[split]]
    images.setflags(write=False)
    return Dataset(
        name=f"digits {split}",
        source=ArraySource(images, labels),
        fingerprint=splits.fingerprint(f"digits:{split}", images.tobytes(), labels.tobytes()),
        num_classes=10,
        label_names=tuple(str(digit) for digit in range(10)),
        image_shape=(8, 8, 1),
        channels=1,
    )


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Image files below a directory: `files` are paths relative to `root`, `labels` (N,) their classes."""

    root: epath.Path
    files: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = self.root / self.files[index]
        return {"image": file.read_bytes(), "label": self.labels[index], "file": str(file)}


def subdirectories(directory: epath.Path) -> list[str]:
    """Names of the directories in a directory, sorted, hidden ones left out."""
    entries = (entry for entry in directory.iterdir() if not entry.name.startswith("."))
    return sorted(entry.name for entry in entries if entry.is_dir())


def _open_folder(root: epath.Path, split: str) -> Dataset:
    if not root.is_dir():
        raise FileNotFoundError(f"data path {str(root)!r} is not a directory; {LAYOUT}")
    known = subdirectories(root)
    if split not in known:
        raise ValueError(f"{splits.unknown_split(split, known, f'the folder {str(root)!r}')}; {LAYOUT}")
    classes = subdirectories(root / split)
    if not classes:
        raise ValueError(f"{str(root / split)!r} has no class directory; {LAYOUT}")
    for other in known:
        _check_same_classes(root, split, classes, other)
    files, labels = [], []
    for label, class_name in enumerate(classes):
        names = sorted(entry.name for entry in (root / split / class_name).iterdir())
        for name in names:
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                files.append(f"{class_name}/{name}")
                labels.append(label)
    if not files:
        raise ValueError(
            f"no image in any class directory of {str(root / split)!r}: looked for {', '.join(IMAGE_SUFFIXES)}; "
            f"{LAYOUT}"
        )
    # A look at every file is slow on a remote disk, so the sizes are a sample; the names are all there.
    sample = files[:: -(-len(files) // SIZES_IN_FINGERPRINT)]
    sizes = [f"{name} {(root / split / name).stat().length}" for name in sample]
    return Dataset(
        name=f"folder {root / split}",
        source=FolderSource(root / split, tuple(files), tuple(labels)),
        fingerprint=splits.fingerprint(f"folder:{split}:{len(files)} images", *classes, *files, *sizes),
        num_classes=len(classes),
        label_names=tuple(classes),
        image_shape=None,
        channels=3,
    )


def _check_same_classes(root: epath.Path, split: str, classes: list[str], other: str) -> None:
    other_classes = subdirectories(root / other)
    if not other_classes or other_classes == classes:
        return
    differences = []
    for owner, only in (
        (split, sorted(set(classes) - set(other_classes))),
        (other, sorted(set(other_classes) - set(classes))),
    ):
        if only:
            more = f" and {len(only) - 10} more" if len(only) > 10 else ""
            differences.append(f"only in {owner!r}: {', '.join(only[:10])}{more}")
    raise ValueError(
        f"the splits {split!r} and {other!r} of {str(root)!r} have different classes, so that a label would not "
        f"mean the same in both; {'; '.join(differences)}"
    )


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """Serialised TFDS examples: `records` random access to their bytes, `features` what to read from them."""

    records: Sequence[bytes]
    features: Any
    decoders: dict[str, Any]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.features.deserialize_example_np(self.records[index], decoders=self.decoders))


def _open_tfds(data: prepared.Prepared) -> Dataset:
    import tensorflow_datasets as tfds

    image, label = _image_and_label(data.info.features, data.name)
    encoded = isinstance(image, tfds.features.Image)
    return Dataset(
        name=f"{data.name} {data.split}",
        source=TfdsSource(
            data.records,
            # Only these two are parsed: boxes, masks or captions beside them would cost time.
            features=tfds.features.FeaturesDict({"image": image, "label": label}),
            decoders={"image": tfds.decode.SkipDecoding()} if encoded else {},
        ),
        fingerprint=data.fingerprint(*label.names),
        num_classes=label.num_classes,
        label_names=tuple(label.names),
        image_shape=None if None in image.shape else image.shape,
        channels=1 if image.shape[-1] == 1 else 3,
    )


def _image_and_label(features: Any, name: str) -> tuple[Any, Any]:
    import tensorflow_datasets as tfds

    found = dict(features) if isinstance(features, tfds.features.FeaturesDict) else {}
    listing = ", ".join(f"{key!r} ({type(found[key]).__name__})" for key in sorted(found)) or repr(features)
    for wanted in ("image", "label"):
        if wanted not in found:
            raise ValueError(f"the {name} has no feature {wanted!r}, which training needs; it has {listing}")
    image, label = found["image"], found["label"]
    if len(image.shape) != 3 or image.np_dtype != np.uint8:
        raise ValueError(
            f"feature 'image' of the {name} has shape {image.shape} and dtype {np.dtype(image.np_dtype)}; "
            "uint8 of (height, width, channels) is needed"
        )
    if not isinstance(label, tfds.features.ClassLabel) or not label.num_classes:
        raise ValueError(f"feature 'label' of the {name} is no ClassLabel with a number of classes: {listing}")
    return image, label
