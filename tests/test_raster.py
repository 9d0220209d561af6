"""Images as sequences of pixels."""

import pickle

import numpy as np
import pytest
from sklearn.datasets import load_digits

from tests.datasets import PATCHES
from train import sources
from train.raster import open_raster


def stacked(dataset):
    examples = list(dataset.source)
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


@pytest.mark.parametrize("split", ["train", "test"])
def test_raster_digits(split):
    dataset = open_raster("digits", split=split)
    images = sources.open_source("digits", split=split).source.images
    assert len(dataset) == len(images) and dataset.length == 64 and dataset.vocab_size == 18
    got = stacked(dataset)
    assert got["targets"].shape == (len(images), 64) and got["weights"].all() and (got["segments"] == 1).all()
    known = {image.astype(np.int32).tobytes() for image in load_digits().images.reshape(-1, 64)}
    assert all(targets.tobytes() in known for targets in got["targets"])
    np.testing.assert_array_equal(got["targets"], np.rint(images.reshape(-1, 64) / 255 * 16))
    np.testing.assert_array_equal(got["tokens"][:, 0], 17)
    np.testing.assert_array_equal(got["tokens"][:, 1:], got["targets"][:, :-1])
    again = stacked(pickle.loads(pickle.dumps(dataset)))
    np.testing.assert_array_equal(again["tokens"], got["tokens"])


def test_raster_levels():
    two, all_of_them = (open_raster("digits", split="test", levels=levels) for levels in (2, 256))
    images = sources.open_source("digits", split="test").source.images.reshape(-1, 64)
    np.testing.assert_array_equal(stacked(two)["targets"], images >= 128)
    np.testing.assert_array_equal(stacked(all_of_them)["targets"], images)
    assert two.fingerprint != all_of_them.fingerprint and two.vocab_size == 3


def test_raster_errors():
    for levels in (1, 257):
        with pytest.raises(ValueError, match=f"levels={levels}: from 2 to 256"):
            open_raster("digits", split="test", levels=levels)
    with pytest.raises(ValueError, match="unknown split 'valid' of 'digits'"):
        open_raster("digits", split="valid")
    with pytest.raises(ValueError, match="images of shape unknown with 3 channels: a sequence of pixels needs one"):
        open_raster("tfds", split="test", path=PATCHES)
