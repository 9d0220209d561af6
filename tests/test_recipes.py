"""The recipes in `configs/` start, with all that they switch on."""

import pathlib

import jax
import pytest

import zoo
from train import config as config_lib
from train import loop

PATCHES = pathlib.Path(__file__).parent / "data" / "tfds" / "colour_patches" / "1.0.0"
SMALL = ("model.overrides.depths=(1,)", "model.overrides.dims=(8,)", "model.overrides.num_heads=(1,)")


@pytest.mark.parametrize("small", [SMALL, pytest.param((), marks=pytest.mark.slow)])
def test_imagenet_recipe_on_another_tfds_data_set(tmp_path, small):
    """Encoded JPEGs of several sizes; every augmentation, bfloat16, mixing and the schedule of the recipe."""
    words = (
        "data.name=tfds",
        f"data.path={PATCHES}",
        "data.eval_split=test",
        "data.batch_size=8",
        "data.image_size=32",
        "data.workers=1",
        "total_steps=3",
        "log_every=1",
        "optim.warmup_steps=1",
        "optim.cooldown_steps=1",
        "accum_steps=1",
        *small,
    )
    config = config_lib.load("configs/imagenet.py:davit_tiny", [f"--config.{word}" for word in words])
    run = loop.prepare(config, str(tmp_path))
    result = loop.train(run)
    assert result["step"] == 3
    # The second batch of the 10 test examples is ragged; were it not masked, tenths would not come out.
    assert result["test_accuracy"] * 10 == pytest.approx(round(result["test_accuracy"] * 10), abs=1e-9)
    assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(run.program.abstract_state.params))


def test_imagenet_recipe_takes_every_image_model():
    for name in zoo.list_models():
        config = config_lib.load(f"configs/imagenet.py:{name}")
        assert config.model.name == name


def test_the_papers_recipe():
    """The defaults of the official train script with its README's options, in optimizer steps of 1,024 images."""
    config = config_lib.load("configs/imagenet.py:davit_tiny")
    epoch = 1_281_167 // 1024
    assert config.total_steps == 310 * epoch and config.optim.warmup_steps == 5 * epoch
    assert (config.optim.lr, config.optim.weight_decay, config.optim.clip_norm) == (1e-3, 0.05, 1.0)
    assert (config.augment.mixup, config.augment.cutmix, config.loss.label_smoothing) == (0.8, 1.0, 0.1)
