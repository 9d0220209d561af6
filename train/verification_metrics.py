"""How well scores of pairs tell genuine pairs from impostors, with confidence intervals over people.

A pair is accepted where its score is at least the threshold. TAR is the share of genuine pairs that are accepted, FAR
that of impostors. The accuracy is that of as many genuine pairs as impostors.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from train.pairs import Pairs, cosine_scores, pair_lists

# Metric -> the FAR at which it is the TAR.
TARS = {"tar_at_far_1pct": 0.01, "tar_at_far_01pct": 0.001}
METRICS = ("accuracy", "auc", *TARS)
CONFIDENCE = 0.95
# Kind of pairs -> the kind of validation pairs that its threshold is chosen on: hard twins get that of all twins, since
# whoever uses a threshold does not know which twins are hard.
THRESHOLD_OF = {"general": "general", "twin": "twin", "hard_twin": "twin"}


@dataclasses.dataclass(frozen=True)
class Roc:
    """The operating points of all thresholds.

    Attributes:
        thresholds: (U + 1,) falling: infinity, then every score that occurs.
        far, tar: (U + 1,) at each of them, from 0 to 1.
    """

    thresholds: Float[np.ndarray, " U"]
    far: Float[np.ndarray, " U"]
    tar: Float[np.ndarray, " U"]

    def auc(self) -> float:
        """The area under the curve: how often a genuine pair scores higher than an impostor, ties counting half."""
        return float((np.diff(self.far) * (self.tar[1:] + self.tar[:-1])).sum() / 2)

    def tar_at(self, far: float) -> float:
        """The greatest TAR of a threshold whose FAR is at most `far`; nothing is interpolated."""
        # A share of counts may lie a rounding above the number that it is.
        return float(self.tar[np.flatnonzero(self.far <= far * (1 + 1e-9))[-1]])

    def best_threshold(self) -> float:
        """The threshold of the highest accuracy, half-way to the next score; of equally good ones the middle one."""
        accuracy = (self.tar + 1 - self.far) / 2
        best = np.flatnonzero(accuracy >= accuracy.max() - 1e-12)
        place = best[len(best) // 2]
        if 0 < place < len(self.thresholds) - 1:
            return float((self.thresholds[place] + self.thresholds[place + 1]) / 2)
        return float(self.thresholds[place])


class Ranking:
    """Scores in falling order, of which the curve is quick to have for many weightings of the pairs."""

    def __init__(self, scores: Float[np.ndarray, " P"], genuine: Bool[np.ndarray, " P"]):
        """Sorts.

        Raises:
            ValueError: if there is no genuine or no impostor pair, or a score is not finite.
        """
        if not genuine.any() or genuine.all():
            missing = "impostor" if genuine.all() else "genuine"
            raise ValueError(f"there is no {missing} pair among {len(scores)}: both kinds are needed")
        if not np.isfinite(scores).all():
            raise ValueError(f"{(~np.isfinite(scores)).sum()} of {len(scores)} scores are not finite")
        self.order = np.argsort(-scores, kind="stable")
        self._scores, self._genuine = scores[self.order], genuine[self.order]
        self._last = np.append(np.flatnonzero(np.diff(self._scores)), len(scores) - 1)

    def roc(self, weights: Float[np.ndarray, " P"] | None = None) -> Roc:
        """The curve, each pair counted `weights` times, which are in the order of the scores given; None: once."""
        counted = np.ones(len(self._scores)) if weights is None else weights[self.order]
        genuine = np.where(self._genuine, counted, 0).cumsum()
        impostors = (counted.cumsum() - genuine)[self._last]
        genuine = genuine[self._last]
        thresholds = np.append(np.inf, self._scores[self._last])
        return Roc(thresholds, np.append(0.0, impostors / impostors[-1]), np.append(0.0, genuine / genuine[-1]))


def accuracy(
    scores: Float[np.ndarray, " P"],
    genuine: Bool[np.ndarray, " P"],
    threshold: float,
    weights: Float[np.ndarray, " P"] | None = None,
) -> float:
    """The share of right answers where there are as many genuine pairs as impostors: (TAR + 1 - FAR) / 2."""
    weights = np.ones(len(scores)) if weights is None else weights
    right = np.where((scores >= threshold) == genuine, weights, 0)
    tar, tnr = (right[part].sum() / weights[part].sum() for part in (genuine, ~genuine))
    return float((tar + tnr) / 2)


def measure(
    scores: Float[np.ndarray, " P"], pairs: Pairs, threshold: float, *, replicates: int = 1000, seed: int = 0
) -> dict[str, float]:
    """The metrics of one kind of pairs, each with the ends of its interval, `NAME_low` and `NAME_high`.

    The intervals are percentiles of a bootstrap over people and not over pairs, which are far from independent: whole
    families are drawn with replacement, twins together. With n(f) the times that family f was drawn, a pair within it
    counts n(f) times, one of two families n(f) n(g) times. The threshold stays.

    Args:
        scores: of the pairs.
        pairs: the pairs.
        threshold: for the accuracy, chosen elsewhere.
        replicates: of the bootstrap; 0: no intervals.
        seed: of the bootstrap.

    Returns:
        `METRICS` by name, intervals that have no meaning (fewer than two families) left out; `genuine_pairs` and
        `impostor_pairs`.

    Source: for the bootstrap Bolle, Ratha and Pankanti, "Error analysis of pattern recognition systems: the subsets
    bootstrap", CVIU 93(1), 2004.
    """
    ranking = Ranking(scores, pairs.genuine)

    def all_of(weights):
        roc = ranking.roc(weights)
        tars = (roc.tar_at(far) for far in TARS.values())
        return accuracy(scores, pairs.genuine, threshold, weights), roc.auc(), *tars

    found = dict(zip(METRICS, all_of(None)))
    samples = [all_of(weights) for weights in _resampled(pairs, replicates, seed)]
    if samples:
        for name, low, high in zip(METRICS, *_interval(samples)):
            found |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    genuine = int(pairs.genuine.sum())
    return found | {"genuine_pairs": genuine, "impostor_pairs": len(pairs) - genuine}


def _resampled(pairs: Pairs, replicates: int, seed: int) -> Iterator[Float[np.ndarray, " P"]]:
    """How often each pair counts in the replicates of a bootstrap over families; none of fewer than two families."""
    names, families = np.unique(pairs.families, return_inverse=True)
    families = families.reshape(-1, 2)
    if not replicates or len(names) < 2:
        return
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=replicates)
    within = families[:, 0] == families[:, 1]
    for times in drawn.astype(np.float64):
        weights = times[families[:, 0]] * np.where(within, 1, times[families[:, 1]])
        if weights[pairs.genuine].any() and weights[~pairs.genuine].any():
            yield weights


def _interval(samples: Sequence[Any]) -> Float[np.ndarray, "2 ..."]:
    """The ends of the confidence interval."""
    return np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)


@dataclasses.dataclass(frozen=True)
class Scored:
    """The pairs of one kind with their scores, and the threshold that was chosen on validation pairs."""

    pairs: Pairs
    scores: Float[np.ndarray, " P"]
    threshold: float


def pairs_to_verify(
    labels: Int[np.ndarray, " N"],
    twins: Int[np.ndarray, " N"],
    hard: Bool[np.ndarray, " N"],
    validation: Bool[np.ndarray, " N"],
    *,
    max_impostors: int = 100_000,
    seed: int = 0,
) -> tuple[dict[str, Pairs], dict[str, Pairs]]:
    """The pairs of every kind among the images for validation, and among the others.

    Args:
        labels, twins, hard, validation, max_impostors, seed: as in `score`.

    Raises:
        ValueError: if there is no pair to score, or none to choose a kind's threshold on.
    """
    known, asked = (
        pair_lists(labels[part], twins[part], hard[part], max_impostors=max_impostors, seed=seed)
        for part in (validation, ~validation)
    )
    if not asked:
        raise ValueError(
            "no pairs to verify: there must be a person of two images, and either their twin or someone else"
        )
    for kind in asked:
        if THRESHOLD_OF[kind] not in known:
            raise ValueError(
                f"the validation part has no {THRESHOLD_OF[kind]} pairs to choose the threshold of {kind} pairs on; "
                "eval_split is two splits, such as 'validation+test', the first of which has people of two images each"
            )
    return known, asked


def score(
    embeddings: Float[np.ndarray, "N E"],
    labels: Int[np.ndarray, " N"],
    twins: Int[np.ndarray, " N"],
    hard: Bool[np.ndarray, " N"],
    validation: Bool[np.ndarray, " N"],
    *,
    max_impostors: int = 100_000,
    seed: int = 0,
) -> dict[str, Scored]:
    """The pairs of every kind among the images that are not for validation, scored.

    Args:
        embeddings: of the images.
        labels, twins, hard, max_impostors, seed: as in `train.pairs.pair_lists`.
        validation: the images on whose pairs thresholds are chosen; no one has images of both sorts.

    Raises:
        ValueError: if there is no pair to score, or none to choose a kind's threshold on.
    """

    known, asked = pairs_to_verify(labels, twins, hard, validation, max_impostors=max_impostors, seed=seed)
    thresholds = {}
    for kind, pairs in known.items():
        ranking = Ranking(cosine_scores(embeddings[validation], pairs), pairs.genuine)
        thresholds[kind] = ranking.roc().best_threshold()
    return {
        kind: Scored(pairs, cosine_scores(embeddings[~validation], pairs), thresholds[THRESHOLD_OF[kind]])
        for kind, pairs in asked.items()
    }


def summary(scored: Mapping[str, Scored], *, replicates: int = 1000, seed: int = 0) -> dict[str, float]:
    """`measure` of every kind, the names after that of the kind, as in `twin_accuracy`; and `twin_threshold`."""
    found = {}
    for kind, these in scored.items():
        values = measure(these.scores, these.pairs, these.threshold, replicates=replicates, seed=seed)
        found |= {f"{kind}_{name}": value for name, value in (values | {"threshold": these.threshold}).items()}
    return found


def contrast(
    ours: Sequence[Mapping[str, Scored]],
    theirs: Sequence[Mapping[str, Scored]],
    *,
    replicates: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """How much more accurate models are than others on the same pairs.

    The interval is that of `measure`'s bootstrap with both sides scored on the same families each time, so that what is
    hard for all counts for neither. The models stay: it says nothing of what other seeds of training would give.

    Args:
        ours, theirs: what `score` gives for the models of each side, such as those of several seeds; means are taken.
        replicates, seed: of the bootstrap.

    Returns:
        For every kind of pairs `difference` of the mean accuracies, from -1 to 1, and the ends of its interval, `low`
        and `high` (absent where there is none).

    Raises:
        ValueError: if the models were not scored on the same pairs.
    """
    found = {}
    for kind, first in ours[0].items():
        sides = [[scored[kind] for scored in side] for side in (ours, theirs)]
        if any(not _same(first.pairs, scored.pairs) for side in sides for scored in side):
            raise ValueError(f"the {kind} pairs of the models are not the same, so that they cannot be compared")

        def difference(weights, sides=sides):
            mean = (
                np.mean([accuracy(one.scores, one.pairs.genuine, one.threshold, weights) for one in side])
                for side in sides
            )
            return float(np.subtract(*mean))

        found[kind] = {"difference": difference(None)}
        samples = [difference(weights) for weights in _resampled(first.pairs, replicates, seed)]
        if samples:
            found[kind] |= dict(zip(("low", "high"), _interval(samples).tolist()))
    return found


def _same(pairs: Pairs, others: Pairs) -> bool:
    return np.array_equal(pairs.first, others.first) and np.array_equal(pairs.second, others.second)
