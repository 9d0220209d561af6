"""Small data sets that tests read."""

import functools
import pathlib

import numpy as np

from train import sources

TFDS_DIR = pathlib.Path(__file__).parent / "data" / "tfds"
PATCHES = TFDS_DIR / "colour_patches" / "1.0.0"
TFRECORD = TFDS_DIR / "colour_patches_tfrecord" / "1.0.0"
COLOURS = ("red", "green", "blue")


def array_dataset(size, shape=(4, 4, 1)):
    images = np.arange(size, dtype=np.uint8).reshape(size, 1, 1, 1) * np.ones(shape, np.uint8)
    return sources.Dataset(
        name="numbers",
        source=sources.ArraySource(images, np.arange(size) % 5),
        fingerprint=f"numbers:{size}",
        num_classes=5,
        label_names=tuple("abcde"),
        image_shape=shape,
        channels=1,
    )


@functools.cache
def patches(split="train"):
    return sources.open_source("tfds", split=split, path=PATCHES)
