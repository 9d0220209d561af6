import errno
import pathlib
import random
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from tests import checkpoint_child
from tests.checkpoint_child import same_bits
from train import checkpoint
from train.checkpoint import CheckpointError, Checkpoints, read_state
from zoo.orbax_dir import DamagedStep, verified

ROOT = pathlib.Path(__file__).parent.parent


@flax.struct.dataclass
class State:
    params: Any
    opt_state: Any
    step: Any
    key: Any
    raw_key: Any
    ema: Any = None


def small_state(step: int) -> State:
    """Random bits, NaNs with payloads among them, in every dtype that a state may hold."""
    rng = np.random.default_rng(step)

    def bits(shape, dtype):
        dtype = np.dtype(dtype)
        return jnp.asarray(np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape))

    params = {
        "dense": {"kernel": bits((8, 16), np.float32), "bias": bits((8,), ml_dtypes.bfloat16)},
        "blocks": [bits((16,), np.int8), bits((8, 3), np.uint32)],
        "empty": {},
    }
    return State(
        params=params,
        opt_state=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init({"w": jnp.ones((8, 2))}),
        step=jnp.int32(step),
        key=jax.random.split(jax.random.key(step), 3),
        raw_key=jax.random.PRNGKey(step),
    )


def tiny(step: int) -> dict[str, jax.Array]:
    return {"w": jnp.full((3,), step, jnp.float32)}


def plain(tree):
    """Key arrays as their data, so that bits can be compared."""

    def convert(leaf):
        return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    return jax.tree.map(convert, tree)


def open_checkpoints(directory, keep=9, **options) -> Checkpoints:
    return Checkpoints(directory, every_steps=1, keep=keep, **options)


def save_steps(directory, steps, make=tiny, keep=9):
    with open_checkpoints(directory, keep) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, make(step), data={"example": step}, config={"seed": 1})


def restore(directory, like=None, step=None):
    with open_checkpoints(directory) as checkpoints:
        return checkpoints.restore(tiny(0) if like is None else like, step)


def names_in(directory) -> list[str]:
    return sorted(path.name for path in pathlib.Path(directory).iterdir())


def files_in(directory) -> list[pathlib.Path]:
    return sorted(path for path in pathlib.Path(directory).rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pristine") / "run"
    save_steps(directory, (1, 2), small_state)
    return directory


def place(tree, shape: tuple[int, int]):
    """Rows over the first mesh axis and columns over the second where they divide; keys and scalars everywhere."""
    devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
    mesh = jax.sharding.Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def sharding(leaf):
        axes = [
            name if size % count == 0 else None
            for size, count, name in zip(leaf.shape, shape, ("fsdp", "tensor"))
        ]
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


def flip(path, draw):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(path, draw):
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


DAMAGE = {
    "flipped bit": flip,
    "truncation": truncate,
    "empty file": lambda path, draw: path.write_bytes(b""),
    "missing file": lambda path, draw: path.unlink(),
    "missing item": lambda path, draw: shutil.rmtree(path),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_anywhere_is_found_named_and_passed_over(two_steps, tmp_path, capfd, kind):
    draw = random.Random(kind)
    expected = plain(small_state(1))
    for trial in range(20):
        directory = tmp_path / str(trial)
        shutil.copytree(two_steps, directory)
        newest = directory / "2"
        candidates = files_in(newest)
        if kind == "missing item":
            candidates = [path for path in newest.rglob("*") if path.is_dir()]
        path = sorted(candidates)[trial] if trial < len(candidates) else draw.choice(candidates)
        DAMAGE[kind](path, draw)

        restored = restore(directory, small_state(0))
        assert restored.step == 1 and restored.data == {"example": 1}, path
        assert same_bits(plain(restored.state), expected)
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1 and "step 2" in lines[0]
        assert str(path.relative_to(newest)) in lines[0]
    step, state, _ = read_state(directory)
    assert step == 1 and same_bits(state["params"], jax.device_get(expected.params))
    assert "step 2" in capfd.readouterr().err


def test_damage_is_found_in_a_file_that_is_hashed_while_restoring(tmp_path, capfd):
    def make(step):
        return {"w": jnp.full((1024, 1024), step, jnp.float32)}

    save_steps(tmp_path, (1, 2), make)
    largest = max(files_in(tmp_path / "2"), key=lambda path: path.stat().st_size)
    assert largest.stat().st_size > 4 << 20
    flip(largest, random.Random(0))
    restored = restore(tmp_path, make(0))
    assert restored.step == 1 and (np.asarray(restored.state["w"]) == 1).all()
    assert largest.name in capfd.readouterr().err

    def fail():
        raise KeyError("what a reader of damaged files may raise")

    with pytest.raises(DamagedStep, match=largest.name):
        verified(tmp_path / "2", fail)
    with pytest.raises(KeyError):
        verified(tmp_path / "1", fail)


def test_a_step_without_digests_was_not_finished(tmp_path, capfd):
    save_steps(tmp_path, (1, 2))
    (tmp_path / "2" / "digests.json").unlink()
    assert restore(tmp_path).step == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "step 2" in line and "digests.json is missing" in line


def test_no_good_step_is_an_error_that_lists_the_reasons(tmp_path, capfd):
    save_steps(tmp_path, (1, 2))
    (tmp_path / "1" / "data" / "metadata").write_text("")
    shutil.rmtree(tmp_path / "2" / "config")
    for read in (restore, read_state):
        with pytest.raises(CheckpointError) as raised:
            read(tmp_path)
        assert "step 1: data/metadata has 0 bytes" in str(raised.value)
        assert "step 2: config/" in str(raised.value)
        assert len(capfd.readouterr().err.splitlines()) == 2
    assert names_in(tmp_path) == ["1", "2"]


def test_a_step_that_is_asked_for_is_the_one_restored(tmp_path):
    save_steps(tmp_path, (1, 2, 3))
    assert restore(tmp_path, step=2).step == 2
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4 .*\[1, 2, 3\]"):
        restore(tmp_path, step=4)
    (tmp_path / "2" / "data" / "metadata").write_text("{}")
    with pytest.raises(CheckpointError, match=f"{tmp_path}.*step 2: data/metadata"):
        restore(tmp_path, step=2)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.replace(params={"other": s.step}), "only in the checkpoint: .*dense/kernel.*not in .*/other"),
        (lambda s: s.replace(step=jnp.zeros((2,), jnp.int32)), r"step \(saved int32\[\], expected int32\[2\]\)"),
        (lambda s: s.replace(step=jnp.float32(0)), r"step \(saved int32\[\], expected float32\[\]\)"),
        (lambda s: s.replace(ema=s.params), r"not in the checkpoint: ema/blocks/0"),
        (lambda s: s.replace(raw_key=jax.random.key(0)), r"raw_key \(saved uint32\[2\], expected key<fry>\[\]\)"),
    ],
)
def test_another_model_is_an_error_and_no_damage(two_steps, capfd, change, message):
    with pytest.raises(ValueError, match=message):
        restore(two_steps, change(small_state(0)))
    assert capfd.readouterr().err == ""


def test_saving_goes_on_over_the_steps_that_were_passed_over(tmp_path, capfd):
    save_steps(tmp_path, (1, 2, 3, 4))
    for step in ("2", "3", "4"):
        (tmp_path / step / "leaves" / "metadata").write_text("x")
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(tiny(0)).step == 1
        assert not checkpoints.save(1, tiny(1), data={}, config={}, force=True)
        capfd.readouterr()
        assert checkpoints.save(2, tiny(7), data={}, config={})
        checkpoints.wait()
        assert names_in(tmp_path) == ["1", "2"]
        deleted = capfd.readouterr().err.splitlines()
        assert ["step 2" in deleted[0], "step 3" in deleted[1], "step 4" in deleted[2]] == [True] * 3
        assert checkpoints.save(3, tiny(8), data={}, config={})
    assert (np.asarray(restore(tmp_path, step=2).state["w"]) == 7).all()
    assert (np.asarray(restore(tmp_path).state["w"]) == 8).all()
    assert capfd.readouterr().err == ""


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


def test_a_directory_that_cannot_be_written_is_an_error_at_the_start(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match=f"cannot write checkpoints to {tmp_path}/file/run: .*; choose"):
        open_checkpoints(tmp_path / "file" / "run")


def test_a_full_disk_surfaces_and_the_next_save_succeeds(tmp_path, capfd):
    """A limit on the size of files stands for the disk: writing beyond it fails in Orbax's thread."""

    def make(step):
        return {"w": jnp.asarray(np.random.default_rng(step).standard_normal(100_000), jnp.float32)}

    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make(1), data={}, config={})
        checkpoints.wait()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            assert checkpoints.save(2, make(2), data={}, config={})
            with pytest.raises(CheckpointError, match=f"saving step 2 to {tmp_path} failed: .*writing") as raised:
                checkpoints.save(3, make(3), data={}, config={})
            assert raised.value.__cause__ is not None
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert names_in(tmp_path) == ["1"]
        assert checkpoints.save(2, make(2), data={}, config={})
        assert checkpoints.save(3, make(3), data={}, config={})
    restored = restore(tmp_path, make(0))
    assert restored.step == 3 and same_bits(restored.state, make(3))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("ends_with", ["wait", "close", "with", "synchronous"])
def test_a_failure_in_the_background_surfaces_wherever_one_waits(tmp_path, monkeypatch, ends_with):
    def fail(step_dir):
        raise OSError(errno.ENOSPC, "No space left on device")

    save_steps(tmp_path, (1,))
    monkeypatch.setattr(checkpoint, "write_digests", fail)
    checkpoints = open_checkpoints(tmp_path, async_=ends_with != "synchronous")
    checkpoints.restore(tiny(0))
    with pytest.raises(CheckpointError, match="saving step 2 .* failed: OSError: .*No space left"):
        if ends_with == "with":
            with checkpoints:
                checkpoints.save(2, tiny(2), data={}, config={})
        else:
            checkpoints.save(2, tiny(2), data={}, config={})
            getattr(checkpoints, ends_with)()
    checkpoints.close()
    assert names_in(tmp_path) == ["1"]


def test_an_exception_on_its_way_is_not_hidden_by_a_failed_save(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(checkpoint, "write_digests", lambda step_dir: 1 / 0)
    with pytest.raises(KeyboardInterrupt), open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tiny(1), data={}, config={})
        raise KeyboardInterrupt
    assert "saving step 1" in capfd.readouterr().err


def test_a_file_system_without_rename_serves_as_well(tmp_path, monkeypatch, capfd):
    for name in ("rename", "replace"):
        monkeypatch.setattr(f"os.{name}", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no rename")))
    save_steps(tmp_path, (1, 2, 3), small_state, keep=2)
    assert names_in(tmp_path) == ["2", "3"]
    assert same_bits(plain(restore(tmp_path, small_state(0)).state), plain(small_state(3)))
    assert capfd.readouterr().err == ""
    for name in ("commit_success.txt", "digests.json"):
        (tmp_path / "3" / name).unlink()
    assert restore(tmp_path, small_state(0)).step == 2
    assert names_in(tmp_path) == ["2"]


def test_leftovers_of_a_killed_save_are_removed_and_nothing_else(tmp_path):
    save_steps(tmp_path, (1,))
    (tmp_path / "2.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    open_checkpoints(tmp_path).close()
    assert names_in(tmp_path) == ["1", "notes"]
    assert restore(tmp_path).step == 1


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
    code = "import sys, zoo.orbax_dir; sys.exit('orbax.checkpoint' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


class Run:
    """A child process that saves every step."""

    def __init__(self, directory, *options):
        command = [sys.executable, "-m", "tests.checkpoint_child", str(directory), *options]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    def read(self):
        words = self.process.stdout.readline().split()
        assert words, f"the child ended with {self.process.wait()}"
        return words

    def kill(self):
        with self.process:
            self.process.kill()
            return self.process.stdout.read().split("\n")


@pytest.mark.parametrize(
    "options, kills",
    [
        ((), 3),
        (("--no-rename",), 1),
        pytest.param((), 20, marks=pytest.mark.slow),
        pytest.param(("--no-rename",), 20, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_from_the_step_before(tmp_path, options, kills):
    """The child checks the bits that it restores; here, that no more than the save in progress was lost."""
    draw = random.Random(str(options))
    finished = 0
    for _ in range(kills):
        run = Run(tmp_path, *options)
        try:
            word, restored, _, leftovers = run.read()
            assert word == "restored" and leftovers == "0"
            assert int(restored) >= finished
            run.read()
            time.sleep(draw.uniform(0, 0.3))
        finally:
            lines = run.kill()
        started = [int(line.split()[1]) for line in lines if line.startswith("started") and len(line.split()) == 2]
        # Step n starts once step n - 1 is written.
        finished = max([int(restored), *(step - 1 for step in started)])
    like = jax.tree.map(jnp.asarray, checkpoint_child.make_arrays(0))
    state = restore(tmp_path, like)
    assert state.step >= finished > 0
    assert same_bits(state.state, checkpoint_child.make_arrays(state.step))
    assert all(name.isdecimal() for name in names_in(tmp_path))


@pytest.mark.slow
def test_two_processes_save_and_agree_on_what_to_restore(tmp_path):
    def run():
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        children = [Run(tmp_path, "--process", str(i), "--coordinator", address) for i in range(2)]
        outputs = [child.process.communicate(timeout=120)[0] for child in children]
        assert [child.process.returncode for child in children] == [0, 0]
        return ["restored 0" in text or "restored 1" in text for text in outputs]

    assert run() == [True, True]
    flip(tmp_path / "2" / "data" / "metadata", random.Random(0))
    assert run() == [True, True]
    assert names_in(tmp_path) == ["2", "3"]
    like = jax.tree.map(jnp.asarray, checkpoint_child.make_arrays(0))
    assert same_bits(restore(tmp_path, like).state, checkpoint_child.make_arrays(3))


@pytest.mark.bench
def test_verifying_adds_at_most_half_to_the_time_of_restoring_a_gigabyte(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    state = {f"w{i}": jnp.asarray(rng.standard_normal((1024, 4096), np.float32)) for i in range(60)}
    seconds = {True: [], False: []}
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, data={}, config={})
        for trial in range(10):
            verify = trial % 2 == 1
            monkeypatch.setattr(checkpoint, "verified", verified if verify else lambda path, read: read())
            start = time.perf_counter()
            jax.block_until_ready(checkpoints.restore(state).state)
            seconds[verify].append(time.perf_counter() - start)
    plainly, verifying = (statistics.median(seconds[verify]) for verify in (False, True))
    print(f"restoring 1.0 GB: {plainly:.2f} s, with digests {verifying:.2f} s, ratio {verifying / plainly:.2f}")
    assert verifying <= 1.5 * plainly
