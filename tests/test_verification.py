"""Pairs and what is measured of their scores, against loops over all pairs and scikit-learn."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from train import pairs as pairs_lib
from train import verification_metrics as metrics

# Two pairs of twins (0, 1) and (2, 3), of which the second is hard; 4 has no twin, the twin 9 of 5 no image.
LABELS = np.array([0, 2, 0, 1, 3, 4, 1, 5, 2, 0, 4, 3])
TWIN_OF = {0: 1, 1: 0, 2: 3, 3: 2, 4: -1, 5: 9}
TWINS = np.array([TWIN_OF[label] for label in LABELS])
HARD = np.isin(LABELS, (2, 3))


def by_loop():
    found = {kind: set() for kind in pairs_lib.KINDS}
    for a, b in itertools.combinations(range(len(LABELS)), 2):
        genuine, twins = LABELS[a] == LABELS[b], TWINS[a] == LABELS[b]
        if genuine or not twins:
            found["general"].add((a, b, genuine))
        if (genuine and LABELS[a] < 4) or twins:
            found["twin"].add((a, b, genuine))
            if HARD[a]:
                found["hard_twin"].add((a, b, genuine))
    return found


def as_set(found):
    rows = zip(np.minimum(found.first, found.second), np.maximum(found.first, found.second), found.genuine)
    return {(int(a), int(b), bool(genuine)) for a, b, genuine in rows}


def test_pair_lists():
    found, expected = pairs_lib.pair_lists(LABELS, TWINS, HARD), by_loop()
    assert {kind: as_set(pairs) for kind, pairs in found.items()} == expected
    assert all(len(found[kind]) == len(expected[kind]) for kind in expected)
    family = {0: 0, 1: 0, 2: 2, 3: 2, 4: 4, 5: 5}
    for pairs in found.values():
        for a, b, families in zip(pairs.first, pairs.second, pairs.families):
            assert families.tolist() == [family[LABELS[a]], family[LABELS[b]]]


def test_general_impostors_are_drawn_where_there_are_many():
    everything = as_set(pairs_lib.pair_lists(LABELS, TWINS, HARD)["general"])
    drawn = [pairs_lib.pair_lists(LABELS, TWINS, HARD, max_impostors=10, seed=seed)["general"] for seed in (0, 0, 1)]
    for pairs in drawn:
        assert as_set(pairs) <= everything and len(as_set(pairs)) == len(pairs)
        assert (~pairs.genuine).sum() == 10 and pairs.genuine.sum() == 7
    assert as_set(drawn[0]) == as_set(drawn[1]) != as_set(drawn[2])
    many = np.repeat(np.arange(900), 2)
    found = pairs_lib.pair_lists(many, np.full(1800, -1), np.zeros(1800, bool))["general"]
    assert len(as_set(found)) == len(found) == 900 + 100_000
    assert (many[found.first] == many[found.second]).sum() == 900


def test_kinds_without_pairs_are_absent():
    alone = np.arange(4)
    nobody = np.full(4, -1)
    assert not pairs_lib.pair_lists(alone, nobody, np.zeros(4, bool))
    assert not pairs_lib.pair_lists(np.zeros(4, int), nobody, np.zeros(4, bool))
    twins_only = pairs_lib.pair_lists(np.array([0, 0, 1]), np.array([1, 1, 0]), np.zeros(3, bool))
    assert set(twins_only) == {"twin"}
    with pytest.raises(ValueError, match="max_impostors=0: at least 1"):
        pairs_lib.pair_lists(LABELS, TWINS, HARD, max_impostors=0)


def test_cosine_scores():
    embeddings = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    embeddings[3] = 0
    pairs = pairs_lib.pair_lists(LABELS, TWINS, HARD)["general"]
    found = pairs_lib.cosine_scores(embeddings, pairs)
    for a, b, score in zip(pairs.first, pairs.second, found):
        x, y = embeddings[a].astype(np.float64), embeddings[b].astype(np.float64)
        expected = 0 if 3 in (a, b) else x @ y / np.sqrt((x @ x) * (y @ y))
        assert score == pytest.approx(expected, abs=1e-14)


def noisy(size=400, levels=None, seed=0):
    """Scores, with many ties where there are levels, and weights of which some are 0."""
    rng = np.random.default_rng(seed)
    genuine = rng.random(size) < 0.3
    scores = rng.normal(size=size) + genuine
    if levels:
        scores = np.round(scores * levels) / levels
    return scores, genuine, rng.integers(0, 4, size).astype(float)


@pytest.mark.parametrize("levels", [None, 2])
def test_auc_and_tars(levels):
    scores, genuine, weights = noisy(levels=levels)
    ranking = metrics.Ranking(scores, genuine)
    for counted in (None, weights):
        roc = ranking.roc(counted)
        times = np.ones(len(scores)) if counted is None else counted
        ours, theirs = scores[genuine][:, None], scores[~genuine]
        both = times[genuine][:, None] * times[~genuine]
        expected = (both * ((ours > theirs) + 0.5 * (ours == theirs))).sum() / both.sum()
        assert roc.auc() == pytest.approx(expected, abs=1e-12)
        assert roc.auc() == pytest.approx(roc_auc_score(genuine, scores, sample_weight=counted), abs=1e-12)
        for far in (0.0, 0.001, 0.01, 0.1, 0.5, 1.0):
            best = 0.0
            for threshold in np.append(scores, np.inf):
                accepted = np.where(scores >= threshold, times, 0)
                if accepted[~genuine].sum() <= far * times[~genuine].sum():
                    best = max(best, accepted[genuine].sum() / times[genuine].sum())
            assert roc.tar_at(far) == pytest.approx(best, abs=1e-12)


def test_an_exact_share_of_impostors_is_allowed():
    """Of 100 impostors one may be accepted at 1 %, none at 0.1 %."""
    scores = np.concatenate([np.arange(100) / 100, [0.985, 0.975, 0.995]])
    roc = metrics.Ranking(scores, np.arange(103) >= 100).roc()
    assert roc.tar_at(0.01) == pytest.approx(2 / 3) and roc.tar_at(0.001) == pytest.approx(1 / 3)
    assert roc.tar_at(0.02) == 1


@pytest.mark.parametrize("levels", [None, 2])
def test_threshold(levels):
    scores, genuine, _ = noisy(levels=levels)
    threshold = metrics.Ranking(scores, genuine).roc().best_threshold()
    rates = {t: ((scores[genuine] >= t).mean() + (scores[~genuine] < t).mean()) / 2 for t in [*scores, np.inf]}
    assert metrics.accuracy(scores, genuine, threshold) == pytest.approx(max(rates.values()), abs=1e-12)
    assert threshold not in scores
    apart = metrics.Ranking(np.array([0.1, 0.5, 0.9]), np.array([False, False, True])).roc()
    assert apart.best_threshold() == pytest.approx(0.7) and apart.auc() == 1


def test_ranking_errors():
    for genuine, missing in ((np.ones(3, bool), "impostor"), (np.zeros(3, bool), "genuine")):
        with pytest.raises(ValueError, match=f"there is no {missing} pair among 3"):
            metrics.Ranking(np.zeros(3), genuine)
    with pytest.raises(ValueError, match="1 of 3 scores are not finite"):
        metrics.Ranking(np.array([0, np.nan, 1]), np.array([True, False, True]))


def faces(people=40, images=4, seed=0):
    """Embeddings of twins that are near one another, in pairs 0 and 1, 2 and 3; every fourth pair is hard."""
    rng = np.random.default_rng(seed)
    family = np.repeat(rng.normal(size=(people // 2, 16)), 2, axis=0)
    person = family + 0.35 * rng.normal(size=family.shape)
    labels = np.repeat(np.arange(people), images)
    embeddings = person[labels] + 0.35 * rng.normal(size=(len(labels), 16))
    return embeddings.astype(np.float32), labels, labels ^ 1, labels // 2 % 4 == 0


def test_measure_is_about_families():
    """The interval is that of a bootstrap by hand, in which each drawn family is a new one."""
    embeddings, labels, twins, hard = faces(people=12)
    pairs = pairs_lib.pair_lists(labels, twins, hard)["general"]
    scores = pairs_lib.cosine_scores(embeddings, pairs)
    found = metrics.measure(scores, pairs, 0.5, replicates=40, seed=3)
    rng, aucs = np.random.Generator(np.random.PCG64(3)), []
    for times in rng.multinomial(6, np.full(6, 1 / 6), size=40):
        first, second = (times[pairs.families[:, side] // 2] for side in (0, 1))
        repeats = np.where(pairs.families[:, 0] == pairs.families[:, 1], first, first * second)
        chosen = np.repeat(np.arange(len(pairs)), repeats)
        aucs.append(roc_auc_score(pairs.genuine[chosen], scores[chosen]))
    low, high = np.quantile(aucs, [0.025, 0.975])
    assert found["auc_low"] == pytest.approx(low) and found["auc_high"] == pytest.approx(high)
    assert found["auc"] == pytest.approx(roc_auc_score(pairs.genuine, scores))
    assert found["genuine_pairs"] == 12 * 6 and found["impostor_pairs"] == 12 * 10 * 16 // 2
    for name in metrics.METRICS:
        assert 0 <= found[f"{name}_low"] <= found[name] <= found[f"{name}_high"] <= 1
    assert metrics.measure(scores, pairs, 0.5, replicates=40, seed=3) == found
    assert "auc_low" not in metrics.measure(scores, pairs, 0.5, replicates=0)


def test_one_family_has_no_interval():
    embeddings, labels, twins, hard = faces(people=2)
    pairs = pairs_lib.pair_lists(labels, twins, hard)["twin"]
    found = metrics.measure(pairs_lib.cosine_scores(embeddings, pairs), pairs, 0.5)
    assert set(found) == {*metrics.METRICS, "genuine_pairs", "impostor_pairs"}


def test_score_and_summary():
    """Thresholds come from the validation part alone, those of hard twins from all its twins."""
    embeddings, labels, twins, hard = faces()
    validation = labels < 16
    scored = metrics.score(embeddings, labels, twins, hard, validation)
    known = pairs_lib.pair_lists(labels[validation], twins[validation], hard[validation])
    for kind, other in metrics.THRESHOLD_OF.items():
        scores = pairs_lib.cosine_scores(embeddings[validation], known[other])
        expected = metrics.Ranking(scores, known[other].genuine).roc().best_threshold()
        assert scored[kind].threshold == expected
        own = scored[kind]
        assert len(own.scores) == len(own.pairs) and own.pairs.first.max() < (~validation).sum()
    found = metrics.summary(scored, replicates=20)
    for kind in pairs_lib.KINDS:
        own = scored[kind]
        right = metrics.accuracy(own.scores, own.pairs.genuine, own.threshold)
        assert found[f"{kind}_accuracy"] == right and found[f"{kind}_threshold"] == own.threshold
    assert found["general_accuracy"] > found["twin_accuracy"]
    changed = embeddings.copy()
    changed[~validation] = 0
    for kind, other in metrics.score(changed, labels, twins, hard, validation).items():
        assert other.threshold == scored[kind].threshold


def test_contrast_is_paired():
    """The difference of means over models, its interval from one bootstrap of the families for both sides."""
    embeddings, labels, twins, hard = faces(people=24)
    validation, rng = labels < 12, np.random.default_rng(5)
    blurred = [embeddings + level * rng.standard_normal(embeddings.shape) for level in (0.0, 0.3, 0.6, 0.9)]
    scored = [metrics.score(each, labels, twins, hard, validation) for each in blurred]
    found = metrics.contrast(scored[:2], scored[2:], replicates=30, seed=4)
    for kind, values in found.items():
        pairs = scored[0][kind].pairs

        def accuracy(one, weights, pairs=pairs):
            right = (one.scores >= one.threshold) == pairs.genuine
            return np.mean([np.average(right[side], weights=weights[side]) for side in (pairs.genuine, ~pairs.genuine)])

        def difference(weights, kind=kind):
            by_model = [accuracy(each[kind], weights) for each in scored]
            return np.mean(by_model[:2]) - np.mean(by_model[2:])

        assert values["difference"] == pytest.approx(difference(np.ones(len(pairs))))
        names, place = np.unique(pairs.families, return_inverse=True)
        place, samples = place.reshape(-1, 2), []
        if len(names) == 1:
            assert "low" not in values
            continue
        generator = np.random.Generator(np.random.PCG64(4))
        for times in generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=30):
            first, second = times[place[:, 0]], times[place[:, 1]]
            weights = np.where(place[:, 0] == place[:, 1], first, first * second)
            if weights[pairs.genuine].any() and weights[~pairs.genuine].any():
                samples.append(difference(weights))
        assert [values["low"], values["high"]] == pytest.approx(np.quantile(samples, [0.025, 0.975]).tolist())
    same = metrics.contrast(scored[:1], scored[:1], replicates=10)
    assert all(set(values.values()) == {0.0} for values in same.values())
    other = metrics.score(embeddings[::-1], labels[::-1], twins[::-1], hard[::-1], validation[::-1])
    with pytest.raises(ValueError, match="general pairs of the models are not the same"):
        metrics.contrast(scored[:1], [other])


def test_score_errors():
    embeddings, labels, twins, hard = faces()
    single = np.arange(len(labels)) % 4 == 0
    with pytest.raises(ValueError, match="no pairs to verify: there must be a person of two images"):
        metrics.score(embeddings[single], labels[single], twins[single], hard[single], labels[single] < 16)
    with pytest.raises(ValueError, match="the validation part has no general pairs to choose the threshold of"):
        metrics.score(embeddings, labels, twins, hard, np.zeros(len(labels), bool))
    with pytest.raises(ValueError, match="no pairs to verify"):
        metrics.score(embeddings, labels, twins, hard, np.ones(len(labels), bool))
