"""What a step of training costs, against the compiler's own count, and the share of the peak that makes of it."""

import types

import jax
import jax.numpy as jnp
import pytest

from train import config as config_lib
from train import fault_runs, flops, inputs, program


def build(**values):
    config = "configs/digits.py:vit_nano"
    loaded = config_lib.load(config, fault_runs.words(config, total_steps=3, optim__name="adamw", ema=0.0, **values))
    train_set = inputs.open_dataset(loaded, loaded.data.split)
    return program.build(loaded, train_set, jax.devices()[:1])


def test_a_step_costs_what_the_compiler_counts():
    """Of blocks that are written out, none in a loop: what the compiler counts of a loop is one round."""
    built = build(model__overrides__dim=128, model__overrides__depths="(2,)", data__batch_size=64)
    batch = {"image": jnp.zeros((64, 8, 8, 1), jnp.uint8), "label": jnp.zeros((64,), jnp.int32)}
    counted = 64 * flops.training_flops(built, batch)
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = built.train_step.lower(built.abstract_state, batch, key, built.task).compile()
    # The compiler's are a little more, by the softmax and the optimizer, and less by the first layer's backward pass.
    assert counted == pytest.approx(compiled.cost_analysis()["flops"], rel=0.1)


def test_mfu_is_the_share_of_the_peak_of_all_devices(monkeypatch):
    assert flops.mfu(1e12) == {}
    monkeypatch.setattr(flops, "peak", lambda kind: types.SimpleNamespace(flops=5e12))
    assert flops.mfu(1e12) == {"mfu": pytest.approx(0.2 / jax.device_count())}
