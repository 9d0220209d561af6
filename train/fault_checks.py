"""Faults that need no process of their own: damaged files, runs cut at every step, other meshes, numbers not finite."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pathlib
import random
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train import config as config_lib
from train import data, inputs, loop, program
from train.checkpoint import Checkpoints
from train.fault_runs import CONFIG, arrays, distance, good_steps, lines, same_bits, without_times, words
from zoo.formats import orbax_dir


def flip(path: pathlib.Path, draw: random.Random) -> None:
    """Turns one bit of a file over."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _truncate(path: pathlib.Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


# Kind of damage -> what is done to a file, or to a folder, of a step.
DAMAGE: dict[str, Callable[[pathlib.Path, random.Random], Any]] = {
    "flipped bit": flip,
    "truncation": _truncate,
    "empty file": lambda path, draw: path.write_bytes(b""),
    "missing file": lambda path, draw: path.unlink(),
    "missing item": lambda path, draw: shutil.rmtree(path),
}


def prepare(workdir: pathlib.Path, config: str = CONFIG, **values: Any) -> loop.Run:
    """A tiny run, ready to train."""
    return loop.prepare(config_lib.load(config, words(config, **values)), str(workdir))


def train(workdir: pathlib.Path, config: str = CONFIG, **values: Any) -> dict[str, Any]:
    """Trains a tiny run in this process; what it says on stderr is dropped."""
    with contextlib.redirect_stderr(io.StringIO()):
        return loop.train(prepare(workdir, config, **values))


def damage(place: pathlib.Path, places: int = 20, *, seed: int = 0) -> dict[str, Any]:
    """Damages the newest step of a run in every way, in random places.

    Returns:
        How many `trials`, how many of them were not `detected`, not `named` in one line on stderr, or did not restore
        the step before to the bit (`wrong`); `restarted`, whether training goes on from the step before.
    """
    settings = dict(total_steps=6, checkpoint__every_steps=3)
    train(place / "run", **settings)
    steps, draw = place / "run" / "checkpoints", random.Random(seed)
    expected = arrays(place / "run", 3)
    figures: dict[str, Any] = dict(trials=0, undetected=0, unnamed=0, wrong=0)
    for kind, do in DAMAGE.items():
        for _ in range(places):
            copied = place / "damaged" / "checkpoints"
            shutil.copytree(steps, copied)
            newest = copied / "6"
            wanted = sorted(path for path in newest.rglob("*") if path.is_dir() == (kind == "missing item"))
            path = draw.choice([path for path in wanted if path.is_dir() or path.stat().st_size])
            do(path, draw)
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                step, state, _ = orbax_dir.read_state(copied)
            told = said.getvalue().splitlines()
            figures["trials"] += 1
            figures["undetected"] += step != 3
            named = len(told) == 1 and "step 6" in told[0] and str(path.relative_to(newest)) in told[0]
            figures["unnamed"] += not named
            figures["wrong"] += not same_bits(jax.tree.map(np.asarray, state), expected)
            shutil.rmtree(copied)
    shutil.copytree(place / "run", place / "again")
    flip(next((place / "again" / "checkpoints" / "6" / "data").iterdir()), draw)
    result = train(place / "again", **settings)
    figures["restarted"] = result["step"] == 6 and good_steps(place / "again") == [3, 6]
    figures["restarted"] &= same_bits(arrays(place / "again", 6), arrays(place / "run", 6))
    return figures


def cut(place: pathlib.Path, config: str = CONFIG, *, total: int = 4, at: Sequence[int] | None = None, **values: Any):
    """Trains straight, and again from the checkpoint of every step.

    Args:
        place: an empty directory.
        config: of the run.
        total: its steps.
        at: the steps to go on from; None means all.
        values: what makes it small.

    Returns:
        At how many steps the run was `cut`, and how many `differ` at the end: in a bit of the checkpoint (parameters,
        optimizer, averages, position in the data), in a metric, or in a line of `metrics.jsonl`.
    """
    settings = dict(total_steps=total, checkpoint__every_steps=1, checkpoint__keep=total + 1, eval_every=2) | values
    expected = without_times(train(place / "straight", config, **settings))
    end = arrays(place / "straight", total)
    position = (place / "straight" / "checkpoints" / str(total) / "data" / "metadata").read_bytes()
    figures = dict(cut=0, differ=0)
    for step in range(1, total) if at is None else at:
        workdir = place / f"cut{step}"
        shutil.copytree(place / "straight", workdir)
        for later in range(step + 1, total + 1):
            shutil.rmtree(workdir / "checkpoints" / str(later))
        same = without_times(train(workdir, config, **settings)) == expected
        same = same and lines(workdir) == lines(place / "straight") and same_bits(arrays(workdir, total), end)
        same = same and (workdir / "checkpoints" / str(total) / "data" / "metadata").read_bytes() == position
        figures["cut"] += 1
        figures["differ"] += not same
        shutil.rmtree(workdir)
    return figures


def meshes(place: pathlib.Path) -> dict[str, Any]:
    """Saves a state that lies on 8 devices (fsdp 8) and restores it on other meshes.

    Returns:
        How many `meshes`, and on how many of them a bit `differs` or a leaf does not lie where the mesh wants it.
    """
    config = config_lib.load(CONFIG, words(model__overrides__dims="(32,)", total_steps=3))
    train_set = inputs.open_dataset(config, config.data.split)
    devices = jax.devices()

    def built(count: int, **mesh: int) -> program.Program:
        settings = {f"mesh__{axis}": size for axis, size in (dict(data=1, fsdp=1, tensor=1) | mesh).items()}
        return program.build(
            config_lib.load(CONFIG, words(model__overrides__dims="(32,)", total_steps=3, **settings)),
            train_set,
            devices[:count],
        )

    state = built(8, fsdp=8).init()
    expected = jax.tree.map(np.asarray, state)
    with Checkpoints(place / "checkpoints", every_steps=1, keep=1) as checkpoints:
        checkpoints.save(1, state, data={}, config={})
    figures = dict(meshes=0, differ=0)
    others = [(8, dict(fsdp=2, tensor=4)), (8, dict(data=8)), (8, dict(data=2, fsdp=2, tensor=2)), (1, {})]
    for count, mesh in others:
        wanted = built(count, **mesh).abstract_state
        with Checkpoints(place / "checkpoints", every_steps=1, keep=1) as checkpoints:
            found = checkpoints.restore(wanted).state
        lies = [a.sharding == b.sharding for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)]
        figures["meshes"] += 1
        figures["differ"] += not (all(lies) and same_bits(jax.tree.map(np.asarray, found), expected))
    return figures


def order(
    place: pathlib.Path | None = None,
    counts: Sequence[int] = (1, 2, 4, 8),
    *,
    batches: int = 4,
    workers: Sequence[int] = (0, 2),
) -> dict[str, Any]:
    """Reads with several numbers of processes, and goes on with another number in the middle.

    Args:
        place: not used.
        counts: of processes.
        batches: to read.
        workers: numbers of worker processes.

    Returns:
        How many `combinations` of processes before, processes after and worker processes, and how many `differ` from
        one process without workers in an example, its augmentation or its place.
    """
    config = config_lib.load(CONFIG, words(total_steps=3))
    train_set = inputs.open_dataset(config, config.data.split)
    transform = inputs.train_transform(config, train_set)

    def read(processes: int, start: int, count: int, workers: int = 0) -> list[dict[str, np.ndarray]]:
        options = dict(batch_size=16, seed=0, transform=transform, start=start)
        parts = []
        for index in range(processes):
            with data.train_iterator(
                train_set, share=data.Share((index,), processes), workers=workers, **options
            ) as found:
                parts.append([next(found) for _ in range(count)])
        return [{name: np.concatenate([part[name] for part in rows]) for name in rows[0]} for rows in zip(*parts)]

    # From near the end of an epoch on.
    begin, half = 16 * (len(train_set) // 16 - 1), batches // 2
    expected = read(1, begin, batches)
    figures = dict(combinations=0, differ=0)
    for before, after in [(a, b) for a in counts for b in counts]:
        for number in workers if before == after == 2 else workers[:1]:
            found = read(before, begin, half, number) + read(after, begin + half * 16, batches - half, number)
            figures["combinations"] += 1
            figures["differ"] += not same_bits(found, expected)
    return figures


def not_finite(place: pathlib.Path, at: Sequence[int] = (2, 5), *, log_every: int = 4) -> dict[str, Any]:
    """Makes a parameter NaN before a step.

    Returns:
        In how many `runs`, in how many the step was not `named`, the run went on beyond the next log, or the newest
        checkpoint was not that before the step, or not finite (`wrong`).
    """
    settings = dict(total_steps=40, log_every=log_every, checkpoint__every_steps=1, eval_every=0, checkpoint__keep=50)
    train(place / "straight", **(settings | dict(total_steps=max(at))))
    figures = dict(runs=0, wrong=0)
    for step in at:
        workdir = place / f"nan{step}"
        shutil.copytree(place / "straight", workdir)
        for later in range(step, max(at) + 1):
            shutil.rmtree(workdir / "checkpoints" / str(later))
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            # Saves are rarer here, so that it is the log that notices.
            run = prepare(workdir, **(settings | dict(total_steps=max(at), checkpoint__every_steps=1000)))
            spoilt = jax.tree.map(lambda leaf: leaf * jnp.nan, run.state.params)
            run.state = run.state.replace(params=spoilt)
            try:
                loop.train(dataclasses.replace(run, config=_longer(run.config, 40)))
                message = ""
            except loop.TrainingError as error:
                message = str(error)
        logged = [line["step"] for line in lines(workdir)]
        newest = max(good_steps(workdir))
        finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(arrays(workdir, newest)))
        named = f"of step {step} is not finite; the newest checkpoint is step {step - 1}" in message
        figures["runs"] += 1
        figures["wrong"] += not (named and finite and newest == step - 1 and max(logged, default=0) < step)
    return figures


def accumulated(
    place: pathlib.Path | None = None, name: str = "davit_nano", parts: Sequence[int] = (2, 4, 8)
) -> dict[str, float]:
    """The gradient of one batch of digits, taken at once and in parts, without drop path.

    Args:
        place: not used.
        name: of the model.
        parts: into how many.

    Returns:
        Number of parts -> norm of the difference over the norm.
    """
    config = f"configs/digits.py:{name}"
    still = dict(model__overrides__drop_path_rate=0.0, optim__name="sgd", optim__clip_norm="None", ema=0.0)
    settings = dict(total_steps=3, data__batch_size=64, optim__warmup_steps=0, **still)

    def gradient(accum_steps: int) -> Any:
        loaded = config_lib.load(config, words(config, **settings, accum_steps=accum_steps))
        train_set = inputs.open_dataset(loaded, loaded.data.split)
        # On one device, where the smallest part has examples enough.
        built = program.build(loaded, train_set, jax.devices()[:1])
        transform = inputs.train_transform(loaded, train_set)
        with data.train_iterator(train_set, batch_size=64, seed=0, transform=transform) as batches:
            batch = next(batches)
        state = built.init()
        state, _ = built.train_step(state, batch, jax.random.key(0), built.task)
        # The momentum of SGD after its first step is the gradient.
        (trace,) = [leaf for leaf in jax.tree.leaves(state.opt_state, is_leaf=_is_trace) if _is_trace(leaf)]
        return jax.tree.map(np.asarray, trace.trace)

    whole = gradient(1)
    return {str(count): distance(gradient(count), whole) for count in parts}


def _is_trace(node: Any) -> bool:
    return hasattr(node, "trace") and not isinstance(node, (jax.Array, np.ndarray))


def _longer(config: Any, total: int) -> Any:
    import ml_collections

    free = ml_collections.ConfigDict(config)
    free.total_steps = total
    return ml_collections.FrozenConfigDict(free)
