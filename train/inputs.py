"""From a config to its data sets and the host's transforms of examples."""

import dataclasses
from typing import Any

import ml_collections
import numpy as np

from train import augment, program, raster, recall, sources, text
from train.sequences import SequenceSet
from train.sources import Dataset
from zoo import preprocess, registry
from zoo.sequence_model import SequenceModel


def open_dataset(config: ml_collections.ConfigDict, split: str) -> Dataset | SequenceSet:
    """One split of the data that a config names: images, or for `task = "next_token"` sequences.

    Sequences are text (`train.text`), a generated task (`train.recall`), or with `"raster:NAME"` the pixels of images.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError: as `train.sources.open_source`, `train.text.open_text` and
            `train.recall.open_task` do; the config's key is named where one is missing.
    """
    data = config.data
    if config.task == "classify":
        dataset = sources.open_source(data.name, split=split, path=data.path)
        return dataclasses.replace(dataset, channels=len(data.mean))
    if data.name.startswith("raster:"):
        return raster.open_raster(data.name.removeprefix("raster:"), split=split, path=data.path, **data.options)
    if data.length is None:
        raise ValueError("config.data.length, the tokens in a row, is not set")
    if data.name in recall.TASKS:
        if data.path is not None:
            raise ValueError(f"config.data.path {data.path!r} was given, but {data.name!r} is generated and takes none")
        examples = data.examples if split == "train" else data.eval_examples
        options = dict(data.options)
        return recall.open_task(
            data.name, split=split, examples=examples, length=data.length, seed=config.seed, **options
        )
    return text.open_text(
        data.name,
        split=split,
        path=data.path,
        length=data.length,
        tokenizer=data.tokenizer,
        align=data.align or _segment_multiple(config),
        mode=data.packing,
        **data.options,
    )


def _segment_multiple(config: ml_collections.ConfigDict) -> int:
    """Where the model lets documents begin."""
    if not issubclass(registry.family_of(config.model.name).module, SequenceModel):
        return 1
    return registry.create_model(config.model.name, **config.model.overrides).segment_multiple


def _as_it_is(example: dict[str, Any], *randomness: np.random.Generator) -> dict[str, Any]:
    return example


def train_transform(config: ml_collections.ConfigDict, dataset: Dataset | SequenceSet) -> augment.TrainTransform:
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


def eval_transform(config: ml_collections.ConfigDict, dataset: Dataset | SequenceSet) -> preprocess.EvalTransform:
    """The preprocessing of evaluation: resize and crop; of sequences none."""
    if isinstance(dataset, SequenceSet):
        return _as_it_is
    data = config.data
    size = program.image_size(config, dataset)
    return preprocess.eval_transform(
        size, data.crop_pct, data.interpolation, crop_mode=data.crop_mode, mean=data.mean
    )


def eval_splits(config: ml_collections.ConfigDict) -> dict[str, str]:
    """The splits to evaluate by the name that their metrics get."""
    splits = {name: split for name, split in config.data.extra_eval.items() if split}
    return splits if config.data.eval_split is None else {"test": config.data.eval_split, **splits}
