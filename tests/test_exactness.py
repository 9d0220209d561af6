"""A run that goes on from a checkpoint ends as one that was not cut, to the bit: every family, task and mixer."""

import jax
import numpy as np
import pytest

import zoo
from train.fault_checks import cut

NOTHING_CUT_DIFFERS = dict(cut=1, differ=0)
DIGITS = {"data__extra_eval__test_last360": ""}
RECALL = dict(
    data__length=16,
    data__options__num_kv_pairs=2,
    data__options__num_tokens=18,
    data__eval_examples=16,
    data__eval_batch_size=16,
    model__overrides__width=16,
    model__overrides__mlp_hidden=16,
)
# A model -> the fields that leave it two blocks, of which the second drops paths.
IMAGES = {name: {} for name in ("davit_nano", "maxvit_nano", "biformer_nano")}
IMAGES |= {name: dict(model__overrides__depths="(2,)") for name in ("vit_nano", "dcal_nano")}
IMAGES |= dict(care_nano=dict(model__overrides__depths="(1, 1)"))
MIXERS = ("transformer", "sliding_window", "linear_attention", "retnet", "lightning", "gla", "hgrn2", "deltanet")
MIXERS += ("gated_deltanet", "memora")


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_image_models(tmp_path, name):
    """With drop path, label smoothing, shifted and rotated images, averages and clipping."""
    assert cut(tmp_path, f"configs/digits.py:{name}", at=(2,), total=3, **IMAGES[name], **DIGITS) == NOTHING_CUT_DIFFERS


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
def test_language_models(tmp_path, mixer):
    # Lightning's decays go from the first layer to another that is the last.
    small = RECALL | dict(model__overrides__depth=2 if mixer == "lightning" else 1)
    found = cut(tmp_path, f"configs/recall.py:mqar,{mixer}", at=(2,), total=3, **small)
    assert found == NOTHING_CUT_DIFFERS


@pytest.mark.slow
def test_every_step_of_a_run_with_accumulation_mixing_erasing_and_averages(tmp_path):
    mixed = dict(augment__mixup=0.8, augment__cutmix=1.0, augment__erase_prob=0.5, augment__hflip=0.5)
    settings = dict(model__overrides__dims="(8,)", model__overrides__depths="(1,)", model__overrides__num_heads="(2,)")
    found = cut(tmp_path, accum_steps=2, ema=0.9, total=3, **settings, **mixed, **DIGITS)
    assert found == dict(cut=2, differ=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam", "lamb", "muon", "sgd"])
def test_optimizers(tmp_path, name):
    assert cut(tmp_path, optim__name=name, at=(2,), total=3) == NOTHING_CUT_DIFFERS


@pytest.mark.slow
def test_distillation(tmp_path):
    teacher = zoo.create_model("davit_nano", in_chans=1)
    variables = jax.jit(teacher.init)(jax.random.key(1), np.zeros((1, 8, 8, 1), np.float32))
    zoo.save_pretrained(teacher, variables, tmp_path / "teacher.safetensors")
    words = dict(distill__teacher="davit_nano", distill__weights=tmp_path / "teacher.safetensors", distill__alpha=0.5)
    assert cut(tmp_path / "runs", at=(2,), total=3, **words) == NOTHING_CUT_DIFFERS


@pytest.mark.slow
def test_worker_processes(tmp_path):
    assert cut(tmp_path, at=(2,), total=3, data__workers=2) == NOTHING_CUT_DIFFERS
