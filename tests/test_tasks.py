"""Tasks: losses against closed forms, and sums that padding does not touch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import tasks


class Table(nn.Module):
    """A model whose logits are the first pixels of the image, of which white stands for not a number."""

    classes: int

    def __call__(self, images, train: bool = False):
        logits = images[:, 0, : self.classes, 0]
        return jnp.where(logits > 2.5, jnp.nan, logits)


def task(classes: int, **options) -> tasks.Classify:
    """Grey level g becomes the logit (g - 128) / 50."""
    return tasks.Classify(classes, (128 / 255,), (50 / 255,), **options)


def batch_of(levels, labels, mask=None):
    images = np.zeros((len(levels), 1, 12, 1), np.uint8)
    images[:, 0, : levels.shape[1], 0] = levels
    batch = {"image": jnp.asarray(images), "label": jnp.asarray(labels, jnp.int32)}
    return batch if mask is None else {**batch, "mask": jnp.asarray(mask)}


def random_levels(*shape):
    """Grey levels, and the logits that they stand for."""
    levels = np.random.default_rng(0).integers(0, 250, shape)
    return levels, (levels - 128) / 50


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_with_smoothing(smoothing):
    levels, logits = random_levels(5, 7)
    labels = np.arange(5)
    classify = task(7, label_smoothing=smoothing)
    prepared = classify.prepare(batch_of(levels, labels), jax.random.key(0))
    loss, (metrics, _) = classify.loss(Table(7), {}, prepared, jax.random.key(0))
    own = -log_softmax(logits)[np.arange(5), labels]
    every = -log_softmax(logits).mean(-1)
    assert float(loss) == pytest.approx(((1 - smoothing) * own + smoothing * every).mean(), rel=1e-6)
    assert float(metrics["accuracy"]) == (logits.argmax(-1) == labels).mean(dtype=np.float32)


def test_mixed_targets_are_of_two_labels():
    levels, logits = random_levels(4, 6)
    classify = task(6, mixup=1.0)
    prepared = classify.prepare(batch_of(levels, [0, 1, 2, 3]), jax.random.key(5))
    targets = np.asarray(prepared["target"])
    np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-6)
    share = targets[0, 0]
    assert 0 < share < 1 and targets[0, 3] == pytest.approx(1 - share, rel=1e-5)
    mixed = share * logits + (1 - share) * logits[::-1]
    np.testing.assert_allclose(prepared["image"][:, 0, :6, 0], mixed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("classes", [3, 8])
def test_sums_of_evaluation(classes):
    levels, logits = random_levels(9, classes)
    labels = np.random.default_rng(1).integers(0, classes, 9)
    mask = np.arange(9) < 6
    sums = jax.device_get(task(classes).evaluate(Table(classes), {}, batch_of(levels, labels, mask)))
    rank = (logits > logits[np.arange(9), labels][:, None]).sum(-1)
    assert sums["count"] == 6
    assert sums["accuracy"] == (rank == 0)[mask].sum()
    assert sums["accuracy_top5"] == (rank < 5)[mask].sum()
    assert sums["loss"] == pytest.approx(-log_softmax(logits)[np.arange(9), labels][mask].sum(), rel=1e-5)


def test_padding_that_is_not_finite_does_not_spread():
    levels = np.asarray([[100, 200], [255, 255]])
    sums = task(2).evaluate(Table(2), {}, batch_of(levels, [1, 0], [True, False]))
    assert all(np.isfinite(value) for value in jax.device_get(sums).values())


def test_bfloat16_images_and_float32_losses():
    classify = task(4, dtype=jnp.bfloat16)
    batch = batch_of(np.eye(4), [0, 1, 2, 3], [True] * 4)
    prepared = classify.prepare(batch, jax.random.key(0))
    assert prepared["image"].dtype == jnp.bfloat16 and prepared["target"].dtype == jnp.float32
    assert classify.evaluate(Table(4), {}, batch)["loss"].dtype == jnp.float32
