"""From a config to its data sets and the host's transforms of examples."""

import dataclasses
from typing import Any

import ml_collections
import numpy as np

from train import augment, data, faces, program, raster, recall, sources, text
from train.face_set import ABOUT, FaceSet
from train.identities import IdentityOrder
from train.sequences import SequenceSet
from train.sources import Dataset
from zoo import preprocess, registry
from zoo.sequence.sequence_model import SequenceModel


def open_dataset(config: ml_collections.ConfigDict, split: str) -> Dataset | SequenceSet:
    """One split of the data that a config names: images, for `task = "verification"` of people, else sequences.

    Sequences are text (`train.text`), a generated task (`train.recall`), or with `"raster:NAME"` the pixels of images.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError: as `train.sources.open_source`, `train.faces.open_faces`,
            `train.text.open_text` and `train.recall.open_task` do; the config's key is named where one is missing.
    """
    wanted = config.data
    if config.task == "verification":
        dataset = faces.open_faces(wanted.name, split=split, path=wanted.path, **wanted.options)
        return dataclasses.replace(dataset, channels=len(wanted.mean))
    if config.task == "classify":
        dataset = sources.open_source(wanted.name, split=split, path=wanted.path)
        return dataclasses.replace(dataset, channels=len(wanted.mean))
    if wanted.name.startswith("raster:"):
        return raster.open_raster(wanted.name.removeprefix("raster:"), split=split, path=wanted.path, **wanted.options)
    if wanted.length is None:
        raise ValueError("config.data.length, the tokens in a row, is not set")
    if wanted.name in recall.TASKS:
        if wanted.path is not None:
            raise ValueError(f"config.data.path {wanted.path!r} was given, but {wanted.name!r} is generated")
        examples = wanted.examples if split == "train" else wanted.eval_examples
        options = dict(wanted.options)
        return recall.open_task(
            wanted.name, split=split, examples=examples, length=wanted.length, seed=config.seed, **options
        )
    return text.open_text(
        wanted.name,
        split=split,
        path=wanted.path,
        length=wanted.length,
        tokenizer=wanted.tokenizer,
        align=segment_alignment(config),
        mode=wanted.packing,
        **wanted.options,
    )


def segment_alignment(config: ml_collections.ConfigDict) -> int:
    """Of what documents of text begin at multiples: `data.align`, or else where the model lets them begin."""
    if config.data.align:
        return config.data.align
    if not issubclass(registry.family_of(config.model.name).module, SequenceModel):
        return 1
    return registry.create_model(config.model.name, **config.model.overrides).segment_multiple


def _as_it_is(example: dict[str, Any], *randomness: np.random.Generator) -> dict[str, Any]:
    return example


def train_transform(config: ml_collections.ConfigDict, dataset: Dataset | SequenceSet) -> data.TrainTransform:
    """The augmentation of `config.augment`: a random-resized crop, or else a shifted crop; of sequences none."""
    if isinstance(dataset, SequenceSet):
        return _as_it_is
    settings = config.augment
    size = program.image_size(config, dataset)
    common = dict(
        hflip=settings.hflip,
        vflip=settings.vflip,
        color_jitter=settings.color_jitter,
        auto_augment=settings.randaugment or None,
        erase_prob=settings.erase_prob,
        mean=config.data.mean,
        interpolation=settings.interpolation,
    )
    if settings.random_resized_crop:
        return augment.train_transform(size, scale=settings.scale, ratio=settings.ratio, **common)
    return augment.random_crop_pad(size, pad=settings.pad_crop, rotate=settings.rotate, **common)


def train_order(config: ml_collections.ConfigDict, dataset: Dataset | SequenceSet) -> data.Order | None:
    """For verification the batches of `config.verification`, else None.

    Raises:
        ValueError: for batches that the data set cannot fill, see `train.identities.IdentityOrder`.
    """
    if not isinstance(dataset, FaceSet):
        return None
    settings = config.verification
    return IdentityOrder(
        dataset.labels,
        dataset.twins,
        batch_size=config.data.batch_size,
        parts=config.accum_steps,
        images=settings.images_per_identity,
        twin_share=settings.twin_share,
        seed=config.seed,
    )


@dataclasses.dataclass(frozen=True)
class _WithEntries:
    """A transform of images that hands on other entries of an example as they are."""

    transform: data.EvalTransform
    names: tuple[str, ...]

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        return {**self.transform(example), **{name: example[name] for name in self.names}}


def eval_transform(config: ml_collections.ConfigDict, dataset: Dataset | SequenceSet) -> data.EvalTransform:
    """The preprocessing of evaluation: resize and crop; of sequences none."""
    if isinstance(dataset, SequenceSet):
        return _as_it_is
    settings = config.data
    size = program.image_size(config, dataset)
    transform = preprocess.eval_transform(
        size, settings.crop_pct, settings.interpolation, crop_mode=settings.crop_mode, mean=settings.mean
    )
    return _WithEntries(transform, ABOUT) if isinstance(dataset, FaceSet) else transform


def eval_splits(config: ml_collections.ConfigDict) -> dict[str, str]:
    """The splits to evaluate by the name that their metrics get."""
    splits = {name: split for name, split in config.data.extra_eval.items() if split}
    return splits if config.data.eval_split is None else {"test": config.data.eval_split, **splits}
