"""Tasks that tell sequence mixers apart: generated, seeded, with answers that are exact."""

import dataclasses
from typing import Any

import numpy as np

from train import splits
from train.generated import Task, check_split, need, sequence
from train.listops import ListOps
from train.mqar import Mqar, MqarZoology
from train.sequences import Example, SequenceSet
from train.transduction import Copy, Sort
from zoo.registry import nearest

DIGITS, MARK, ASK, SPECIAL = 10, 10, 11, 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passkey(Task):
    """Noise in which a mark and a key of digits are hidden; at the end the key is asked for.

    noise, MARK, d1 .. dk, noise, ASK, d1 .. d(k-1). Counted are the last k positions, where d1 .. dk shall be told.
    The noise is uniform over the digits and the other symbols, so that the mark alone tells where the key is. The ids
    are 0 .. 9 the digits, 10 MARK, 11 ASK, 12 and up the other symbols.

    Attributes:
        num_tokens: size of the vocabulary, digits and marks included.
        digits: k.
        depth: where the key is hidden, from 0, the beginning, to 1, right before the question; None: anywhere.

    Source: after Mohtashami and Jaggi, "Landmark Attention", arXiv:2305.16300, section 4.2, with tokens in place of
    English.
    """

    num_tokens: int = 64
    digits: int = 5
    depth: float | int | None = None

    def __post_init__(self) -> None:
        need(self.digits >= 1, f"digits={self.digits}", "a key has at least 1")
        need(self.num_tokens >= SPECIAL, f"num_tokens={self.num_tokens}", f"at least {SPECIAL}: 10 digits and 2 marks")
        least = 2 * self.digits + 1
        need(self.length >= least, f"length={self.length}", f"a key of {self.digits} digits needs at least {least}")
        need(self.depth is None or 0 <= self.depth <= 1, f"depth={self.depth}", "None or from 0 to 1")

    @property
    def vocab_size(self) -> int:
        return self.num_tokens

    @property
    def chance(self) -> float:
        return 1 / DIGITS

    @property
    def detail(self) -> str:
        return f"a key of {self.digits} digits in {self.length} positions"

    def draw(self, rng: np.random.Generator) -> Example:
        noise = rng.integers(self.num_tokens - 2, size=self.length)
        noise = np.where(noise < DIGITS, noise, noise + 2)
        key = rng.integers(DIGITS, size=self.digits)
        last = self.length - 2 * self.digits - 1
        start = int(rng.integers(last + 1)) if self.depth is None else round(self.depth * last)
        return _hidden(noise, start, MARK, key, ASK)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Induction(Task):
    """A trigger in noise; at the end it comes again, and what followed it shall be told.

    noise, TRIGGER, c1 .. ck, noise, TRIGGER, c1 .. c(k-1). Counted are the last k positions, where c1 .. ck shall be
    told. The trigger is the last id; noise and c are uniform over the others.

    Attributes:
        num_tokens: size of the vocabulary, the trigger included.
        induction_length: k.

    Source: the induction heads task of Fu, Dao et al., "Hungry Hungry Hippos", arXiv:2212.14052, section 3.1, and Gu
    and Dao, "Mamba", arXiv:2312.00752, section 4.1.2 (16 tokens, length 256).
    """

    num_tokens: int = 16
    induction_length: int = 1

    def __post_init__(self) -> None:
        need(self.num_tokens >= 3, f"num_tokens={self.num_tokens}", "at least 3: the trigger and two more")
        need(self.induction_length >= 1, f"induction_length={self.induction_length}", "it must be at least 1")
        least = 2 * self.induction_length + 1
        need(
            self.length >= least,
            f"length={self.length}",
            f"induction_length={self.induction_length} needs at least {least}",
        )

    @property
    def vocab_size(self) -> int:
        return self.num_tokens

    @property
    def chance(self) -> float:
        return 1 / (self.num_tokens - 1)

    @property
    def detail(self) -> str:
        return f"what followed a trigger, {self.induction_length} tokens, in {self.length} positions"

    def draw(self, rng: np.random.Generator) -> Example:
        noise = rng.integers(self.num_tokens - 1, size=self.length)
        start = int(rng.integers(self.length - 2 * self.induction_length))
        trigger, content = self.num_tokens - 1, noise[start + 1 : start + 1 + self.induction_length].copy()
        return _hidden(noise, start, trigger, content, trigger)


def _hidden(noise: np.ndarray, start: int, mark: int, content: np.ndarray, ask: int) -> Example:
    """Content behind a mark at `start`, and asked for at the end."""
    tokens, targets, asked = noise.copy(), np.zeros_like(noise), len(noise) - len(content)
    tokens[start] = mark
    tokens[start + 1 : start + 1 + len(content)] = content
    tokens[asked] = ask
    tokens[asked + 1 :] = content[:-1]
    targets[asked:] = content
    return sequence(tokens, targets, np.arange(len(noise)) >= asked)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopy(Task):
    """Symbols scattered over blanks, to be told in their order at the end.

    The first length - memorize positions hold the symbols at random places, blanks elsewhere; then a marker for each
    symbol, where it shall be told; these positions count. The ids are 0 blank, 1 .. num_tokens - 2 the symbols,
    num_tokens - 1 the marker.

    Attributes:
        num_tokens: size of the vocabulary.
        memorize: number of symbols.

    Source: Gu and Dao, "Mamba", arXiv:2312.00752, section 4.1.1 (16 tokens, 16 to memorize, length 4096), after
    Jing et al., "Gated Orthogonal Recurrent Units", arXiv:1706.02761.
    """

    num_tokens: int = 16
    memorize: int = 16

    def __post_init__(self) -> None:
        need(self.num_tokens >= 4, f"num_tokens={self.num_tokens}", "at least 4: blank, marker and two symbols")
        need(self.memorize >= 1, f"memorize={self.memorize}", "it must be at least 1")
        least = 2 * self.memorize
        need(self.length >= least, f"length={self.length}", f"memorize={self.memorize} needs at least {least}")

    @property
    def vocab_size(self) -> int:
        return self.num_tokens

    @property
    def chance(self) -> float:
        return 1 / (self.num_tokens - 2)

    @property
    def detail(self) -> str:
        return f"{self.memorize} symbols scattered over {self.length - self.memorize} positions"

    def draw(self, rng: np.random.Generator) -> Example:
        before = self.length - self.memorize
        symbols = rng.integers(1, self.num_tokens - 1, size=self.memorize)
        tokens = np.zeros(self.length, np.int64)
        tokens[np.sort(rng.choice(before, self.memorize, replace=False))] = symbols
        tokens[before:] = self.num_tokens - 1
        targets = np.concatenate([np.zeros(before, np.int64), symbols])
        return sequence(tokens, targets, np.arange(self.length) >= before)


TASKS: dict[str, type[Task]] = {
    "mqar": Mqar,
    "mqar_zoology": MqarZoology,
    "passkey": Passkey,
    "selective_copy": SelectiveCopy,
    "induction": Induction,
    "listops": ListOps,
    "copy": Copy,
    "sort": Sort,
}


def open_task(name: str, *, split: str, examples: int, length: int, seed: int, **options: Any) -> SequenceSet:
    """Opens one split of a generated task.

    Args:
        name: a key of `TASKS`. "mqar_zoology" gives the examples of Zoology's own generator; all others make example
            i from (seed, split, i) when it is asked for.
        split: "train" or "test"; they never share a stream of random numbers.
        examples: how many there are.
        length: number of positions of an example.
        seed: of the examples.
        **options: fields of the task's class, whose docstrings say what the ids mean and which positions count.

    Returns:
        The examples; `chance` is the accuracy of a uniform guess.

    Raises:
        ValueError: an unknown task, split or option, or settings that leave no example.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}{nearest(name, list(TASKS))}")
    check_split(split, name)
    need(examples >= 1, f"examples={examples}", "there must be at least 1")
    need(seed >= 0, f"seed={seed}", "it must not be negative")
    kinds = {field.name: field.type for field in dataclasses.fields(TASKS[name]) if field.name != "length"}
    for option, value in options.items():
        if option not in kinds:
            raise ValueError(f"the task {name!r} has no option {option!r}{nearest(option, kinds)}")
        kind = kinds[option]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{option}={value!r} of the task {name!r} must be {getattr(kind, '__name__', kind)}")
    task = TASKS[name](length=length, **options)
    return SequenceSet(
        name=f"task {name} {split}",
        source=task.open(split=split, examples=examples, seed=seed),
        fingerprint=splits.fingerprint(f"task:{name}:{split}:{examples}", repr(task), str(seed)),
        vocab_size=task.vocab_size,
        length=length,
        detail=task.detail,
        chance=task.chance,
        source_length=task.source_length,
    )
