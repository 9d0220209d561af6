"""From a config to the host's transforms of examples."""

import ml_collections

from train import augment, program
from train.sources import Dataset
from zoo import preprocess


def train_transform(config: ml_collections.ConfigDict, dataset: Dataset) -> augment.TrainTransform:
    """The augmentation of `config.augment`: a random-resized crop, or else a shifted crop."""
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


def eval_transform(config: ml_collections.ConfigDict, dataset: Dataset) -> preprocess.EvalTransform:
    """The preprocessing of evaluation: resize and crop."""
    data = config.data
    size = program.image_size(config, dataset)
    return preprocess.eval_transform(
        size, data.crop_pct, data.interpolation, crop_mode=data.crop_mode, mean=data.mean
    )


def eval_splits(config: ml_collections.ConfigDict) -> dict[str, str]:
    """The splits to evaluate by the name that their metrics get."""
    splits = {name: split for name, split in config.data.extra_eval.items() if split}
    return splits if config.data.eval_split is None else {"test": config.data.eval_split, **splits}
