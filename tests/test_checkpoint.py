"""Checkpoints: what is saved is what is restored, on any mesh; which steps are kept."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from tests.checkpoint_child import same_bits
from tests.checkpoints import ROOT, names_in, open_checkpoints, plain, restore, save_steps, small_state, tiny
from train import checkpoint
from train.checkpoint import CheckpointError, Checkpoints, read_state


def place(tree, shape: tuple[int, int]):
    """Rows over the first mesh axis and columns over the second where they divide; keys and scalars everywhere."""
    devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
    mesh = jax.sharding.Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def sharding(leaf):
        axes = [name if size % count == 0 else None for size, count, name in zip(leaf.shape, shape, ("fsdp", "tensor"))]
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            axes = []
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding(leaf)), tree)


def test_state_is_restored_bit_for_bit_on_every_mesh(tmp_path, capfd):
    expected = plain(small_state(5))
    with open_checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.restore(small_state(0)) is None
        saved = checkpoints.save(
            5, place(small_state(5), (8, 1)), data={"example": 640}, config={"lr": 0.1, "sizes": (1, 2)}
        )
        assert saved
    assert len(place(small_state(5), (8, 1)).params["dense"]["kernel"].addressable_shards) == 8
    for shape in ((2, 4), (8, 1), (1, 8), (1, 1)):
        like = place(small_state(0), shape)
        restored = restore(tmp_path / "run", jax.eval_shape(lambda tree: tree, like) if shape == (1, 1) else like)
        assert same_bits(plain(restored.state), expected)
        assert (restored.step, restored.data) == (5, {"example": 640})
        assert restored.config == {"lr": 0.1, "sizes": [1, 2]}
        assert restored.state.key.dtype == small_state(0).key.dtype
        for array, wanted in zip(jax.tree.leaves(restored.state), jax.tree.leaves(like)):
            assert array.sharding.is_equivalent_to(wanted.sharding, array.ndim)
    assert capfd.readouterr() == ("", "")


def test_values_of_the_moment_of_saving_are_kept_while_training_goes_on(tmp_path):
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    for shape in ((1, 1), (8, 1)):
        directory = tmp_path / str(shape)
        state = place({"w": jnp.zeros((1024, 1024)), "v": jnp.zeros((64,))}, shape)
        with open_checkpoints(directory) as checkpoints:
            for step in range(3):
                checkpoints.save(step, state, data={}, config={})
                state = advance(state)
        for step in range(3):
            restored = restore(directory, state, step).state
            assert all((np.asarray(leaf) == step).all() for leaf in jax.tree.leaves(restored))


def test_read_state_needs_no_model_and_no_optimizer(two_steps, tmp_path):
    step, state, config = read_state(two_steps)
    assert (step, config) == (2, {"seed": 1})
    original = plain(small_state(2))
    assert same_bits(state["params"], jax.device_get(original.params))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(state))
    assert state["ema"] is None
    assert state["opt_state"][1][0]["mu"]["w"].shape == (8, 2)
    assert same_bits([state["key"], state["raw_key"]], jax.device_get([original.key, original.raw_key]))
    step, state, _ = read_state(two_steps, step=1, only=("params", "ema", "batch_stats"))
    assert step == 1 and state.keys() == {"params", "ema"}
    assert same_bits(state["params"], jax.device_get(small_state(1).params))
    with pytest.raises(CheckpointError, match=f"no checkpoints in {tmp_path}: expected folders"):
        read_state(tmp_path)


@pytest.mark.parametrize("step", [2, 3])
def test_steps_of_another_run_are_not_overwritten(tmp_path, step):
    save_steps(tmp_path, (1, 3))
    with open_checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="holds step 3"):
        checkpoints.save(step, tiny(step), data={}, config={})
    assert restore(tmp_path).step == 3


def test_only_due_steps_are_saved_and_only_the_newest_stay(tmp_path):
    with Checkpoints(tmp_path, every_steps=5, keep=2) as checkpoints:
        started = [
            step for step in range(1, 23) if checkpoints.save(step, tiny(step), data={}, config={}, force=step == 22)
        ]
        assert started == [5, 10, 15, 20, 22]
        assert not checkpoints.should_save(20) and checkpoints.should_save(25)
    assert names_in(tmp_path) == ["20", "22"]
    assert (tmp_path / "22" / "digests.json").exists()
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, every_steps=5, keep=0)


def test_the_last_good_step_stays_until_the_next_can_be_trusted(tmp_path, monkeypatch):
    write_digests = checkpoint.write_digests

    def check(step_dir):
        assert "1" in names_in(tmp_path)
        write_digests(step_dir)

    save_steps(tmp_path, (1,), keep=1)
    monkeypatch.setattr(checkpoint, "write_digests", check)
    with open_checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.restore(tiny(0))
        checkpoints.save(2, tiny(2), data={}, config={})
    assert names_in(tmp_path) == ["2"]


@pytest.mark.parametrize(
    "state, data, error, message",
    [
        ({"a": {"b": 1.0}}, {}, TypeError, "a/b is a float"),
        ({"a": [np.ones(2)]}, {}, TypeError, "a/0 is a ndarray"),
        ({"a": np.zeros((0, 2))}, {}, TypeError, "a is a ndarray"),
        ({"a": "empty"}, {}, ValueError, r"a has shape \(0, 2\)"),
        ({"a": "one"}, {"position": np.int64(3)}, TypeError, "data must be a mapping that JSON can hold"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_refused_before_anything_is_written(tmp_path, state, data, error, message):
    arrays = {"empty": jnp.zeros((0, 2)), "one": jnp.ones(1)}
    state = jax.tree.map(lambda leaf: arrays.get(leaf, leaf) if isinstance(leaf, str) else leaf, state)
    with open_checkpoints(tmp_path) as checkpoints, pytest.raises(error, match=message):
        checkpoints.save(1, state, data=data, config={})
    assert names_in(tmp_path) == []


def test_arrays_without_a_sharding_go_to_the_default_device(tmp_path):
    save_steps(tmp_path, (1,))
    restored = restore(tmp_path, {"w": jax.ShapeDtypeStruct((3,), jnp.float32)})
    assert restored.state["w"].sharding == SingleDeviceSharding(jax.devices()[0])


def test_reading_checkpoints_costs_no_import_until_it_happens():
    code = "import sys, zoo.formats.orbax_dir; sys.exit('orbax.checkpoint' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
