"""Tasks: losses against closed forms, and sums that padding does not touch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import tasks
from zoo.image_model import ImageModel


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


class TwoTables(nn.Module):
    """Two heads in training, their mean otherwise, as CARE has them."""

    classes: int
    join_losses = ImageModel.join_losses

    def __call__(self, images, train: bool = False):
        logits = images[:, 0, : 2 * self.classes, 0]
        heads = logits[:, : self.classes], logits[:, self.classes :]
        return heads if train else (heads[0] + heads[1]) / 2


def cross_entropy(logits, labels):
    return -log_softmax(logits)[np.arange(len(labels)), labels].mean()


def test_two_heads_share_the_loss():
    levels, logits = random_levels(5, 8)
    labels = np.arange(5) % 4
    prepared = task(4).prepare(batch_of(levels, labels), jax.random.key(0))
    loss, (metrics, _) = task(4).loss(TwoTables(4), {}, prepared, jax.random.key(0))
    expected = (cross_entropy(logits[:, :4], labels) + cross_entropy(logits[:, 4:], labels)) / 2
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    mean = (logits[:, :4] + logits[:, 4:]) / 2
    assert float(metrics["accuracy"]) == (mean.argmax(-1) == labels).mean(dtype=np.float32)


class Teacher(nn.Module):
    """Logits are a matrix times the first pixels."""

    @nn.compact
    def __call__(self, images, train: bool = False):
        return images[:, 0, :8, 0] @ self.param("matrix", nn.initializers.normal(), (8, 4))


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_teacher(kind):
    """The teacher sees the same mixed images on its own scale, and its variables are an argument of the step."""
    levels, logits = random_levels(5, 8)
    labels = np.arange(5) % 4
    matrix = np.random.default_rng(1).normal(size=(8, 4))
    distill = tasks.Distill(
        *(4, (128 / 255,), (50 / 255,)),
        teacher=Teacher(),
        teacher_variables={"params": {"matrix": jnp.asarray(matrix, jnp.float32)}},
        teacher_mean=(0.25,),
        teacher_std=(2.0,),
        kind=kind,
        alpha=0.3,
        temperature=2.0,
    )
    assert [leaf.shape for leaf in jax.tree.leaves(distill)] == [(8, 4)]

    @jax.jit
    def loss(distill, batch):
        prepared = distill.prepare(batch, jax.random.key(0))
        return distill.loss(TwoTables(4), {}, prepared, jax.random.key(0))[0]

    teacher = ((levels / 255 - 0.25) / 2) @ matrix
    if kind == "hard":
        asked = cross_entropy(logits[:, 4:], teacher.argmax(-1))
    else:
        wanted, found = log_softmax(teacher / 2), log_softmax(logits[:, 4:] / 2)
        asked = 4 * (np.exp(wanted) * (wanted - found)).sum(-1).mean()
    expected = 0.7 * cross_entropy(logits[:, :4], labels) + 0.3 * asked
    assert float(loss(distill, batch_of(levels, labels))) == pytest.approx(expected, rel=1e-5)
    constants = jax.make_jaxpr(loss)(distill, batch_of(levels, labels)).consts
    assert all(np.shape(constant) != (8, 4) for constant in constants)


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
