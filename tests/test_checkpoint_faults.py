"""Checkpoints under faults: damage, full disks, failures in the background, kills."""

import errno
import random
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import checkpoint_child
from tests.checkpoint_child import same_bits
from tests.checkpoints import (
    ROOT,
    files_in,
    names_in,
    open_checkpoints,
    plain,
    restore,
    save_steps,
    small_state,
    tiny,
)
from train import checkpoint
from train.checkpoint import CheckpointError, read_state
from zoo.formats.orbax_dir import DamagedStep, verified


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
        pytest.param((), 10, marks=pytest.mark.slow),
        pytest.param(("--no-rename",), 10, marks=pytest.mark.slow),
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
            # Step n starts once step n - 1 is written: every child writes one at least.
            seen = [int(run.read()[1]) for _ in range(2)]
            time.sleep(draw.uniform(0, 0.3))
        finally:
            lines = run.kill()
        seen += [int(line.split()[1]) for line in lines if line.startswith("started") and len(line.split()) == 2]
        finished = max(seen) - 1
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
