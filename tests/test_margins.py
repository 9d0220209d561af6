"""Losses with a margin against their formulas in plain numpy and angles, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import margins, triplets

RNG = np.random.default_rng(0)
ROWS, CLASSES, WIDTH = 9, 5, 7
EMBEDDINGS = jnp.asarray(RNG.normal(size=(ROWS, WIDTH)) * np.linspace(0.2, 30, ROWS)[:, None], jnp.float32)
WEIGHTS = jnp.asarray(RNG.normal(size=(WIDTH, CLASSES)), jnp.float32)
LABELS = jnp.arange(ROWS, dtype=jnp.int32) % CLASSES
# Every quarter of the circle, its ends, and one step of float32 beyond them.
ENDS = np.float32([-1, -1 - 2e-7, -0.95, -0.5, 0, 0.3, 0.99, 1, 1 + 2e-7])
STATISTICS = {"mean": jnp.float32(12), "std": jnp.float32(4)}


def cosines():
    e, w = np.asarray(EMBEDDINGS, np.float64), np.asarray(WEIGHTS, np.float64)
    return (e / np.linalg.norm(e, axis=1, keepdims=True)) @ (w / np.linalg.norm(w, axis=0))


def table(own):
    """Cosines in which the true class has those of `own`."""
    return jnp.asarray(cosines(), jnp.float32).at[jnp.arange(ROWS), LABELS].set(own)


def true_class(logits):
    """What a loss has made of the true class, once nothing else has changed."""
    logits = np.array(logits)
    own = logits[np.arange(ROWS), LABELS].copy()
    logits[np.arange(ROWS), LABELS] = 64 * ENDS
    np.testing.assert_array_equal(logits, 64 * table(ENDS))
    return own / 64


def angles(own):
    return np.arccos(np.clip(own.astype(np.float64), -1, 1))


def test_class_cosines():
    found = margins.class_cosines(EMBEDDINGS, WEIGHTS)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, cosines(), atol=3e-7)
    halves = margins.class_cosines(EMBEDDINGS.astype(jnp.bfloat16), WEIGHTS.astype(jnp.bfloat16))
    assert halves.dtype == jnp.float32
    zeros, gradient = jax.value_and_grad(lambda e: margins.class_cosines(e, WEIGHTS).sum())(0 * EMBEDDINGS)
    assert zeros == 0 and np.isfinite(gradient).all()


@pytest.mark.parametrize("margin", [0.2, 0.5, 1.5])
def test_arcface(margin):
    theta, c = angles(ENDS), ENDS.astype(np.float64)
    expected = np.where(theta < np.pi - margin, np.cos(theta + margin), c - margin * np.sin(margin))
    # The sine at the ends is the root of float32's step instead of 0.
    found = true_class(margins.arcface_logits(table(ENDS), LABELS, margin=margin))
    np.testing.assert_allclose(found, expected, atol=4e-4)
    np.testing.assert_allclose(found[2:7], expected[2:7], atol=3e-7)
    easy = true_class(margins.arcface_logits(table(ENDS), LABELS, margin=margin, easy_margin=True))
    np.testing.assert_allclose(easy, np.where(c > 0, np.cos(theta + margin), c), atol=4e-4)


def test_arcface_never_rises_with_the_angle():
    theta = np.linspace(0, np.pi, 181)
    own = jnp.asarray(np.cos(theta)[:, None], jnp.float32)
    logits = margins.arcface_logits(own, jnp.zeros(181, jnp.int32))[:, 0]
    assert (np.diff(logits) < 0).all()


def test_no_margin_is_the_softmax_of_scaled_cosines():
    expected, given = 64 * cosines(), jnp.asarray(cosines(), jnp.float32)
    assert np.abs(margins.arcface_logits(given, LABELS, margin=0.0) - expected).max() < 2e-5
    assert np.abs(margins.cosface_logits(given, LABELS, margin=0.0) - expected).max() < 2e-5
    norms = jnp.linspace(0, 100, ROWS)
    assert np.abs(margins.adaface_logits(given, LABELS, norms, STATISTICS, margin=0.0) - expected).max() < 2e-5
    logs = expected - np.log(np.exp(expected).sum(1, keepdims=True))
    loss = margins.margin_loss(jnp.asarray(expected, jnp.float32), LABELS)
    assert float(loss) == pytest.approx(-logs[np.arange(ROWS), LABELS].mean(), rel=1e-6)


def test_cosface():
    found = true_class(margins.cosface_logits(table(ENDS), LABELS))
    np.testing.assert_allclose(found, ENDS.astype(np.float64) - 0.35, atol=3e-7)


@pytest.mark.parametrize("norm", [0.0, 3.0, 11.0, 12.0, 15.0, 500.0])
def test_adaface(norm):
    quality = np.clip(0.333 * (np.clip(norm, 1e-3, 100) - 12) / (4 + 1e-3), -1, 1)
    expected = np.cos(np.clip(angles(ENDS) - 0.4 * quality, 0, np.pi)) - 0.4 * (1 + quality)
    norms = jnp.full(ROWS, norm)
    found = true_class(margins.adaface_logits(table(ENDS), LABELS, norms, STATISTICS))
    np.testing.assert_allclose(found, expected, atol=4e-4)
    np.testing.assert_allclose(found[2:7], expected[2:7], atol=5e-7)


def test_norm_statistics():
    norms, statistics = jnp.array([0.0, 3, 5, 900]), margins.first_norm_statistics()
    assert float(statistics["mean"]) == 20 and float(statistics["std"]) == 100
    clipped = np.array([1e-3, 3, 5, 100])
    for _ in range(2):
        previous = statistics
        statistics = margins.update_norm_statistics(statistics, norms, momentum=0.9)
        for name, value in (("mean", clipped.mean()), ("std", clipped.std(ddof=1))):
            assert float(statistics[name]) == pytest.approx(0.9 * float(previous[name]) + 0.1 * value, rel=1e-6)


@pytest.mark.parametrize("name", ["arcface", "easy", "cosface", "adaface"])
def test_gradients_are_finite_at_the_ends(name):
    norms = jnp.array([0.0, 1, 5, 9, 12, 15, 20, 100, 1000])

    @jax.jit
    @jax.value_and_grad
    def loss(cosines):
        if name == "adaface":
            return margins.margin_loss(margins.adaface_logits(cosines, LABELS, norms, STATISTICS), LABELS)
        if name == "cosface":
            return margins.margin_loss(margins.cosface_logits(cosines, LABELS), LABELS)
        logits = margins.arcface_logits(cosines, LABELS, easy_margin=name == "easy")
        return margins.margin_loss(logits, LABELS)

    value, gradient = loss(table(ENDS))
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_an_embedding_on_its_class_has_a_finite_gradient():
    on = WEIGHTS.T[LABELS]

    def loss(embeddings):
        return margins.margin_loss(margins.arcface_logits(margins.class_cosines(embeddings, WEIGHTS), LABELS), LABELS)

    for embeddings in (on, -on):
        assert np.isfinite(jax.grad(loss)(embeddings)).all()


def test_errors_of_margins():
    with pytest.raises(ValueError, match="margin=2.0: from 0 to pi / 2"):
        margins.arcface_logits(table(ENDS), LABELS, margin=2.0)
    with pytest.raises(ValueError, match="margin=-0.1: from 0 to 2"):
        margins.cosface_logits(table(ENDS), LABELS, margin=-0.1)
    with pytest.raises(ValueError, match="concentration=-1.0: at least 0"):
        margins.adaface_logits(table(ENDS), LABELS, jnp.asarray(ENDS), STATISTICS, concentration=-1.0)


# Persons 0 and 1 are twins of 3 and 2 images; 2 is one whose twin 7 is not there; 3 has one image and no twin.
PEOPLE = jnp.array([0, 1, 2, 0, 2, 1, 0, 3])
TWINS = jnp.array([1, 0, 7, 1, 7, 0, 1, -1])


def test_twin_rows():
    index, present = jax.jit(triplets.twin_rows)(PEOPLE, TWINS)
    np.testing.assert_array_equal(present, [True, True, False, True, False, True, True, False])
    np.testing.assert_array_equal(index, [1, 0, 2, 5, 4, 3, 1, 7])


def hardest(embeddings, margin, negative):
    """The loss and the share of anchors in it, by loops in float64."""
    units = np.asarray(embeddings, np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    losses = []
    for a, person in enumerate(PEOPLE):
        distances = 1 - units @ units[a]
        positives = [distances[i] for i, other in enumerate(PEOPLE) if other == person and i != a]
        others = [i for i, other in enumerate(PEOPLE) if other != person]
        twins = [i for i in others if PEOPLE[i] == TWINS[a]]
        others = twins if twins and negative == "twin" else others
        if positives:
            losses.append(max(0, max(positives) - min(distances[i] for i in others) + margin))
    return np.mean(losses), np.mean(np.array(losses) > 0)


@pytest.mark.parametrize("negative", triplets.NEGATIVES)
def test_batch_hard_triplet(negative):
    embeddings = jnp.asarray(np.random.default_rng(3).normal(size=(8, 4)), jnp.float32)
    positives, negatives = triplets.triplet_masks(PEOPLE, TWINS, negative)
    found = triplets.batch_hard_triplet(embeddings, positives, negatives, margin=0.2)
    np.testing.assert_allclose(found, hardest(embeddings, 0.2, negative), rtol=1e-5)


@pytest.mark.parametrize("people", [[0, 1, 2, 3], [5, 5, 5, 5]])
def test_a_batch_without_triplets_has_no_loss(people):
    """One image each, or one person alone."""
    masks = triplets.triplet_masks(jnp.array(people), jnp.full(4, -1))
    embeddings = jnp.ones((4, 3))
    (loss, share), gradient = jax.value_and_grad(triplets.batch_hard_triplet, has_aux=True)(embeddings, *masks)
    assert loss == 0 and share == 0
    np.testing.assert_array_equal(gradient, 0)


def test_equal_embeddings_have_a_finite_gradient():
    masks = triplets.triplet_masks(PEOPLE, TWINS)
    for embeddings in (jnp.ones((8, 3)), jnp.zeros((8, 3))):
        (loss, share), gradient = jax.value_and_grad(triplets.batch_hard_triplet, has_aux=True)(embeddings, *masks)
        assert float(loss) == pytest.approx(0.5) and float(share) == 1 and np.isfinite(gradient).all()


def test_errors_of_triplets():
    with pytest.raises(ValueError, match="unknown negative 'twins'; did you mean 'twin'"):
        triplets.triplet_masks(PEOPLE, TWINS, "twins")
