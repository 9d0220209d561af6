"""What is minimised and measured of sequences, against plain numpy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.next_token import NextToken

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(3, 4, 5)).astype(np.float32)
TARGETS = np.array([[1, 2, 0, 4], [0, 0, 3, 3], [2, 2, 2, 2]], np.int32)
WEIGHTS = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 1]], np.float32)
ROWS = np.zeros((3, 4), np.int32)
BATCH = jax.tree.map(jnp.asarray, dict(tokens=ROWS, targets=TARGETS, weights=WEIGHTS, segments=ROWS + 1))
KEY = jax.random.key(0)


class Constant(nn.Module):
    """Says `LOGITS`, times a parameter; sows a loss, and counts its calls."""

    @nn.compact
    def __call__(self, tokens, segments=None, train=False):
        assert tokens.shape == (3, 4)
        scale = self.param("scale", nn.initializers.ones, ())
        calls = self.variable("calls", "count", jnp.zeros, (), jnp.int32)
        if train and not self.is_initializing():
            calls.value += 1
            self.sow("losses", "a", jnp.float32(0.25))
            self.sow("losses", "b", jnp.float32(0.5))
        return LOGITS * scale + (0 if segments is None else 1)


def nats():
    logits = LOGITS.astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logs, -np.take_along_axis(logs, TARGETS[..., None], -1)[..., 0]


@pytest.fixture(scope="module")
def variables():
    return Constant().init(KEY, BATCH["tokens"])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss(variables, smoothing):
    task = NextToken(label_smoothing=smoothing, state=("calls",))
    loss, (metrics, state) = task.loss(Constant(), variables, BATCH, KEY)
    logs, losses = nats()
    losses = (1 - smoothing) * losses - smoothing * logs.mean(-1)
    expected = losses[WEIGHTS > 0].mean()
    assert float(loss) == pytest.approx(expected + 0.75, rel=1e-6)
    assert float(metrics["auxiliary_loss"]) == 0.75 and float(metrics["loss"]) == float(loss)
    assert float(metrics["accuracy"]) == pytest.approx((LOGITS.argmax(-1) == TARGETS)[WEIGHTS > 0].mean())
    assert state == {"calls": {"count": 1}}


def test_documents_are_told_apart_only_where_there_are_several():
    inputs = {packed: set(NextToken(packed=packed).inputs(BATCH)) for packed in (True, False)}
    assert inputs == {True: {"tokens", "segments"}, False: {"tokens"}}


def test_metrics_of_a_set(variables):
    """Two batches, the last row of the second being padding; bytes are counted once."""
    task, totals = NextToken(), {}
    for mask in ([True] * 3, [True, True, False]):
        batch = BATCH | dict(mask=jnp.array(mask), bytes=jnp.array([7, 0, 4]))
        for name, value in task.evaluate(Constant(), variables, batch).items():
            totals[name] = totals.get(name, 0) + np.asarray(value).item()
    counted = np.concatenate([WEIGHTS > 0, (WEIGHTS > 0) & np.array([[1], [1], [0]], bool)])
    losses = np.tile(nats()[1], (2, 1))[counted]
    right = np.tile(LOGITS.argmax(-1) == TARGETS, (2, 1))
    rows = counted.any(-1)
    found = task.summarize(totals)
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-6)
    assert found["accuracy"] == right[counted].mean()
    assert found["accuracy_row"] == (right | ~counted).all(-1)[rows].mean()
    assert found["bits_per_byte"] == pytest.approx(losses.sum() / np.log(2) / (7 + 4 + 7), rel=1e-6)
    del totals["bytes"]
    assert task.summarize(totals)["bits_per_token"] == pytest.approx(losses.mean() / np.log(2), rel=1e-6)
