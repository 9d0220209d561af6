"""Multi-query associative recall: values to be told for keys that were given with them earlier.

Source: Arora, Eyuboglu et al., "Zoology: Measuring and Improving Recall in Efficient Language Models",
arXiv:2312.04927, section 4 and the generator published with it (HazyResearch/zoology, zoology/data/multiquery_ar.py).
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Int64

from train.generated import SPLITS, Task, need, sequence
from train.sequences import Example, check_index

IGNORED = -100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mqar(Task):
    """`num_kv_pairs` pairs of key and value, then each key once more, where its value shall be told.

    The keys are ids 1 .. V // 2 - 1, the values V // 2 .. V - 1, both drawn without replacement; 0 is filler. The
    pairs come first, k v k v ..., `num_passes` times. The rest of the sequence is divided into gaps of two positions;
    each key takes the first position of a gap, drawn without replacement with probability proportional to
    i ** (power_a - 1) for the i-th. Counted are the positions of those keys.

    Attributes:
        num_tokens: V.
        num_kv_pairs, num_passes, power_a: see above; `power_a=1` makes all gaps equally likely.
        random_non_queries: whether ids drawn from all V stand in place of the filler.
    """

    num_tokens: int = 8192
    num_kv_pairs: int = 8
    num_passes: int = 1
    power_a: float | int = 0.01
    random_non_queries: bool = True

    def __post_init__(self) -> None:
        pairs, passes = self.num_kv_pairs, self.num_passes
        need(pairs >= 1 and passes >= 1, f"num_kv_pairs={pairs}, num_passes={passes}", "both must be at least 1")
        need(self.power_a > 0, f"power_a={self.power_a}", "it must be above 0")
        least = 2 * pairs * (passes + 1)
        need(
            self.length % 2 == 0 and self.length >= least,
            f"length={self.length}",
            f"an even length of at least {least} is needed for {pairs} pairs given {passes} times and asked once",
        )
        least = 2 * pairs + 2
        need(self.num_tokens >= least, f"num_tokens={self.num_tokens}", f"{pairs} pairs need at least {least}")

    @property
    def vocab_size(self) -> int:
        return self.num_tokens

    @property
    def chance(self) -> float:
        return 1 / (self.num_tokens - self.num_tokens // 2)

    @property
    def detail(self) -> str:
        return (
            f"multi-query associative recall, {self.num_kv_pairs} pairs in {self.length} positions; guessing among "
            f"the values of the sequence gives {1 / self.num_kv_pairs:.3f}"
        )

    @property
    def context(self) -> int:
        """Number of positions that the pairs take."""
        return 2 * self.num_kv_pairs * self.num_passes

    @functools.cached_property
    def gap_law(self) -> np.ndarray:
        law = self.power_a * np.arange(1, (self.length - self.context) // 2 + 1) ** (self.power_a - 1)
        return law / law.sum()

    def draw(self, rng: np.random.Generator) -> Example:
        pairs, first_value = self.num_kv_pairs, self.num_tokens // 2
        keys = 1 + rng.choice(first_value - 1, pairs, replace=False)
        values = first_value + rng.choice(self.num_tokens - first_value, pairs, replace=False)
        # The order in which exponential clocks of these rates ring is that of drawing without replacement.
        gaps = np.argsort(rng.exponential(size=len(self.gap_law)) / self.gap_law)[:pairs]
        tokens, labels = self.arrange(keys[None], values[None], gaps[None])
        if self.random_non_queries:
            tokens = np.where(tokens == 0, rng.integers(self.num_tokens, size=tokens.shape), tokens)
        return sequence(tokens[0], labels[0], labels[0] != IGNORED)

    def arrange(
        self, keys: Int64[np.ndarray, "B n"], values: Int64[np.ndarray, "B n"], gaps: Int64[np.ndarray, "B n"]
    ) -> tuple[Int64[np.ndarray, "B N"], Int64[np.ndarray, "B N"]]:
        """Tokens, 0 where filler goes, and labels, `IGNORED` where nothing is asked."""
        tokens = np.zeros((len(keys), self.length), np.int64)
        labels = np.full_like(tokens, IGNORED)
        tokens[:, 0 : self.context : 2] = np.tile(keys, (1, self.num_passes))
        tokens[:, 1 : self.context : 2] = np.tile(values, (1, self.num_passes))
        rows, places = np.arange(len(keys))[:, None], self.context + 2 * gaps
        tokens[rows, places] = keys
        labels[rows, places] = values
        return tokens, labels


@dataclasses.dataclass(frozen=True, kw_only=True)
class MqarZoology(Mqar):
    """The same, with the very examples that Zoology's generator makes, all of them at once and held in memory.

    `seed` is that of a Zoology data configuration with one training and one test segment. Only what stands in place
    of the filler differs: Zoology takes it from torch's generator, without a seed.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self.num_passes == 1, f"num_passes={self.num_passes}", "only with 1 does Zoology's generator work")

    def open(self, *, split: str, examples: int, seed: int) -> "Arrays":
        seeds = np.random.RandomState(seed)
        segment_seeds = [seeds.randint(0, 2**31, size=1, dtype=np.int64)]
        segment_seeds.append(seeds.randint(2**31, 2**32, size=1, dtype=np.int64))
        return Arrays(*self.segment(examples, int(segment_seeds[SPLITS.index(split)][0])))

    def segment(self, examples: int, seed: int) -> tuple[Int64[np.ndarray, "B N"], Int64[np.ndarray, "B N"]]:
        """Tokens and labels of a Zoology segment, `seed` being the segment's own."""
        rng = np.random.RandomState(seed)

        def choices(options: np.ndarray, law: np.ndarray | None = None) -> np.ndarray:
            return np.stack([rng.choice(options, self.num_kv_pairs, False, law) for _ in range(examples)])

        first_value = self.num_tokens // 2
        keys, values = choices(np.arange(1, first_value)), choices(np.arange(first_value, self.num_tokens))
        gaps = choices(np.arange(len(self.gap_law)), self.gap_law)
        tokens, labels = self.arrange(keys, values, gaps)
        if self.random_non_queries:
            filler = np.random.default_rng(seed).integers(self.num_tokens, size=tokens.shape)
            tokens = np.where(tokens == 0, filler, tokens)
        return tokens, labels


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Examples in memory: `tokens` and `labels` int64 (examples, N)."""

    tokens: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Example:
        check_index(index, len(self))
        labels = self.labels[index]
        return sequence(self.tokens[index], labels, labels != IGNORED)
