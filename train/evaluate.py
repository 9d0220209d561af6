"""Scores a model on a data set, counting every example exactly once.

    python -m train.evaluate --workdir runs/digits
    python -m train.evaluate --model davit_tiny.msft_in1k --weights model.safetensors \\
        --data tfds:imagenet2012 --split validation --path /data/tensorflow_datasets

The first scores the newest good checkpoint of a run, as the run itself does; the second published weights, with
the preprocessing that they were published with. What is printed on stdout is one line of JSON.
"""

import argparse
import dataclasses
import functools
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

import zoo
from train import commands, data, host, inputs, leaves, metrics, program, sources, tasks
from train import config as config_lib
from train.checkpoint import CheckpointError, read_state
from train.face_set import FaceSet
from train.sequences import SequenceSet
from train.sharding import batch_sharding, check_batch, make_mesh, on_mesh, place_batch
from train.verification_metrics import Scored
from zoo import preprocess
from zoo.pretrained import abstract_variables

BATCH_SIZE = 128
# What is wrong with arguments, data or weights, and not with the program.
ERRORS = (ValueError, TypeError, OSError, ImportError, NotImplementedError, CheckpointError, zoo.WeightsError)


def evaluate(
    eval_step: Callable[[Any, Any], dict[str, jax.Array]],
    variables: Any,
    batches: Iterable[dict[str, np.ndarray]],
    rows: NamedSharding,
    summarize: Callable[[dict[str, Any]], Any],
) -> Any:
    """The metrics of all unmasked examples, or what else `summarize` makes of them.

    Args:
        eval_step: `(variables, batch) -> sums`.
        variables: what the model takes.
        batches: padded and masked batches (`train.data.eval_iterator`), this process's rows of each.
        rows: sharding of a batch.
        summarize: from the sums of all batches, integers added exactly and floats in float64, and from the rows of
            all batches behind one another, to metrics: that of the task (`train.tasks`).
    """
    totals: dict[str, Any] = {}
    parts: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        found = jax.device_get(eval_step(variables, place_batch(batch, rows)))
        for name, value in found.items():
            if value.ndim:
                parts.setdefault(name, []).append(value)
            else:
                totals[name] = totals.get(name, 0) + value.item()
    return summarize(totals | {name: np.concatenate(each) for name, each in parts.items()})


def score(
    task: tasks.Task,
    model: nn.Module,
    variables: Any,
    dataset: sources.Dataset | SequenceSet,
    *,
    transform: data.EvalTransform,
    batch_size: int = BATCH_SIZE,
    workers: int = 0,
    summarize: Callable[[dict[str, Any]], Any] | None = None,
) -> Any:
    """The task's metrics of a model, over all devices.

    Args:
        task: what is measured.
        model: the model.
        variables: its variables.
        dataset: what to score it on.
        transform: the host's preprocessing.
        batch_size: a multiple of the number of devices; does not change the result but for rounding.
        workers: reader processes.
        summarize: what is returned of all sums and rows, see `evaluate`; None: the task's metrics by name.

    Raises:
        ValueError: if the batch does not divide.
    """
    mesh = make_mesh(dict(data=-1, fsdp=1, tensor=1, sequence=1))
    check_batch("batch size", batch_size, mesh)
    replicated, rows = NamedSharding(mesh, PartitionSpec()), batch_sharding(mesh)
    score = functools.partial(task.evaluate, model)
    eval_step = jax.jit(on_mesh(mesh, score), out_shardings=replicated)
    batches = data.eval_iterator(dataset, batch_size=batch_size, transform=transform, workers=workers)
    with batches:
        placed = jax.device_put(variables, replicated)
        return evaluate(eval_step, placed, batches, rows, task.summarize if summarize is None else summarize)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: its arguments; None means those of the process.

    Returns:
        The exit code: 0 done, 2 the arguments, the data or the weights are wrong.
    """
    arguments = _parse(argv)
    host.keep_freed_memory()
    host.cache_compiled_programs()
    try:
        result = _run_of(arguments) if arguments.workdir else _score_weights(arguments)
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(metrics.final_line(result), flush=True)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = commands.parser("train.evaluate", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--workdir", metavar="DIR", help="a run of `python -m train`")
    what.add_argument("--model", metavar="TAG", help="a model with published weights, such as davit_tiny.msft_in1k")
    parser.add_argument("--step", type=int, help="with --workdir: this checkpoint and no other")
    parser.add_argument("--raw", action="store_true", help="with --workdir: not the running averages")
    parser.add_argument("--weights", metavar="FILE", help="with --model: a file; else it is fetched from the hub")
    parser.add_argument("--image-size", type=int, help="side in pixels, where it is not to be that of the training")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="with --model: of the computation")
    parser.add_argument("--data", metavar="NAME", help="digits, folder, tfds or tfds:NAME")
    parser.add_argument("--split", help="of the data set")
    parser.add_argument("--path", help="of the data set")
    parser.add_argument("--batch-size", type=int, help=f"with --model: {BATCH_SIZE} if not given")
    parser.add_argument("--workers", type=int, default=0, help="reader processes")
    parser.add_argument("--examples", type=int, help="with --workdir: only so many of each split, from the first")
    parser.add_argument(
        f"{config_lib.FLAG}KEY",
        metavar="VALUE",
        help="with --workdir: change the run's config, such as --config.model.overrides.clear_every=1",
    )
    arguments, arguments.overrides = parser.parse_known_args(argv)
    if arguments.overrides and arguments.model:
        parser.error(f"{arguments.overrides[0]} does not go with --model")
    if arguments.examples is not None and arguments.examples < 1:
        parser.error(f"--examples must be at least 1, got {arguments.examples}")
    given = "--workdir" if arguments.workdir else "--model"
    for name in ("weights", "dtype") if arguments.workdir else ("step", "raw", "examples"):
        if getattr(arguments, name) not in (None, False):
            parser.error(f"--{name.replace('_', '-')} does not go with {given}")
    if arguments.model and not (arguments.data and arguments.split):
        parser.error("--model needs --data and --split")
    if arguments.data and not arguments.split:
        parser.error("--data needs --split")
    if arguments.image_size is not None and arguments.image_size < 1:
        parser.error(f"--image-size must be at least 1, got {arguments.image_size}")
    return arguments


def _run_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `--workdir` asks for."""
    given = {
        "data.name": arguments.data,
        # Other data lies elsewhere.
        "data.path": arguments.path or ("None" if arguments.data else None),
        "data.image_size": arguments.image_size,
        "data.eval_batch_size": arguments.batch_size,
    }
    words = [f"{config_lib.FLAG}{key}={value}" for key, value in given.items() if value is not None]
    return score_run(
        arguments.workdir,
        step=arguments.step,
        raw=arguments.raw,
        split=arguments.split,
        overrides=(*words, *arguments.overrides),
        examples=arguments.examples,
        workers=arguments.workers,
    )


def score_run(
    workdir: epath.PathLike,
    *,
    step: int | None = None,
    raw: bool = False,
    split: str | None = None,
    overrides: Sequence[str] = (),
    examples: int | None = None,
    workers: int = 0,
) -> dict[str, Any]:
    """Scores a checkpoint of a run on the run's own splits or another one.

    Args:
        workdir: of the run.
        step: its checkpoint; None: the newest good one.
        raw: not the running averages where they are kept.
        split: what to score it on; None: the splits that the run evaluates.
        overrides: `--config.KEY=VALUE` words that change the run's config, such as its data or the model's fields.
        examples: how many of each split, from the first; None: all.
        workers: reader processes.

    Returns:
        `step`, `examples`, `seconds`, the rate, and the metrics, each after the name of its split.

    Raises:
        CheckpointError: if there is no good checkpoint.
        ValueError: if the model does not fit the checkpoint or the data, or the run evaluates nothing.
    """
    step, config, variables = load_run(workdir, step=step, raw=raw, overrides=overrides)
    splits = inputs.eval_splits(config)
    if split:
        splits = {re.sub(r"\W+", "_", split).strip("_"): split}
    if not splits:
        raise ValueError("the run evaluates nothing; name a --split")
    result: dict[str, Any] = {"step": step}
    for prefix, split in splits.items():
        dataset = inputs.open_dataset(config, split)
        if examples is not None:
            dataset = dataclasses.replace(dataset, source=_First(dataset.source, min(examples, len(dataset))))
        if config.task != "next_token" and config.data.image_size is None and dataset.image_shape is None:
            raise ValueError(f"the images of {dataset.name} differ in size; give --image-size")
        model = program.build_model(config, dataset)
        _check_fits(model, variables, dataset)
        found = functools.partial(
            score,
            tasks.without_teacher(config, model, dataset),
            model,
            variables,
            dataset,
            transform=inputs.eval_transform(config, dataset),
            batch_size=config.data.eval_batch_size or config.data.batch_size,
            workers=workers,
        )
        with jax.default_matmul_precision(config.matmul_precision):
            _add(result, prefix, dataset, found)
    return result


@dataclasses.dataclass(frozen=True)
class ScoredFaces:
    """A run's model on faces.

    Attributes:
        step, config, variables: of the checkpoint.
        model, task, dataset: what was scored on what.
        scored: every kind of pairs with their scores.
    """

    step: int
    config: ml_collections.FrozenConfigDict
    variables: dict[str, Any]
    model: nn.Module
    task: tasks.Verification
    dataset: FaceSet
    scored: dict[str, Scored]


def score_faces(
    workdir: epath.PathLike,
    *,
    step: int | None = None,
    raw: bool = False,
    split: str | None = None,
    overrides: Sequence[str] = (),
) -> ScoredFaces:
    """The pairs of a run of task "verification" with their scores.

    Args:
        workdir, step, raw, overrides: as of `score_run`.
        split: such as "validation+test"; None: the run's `data.eval_split`.

    Raises:
        CheckpointError: if there is no good checkpoint.
        ValueError: for a run of another task, or without a split to score.
    """
    step, config, variables = load_run(workdir, step=step, raw=raw, overrides=overrides)
    split = split or config.data.eval_split
    if config.task != "verification" or not split:
        raise ValueError(f"{workdir} is a run of task {config.task!r} with eval_split {split!r}: nothing to verify")
    dataset = inputs.open_dataset(config, split)
    model = program.build_model(config, dataset)
    _check_fits(model, variables, dataset)
    task = tasks.without_teacher(config, model, dataset)
    with jax.default_matmul_precision(config.matmul_precision):
        scored = score(
            task,
            model,
            variables,
            dataset,
            transform=inputs.eval_transform(config, dataset),
            batch_size=config.data.eval_batch_size or config.data.batch_size,
            summarize=task.score,
        )
    return ScoredFaces(step, config, variables, model, task, dataset, scored)


def load_run(
    workdir: epath.PathLike, *, step: int | None = None, raw: bool = False, overrides: Sequence[str] = ()
) -> tuple[int, ml_collections.FrozenConfigDict, dict[str, Any]]:
    """A checkpoint of a run: its step, the run's config, and the model's variables; see `score_run`."""
    directory = epath.Path(workdir) / "checkpoints"
    step, state, saved = read_state(directory, step, only=("params", "model_state", "ema"))
    averaged = bool(state.get("ema")) and not raw
    variables = state["ema"] if averaged else {"params": state["params"], **state.get("model_state", {})}
    print(f"{directory / str(step)}{', running averages' * averaged}", file=sys.stderr)
    return step, config_lib.overlay(saved, overrides), variables


@dataclasses.dataclass(frozen=True)
class _First:
    """The first examples of a source."""

    source: Any
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.source[index]


def _score_weights(arguments: argparse.Namespace) -> dict[str, Any]:
    """Published weights, with their own preprocessing."""
    cfg = zoo.pretrained_cfg(arguments.model)
    dataset = sources.open_source(arguments.data, split=arguments.split, path=arguments.path)
    dataset = dataclasses.replace(dataset, channels=len(cfg.mean))
    options = dict(dtype=jnp.dtype(arguments.dtype or "float32"), image_size=arguments.image_size)
    model, variables, report = zoo.load_pretrained(arguments.model, arguments.weights, **options)
    print(report, file=sys.stderr)
    result: dict[str, Any] = {}
    prefix = re.sub(r"\W+", "_", arguments.split).strip("_")
    if model.num_classes != dataset.num_classes:
        raise ValueError(
            f"the model has {model.num_classes} classes, {dataset.name} has {dataset.num_classes}; "
            "score it on a data set with the classes that it was trained on"
        )
    found = functools.partial(
        score,
        tasks.Classify(dataset.num_classes, tuple(cfg.mean), tuple(cfg.std), dtype=model.dtype),
        model,
        variables,
        dataset,
        transform=preprocess.published_transform(cfg, arguments.image_size),
        batch_size=arguments.batch_size or BATCH_SIZE,
        workers=arguments.workers,
    )
    _add(result, prefix, dataset, found)
    return result


def _add(
    result: dict[str, Any],
    prefix: str,
    dataset: sources.Dataset | SequenceSet,
    found: Callable[[], dict[str, float]],
):
    started = time.perf_counter()
    values = found()
    seconds = result.get("seconds", 0.0) + time.perf_counter() - started
    examples = result.get("examples", 0) + len(dataset)
    result |= {f"{prefix}_{name}": value for name, value in values.items()}
    rate = {"images_per_second": examples / seconds}
    if isinstance(dataset, SequenceSet):
        rate = {"tokens_per_second": examples * dataset.length / seconds}
    result |= {"examples": examples, "seconds": round(seconds, 2), **rate}


def _check_fits(model: nn.Module, variables: Any, dataset: sources.Dataset | SequenceSet) -> None:
    """Raises `ValueError` if the checkpoint's arrays are not those of the model as the data set wants it."""
    if found := leaves.differences(leaves.describe(variables), leaves.describe(abstract_variables(model))):
        of = f"vocabulary of {dataset.vocab_size}" if isinstance(dataset, SequenceSet) else ""
        of = of or f"{dataset.num_classes} classes"
        raise ValueError(f"the run's model is not one for the {of} of {dataset.name}: {found}")


if __name__ == "__main__":
    sys.exit(main())
