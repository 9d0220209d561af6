"""Tasks for an encoder and a decoder: the source is to be written down again, as it is or sorted."""

import dataclasses

import numpy as np

from train.generated import Task, need, sequence
from train.sequences import Example, shifted
from zoo.sequence.writing import BEGIN, END, PADDING, SPECIAL


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy(Task):
    """The encoder reads symbols and END, the decoder BEGIN and the symbols; it shall tell the symbols and END.

    Both sides have `length` positions, the rest of which is padding. Counted are the positions of symbols and END.
    The ids are 0 padding, 1 BEGIN, 2 END, 3 and up the symbols.

    Attributes:
        symbols: how many kinds there are.
        min_symbols: the number of symbols is uniform in [min_symbols, length - 1].
    """

    symbols: int = 32
    min_symbols: int = 1

    def __post_init__(self) -> None:
        need(self.symbols >= 2, f"symbols={self.symbols}", "at least 2 kinds are needed")
        need(
            1 <= self.min_symbols < self.length,
            f"length={self.length} with min_symbols={self.min_symbols}",
            "min_symbols must be at least 1 and leave a position for END",
        )

    @property
    def vocab_size(self) -> int:
        return SPECIAL + self.symbols

    @property
    def chance(self) -> float:
        return 1 / (self.symbols + 1)

    @property
    def detail(self) -> str:
        return f"{self.min_symbols} to {self.length - 1} symbols of {self.symbols} kinds, {self.wanted}"

    wanted = "to be copied"

    @property
    def source_length(self) -> int:
        return self.length

    def draw(self, rng: np.random.Generator) -> Example:
        number = int(rng.integers(self.min_symbols, self.length))
        symbols = SPECIAL + rng.integers(self.symbols, size=number)
        source, targets = (np.full(self.length, PADDING, np.int32) for _ in range(2))
        source[:number], targets[:number] = symbols, self.answer(symbols)
        source[number] = targets[number] = END
        used = np.arange(self.length) <= number
        example = sequence(np.where(used, shifted(targets, BEGIN), PADDING), targets, used, used=number + 1)
        return {**example, "source": source, "source_mask": used}

    def answer(self, symbols: np.ndarray) -> np.ndarray:
        return symbols


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sort(Copy):
    """As `Copy`, but the symbols shall be told in rising order."""

    wanted = "to be sorted"

    def answer(self, symbols: np.ndarray) -> np.ndarray:
        return np.sort(symbols)
