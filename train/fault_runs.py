"""Training processes that are killed, told to stop, starved of disk, torn from one another, and what is left then."""

from __future__ import annotations

import json
import os
import pathlib
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import train
from zoo.formats import orbax_dir

ROOT = pathlib.Path(train.__file__).parent.parent if train.__file__ else pathlib.Path.cwd()
CONFIG = "configs/digits.py:davit_nano"
# A run whose steps take milliseconds.
TINY = {
    "data.batch_size": 16,
    "optim.warmup_steps": 2,
    "eval_every": 9,
    "log_every": 1,
    "checkpoint.every_steps": 3,
    "checkpoint.keep": 3,
}
# Config -> what makes it small besides, or does without what is of no use here.
SMALL_MODELS = {
    CONFIG: {
        "data.extra_eval.test_last360": "",
        "model.overrides.depths": "(1,)",
        "model.overrides.dims": "(8,)",
        "model.overrides.num_heads": "(2,)",
    },
    "configs/raster.py:gated_deltanet_nano": {"model.overrides.depth": 1},
}
# Longer than anything here takes on a busy machine.
PATIENCE = 300.0


def words(config: str = CONFIG, **values: Any) -> list[str]:
    """Settings of a tiny run for the command line; in the names a double underscore stands for a dot."""
    changed = {name.replace("__", "."): value for name, value in values.items()}
    return [f"--config.{name}={value}" for name, value in (TINY | SMALL_MODELS.get(config, {}) | changed).items()]


class Child:
    """A training process whose stderr goes to a file, from which one sees how far it is."""

    def __init__(
        self,
        workdir: pathlib.Path,
        *more: str,
        config: str = CONFIG,
        devices: int = 8,
        name: str = "child",
        **values: Any,
    ):
        self.workdir = workdir
        workdir.parent.mkdir(parents=True, exist_ok=True)
        self._log = workdir.parent / f"{workdir.name}.{name}.log"
        command = [sys.executable, "-m", "train", "--config", config, "--workdir", str(workdir)]
        flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONUNBUFFERED": "1",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}".strip(),
        }
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *words(config, **values), *more],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def said(self) -> str:
        """What it has written to stderr so far."""
        return self._log.read_text()

    def step(self) -> int:
        """The last step that it has logged, 0 before the first."""
        found = re.findall(r"^step ([\d,]+)/", self.said(), re.M)
        return max((int(number.replace(",", "")) for number in found), default=0)

    def ended(self) -> bool:
        """Whether the process has ended."""
        return self.process.poll() is not None

    def until(self, holds: Callable[[], Any], seconds: float = PATIENCE) -> None:
        """Waits until `holds` or the end of the process; kills it and raises `TimeoutError` after so many seconds."""
        end = time.monotonic() + seconds
        while not self.ended() and not holds():
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"a run in {self.workdir} did not get on in {seconds:.0f} s:\n{self.said()[-2000:]}")
            time.sleep(0.01)

    def kill(self) -> None:
        """Kills it and collects what is left of it."""
        self.process.kill()
        self.process.communicate()

    def finish(self, seconds: float = PATIENCE) -> tuple[int, dict[str, Any]]:
        """Waits for its end; the exit code and the result that it printed, `{}` where there is none."""
        try:
            out, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"a run in {self.workdir} did not end:\n{self.said()[-2000:]}") from None
        lines = [line for line in out.splitlines() if line.startswith("{")]
        return self.process.returncode, json.loads(lines[-1]) if lines else {}


def together(workdir: pathlib.Path, count: int, devices: int = 8, **values: Any) -> list[Child]:
    """Starts `count` processes that share `devices` devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shared = ("--distributed", "--coordinator", address, "--num-processes", str(count))
    return [
        Child(workdir, *shared, "--process-id", str(i), devices=devices // count, name=f"process{i}", **values)
        for i in range(count)
    ]


def arrays(workdir: pathlib.Path, step: int | None = None) -> Any:
    """A checkpoint of a run as numpy arrays."""
    return jax.tree.map(np.asarray, orbax_dir.read_state(workdir / "checkpoints", step)[1])


def same_bits(tree: Any, expected: Any) -> bool:
    """Whether two trees of arrays are the same to the bit."""
    if jax.tree.structure(tree) != jax.tree.structure(expected):
        return False
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected))]
    return all((a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()) for a, b in pairs)


def distance(tree: Any, expected: Any) -> float:
    """The norm of the difference of two trees over the norm of the second."""
    flat = [
        np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(each)])
        for each in (tree, expected)
    ]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1]))


def lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` without what differs from run to run, times and rates."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [without_times(line) for line in found]


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics that are the same whenever and however fast a run is."""
    timed = ("seconds", "goodput", "memory")
    return {
        name: value
        for name, value in metrics.items()
        if not (name.startswith(timed) or name.endswith("_per_second") or name == "mfu")
    }


def good_steps(workdir: pathlib.Path) -> list[int]:
    """The steps of which every byte is as written."""
    place = workdir / "checkpoints"
    return [step for step in orbax_dir.list_steps(place) if not orbax_dir.problems(place / str(step), contents=True)]


def _temporary(workdir: pathlib.Path) -> set[tuple[str, int]]:
    """Temporary folders of saves, each with what tells it from a later one of the same name."""
    place = workdir / "checkpoints"
    found = [path for path in place.iterdir() if orbax_dir.TEMPORARY in path.name] if place.exists() else []
    return {(path.name, path.stat().st_ino) for path in found}


def kills(place: pathlib.Path, kills: int, *, seed: int = 0, total: int = 60, every: int = 3) -> dict[str, Any]:
    """Kills a run at random moments, in the start-up, between steps and in saves, until it is done; then the next one.

    Args:
        place: an empty directory.
        kills: how many.
        seed: of the moments.
        total: steps of a run.
        every: steps between checkpoints.

    Returns:
        How many `kills`, and how many of them left a save unfinished, `in_saves`; runs that came to their `ends`;
        `failed` restarts; `wrong` restored states and ends, compared to the bit with a run that was not killed; the
        most `saves_lost` and `steps_lost`; and the temporary folders `left` by one restart.
    """
    settings = dict(total_steps=total, checkpoint__every_steps=every)
    code, expected = Child(place / "straight", **settings, checkpoint__keep=total).finish()
    if code:
        raise RuntimeError(f"the run without kills ended with {code}")
    draw = random.Random(seed)
    figures = dict(kills=0, in_saves=0, ends=0, failed=0, wrong=0, saves_lost=0, steps_lost=0, left=0)
    workdir, newest, before = place / "run0", 0, set()
    while figures["kills"] < kills or not figures["ends"] or newest or before:
        last = figures["kills"] >= kills
        child = Child(workdir, **settings)
        if not last and draw.random() < 0.15:
            time.sleep(draw.uniform(0.1, 6.0))
        else:
            # Some steps further than where it goes on, and then so soon that it may still be saving the last of them.
            reach = newest + draw.randint(1, 6 * every)
            child.until(lambda child=child, reach=reach: child.step() >= reach)
            begun = re.search(r"going on from step ([\d,]+) of", child.said())
            found = int(begun.group(1).replace(",", "")) if begun else 0
            figures["failed"] += found != newest or (child.ended() and bool(child.process.returncode))
            if not last:
                time.sleep(draw.uniform(0.0, 0.3))
        if last or child.ended():
            code, result = child.finish()
            same = not code and without_times(result) == without_times(expected)
            same = same and lines(workdir) == lines(place / "straight")
            same = same and same_bits(arrays(workdir, total), arrays(place / "straight", total))
            figures["ends"] += 1
            figures["failed"] += bool(code)
            figures["wrong"] += not same
            workdir, newest, before = place / f"run{figures['ends']}", 0, set()
            continue
        child.kill()
        figures["kills"] += 1
        seen, steps, after = child.step(), good_steps(workdir), _temporary(workdir)
        figures["in_saves"] += bool(after - before) or len(steps) < len(orbax_dir.list_steps(workdir / "checkpoints"))
        newest = max(steps, default=0)
        figures["wrong"] += newest > 0 and not same_bits(arrays(workdir, newest), arrays(place / "straight", newest))
        if seen:
            figures["saves_lost"] = max(figures["saves_lost"], seen // every - newest // every)
            figures["steps_lost"] = max(figures["steps_lost"], seen - newest)
            figures["left"] += len(before & after)
        before = after
    return figures


def preempted(place: pathlib.Path, *, width: int = 2048, seconds: float = PATIENCE) -> dict[str, Any]:
    """Sends SIGTERM twice to a run whose state has 24 * 12 * `width` ** 2 bytes (1.2 GB at 2,048).

    Returns:
        `bytes` of the checkpoint, the `seconds` from the first signal to the end, the exit `code`, and whether the
        step in which the signal came is `saved` and good.
    """
    config = "configs/digits.py:vit_nano"
    overrides = {"dim": width, "num_heads": 8, "depths": "(2,)"}
    child = Child(
        place / "run",
        config=config,
        devices=1,
        total_steps=10_000,
        optim__name="adamw",
        ema=0.0,
        # The time that the step in flight takes is not what is measured.
        data__batch_size=2,
        checkpoint__every_steps=10_000,
        **{f"model__overrides__{name}": value for name, value in overrides.items()},
    )
    child.until(lambda: child.step() >= 2, 2 * seconds)
    seen, sent = child.step(), time.monotonic()
    child.process.send_signal(signal.SIGTERM)
    child.until(lambda: time.monotonic() > sent + 0.2)
    child.process.send_signal(signal.SIGTERM)
    code, _ = child.finish(seconds)
    took = time.monotonic() - sent
    steps = good_steps(child.workdir)
    size = sum(path.stat().st_size for path in (child.workdir / "checkpoints").rglob("*") if path.is_file())
    saved = len(steps) == 1 and steps[0] >= seen
    return dict(code=code, seconds=round(took, 1), gigabytes=round(size / 1e9, 2), saved=saved)


def starved(place: pathlib.Path, kind: str) -> dict[str, Any]:
    """Takes the disk away from a run that saves every three steps.

    Args:
        place: an empty directory.
        kind: "full", where no file can grow beyond a few bytes, or "gone", where the folder of checkpoints is a file.

    Returns:
        The exit `code`, whether the error was `named`, how many `intervals` the run went on, and whether the newest
        good step before is still the `newest`.
    """
    settings = dict(model__overrides__dims="(64,)", eval_every=0)
    child = Child(place / "run", **settings, total_steps=100_000)
    child.until(lambda: len(good_steps(child.workdir)) >= 2)
    steps = child.workdir / "checkpoints"
    aside = place / "aside"
    if kind == "full":
        # What it says and its metrics stay far below.
        files = [path.stat().st_size for path in (steps / str(max(good_steps(child.workdir)))).rglob("*")]
        resource.prlimit(child.process.pid, resource.RLIMIT_FSIZE, (max(files) // 2,) * 2)
    else:
        steps.rename(aside)
        steps.write_text("not a folder")
    seen = child.step()
    code, _ = child.finish()
    went_on = child.step() - seen
    if kind != "full":
        steps.unlink()
        aside.rename(steps)
    found = orbax_dir.list_steps(steps)
    # The libraries in between say things of their own, before it and at the interpreter's end.
    errors = [line for line in child.said().splitlines() if line.startswith("error: ")]
    named = len(errors) == 1 and ("saving step" in errors[0] or "cannot write" in errors[0])
    again = Child(child.workdir, **settings, total_steps=max(found) + 3, name="again")
    return dict(
        code=code,
        named=named,
        intervals=round(went_on / 3, 1),
        newest=bool(found) and max(found) in good_steps(child.workdir) and max(found) >= seen - 6,
        restarted=again.finish()[0] == 0,
    )


def processes(place: pathlib.Path, count: int, *, total: int = 1, config: str = CONFIG, **more: Any) -> dict[str, Any]:
    """Trains with `count` processes and with one on the same number of devices.

    Args:
        place: an empty directory.
        count: of processes.
        total: steps.
        config, more: of both, as `Child` takes them.

    Returns:
        The `distance` of the states by norm, and the largest difference of a `loss`.
    """
    settings = dict(total_steps=total, checkpoint__every_steps=1, optim__warmup_steps=0, config=config) | more
    one = Child(place / "one", **settings)
    codes = [one.finish()[0]]
    children = together(place / f"of{count}", count, **settings)
    codes += [child.finish()[0] for child in children]
    if any(codes):
        raise RuntimeError(f"exit codes {codes}:\n" + "\n".join(child.said()[-1500:] for child in children))
    places = (place / f"of{count}", place / "one")
    losses = [[line["train/loss"] for line in lines(each) if "train/loss" in line] for each in places]
    return dict(
        distance=distance(*(arrays(each, total) for each in places)),
        loss=max(abs(a - b) for a, b in zip(*losses, strict=True)),
    )


def torn(place: pathlib.Path, count: int = 2, *, lose: int = 1) -> dict[str, Any]:
    """Kills one of several processes in training and starts all of them again.

    Returns:
        The exit `codes` of the others, the `seconds` until the last of them ended, whether each `named` what happened,
        and the step from which they went on, `again`.
    """
    settings = dict(total_steps=100_000, eval_every=0)
    children = together(place / "run", count, **settings)
    children[0].until(lambda: len(good_steps(place / "run")) >= 1)
    newest = max(good_steps(place / "run"))
    children[lose].kill()
    begun = time.monotonic()
    others = [child for child in children if child is not children[lose]]
    codes = [child.finish()[0] for child in others]
    took = time.monotonic() - begun
    named = all("another process of this run ended or cannot be reached" in child.said() for child in others)
    newest = max(good_steps(place / "run"))
    again = together(place / "run", count, **(settings | dict(total_steps=newest + 3)))
    restarted = [child.finish()[0] for child in again]
    went_on = f"going on from step {newest:,} of" in again[0].said()
    return dict(codes=codes, seconds=round(took, 1), named=named, restarted=not any(restarted) and went_on)
