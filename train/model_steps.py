"""A model's inference and its training step, compiled and timed as `kernels.bench` times ops."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from kernels import compat
from kernels.bench.limits import Limits, free_bytes
from kernels.bench.measure import Effort, attempt, time_together
from kernels.bench.programs import peak_bytes, precision
from kernels.bench.rows import Row
from kernels.bench.timing import Timed
from kernels.cost import cost, tree_bytes
from train import config as config_lib
from train import flops, program, stand_in
from train.sequences import SequenceSet
from train.sources import Dataset
from zoo import registry
from zoo.sequence.sequence_model import SequenceModel

DIRECTIONS = ("inference", "training")
# Sets of inputs that take turns.
SETS = 3
# Classes, or people, of models that have no head of their own.
CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Peer:
    """Someone else's implementation of the same model.

    Attributes:
        name: in tables.
        start: `start(direction, row)` gives what times are taken of, and fills in what else it knows.
        absent: why there is none, None if there is.
    """

    name: str
    start: Callable[[str, Row], Timed] | None
    absent: str | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """A model and how it is trained, on data of which only shapes are known.

    Attributes:
        config: complete (`train.config.load`).
        dataset: its `data`.
        row: fields of the rows that are known from the beginning.
        peers: what is timed beside it.
    """

    config: ml_collections.FrozenConfigDict
    dataset: Dataset | SequenceSet
    row: dict[str, Any]
    peers: Sequence[Peer] = ()


def job(name: str, batch: int, dtype: str) -> Job:
    """A model of the zoo as its variant is, for images or tokens of the size that it is made for, trained by AdamW.

    Args:
        name: of the model.
        batch: images or rows of tokens.
        dtype: of the computation; products of float32 are of full precision.

    Raises:
        ValueError: for an unknown model.
    """
    model = registry.create_model(name)
    of_tokens = isinstance(model, SequenceModel)
    settings = {
        "model.name": name,
        "data.batch_size": batch,
        "optim.name": "adamw",
        "optim.weight_decay": 0.05,
        "optim.clip_norm": 1.0,
        "total_steps": 1_000_000,
        "dtype": dtype,
        "matmul_precision": "highest" if dtype == "float32" else "default",
    }
    if of_tokens:
        settings |= {"task": "next_token", "data.name": "random", "data.length": model.length}
        shape = f"batch {batch} of {model.length} tokens"
    else:
        side = model.input_size()[0]
        is_verified = registry.family_of(name).name == "ahan"
        settings |= {
            "task": "verification" if is_verified else "classify",
            # What the data would be called if they were there.
            "data.name": "people" if is_verified else "tfds:random",
            "data.image_size": side,
            "data.mean": (0.5,) * model.in_chans,
            "data.std": (0.5,) * model.in_chans,
        }
        shape = f"batch {batch} of {side}x{side}x{model.in_chans}"
    words = [f"{config_lib.FLAG}{key}={value}" for key, value in settings.items()]
    config = config_lib.overlay(ml_collections.ConfigDict(), words)
    dataset = _random_tokens(model) if of_tokens else stand_in.dataset(config, model.num_classes or CLASSES)
    row = dict(
        op=name,
        variant=name,
        # The names that there are differ behind this.
        label=name.replace("routing_transformer", "routing"),
        family="language model" if of_tokens else "image model",
        shape=shape,
        pattern="self causal" if of_tokens else "self noncausal",
    )
    return Job(config, dataset, row)


def _random_tokens(model: SequenceModel) -> SequenceSet:
    """One row of what the model takes, all of whose tokens are to be told."""
    inputs = {name: np.zeros(like.shape[1:], like.dtype) for name, like in model.example_inputs().items()}
    tokens = inputs["tokens"]
    row = inputs | {
        "targets": tokens,
        "weights": np.ones(len(tokens), np.float32),
        "segments": np.ones(len(tokens), np.int32),
    }
    return SequenceSet(
        name="random tokens",
        source=stand_in.Rows(row),
        fingerprint="random",
        vocab_size=model.vocab_size,
        length=len(tokens),
        source_length=len(inputs["source"]) if "source" in inputs else None,
    )


def measure(
    jobs: Sequence[Job],
    limits: Limits,
    effort: Effort,
    directions: Sequence[str] = DIRECTIONS,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Rows for all models, in their order.

    Args:
        jobs: what to measure, on the default device alone.
        limits: the device's.
        effort: how long.
        directions: of `DIRECTIONS`.
        tell: gets a line before each model.
    """
    rows = []
    for done, each in enumerate(jobs):
        tell(f"[{done + 1}/{len(jobs)}] {each.row['label']}, {each.row['shape']}, {each.config.dtype}")
        rows += _rows(each, limits, effort, directions)
    return rows


def blank(each: Job, direction: str, implementation: str, device: str, platform: str) -> Row:
    """A row with what is known before anything has run."""
    return Row(
        **each.row,
        implementation=implementation,
        device=device,
        platform=platform,
        length=None,
        dtype=each.config.dtype,
        direction=direction,
    )


def _rows(each: Job, limits: Limits, effort: Effort, directions: Sequence[str]) -> list[Row]:
    device = jax.devices()[0]
    found = []
    built = None
    for direction in directions:
        group = [blank(each, direction, "zoo", device.device_kind, device.platform)]
        if built is None:
            built = attempt(group[0], functools.partial(_Built, each, device))
        started = []
        if built is not None:
            timed = attempt(group[0], functools.partial(built.start, direction, group[0], limits))
            started += [(group[0], timed)] if timed is not None else []
        for peer in each.peers:
            row = blank(each, direction, peer.name, device.device_kind, device.platform)
            group.append(row)
            if peer.absent is not None:
                row.status, row.reason = "not measured", peer.absent
                continue
            # The same work, whoever does it.
            row.flops, row.bytes, row.floor_ms, row.bound = (
                getattr(group[0], name) for name in ("flops", "bytes", "floor_ms", "bound")
            )
            row.floor_source = group[0].floor_source
            timed = attempt(row, functools.partial(peer.start, direction, row), is_peer=True)
            started += [(row, timed)] if timed is not None else []
        if started:
            time_together(started, effort.repeats, effort.target, effort.budget)
        for row in group:
            if built is not None and row.median_ms is not None:
                setattr(row, f"{built.unit}_per_s", built.examples / (row.median_ms / 1e3))
        found += group
    return found


class _Built:
    """A model's program on one device, its state and batches of random inputs."""

    def __init__(self, each: Job, device: Any):
        self.config, self.device = each.config, device
        self.program = program.build(each.config, each.dataset, [device])
        abstract = stand_in.batch(each.config, each.dataset, self.program.rows)
        self.abstract, self.dataset = abstract, each.dataset
        self.unit, self.examples = flops.unit(abstract), flops.examples(abstract)
        self.state = self.program.init()
        place = self.program.rows
        self.sets = [jax.device_put(self._drawn(np.random.default_rng(seed)), place) for seed in range(SETS)]

    def _drawn(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """A batch whose every number is drawn."""
        classes = getattr(self.dataset, "vocab_size", None) or self.dataset.num_classes
        found = {}
        for name, like in self.abstract.items():
            if name == "weights" or name == "segments" or like.dtype == bool:
                found[name] = np.ones(like.shape, like.dtype)
            elif name == "image":
                drawn = rng.integers(256, size=like.shape)
                found[name] = (drawn if like.dtype == np.uint8 else drawn / 255).astype(like.dtype)
            elif name == "twin_index":
                found[name] = np.full(like.shape, -1, like.dtype)
            else:
                found[name] = rng.integers(classes, size=like.shape).astype(like.dtype)
        return found

    def start(self, direction: str, row: Row, limits: Limits) -> Timed | None:
        """What times are taken of; None, with the row's status set, where the program does not fit."""
        key = jax.device_put(jax.random.key(0), self.program.replicated)
        if direction == "training":
            function, operands = self.program.train_step, (self.state, self.sets[0], key, self.program.task)
        else:
            function, operands = jax.jit(self._inference()), (self.state.variables(), *self._inputs(self.sets[0]))
        compat.forget_traced()
        with precision(self.config.dtype):
            begin = time.perf_counter()
            compiled = function.lower(*operands).compile()
            row.compile_s = time.perf_counter() - begin
            row.peak_bytes = peak_bytes(compiled)
            row.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.program.abstract_state.params))
            self._count(direction, function, operands, row, limits)
        free = free_bytes(self.device)
        if free is not None and row.peak_bytes is not None and row.peak_bytes > free + tree_bytes(operands):
            row.status = "out of memory"
            row.reason = f"takes {row.peak_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            return None
        module = "jit_" + getattr(function, "__name__", "")
        if direction == "inference":
            variables = self.state.variables()
            return Timed(lambda i: compiled(variables, *self._inputs(self.sets[i])), SETS, module)

        def step(i: int) -> Any:
            self.state, values = compiled(self.state, self.sets[i], key, self.program.task)
            return values

        return Timed(step, SETS, module)

    def _inference(self) -> Callable[..., Any]:
        """The model's output on the pixels or tokens of a batch."""
        names = self._names()

        def infer(variables, *inputs):
            if names == ("image",):
                image = inputs[0].astype(self.config.dtype)
                return self.program.model.apply(variables, image / 255 if inputs[0].dtype == np.uint8 else image)
            return self.program.model.apply(variables, **dict(zip(names, inputs)))

        return infer

    def _names(self) -> tuple[str, ...]:
        if "image" in self.abstract:
            return ("image",)
        return tuple(name for name in ("tokens", "source", "source_mask") if name in self.abstract)

    def _inputs(self, batch: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        return tuple(batch[name] for name in self._names())

    def _count(self, direction: str, function: Any, operands: tuple[Any, ...], row: Row, limits: Limits) -> None:
        """Products that the mathematics needs; what comes in and goes out, once; and what these take at least."""
        if direction == "training":
            row.flops = flops.training_flops(self.program, self.abstract) * self.examples
        else:
            row.flops = cost(function, *operands, platform=jax.default_backend()).matmul_flops
        row.bytes = tree_bytes(_without_keys(operands)) + tree_bytes(_without_keys(jax.eval_shape(function, *operands)))
        floor, row.bound = limits.floor(row.flops, row.bytes, row.dtype)
        row.floor_ms, row.floor_source = floor * 1e3, limits.source


def _without_keys(tree: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
