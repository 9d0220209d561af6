"""Batches of examples in an order that no number of processes, workers or restarts changes."""

import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from train.sequences import SequenceSet
from train.sources import Dataset

Batch = dict[str, np.ndarray]
TrainTransform = Callable[[dict[str, Any], np.random.Generator], Mapping[str, Any]]
EvalTransform = Callable[[dict[str, Any]], Mapping[str, Any]]
# The examples of a global batch by its number, counted from the start of training.
Order = Callable[[int], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class DataPosition:
    """Where training stands in its data: what a checkpoint stores, and all that going on needs.

    Attributes:
        examples: the global example number of the next example.
        fingerprint: of the data set that the examples came from.
    """

    examples: int
    fingerprint: str

    def check(self, dataset: Dataset | SequenceSet) -> None:
        """Raises ValueError unless `dataset` is the one that this position belongs to."""
        if dataset.fingerprint != self.fingerprint:
            raise ValueError(
                f"the checkpoint was written on the data set {self.fingerprint!r}, but the {dataset.name} is "
                f"{dataset.fingerprint!r}: give it the same data, or start in a new workdir"
            )


def shuffled(number: int, *, size: int, seed: int) -> tuple[int, int]:
    """The order of training: which example a global example number stands for.

    Each epoch visits each example exactly once, in an order of its own.

    Args:
        number: global example number, counted from the start of training over all processes.
        size: number of examples in the data set.
        seed: of the order.

    Returns:
        (index, epoch): the example's place in the data set, and how often training went through it before.
    """
    epoch, place = divmod(number, size)
    key = _epoch_seed(seed, epoch)
    return grain.experimental.index_shuffle(place, max_index=size - 1, seed=key, rounds=4), epoch


@functools.lru_cache
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(1)[0])


@dataclasses.dataclass(frozen=True)
class Share:
    """What one process reads of every global batch: some of its equal slices, which another may read too.

    Attributes:
        slices: their numbers, ascending.
        of: how many slices there are.
    """

    slices: tuple[int, ...] = (0,)
    of: int = 1

    def __post_init__(self) -> None:
        if not self.slices or list(self.slices) != sorted(set(self.slices) & set(range(self.of))):
            raise ValueError(f"slices={self.slices} are not some of {self.of} slices, in ascending order")


@dataclasses.dataclass(frozen=True)
class _View:
    """The batches of one process by their number: what grain reads, possibly in another process."""

    dataset: Dataset | SequenceSet
    transform: Callable[..., Mapping[str, Any]]
    batch_size: int
    share: Share

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.share.of:
            raise ValueError(
                f"batch_size={self.batch_size} does not divide into {self.share.of} equal slices; "
                f"a multiple of {self.share.of} does"
            )
        if not len(self.dataset):
            raise ValueError(f"the {self.dataset.name} has no example")

    def rows(self, step: int) -> list[int]:
        """The numbers, counted over all processes, of this process's rows in global batch `step`."""
        size = self.batch_size // self.share.of
        firsts = (step * self.batch_size + number * size for number in self.share.slices)
        return [row for first in firsts for row in range(first, first + size)]

    def record(self, index: int, *randomness: np.random.Generator) -> dict[str, Any]:
        example = self.dataset.read(index)
        record = dict(self.transform(example, *randomness))
        if "label" in example:
            record["label"] = np.int32(record.get("label", example["label"]))
        return record


@dataclasses.dataclass(frozen=True)
class _TrainView(_View):
    seed: int
    start: int
    repeats: int

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("seed", 0), ("start", 0), ("repeats", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> Batch:
        records = []
        for index, key in self.examples(step):
            sequence = np.random.SeedSequence(self.seed, spawn_key=key)
            record = self.record(index, np.random.Generator(np.random.PCG64(sequence)))
            record["index"] = np.int32(index)
            records.append(record)
        return _stack(records)

    def examples(self, step: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """This process's examples of global batch `step`, each with the key of its randomness."""
        for row in self.rows(step):
            epoch, place = divmod(self.start + row, len(self.dataset))
            place, copy = divmod(place, self.repeats)
            index, _ = shuffled(epoch * len(self.dataset) + place, size=len(self.dataset), seed=self.seed)
            yield index, (epoch, index, copy) if copy else (epoch, index)


@dataclasses.dataclass(frozen=True)
class _OrderedView(_TrainView):
    order: Order

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start % self.batch_size or self.repeats != 1:
            raise ValueError(
                f"start={self.start}, repeats={self.repeats}: an order gives whole batches of {self.batch_size}, each "
                f"example once; start must be a multiple of that, and repeats 1"
            )

    def examples(self, step: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """As without an order; an example's randomness is keyed by the number of its row in all of training."""
        indices = self.order(self.start // self.batch_size + step)
        for row in self.rows(step):
            index = int(indices[row % self.batch_size])
            yield index, (self.start + row, index)


@dataclasses.dataclass(frozen=True)
class _EvalView(_View):
    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __getitem__(self, step: int) -> Batch:
        last = len(self.dataset) - 1
        # The padding repeats the last example: something of the right shape, which the mask tells to ignore.
        batch = _stack([self.record(min(row, last)) for row in self.rows(step)])
        batch["mask"] = np.asarray([row <= last for row in self.rows(step)])
        return batch


def _stack(records: list[dict[str, Any]]) -> Batch:
    batch = {}
    for key in records[0]:
        values = [np.asarray(record[key]) for record in records]
        shapes = sorted({value.shape for value in values})
        if len(shapes) > 1:
            raise ValueError(
                f"{key!r} has the shapes {', '.join(map(str, shapes))} within one batch: the transform must "
                "give all examples the same shape"
            )
        batch[key] = np.stack(values)
    return batch


class Batches(Iterator[Batch]):
    """Batches made ahead of time by threads or worker processes.

    `close` or the end of a `with` block stops those. An exception raised while a batch was made is raised where
    that batch was asked for, and stops them too.
    """

    def __init__(self, view: _View, *, workers: int, prefetch: int):
        if workers < 0 or prefetch < (1 if workers else 0):
            raise ValueError(
                f"workers={workers}, prefetch={prefetch}: neither can be negative, and workers need a prefetch "
                "of at least 1"
            )
        self._view = view
        # A worker process works ahead by its output queue and needs no threads for that.
        threads = 0 if workers else prefetch
        batches = grain.MapDataset.source(view).to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        )
        if workers:
            # Grain reads absl flags there, which raises in a program that never parsed any; defaults will do.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch),
                worker_init_fn=_prepare_worker,
            )
        # Grain's iterator must be gone before the interpreter is: the finalizer holds the last reference.
        self._iterators = [iter(batches)]
        self._finalizer = weakref.finalize(self, _close_all, self._iterators)

    def __next__(self) -> Batch:
        if not self._iterators:
            raise ValueError("these batches were closed, or an error ended them")
        try:
            batch = next(self._iterators[0])
        except StopIteration:
            raise
        except Exception:
            self.close()
            raise
        # What workers hand over lives in shared memory, which is small in a container and leaks if the process ends
        # with it in use.
        return {key: value if type(value) is np.ndarray else np.array(value) for key, value in batch.items()}

    def close(self) -> None:
        """Stops the threads or workers; there are no more batches then."""
        self._finalizer()

    def __enter__(self):
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _close_all(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()


class TrainBatches(Batches):
    """The endless batches of training."""

    def position(self, batches: int) -> DataPosition:
        """Where training stands after the first `batches` batches of this iterator."""
        return DataPosition(
            examples=self._view.start + batches * self._view.batch_size,
            fingerprint=self._view.dataset.fingerprint,
        )


def train_iterator(
    dataset: Dataset | SequenceSet,
    *,
    batch_size: int,
    seed: int,
    transform: TrainTransform,
    start: int = 0,
    share: Share = Share(),
    workers: int = 0,
    prefetch: int = 2,
    channels: int | None = None,
    repeats: int = 1,
    order: Order | None = None,
) -> TrainBatches:
    """Endless shuffled batches; global batch k holds the examples start + k * batch_size and on, in order.

    What a batch holds depends on `dataset`, `batch_size`, `seed`, `transform`, `repeats`, `order` and `start` alone:
    `shuffled` gives the order, and the randomness of an example is keyed by (seed, index, epoch, repetition).

    Args:
        dataset: images (`train.sources.open_source`) or sequences (`train.sequences.SequenceSet`).
        batch_size: rows of the global batch, a multiple of `share.of`.
        seed: of the order and of the transform's randomness.
        transform: called as transform(example, rng) with what `dataset.read` gives, not to be written to, and the
            example's own np.random.Generator. It returns a dict of arrays of one shape each. With `workers` it must
            be picklable.
        start: global example number to begin with, `DataPosition.examples` when resuming.
        share: which rows of each global batch to give (`train.sharding.batch_slices`); all of them by default.
        workers: number of worker processes; 0 makes the batches in threads of this process.
        prefetch: batches made ahead, by as many threads; with workers, batches made ahead by each worker.
        channels: of images, 1 or 3; None means the data set's own.
        repeats: how many times in a row each example comes, each time augmented differently; an epoch keeps its
            length and so visits one in `repeats` of the examples (repeated augmentation, Hoffer et al.,
            arXiv:1901.09335).
        order: which examples the batches hold, in place of `shuffled`; a pure function, picklable with `workers`.
            There are no epochs then, and `start` is a multiple of `batch_size`.

    Returns:
        Iterator over dicts of arrays (rows, ...): what the transform returned, of images also
        "label" int32, and "index" int32, the examples' places in the data set.

    Raises:
        ValueError: an argument out of range, or a batch size that does not divide into the slices.
    """
    of = (_with_channels(dataset, channels), transform, batch_size, share, seed, start, repeats)
    view = _TrainView(*of) if order is None else _OrderedView(*of, order)
    return TrainBatches(view, workers=workers, prefetch=prefetch)


def eval_iterator(
    dataset: Dataset | SequenceSet,
    *,
    batch_size: int,
    transform: EvalTransform,
    share: Share = Share(),
    workers: int = 0,
    prefetch: int = 2,
    channels: int | None = None,
) -> Batches:
    """Every example exactly once, in the data set's order, in batches of one size.

    Args:
        dataset, batch_size, share, workers, prefetch, channels: as in `train_iterator`.
        transform: called as transform(example), otherwise as in `train_iterator`.

    Returns:
        Iterator over ceil(len(dataset) / batch_size) dicts of arrays (rows, ...): what the
        transform returned, of images also "label" int32, and "mask" bool: False marks the padding of the last batch.
        All processes get the same number of batches.

    Raises:
        ValueError: as in `train_iterator`.
    """
    view = _EvalView(_with_channels(dataset, channels), transform, batch_size, share)
    return Batches(view, workers=workers, prefetch=prefetch)


def _with_channels(dataset: Dataset | SequenceSet, channels: int | None) -> Dataset | SequenceSet:
    return dataset if channels is None else dataclasses.replace(dataset, channels=channels)


def _prepare_worker(worker_index: int, worker_count: int) -> None:
    # Ctrl-C and many a scheduler's SIGTERM reach every process of the group. What they mean is for the main process
    # to decide, which still needs its batches until it has saved and closes the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # A killed main process tells its workers nothing, and they would wait for it forever.
    multiprocessing.parent_process().join()
    os._exit(1)
