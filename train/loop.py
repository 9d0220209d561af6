"""The training loop: one for every model and task."""

import collections
import dataclasses
import functools
import json
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from train import augment, checkpoint, config as config_lib, data, evaluate, metrics, program as program_lib, sources
from train.sharding import check_batch, place_batch
from train.step import TrainState

# Steps dispatched ahead of the device: enough to hide the host, few enough to bound memory.
STEPS_IN_FLIGHT = 2


class TrainingError(RuntimeError):
    """A run that cannot go on: what happened, at which step, and what there is to start from."""


@dataclasses.dataclass
class Run:
    """A run that is ready to train: everything that can be wrong with its settings has been looked at."""

    config: ml_collections.ConfigDict
    workdir: epath.Path
    train_set: sources.Dataset
    eval_sets: dict[str, sources.Dataset]
    program: program_lib.Program
    checkpoints: checkpoint.Checkpoints
    state: TrainState
    restored_step: int | None
    meter: metrics.Meter


def prepare(config: ml_collections.ConfigDict, workdir: str) -> Run:
    """Opens the data, builds the program, restores the newest good checkpoint or draws the first state.

    Args:
        config: a complete config (`train.config.load`).
        workdir: directory of the run, a local path or an address such as `gs://bucket/run`.

    Raises:
        ValueError: for settings, data or a workdir that do not fit one another.
        FileNotFoundError: for data that is not there.
        CheckpointError: for a workdir that cannot be written, or that holds no good checkpoint but bad ones.
    """
    meter = metrics.Meter()
    jax.config.update("jax_default_matmul_precision", config.matmul_precision)
    train_set, eval_sets = _open_data(config)
    program = program_lib.build(config, train_set)
    if eval_sets:
        check_batch("config.data.eval_batch_size", _eval_batch_size(config), program.mesh)
    workdir = epath.Path(workdir)
    with meter.phase("checkpoint"):
        checkpoints = checkpoint.Checkpoints(
            workdir / "checkpoints", every_steps=config.checkpoint.every_steps, keep=config.checkpoint.keep
        )
        _check_config(workdir, config)
        restored = checkpoints.restore(program.abstract_state)
    if restored is None:
        with meter.phase("compile"):
            state = program.init()
    else:
        state = restored.state
        data.DataPosition(**restored.data).check(train_set)
    return Run(
        config=config,
        workdir=workdir,
        train_set=train_set,
        eval_sets=eval_sets,
        program=program,
        checkpoints=checkpoints,
        state=state,
        restored_step=None if restored is None else restored.step,
        meter=meter,
    )


def train(run: Run) -> dict[str, Any]:
    """Trains to `total_steps` and evaluates.

    Returns:
        `step`, `seconds` (wall time of this process's part), and the final metrics by name.

    Raises:
        TrainingError: if the loss or the gradient stops being finite; the step is named, and the newest
            checkpoint is from before it.
        CheckpointError: if checkpoints cannot be written.
    """
    config, meter, program = run.config, run.meter, run.program
    first, last = run.restored_step or 0, config.total_steps
    writer = metrics.Writer(run.workdir)
    writer.resume(first)
    progress = metrics.Progress(last, start=first, examples_per_step=config.data.batch_size)
    batches = data.train_iterator(
        run.train_set,
        batch_size=config.data.batch_size,
        seed=config.seed,
        transform=train_transform(config, run.train_set),
        start=first * config.data.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        channels=len(config.data.mean),
    )
    saved = config_lib.plain(config)
    evaluated: dict[str, float] = {}
    with progress, batches, writer, run.checkpoints, jax.transfer_guard("disallow"):
        if run.restored_step is not None:
            progress.message(f"going on from step {first} of {last} in {run.workdir}")
        with jax.transfer_guard("allow"):
            key = jax.device_put(jax.random.key(config.seed), program.replicated)
        state, step_fn, in_flight = run.state, None, collections.deque()
        for step in range(first + 1, last + 1):
            with meter.phase("data"):
                batch = place_batch(next(batches), program.rows)
            if step_fn is None:
                progress.phase("compiling")
                with meter.phase("compile"), jax.transfer_guard("allow"):
                    step_fn = program.train_step.lower(state, batch, key).compile()
                progress.phase("training")
            with meter.phase("step"):
                _profile(config, run.workdir, step)
                state, values = step_fn(state, batch, key)
                in_flight.append(values)
                if len(in_flight) > STEPS_IN_FLIGHT:
                    jax.block_until_ready(in_flight.popleft())
            log = step % config.log_every == 0 or step == last
            save = run.checkpoints.should_save(step) or step == last
            if log or save:
                with meter.phase("step"):
                    values = _finite({name: v.item() for name, v in jax.device_get(values).items()}, run)
                if log:
                    rates = meter.rates(step, config.data.batch_size)
                    writer.write(step, {f"train/{name}": v for name, v in values.items()} | rates)
                    progress.update(step, values | rates)
            if save:
                progress.phase("saving")
                with meter.phase("checkpoint"):
                    run.checkpoints.save(
                        step, state, data=dataclasses.asdict(batches.position(step - first)), config=saved, force=True
                    )
                progress.phase("training")
            if run.eval_sets and (step == last or (config.eval_every and step % config.eval_every == 0)):
                evaluated = _evaluate(run, state, step, writer, progress)
        if first >= last and run.eval_sets:
            evaluated = _evaluate(run, state, first, writer, progress)
        with meter.phase("checkpoint"):
            run.checkpoints.wait()
        writer.write(max(first, last), meter.shares())
    return {"step": max(first, last), "seconds": round(meter.seconds(), 1), **evaluated}


def _open_data(config: ml_collections.ConfigDict) -> tuple[sources.Dataset, dict[str, sources.Dataset]]:
    """The training split, and the splits to evaluate by the name that their metrics get."""
    splits = dict(config.data.extra_eval)
    if config.data.eval_split is not None:
        splits = {"test": config.data.eval_split, **splits}
    opened = functools.partial(sources.open_source, config.data.name, path=config.data.path)
    train_set = opened(split=config.data.split)
    eval_sets = {name: opened(split=split) for name, split in splits.items()}
    if len(train_set) == 0:
        raise ValueError(f"config.data.split {config.data.split!r} of {train_set.name} holds no examples")
    return train_set, eval_sets
