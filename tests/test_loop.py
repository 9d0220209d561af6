"""Whole runs: what they leave behind, how they go on, how they end early."""

import errno
import json
import os
import random
import re
import shutil
import socket
import time

import chex
import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

import zoo
from tests import object_store, runs
from train import checkpoint, checkpoints, fault_runs, loop, metrics
from train import config as config_lib
from train.__main__ import main
from train.checkpoint import read_state
from train.preemption import Notice, Preempted


def prepare(workdir, **values) -> loop.Run:
    return loop.prepare(config_lib.load(runs.CONFIG, runs.overrides(**values)), str(workdir))


def train(workdir, **values) -> dict:
    return loop.train(prepare(workdir, **values))


def arrays(workdir, step: int):
    """A checkpoint as numpy arrays."""
    return jax.tree.map(np.asarray, read_state(workdir / "checkpoints", step)[1])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run without interruption: its workdir and what it returned."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    return workdir, train(workdir)


def test_what_a_run_leaves_behind(straight):
    workdir, result = straight
    assert result["step"] == 12 and result["seconds"] > 0
    metrics = {"accuracy", "accuracy_top5", "loss"}
    names = {f"{split}_{metric}" for split in ("test", "test_last360") for metric in metrics}
    assert set(result) == {"step", "seconds", *names}
    lines = runs.lines(workdir)
    logged = [line["step"] for line in lines if "train/loss" in line]
    evaluated = [line["step"] for line in lines if "eval/test_accuracy" in line]
    assert logged == [2, 4, 6, 8, 10, 12] and evaluated == [4, 8, 12]
    assert {name.removeprefix("eval/"): value for name, value in lines[-1].items() if name != "step"} == {
        name: value for name, value in result.items() if name not in ("step", "seconds")
    }
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["12", "3", "6", "9"]
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert json.loads((workdir / "config.json").read_text())["model"]["name"] == "davit_nano"


def test_a_finished_run_is_only_evaluated_again(straight, capsys):
    workdir, result = straight
    before = (workdir / "metrics.jsonl").read_bytes()
    again = train(workdir)
    assert runs.without_times(again) == runs.without_times(result)
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert "going on from step 12 of 12" in capsys.readouterr().err


def assert_same_as(straight, workdir, result) -> None:
    """The metrics of all steps, the result, and every bit of the last checkpoint."""
    other, expected = straight
    assert runs.without_times(result) == runs.without_times(expected)
    assert runs.lines(workdir) == runs.lines(other)
    chex.assert_trees_all_equal(arrays(workdir, 12), arrays(other, 12))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_run_ends_as_if_it_had_not_been(straight, tmp_path):
    """Ten kills, also in the start-up, are `train.fault_runs.kills`."""
    draw = random.Random(12)
    workdir = tmp_path / "killed"
    for _ in range(4):
        child = runs.start(workdir)
        try:
            # Any moment from the first checkpoint on; a run that is done by then shows that case.
            for line in child.stderr:
                if line.startswith(f"step {draw.choice((2, 4, 6, 8, 10))}/"):
                    time.sleep(draw.uniform(0, 0.2))
                    break
        finally:
            child.kill()
            child.communicate()
    child = runs.start(workdir)
    out, err = child.communicate()
    assert child.returncode == 0, err
    assert "going on from step " in err
    (line,) = out.splitlines()
    assert_same_as(straight, workdir, json.loads(line))


@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.slow), 9])
def test_going_on_from_a_step_is_bit_equal(straight, tmp_path, step, capsys):
    """The state, the order of the data, the random numbers and the averages, wherever a run was cut."""
    workdir = tmp_path / "cut"
    shutil.copytree(straight[0], workdir)
    for later in range(step + 3, 13, 3):
        shutil.rmtree(workdir / "checkpoints" / str(later))
    result = train(workdir)
    assert f"going on from step {step} of 12" in capsys.readouterr().err
    assert_same_as(straight, workdir, result)


class Told(Notice):
    """A notice that comes at one question; before it, as many as there are."""

    def __init__(self, at: int):
        super().__init__()
        self.at, self.asked, self.listens = at, 0, False

    def listen(self):
        self.listens = True

    def arrived(self):
        self.asked += 1
        return self.asked >= self.at


# Each of the 12 steps asks, and after steps 4, 8 and 12 the one batch of each of the two evaluations.
@pytest.mark.parametrize(
    "at, step, scored",
    [
        (2, 2, True),
        pytest.param(4, 4, False, marks=pytest.mark.slow),
        (6, 4, False),
        pytest.param(17, 12, False, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_told_to_stop_saves_and_ends_as_if_it_had_not_been(straight, tmp_path, at, step, scored):
    """In training, and in an evaluation, which the run that goes on makes up for."""
    run, told = prepare(tmp_path), Told(at)
    with pytest.raises(Preempted, match=f"stopped by SIGTERM after step {step}, which is saved"):
        loop.train(run, told)
    assert told.listens
    assert [line["step"] for line in runs.lines(tmp_path) if "eval/test_loss" in line] == [4, 8][
        : max(0, step // 4 - 1)
    ]
    again = prepare(tmp_path)
    assert (again.restored_step, again.unscored) == (step, not scored)
    assert_same_as(straight, tmp_path, loop.train(again))


def test_no_more_than_one_save_is_unfinished_when_a_step_is_told_of(tmp_path, monkeypatch):
    digests, write, seen = checkpoint.write_digests, metrics.Writer.write, {}

    def slowly(step_dir):
        time.sleep(0.4)
        digests(step_dir)

    def looking(writer, step, values):
        seen[step] = max(fault_runs.good_steps(tmp_path), default=0)
        write(writer, step, values)

    monkeypatch.setattr(checkpoint, "write_digests", slowly)
    monkeypatch.setattr(metrics.Writer, "write", looking)
    train(tmp_path, log_every=1, eval_every=0)
    assert sorted(seen) == list(range(1, 13))
    assert all(newest // 3 >= step // 3 - 1 for step, newest in seen.items())
    assert any(newest // 3 < step // 3 for step, newest in seen.items() if step % 3), "saves are in the background"


def test_a_workdir_without_rename_and_append_serves_as_well(straight, tmp_path, monkeypatch, capsys):
    """As on gs://: a run that is told to stop, one that goes on, the metrics, the config and the checkpoints."""
    store = object_store.install(monkeypatch, tmp_path)
    workdir = epath.Path(f"{object_store.PREFIX}bucket/run")
    with pytest.raises(Preempted):
        loop.train(prepare(workdir), Told(7))
    (tmp_path / "bucket" / "run" / "checkpoints" / "11" / "state").mkdir(parents=True)
    assert_same_as(straight, tmp_path / "bucket" / "run", train(workdir))
    assert "going on from step 5 of 12" in capsys.readouterr().err
    assert json.loads((workdir / "config.json").read_text())["model"]["name"] == "davit_nano"
    assert store.writes and not list(tmp_path.rglob("*tmp*"))
    assert checkpoints.main([str(workdir), "--verify"]) == 0
    (tmp_path / "bucket" / "run" / "checkpoints" / "13" / "state").mkdir(parents=True)
    assert checkpoints.main([str(workdir), "--repair"]) == 0
    assert "13: unfinished" in capsys.readouterr().err


@pytest.mark.slow
def test_going_on_with_other_devices_and_for_longer(straight, tmp_path):
    """Only what `RESUMABLE` lists: the state is restored to the bit and placed as the new mesh wants it."""
    workdir = tmp_path / "other"
    shutil.copytree(straight[0], workdir)
    run = prepare(workdir, mesh__data=2, mesh__fsdp=2, mesh__tensor=2, total_steps=14)
    assert run.restored_step == 12
    expected = arrays(straight[0], 12)
    got = jax.tree.map(np.asarray, run.state)
    chex.assert_trees_all_equal(got.params, expected["params"])
    chex.assert_trees_all_equal(got.ema, expected["ema"])
    kernel = run.state.params["stages_0_0"]["spatial"]["mlp"]["fc1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (4, 16)
    assert loop.train(run)["step"] == 14


@pytest.mark.slow
def test_two_processes(straight, tmp_path):
    """Four devices in each of two processes compute what eight in one do, and leave the same files."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    job = dict(SLURM_JOB_ID="1", SLURM_STEP_NODELIST="localhost", SLURM_NTASKS="2", JAX_COORDINATOR_PORT=port)
    children = [
        runs.start(
            tmp_path,
            "--distributed",
            **job,
            SLURM_PROCID=rank,
            SLURM_LOCALID=rank,
            XLA_FLAGS=os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4"),
        )
        for rank in "01"
    ]
    outputs = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    # Gloo, which connects the processes, talks on stdout too.
    results = [[line for line in out.splitlines() if line.startswith("{")] for out, _ in outputs]
    assert [len(lines) for lines in results] == [1, 0]
    result = runs.without_times(json.loads(results[0][0]))
    assert result == pytest.approx(runs.without_times(straight[1]), rel=1e-5)
    chex.assert_trees_all_close(arrays(tmp_path, 3), arrays(straight[0], 3), rtol=1e-5, atol=1e-6)


def test_a_number_that_is_not_finite_ends_the_run(tmp_path):
    run = prepare(tmp_path, optim__lr=1e30, optim__warmup_steps=5, checkpoint__every_steps=1, log_every=1)
    with pytest.raises(
        loop.TrainingError, match=r"of step \d+ is not finite; the newest checkpoint is step \d+"
    ) as error:
        loop.train(run)
    bad, newest = (int(number) for number in re.findall(r"step (\d+)", str(error.value)))
    assert newest == bad - 1 and 0 < bad <= 4
    for leaf in jax.tree.leaves(arrays(tmp_path, newest)):
        assert np.isfinite(leaf).all()
    assert all(line["step"] < bad for line in runs.lines(tmp_path))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config.optim.lrr=1"], "unknown key 'optim.lrr'; did you mean 'optim.lr'"),
        (["--config.model.name=davit_nanno"], "unknown model 'davit_nanno'; did you mean 'davit_nano'"),
        (["--config.model.overrides.depht=3"], "takes no argument 'depht'; did you mean 'depths'"),
        (["--config.data.batch_size=20"], "batch_size = 20 does not divide over 8 devices .* 16 or 24"),
        (["--config.data.eval_batch_size=7"], "eval_batch_size = 7 does not divide over 8 devices .*: 8"),
        (["--config.mesh.fsdp=3"], "mesh .* 8"),
        (["--config.data.name=folder", "--config.data.path=/nowhere"], "'/nowhere' is not a directory"),
        (["--config.data.name=tfds:nothing"], "nothing"),
        (["--config.data.split=trian"], "unknown split 'trian'"),
        (["surplus"], "unexpected argument 'surplus'"),
    ],
)
def test_wrong_settings(tmp_path, words, message, capsys):
    assert main(["--config", runs.CONFIG, "--workdir", str(tmp_path), *runs.SMALL, *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and re.search(message, err)
    assert runs.left_behind(tmp_path) == []


def test_a_workdir_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    workdir = tmp_path / "file" / "run"
    assert main(["--config", runs.CONFIG, "--workdir", str(workdir), *runs.SMALL]) == 2
    assert "choose a directory that this user can write" in capsys.readouterr().err


@pytest.mark.slow
def test_metrics_that_cannot_be_written_end_the_run_and_lose_nothing(tmp_path, monkeypatch, capsys):
    """As on a disk that is full."""
    write = metrics.Writer.write

    def full(self, step, values):
        if step > 7:
            raise OSError(errno.ENOSPC, "cannot write metrics: No space left on device", "metrics.jsonl")
        write(self, step, values)

    words = ["--config", runs.CONFIG, "--workdir", str(tmp_path), *runs.SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(metrics.Writer, "write", full)
        assert main(words) == 1
    assert re.search("^error: .*cannot write metrics: No space left", capsys.readouterr().err, re.M)
    assert main(words) == 0
    assert "going on from step 6 of 12" in capsys.readouterr().err


def test_a_workdir_of_another_run(straight, capsys):
    words = ["--config.optim.weight_decay=0.5", "--config.total_steps=20"]
    assert main(["--config", runs.CONFIG, "--workdir", str(straight[0]), *runs.SMALL, *words]) == 2
    assert re.search(r"optim\.weight_decay: 0\.05 there, 0\.5 now", capsys.readouterr().err)


@pytest.mark.slow
def test_a_folder_of_images_that_breaks_in_the_middle(tmp_path, capsys):
    images = tmp_path / "images"
    for split in ("train", "test"):
        for number in range(32):
            place = images / split / f"class{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (10, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.png")
    broken = images / "train" / "class0" / "8.png"
    broken.write_bytes(broken.read_bytes()[:100])
    words = [
        f"--config.data.path={images}",
        "--config.data.name=folder",
        "--config.data.extra_eval.test_last360=test",
        "--config.data.image_size=8",
        "--config.data.mean=0.5,0.5,0.5",
        "--config.data.std=0.5,0.5,0.5",
        "--config.model.overrides.num_classes=2",
    ]
    workdir = tmp_path / "run"
    assert main(["--config", runs.CONFIG, "--workdir", str(workdir), *runs.SMALL, *words]) == 1
    assert re.search(r"the data of step [12] cannot be read: .*8\.png", capsys.readouterr().err)
    Image.fromarray(np.zeros((10, 12, 3), np.uint8)).save(broken)
    assert main(["--config", runs.CONFIG, "--workdir", str(workdir), *runs.SMALL, *words]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 12


@pytest.mark.slow
def test_a_profile(tmp_path):
    nothing = dict(data__eval_split="None", data__extra_eval__test_last360="")
    result = train(tmp_path, profile__first_step=2, profile__steps=2, total_steps=4, **nothing)
    assert set(result) == {"step", "seconds"}
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_run_starts_from_the_weights_of_another(straight, tmp_path, capsys):
    """At a learning rate of zero it ends where the other one did, whose averages it took."""
    result = train(tmp_path, model__weights=straight[0], optim__lr=0.0, total_steps=3)
    for name, value in straight[1].items():
        if name.startswith("test"):
            assert result[name] == pytest.approx(value, rel=1e-6), name
    assert re.search(r"davit_nano from .*straight.*\n(.*\n)*.*weights +ema", capsys.readouterr().err)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The weights of a `davit_nano` for the digits."""
    path = tmp_path_factory.mktemp("teacher") / "davit_nano.safetensors"
    model = zoo.create_model("davit_nano", in_chans=1)
    zoo.save_pretrained(model, jax.jit(model.init)(jax.random.key(1), np.zeros((1, 8, 8, 1), np.float32)), path)
    return path


@pytest.mark.slow
def test_a_run_learns_from_a_teacher(teacher, tmp_path):
    """From the words of the command line to steps whose loss is the teacher's."""
    words = dict(distill__teacher="davit_nano", distill__weights=teacher, distill__alpha=1.0, log_every=1)
    train(tmp_path, total_steps=2, optim__warmup_steps=1, **words)
    losses = [line["train/loss"] for line in runs.lines(tmp_path) if "train/loss" in line]
    assert len(losses) == 2 and all(1 < loss < 4 for loss in losses)


@pytest.mark.slow
def test_a_teacher_of_other_channels(teacher, tmp_path):
    words = dict(distill__teacher="davit_nano", distill__weights=teacher)
    words |= dict(data__mean="0.5,0.5,0.5", data__std="0.5,0.5,0.5")
    with pytest.raises(ValueError, match="config.distill.teacher davit_nano has in_chans 1, the model has 3"):
        prepare(tmp_path, **words)
