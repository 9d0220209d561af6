"""Which pairs of images a verification is asked about: general ones, those of twins, those of hard twins."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from train.generated import need

KINDS = ("general", "twin", "hard_twin")
# Rows of embeddings gathered at a time.
_BLOCK = 16384


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of images.

    Attributes:
        first, second: (P,) rows of the images.
        genuine: (P,) whether both show the same person.
        families: (P, 2) whose images they are, in families: twins are one family, everyone else is one alone.
    """

    first: Int[np.ndarray, " P"]
    second: Int[np.ndarray, " P"]
    genuine: Bool[np.ndarray, " P"]
    families: Int[np.ndarray, "P 2"]

    def __len__(self) -> int:
        return len(self.first)


def pair_lists(
    labels: Int[np.ndarray, " N"],
    twins: Int[np.ndarray, " N"],
    hard: Bool[np.ndarray, " N"],
    *,
    max_impostors: int = 100_000,
    seed: int = 0,
) -> dict[str, Pairs]:
    """The pairs of every kind that a set of images has.

    `general`: the genuine pairs of all people against pairs of people who are not twins of one another. `twin`: the
    genuine pairs of the people whose twin is in the set, against the pairs of these with their twins. `hard_twin`: of
    these the ones whose pair of twins is marked hard. A kind without a genuine or without an impostor pair is absent.

    Args:
        labels: the person on each image.
        twins: that person's twin, a label or -1. One who has no image here counts as none.
        hard: whether the twins are a hard pair.
        max_impostors: of general impostor pairs at most so many are taken, drawn at random; of all others every one.
        seed: of that draw.

    Raises:
        ValueError: for `max_impostors` below 1.
    """
    need(max_impostors >= 1, f"max_impostors={max_impostors}", "at least 1")
    known = np.unique(labels)
    twins = np.where(np.isin(twins, known), twins, -1)
    families = np.where(twins < 0, labels, np.minimum(labels, twins))
    rows = {label: np.flatnonzero(labels == label) for label in known.tolist()}
    genuine = {label: _among(mine) for label, mine in rows.items()}
    of_twins = {
        label: _between(mine, rows[int(twins[mine[0]])]) for label, mine in rows.items() if twins[mine[0]] > label
    }
    paired = [label for label, mine in rows.items() if twins[mine[0]] >= 0]
    hard_ones = {label for label, mine in rows.items() if hard[mine[0]]}
    kinds = {
        "general": (list(rows), _strangers(labels, twins, max_impostors, seed)),
        "twin": (paired, _joined([of_twins[label] for label in of_twins])),
        "hard_twin": (
            [label for label in paired if label in hard_ones],
            _joined([of_twins[label] for label in of_twins if label in hard_ones]),
        ),
    }
    found = {}
    for kind, (people, impostors) in kinds.items():
        own = _joined([genuine[label] for label in people])
        if own.shape[1] and impostors.shape[1]:
            first, second = np.concatenate([own, impostors], 1)
            is_genuine = np.arange(len(first)) < own.shape[1]
            found[kind] = Pairs(first, second, is_genuine, np.stack([families[first], families[second]], 1))
    return found


def cosine_scores(embeddings: Float[np.ndarray, "N E"], pairs: Pairs) -> Float[np.ndarray, " P"]:
    """The cosine of every pair's embeddings, in float64; 0 for an embedding of length 0."""
    embeddings = embeddings.astype(np.float64)
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    units = embeddings / np.where(lengths, lengths, 1)
    blocks = range(0, len(pairs), _BLOCK)
    parts = [slice(start, start + _BLOCK) for start in blocks]
    return np.concatenate([np.einsum("pe,pe->p", units[pairs.first[p]], units[pairs.second[p]]) for p in parts])


def _among(rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, "2 P"]:
    return rows[np.stack(np.triu_indices(len(rows), 1))]


def _between(rows: Int[np.ndarray, " n"], others: Int[np.ndarray, " m"]) -> Int[np.ndarray, "2 P"]:
    return np.stack([np.repeat(rows, len(others)), np.tile(others, len(rows))])


def _joined(pairs: list[np.ndarray]) -> Int[np.ndarray, "2 P"]:
    return np.concatenate([np.zeros((2, 0), np.int64), *pairs], 1)


def _strangers(
    labels: Int[np.ndarray, " N"], twins: Int[np.ndarray, " N"], at_most: int, seed: int
) -> Int[np.ndarray, "2 P"]:
    """Pairs of images of two people who are no twins."""
    total = len(labels) * (len(labels) - 1) // 2
    # Twice as many as wanted: those of one person and of twins go.
    size = min(2 * at_most, total)
    numbers = np.random.Generator(np.random.PCG64(seed)).choice(total, size, replace=False) if size else np.arange(0)
    # Number k is the pair (row, column) with column < row and k = row (row - 1) / 2 + column; the root may be off by 1.
    row = np.floor((1 + np.sqrt(1 + 8.0 * numbers)) / 2).astype(np.int64)
    row += row * (row + 1) // 2 <= numbers
    row -= row * (row - 1) // 2 > numbers
    column = numbers - row * (row - 1) // 2
    apart = (labels[row] != labels[column]) & (twins[row] != labels[column])
    return np.sort(np.stack([column, row])[:, apart][:, :at_most], axis=0)
