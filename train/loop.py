"""The training loop: one for every model and task."""

import collections
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
from etils import epath

from train import checkpoint, data, flops, metrics, preemption, progress, sources, start
from train import config as config_lib
from train import host as host_lib
from train import program as program_lib
from train.evaluate import evaluate
from train.face_set import FaceSet, check_strangers
from train.inputs import eval_splits, eval_transform, open_dataset, train_order, train_transform
from train.sequences import SequenceSet
from train.sharding import batch_slices, check_batch, place_batch
from train.step import TrainState
from train.verification_metrics import pairs_to_verify

# Steps dispatched ahead of the device: enough to hide the host, few enough to bound memory.
STEPS_IN_FLIGHT = 2
CONFIG_FILE = "config.json"
# Of an evaluation, what is for metrics.jsonl alone: ends of intervals, numbers of pairs, thresholds.
DETAILS = ("_low", "_high", "_pairs", "_threshold")
# Beside the position in the data of a checkpoint: the evaluation that was due at its step was cut short.
UNSCORED = "unscored"


class TrainingError(RuntimeError):
    """A run that cannot go on: what happened, at which step, and what there is to start from."""


class NotFinite(TrainingError):
    """The loss or the gradient stopped being finite, which all processes of a run see at once."""


@dataclasses.dataclass
class Run:
    """A run that is ready to train: everything that can be wrong with its settings has been looked at."""

    config: ml_collections.FrozenConfigDict
    workdir: epath.Path
    train_set: sources.Dataset | SequenceSet
    eval_sets: dict[str, sources.Dataset | SequenceSet]
    order: data.Order | None
    program: program_lib.Program
    checkpoints: checkpoint.Checkpoints
    state: TrainState
    restored_step: int | None
    examples: int
    unscored: bool
    meter: metrics.Meter


def prepare(config: ml_collections.FrozenConfigDict, workdir: str) -> Run:
    """Opens the data, builds the program, restores the newest good checkpoint or draws the first state.

    Args:
        config: a complete config (`train.config.load`).
        workdir: directory of the run, a local path or an address such as `gs://bucket/run`.

    Raises:
        ValueError: for settings, data or a workdir that do not fit one another.
        FileNotFoundError: for data that is not there.
        CheckpointError: for a workdir that cannot be written, or that holds no good checkpoint but bad ones.
    """
    meter = metrics.Meter("tokens" if config.task == "next_token" else "images")
    train_set, eval_sets = _open_data(config)
    order = train_order(config, train_set)
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
        _write_config(workdir, config)
    position = {"examples": 0} if restored is None else dict(restored.data)
    unscored = position.pop(UNSCORED, False)
    if restored is None:
        with meter.phase("compile"):
            state = start.from_weights(program, program.init(), config)
    else:
        state = restored.state
        data.DataPosition(**position).check(train_set)
    return Run(
        config=config,
        workdir=workdir,
        train_set=train_set,
        eval_sets=eval_sets,
        order=order,
        program=program,
        checkpoints=checkpoints,
        state=state,
        restored_step=None if restored is None else restored.step,
        examples=position["examples"],
        unscored=unscored,
        meter=meter,
    )


def train(run: Run, notice: preemption.Notice | None = None) -> dict[str, Any]:
    """Trains to `total_steps` and evaluates.

    Whatever a step has to say is written before its checkpoint, so that a run that is killed and goes on
    leaves the same `metrics.jsonl` as one that is not.

    Args:
        run: what `prepare` made.
        notice: asked after every step, and during evaluations after every batch, whether to stop; an evaluation that
            is cut short is made up for by the run that goes on.

    Returns:
        `step`, `seconds` (wall time of this process), and the final metrics by name.

    Raises:
        TrainingError: if the loss or the gradient stops being finite (the step is named, and the newest
            checkpoint is from before it), or if an example cannot be read.
        CheckpointError: if checkpoints cannot be written.
        Preempted: if the notice came before the last step was done and scored; the checkpoint is written.
    """
    config, meter, program = run.config, run.meter, run.program
    first, last = run.restored_step or 0, config.total_steps
    bar = progress.Progress(last, start=first, process_index=jax.process_index())
    batches = data.train_iterator(
        run.train_set,
        batch_size=config.data.batch_size,
        seed=config.seed,
        transform=train_transform(config, run.train_set),
        start=run.examples,
        share=data.Share(*batch_slices(program.rows)),
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        repeats=config.data.repeats,
        order=run.order,
    )
    key = jax.jit(functools.partial(jax.random.key, config.seed), out_shardings=program.replicated)()
    saved_config = config_lib.plain(config)
    state, evaluated, compiled = run.state, {}, None
    notice = preemption.Notice() if notice is None else notice
    told = notice.arrived
    in_flight: collections.deque[dict[str, jax.Array]] = collections.deque()
    with (
        bar,
        batches,
        metrics.Writer(run.workdir, process_index=jax.process_index()) as writer,
        run.checkpoints,
        jax.transfer_guard("disallow"),
    ):
        writer.resume(first, without="eval/" if run.unscored else None)
        meter.redo(writer.redone)
        bar.announce(_describe(run))
        if run.restored_step is not None:
            bar.announce(f"going on from step {first} of {last} in {run.workdir}")
        if run.unscored and run.eval_sets:
            evaluated = _evaluate(run, state, bar)
            _record(first, evaluated, writer, bar)
        for step in range(first + 1, last + 1):
            with meter.phase("data"):
                batch = place_batch(_next(batches, step), program.rows)
            if compiled is None:
                bar.phase("compiling")
                with meter.phase("compile"), jax.transfer_guard("allow"):
                    compiled = program.train_step.lower(state, batch, key, program.task).compile()
                    rates = _rates(run, batch)
                notice.listen()
                bar.phase("training")
            with meter.phase("step"), _profile(run, step):
                state, values = compiled(state, batch, key, program.task)
                in_flight.append(values)
                if len(in_flight) > STEPS_IN_FLIGHT:
                    jax.block_until_ready(in_flight.popleft())
            meter.count(config.data.batch_size * getattr(run.train_set, "length", 1))
            bar.advance(step)
            ends, stopped = step == last, told()
            log = ends or step % config.log_every == 0
            save = ends or stopped or run.checkpoints.should_save(step)
            scored = run.eval_sets and (ends or (config.eval_every and step % config.eval_every == 0))
            if save:
                # Before the step is told of: no more than one save is then unfinished, whenever the run is killed.
                with meter.phase("checkpoint"):
                    run.checkpoints.wait()
            if log or save or scored:
                with meter.phase("step"):
                    host = _finite(jax.device_get(values), run)
                if log:
                    speed = rates()
                    line = {f"train/{name}": value for name, value in host.items()}
                    writer.write(step, line | speed | meter.seconds_by_phase() | meter.goodput() | host_lib.memory())
                    bar.update(step, host | speed)
            unscored = False
            if scored:
                try:
                    evaluated = _evaluate(run, state, bar, told)
                    _record(step, evaluated, writer, bar)
                except _CutShort:
                    unscored = stopped = save = True
            if save:
                writer.flush()
                bar.phase("saving")
                with meter.phase("checkpoint"):
                    position = dataclasses.asdict(batches.position(step - first)) | (
                        {UNSCORED: True} if unscored else {}
                    )
                    run.checkpoints.save(step, state, data=position, config=saved_config, force=True)
                bar.phase("training")
            if unscored or (stopped and not ends):
                with meter.phase("checkpoint"):
                    run.checkpoints.wait()
                raise preemption.Preempted(step)
        if first >= last and run.eval_sets and not run.unscored:
            evaluated = _evaluate(run, state, bar)
        with meter.phase("checkpoint"):
            run.checkpoints.wait()
        bar.announce(_where_the_time_went(meter))
    return {"step": max(first, last), "seconds": round(meter.seconds(), 1), **evaluated}


def _open_data(
    config: ml_collections.FrozenConfigDict,
) -> tuple[sources.Dataset | SequenceSet, dict[str, sources.Dataset | SequenceSet]]:
    """The training split, and the splits to evaluate by the name that their metrics get."""
    train_set = open_dataset(config, config.data.split)
    eval_sets = {name: open_dataset(config, split) for name, split in eval_splits(config).items()}
    field, what = ("vocab_size", "tokens") if config.task == "next_token" else ("num_classes", "classes")
    for dataset in (train_set, *eval_sets.values()):
        if len(dataset) == 0:
            raise ValueError(f"{dataset.name} holds no examples")
        if isinstance(dataset, FaceSet):
            if dataset is not train_set:
                check_strangers(train_set, dataset)
                _check_pairs(config, dataset)
            continue
        found, wanted = getattr(dataset, field), getattr(train_set, field)
        if found != wanted:
            raise ValueError(f"{dataset.name} has {found} {what}, {train_set.name} has {wanted}")
    return train_set, eval_sets


def _check_pairs(config: ml_collections.FrozenConfigDict, dataset: FaceSet) -> None:
    """Raises `ValueError` for faces that could not be scored after training, before it begins."""
    try:
        of_images = (values[dataset.labels] for values in (dataset.twins, dataset.hard, dataset.validation))
        pairs_to_verify(dataset.labels, *of_images, max_impostors=config.verification.max_impostors)
    except ValueError as error:
        raise ValueError(f"the {dataset.name} cannot be scored: {error}") from error


def _eval_batch_size(config: ml_collections.FrozenConfigDict) -> int:
    return config.data.eval_batch_size or config.data.batch_size


def _check_config(workdir: epath.Path, config: ml_collections.FrozenConfigDict) -> None:
    """Refuses a workdir that has checkpoints of a run with another config."""
    path = workdir / CONFIG_FILE
    if path.exists() and checkpoint.list_steps(workdir / "checkpoints"):
        config_lib.check_resume(json.loads(path.read_text()), config)


def _write_config(workdir: epath.Path, config: ml_collections.FrozenConfigDict) -> None:
    """Leaves the config in the workdir; a kill leaves the old one or this one."""
    if jax.process_index() == 0:
        metrics.replace_file(workdir / CONFIG_FILE, (config_lib.describe(config) + "\n").encode())


def _describe(run: Run) -> str:
    """The run in one line."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.program.abstract_state.params))
    device = jax.devices()[0]
    detail = getattr(run.train_set, "detail", "")
    return (
        f"{run.config.model.name}: {parameters:,} parameters on {jax.device_count()} x {device.device_kind}; "
        f"{run.train_set.name}: {len(run.train_set):,} examples, {run.config.data.batch_size} a step"
        + f" ({detail})"
        * bool(detail)
    )


def _rates(run: Run, batch: dict[str, jax.Array]) -> Callable[[], dict[str, float]]:
    """A function for the speed since its last call, with MFU where the devices' peak is known."""
    per_example = flops.training_flops(run.program, batch) if flops.mfu(0.0) else 0

    def rates() -> dict[str, float]:
        found = run.meter.rates()
        return found | flops.mfu(per_example * next(iter(found.values())))

    return rates


def _where_the_time_went(meter: metrics.Meter) -> str:
    seconds = {name.removeprefix("seconds/"): value for name, value in meter.seconds_by_phase().items()}
    parts = sorted(seconds.items(), key=lambda item: -item[1])
    return f"time {meter.seconds():.1f} s: " + ", ".join(f"{name} {value:.1f}" for name, value in parts)


def _next(batches: data.Batches, step: int) -> data.Batch:
    try:
        return next(batches)
    except (ValueError, OSError) as error:
        raise TrainingError(f"the data of step {step} cannot be read: {error}") from error


def _finite(values: dict[str, Any], run: Run) -> dict[str, float]:
    """The metrics of a step as Python numbers, unless this or an earlier step was not finite."""
    host = {name: value.item() for name, value in values.items()}
    bad = host.pop("nonfinite_step")
    if bad >= 0:
        run.checkpoints.wait()
        newest = max(checkpoint.list_steps(run.workdir / "checkpoints"), default=None)
        left = "there is no checkpoint yet" if newest is None else f"the newest checkpoint is step {newest}"
        raise NotFinite(
            f"the loss or the gradient of step {bad} is not finite; {left}. A lower config.optim.lr, a longer "
            "warm-up or config.optim.clip_norm may help; or start from another checkpoint."
        )
    return host


class _CutShort(Exception):
    """An evaluation that was told to stop."""


def _until_told(batches: Iterator[data.Batch], told: Callable[[], bool]) -> Iterator[data.Batch]:
    for batch in batches:
        if told():
            raise _CutShort
        yield batch


def _record(step: int, evaluated: dict[str, float], writer: metrics.Writer, bar: progress.Progress) -> None:
    writer.write(step, {f"eval/{name}": value for name, value in evaluated.items()})
    bar.report(step, {k: v for k, v in evaluated.items() if not k.endswith(DETAILS)})


def _evaluate(
    run: Run, state: TrainState, bar: progress.Progress, told: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """The metrics of every evaluation split, `NAME_METRIC`, by the running averages where they are kept.

    Raises:
        _CutShort: as soon as `told` says so.
    """
    results = {}
    bar.phase("evaluating")
    with run.meter.phase("eval"), jax.transfer_guard("allow"):
        for name, dataset in run.eval_sets.items():
            batches = data.eval_iterator(
                dataset,
                batch_size=_eval_batch_size(run.config),
                transform=eval_transform(run.config, dataset),
                share=data.Share(*batch_slices(run.program.rows)),
                workers=run.config.data.workers,
                prefetch=run.config.data.prefetch,
            )
            with batches:
                found = evaluate(
                    *(run.program.eval_step, state.variables(averaged=True), _until_told(batches, told)),
                    run.program.rows,
                    summarize=run.program.task.summarize,
                )
            results |= {f"{name}_{metric}": value for metric, value in found.items()}
    bar.phase("training")
    return results


@contextlib.contextmanager
def _profile(run: Run, step: int) -> Iterator[None]:
    """Traces the steps that `config.profile` names into `workdir/profile`, for TensorBoard's profiler."""
    settings = run.config.profile
    first = max(settings.first_step, (run.restored_step or 0) + 1)
    last = min(settings.first_step + settings.steps - 1, run.config.total_steps)
    if step == first <= last:
        jax.profiler.start_trace(str(run.workdir / "profile"))
    yield
    if first <= step == last:
        jax.profiler.stop_trace()
