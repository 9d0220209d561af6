"""The distillation loss against closed forms in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.distill import distillation_loss

RNG = np.random.default_rng(0)
B, K = 5, 7
FIRST, SECOND, TEACHER = (RNG.standard_normal((B, K)) * 3 for _ in range(3))
TARGETS = RNG.dirichlet(np.ones(K), B)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def softmax(x):
    return np.exp(log_softmax(x))


def cross_entropy(targets, logits):
    return -(targets * log_softmax(logits)).sum(-1).mean()


def asked(kind, logits, temperature):
    """What the teacher's part of the loss is, by definition."""
    if kind == "hard":
        return cross_entropy(np.eye(K)[TEACHER.argmax(-1)], logits)
    wanted = softmax(TEACHER / temperature)
    ratio = np.log(wanted) - log_softmax(logits / temperature)
    return temperature**2 * (wanted * ratio).sum(-1).mean()


def f32(*arrays):
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


@pytest.mark.parametrize("two_heads", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(("kind", "temperature"), [("hard", 1.0), ("hard", 3.0), ("soft", 1.0), ("soft", 3.0)])
def test_closed_form(kind, temperature, alpha, two_heads):
    first, second, teacher, targets = f32(FIRST, SECOND, TEACHER, TARGETS)
    outputs = (first, second) if two_heads else first
    loss = distillation_loss(outputs, targets, teacher, kind=kind, alpha=alpha, temperature=temperature)
    taught = SECOND if two_heads else FIRST
    expected = (1 - alpha) * cross_entropy(TARGETS, FIRST) + alpha * asked(kind, taught, temperature)
    assert loss.shape == () and loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_the_defaults_are_the_recipe():
    first, second, teacher, targets = f32(FIRST, SECOND, TEACHER, TARGETS)
    loss = distillation_loss((first, second), targets, teacher)
    assert float(loss) == pytest.approx(0.5 * cross_entropy(TARGETS, FIRST) + 0.5 * asked("hard", SECOND, 1), rel=1e-5)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_each_head_learns_from_its_own_teacher_and_the_teacher_from_none(kind):
    arrays = f32(FIRST, SECOND, TEACHER)
    (targets,) = f32(TARGETS)

    def loss(first, second, teacher):
        return distillation_loss((first, second), targets, teacher, kind=kind, alpha=0.3, temperature=2.0)

    first, second, teacher = jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)
    np.testing.assert_allclose(first, 0.7 * (softmax(FIRST) - TARGETS) / B, atol=1e-6)
    if kind == "hard":
        expected = softmax(SECOND) - np.eye(K)[TEACHER.argmax(-1)]
    else:
        expected = 2 * (softmax(SECOND / 2) - softmax(TEACHER / 2))
    np.testing.assert_allclose(second, 0.3 * expected / B, atol=1e-6)
    assert not teacher.any()


def test_a_student_that_agrees_pays_nothing_for_the_soft_part():
    first, teacher, targets = f32(FIRST, TEACHER, TARGETS)
    loss = distillation_loss((first, teacher + 5), targets, teacher, kind="soft", alpha=1.0, temperature=4.0)
    assert abs(float(loss)) < 1e-5


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_large_logits_stay_finite(kind):
    first, second, teacher, targets = f32(FIRST * 1000, SECOND * 1000, TEACHER * 1000, TARGETS)
    loss = distillation_loss((first, second), targets, teacher, kind=kind)
    assert np.isfinite(float(loss))


def test_errors():
    first, targets = f32(FIRST, TARGETS)
    with pytest.raises(ValueError, match="kind must be 'hard' or 'soft', got 'sofd'"):
        distillation_loss.__wrapped__(first, targets, first, kind="sofd")
