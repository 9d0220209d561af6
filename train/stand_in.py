"""What planning knows of a data set that is not there: shapes, classes, vocabulary."""

import dataclasses

import jax
import ml_collections
import numpy as np

from train import data, faces, inputs, recall
from train.face_set import FaceSet
from train.sequences import SequenceSet
from train.sources import ArraySource, Dataset
from zoo.sequence.tokenizers import open_tokenizer

# The data sets that are built in, which are used as they are.
BUILT_IN = ("digits", "raster:digits", "twins", *recall.TASKS)
# Classes of data sets that are known by name.
CLASSES = {"imagenet2012": 1000}


def dataset(config: ml_collections.ConfigDict, classes: int | None = None) -> Dataset | SequenceSet:
    """The training split, or one example of the same shape in its place where it is not built in.

    Args:
        config: a complete config.
        classes: of images, people of a task of verification; None: those of `CLASSES`, or of the data if it is there.

    Raises:
        ValueError: if the classes are not known.
    """
    name = config.data.name
    if name in BUILT_IN:
        return inputs.open_dataset(config, config.data.split)
    if config.task == "next_token":
        return _text(config) if not name.startswith("raster:") else inputs.open_dataset(config, config.data.split)
    if not (name in faces.NAMES if config.task == "verification" else name.startswith(("tfds", "folder"))):
        # There is no such data set, which opening it says best.
        return inputs.open_dataset(config, config.data.split)
    known = name.removeprefix("tfds:").partition(":")[0].partition("/")[0]
    classes = classes or CLASSES.get(known)
    if classes is None:
        try:
            return inputs.open_dataset(config, config.data.split)
        except (OSError, ValueError) as error:
            raise ValueError(f"how many classes the data has is not known; say it by --classes N ({error})") from error
    side = config.data.image_size
    if side is None:
        raise ValueError(f"the images of {name!r} are not there to look at; set config.data.image_size")
    shape = (side, side, len(config.data.mean))
    # As many names as classes are labels, though there is but one image.
    fields = dict(
        name=f"stand-in for {name}",
        source=ArraySource(np.zeros((1, *shape), np.uint8), np.zeros(1, np.int64)),
        fingerprint="stand-in",
        num_classes=classes,
        label_names=tuple(map(str, range(classes))),
        image_shape=shape,
        channels=shape[-1],
    )
    if config.task != "verification":
        return Dataset(**fields)
    nobody = np.full(classes, -1)
    never = np.zeros(classes, bool)
    return FaceSet(**fields, labels=np.zeros(1, np.int64), twins=nobody, hard=never, validation=never)


def _text(config: ml_collections.ConfigDict) -> SequenceSet:
    """A row of text."""
    settings = config.data
    if settings.length is None:
        raise ValueError("config.data.length, the tokens in a row, is not set")
    length = settings.length
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "targets", "segments")}
    return SequenceSet(
        name=f"stand-in for {settings.name}",
        source=Rows(row | {"weights": np.ones(length, np.float32), "bytes": np.int32(length)}),
        fingerprint="stand-in",
        vocab_size=open_tokenizer(settings.tokenizer).vocab_size,
        length=length,
        align=inputs.segment_alignment(config),
        packed=True,
    )


@dataclasses.dataclass(frozen=True)
class Rows:
    """One example, the same at every place."""

    row: dict[str, np.ndarray]

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.row


def batch(
    config: ml_collections.ConfigDict, dataset: Dataset | SequenceSet, rows: jax.sharding.Sharding
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch, as the input pipeline itself makes one of one example."""
    of_one = data.train_iterator(
        dataset, batch_size=1, seed=0, transform=inputs.train_transform(config, dataset), prefetch=1
    )
    with of_one:
        example = next(of_one)
    size = config.data.batch_size
    return {
        name: jax.ShapeDtypeStruct((size, *value.shape[1:]), value.dtype, sharding=rows)
        for name, value in example.items()
    }
