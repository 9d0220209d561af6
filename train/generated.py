"""Examples that are computed when they are asked for, each a pure function of (seed, split, index)."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int

from train import splits
from train.sequences import Example, SequenceSource, check_index

SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A law of examples; subclasses add their options as fields and check them.

    Attributes:
        length: N, the number of positions of an example.
    """

    length: int

    @property
    def vocab_size(self) -> int:
        """Tokens and targets are 0 .. vocab_size - 1."""
        raise NotImplementedError

    @property
    def chance(self) -> float:
        """Expected accuracy of a guess that is uniform over the answers there can be."""
        raise NotImplementedError

    @property
    def detail(self) -> str:
        """What is asked, in a line for a person."""
        raise NotImplementedError

    @property
    def source_length(self) -> int | None:
        """Number of positions of the encoder's input, None where there is no encoder."""
        return None

    def draw(self, rng: np.random.Generator) -> Example:
        """One example, see `train.sequences.SequenceSource`."""
        raise NotImplementedError

    def open(self, *, split: str, examples: int, seed: int) -> SequenceSource:
        """The examples of a split; each split draws from a stream of its own."""
        return Generated(self, split, examples, seed)


@dataclasses.dataclass(frozen=True)
class Generated:
    """`examples` draws of a task. By chance, more likely the fewer there can be, two splits may draw the same one."""

    task: Task
    split: str
    examples: int
    seed: int

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> Example:
        check_index(index, self.examples)
        key = np.random.SeedSequence(self.seed, spawn_key=(SPLITS.index(self.split), index))
        return self.task.draw(np.random.Generator(np.random.PCG64(key)))


def check_split(split: str, name: str) -> None:
    """Raises ValueError unless the split is one that generated data have."""
    if split not in SPLITS:
        raise splits.unknown_split(split, SPLITS, f"the task {name!r}")


def need(holds: bool, given: str, accepted: str) -> None:
    """Raises ValueError with what was given and what would be accepted, unless it `holds`."""
    if not holds:
        raise ValueError(f"{given}: {accepted}")


def sequence(
    tokens: Int[np.ndarray, "N"],
    targets: Int[np.ndarray, "N"],
    counted: Bool[np.ndarray, "N"],
    used: int | None = None,
) -> Example:
    """An example of one document.

    Args:
        tokens: what the model reads.
        targets: what it shall say; ignored where `counted` is False.
        counted: the positions that count.
        used: how many positions come before the padding; None means all.
    """
    segments = np.ones(len(tokens), np.int32)
    segments[len(tokens) if used is None else used :] = 0
    return {
        "tokens": tokens.astype(np.int32),
        "targets": np.where(counted, targets, 0).astype(np.int32),
        "weights": counted.astype(np.float32),
        "segments": segments,
    }
