"""What a data set of token sequences is, whatever its tokens stand for."""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

Example = dict[str, np.ndarray]


@runtime_checkable
class SequenceSource(Protocol):
    """Random access to examples of fixed shapes; picklable, so that worker processes can have it.

    An example is a dict of
        "tokens" int32 (N,): what the model reads;
        "targets" int32 (N,): what it shall say at each position, 0 where `weights` is 0;
        "weights" float32 (N,): 1 at the positions that count, else 0;
        "segments" int32 (N,): which document of the row a position belongs to, 1 and up; 0 is padding;
    for text also
        "bytes" int32 (): how many bytes of text the counted targets stand for;
    and for encoder-decoder tasks
        "source" int32 (M,): what the encoder reads;
        "source_mask" bool (M,): False at its padding.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class SequenceSet:
    """One split of a set of token sequences.

    Attributes:
        name: what error messages call it.
        source: its examples.
        fingerprint: tells from the content whether two sets are the same, wherever they are stored.
        vocab_size: tokens and targets are 0 .. vocab_size - 1, special tokens included.
        length: N, the number of positions of an example.
        align: within a row every document starts at a multiple of this.
        packed: whether a row may hold several documents, which a model must keep apart.
        detail: a line about the content for a person.
        chance: expected accuracy over the counted positions of a guess that is uniform over the answers the task
            can have at all; None where that means nothing.
        source_length: M for encoder-decoder tasks, else None.
    """

    name: str
    source: SequenceSource
    fingerprint: str
    vocab_size: int
    length: int
    align: int = 1
    packed: bool = False
    detail: str = ""
    chance: float | None = None
    source_length: int | None = None

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> Example:
        """An example, whose arrays are not to be written to."""
        return self.source[index]


def shifted(targets: Int32[np.ndarray, "N"], begin: int) -> Int32[np.ndarray, "N"]:
    """What a model reads that shall say `targets`: the token `begin`, then each target but the last."""
    return np.concatenate([np.asarray([begin], np.int32), targets[:-1]])


def check_index(index: int, size: int) -> None:
    """Raises IndexError unless 0 <= index < size, by which also iteration ends."""
    if not 0 <= index < size:
        raise IndexError(f"example {index} of {size}")
