"""Linear attention with decay: against other projects' code, its identities, its extremes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import decay
from kernels.cost import cost
from kernels.dispatch import record_choices
from kernels.gated_linear import gated_linear_attention
from tests.parity import REFERENCE, assert_near
from tests.recurrences import OPS
from tests.reference.linear_operands import HEADS, linear_operands

RECORD = np.load(REFERENCE / "linear_recurrences.npz")
OPERANDS = {name: jnp.asarray(x, jnp.float32) for name, x in linear_operands().items()}
RNG = np.random.default_rng(0)
# Not compiled as a whole, hundreds of small programs would be.
JITTED = jax.jit(
    gated_linear_attention, static_argnames=("scale", "form", "return_state", "return_weights", "implementation")
)


def stored(*names):
    return [OPERANDS[name] for name in names]


@pytest.mark.parametrize(
    ("name", "log_decay"), [("linear", None), ("simple_gla", OPERANDS["scalar"]), ("gla", OPERANDS["channel"])]
)
def test_equals_the_published_recurrences(name, log_decay):
    out, state = JITTED(*stored("query", "key", "value"), log_decay, initial_state=OPERANDS["state"], return_state=True)
    assert_near(out, RECORD[f"{name}/out"], 1e-5, name)
    assert_near(state, RECORD[f"{name}/state"], 1e-5, f"state of {name}")


def test_equals_the_published_fixed_decays():
    """RetNet's parallel form, and Lightning Attention's, which does not scale the queries."""
    retention = JITTED(*stored("query", "key", "value"), decay.retnet(HEADS))
    assert_near(retention, RECORD["retention/out"], 1e-5, "retention")
    slopes = jnp.asarray(RECORD[f"lightning/slopes{HEADS}"])
    lightning = JITTED(*stored("query", "key", "value"), -slopes, scale=1.0)
    assert_near(lightning, RECORD["lightning/out"], 1e-5, "lightning")


@pytest.mark.parametrize("sizes", [(3,), (2, 70, 3)], ids=["per head", "per token"])
def test_a_decay_that_is_the_same_for_all_is_the_same_decay(sizes):
    log_decay = jnp.asarray(-np.exp(RNG.normal(-1, 1, sizes)), jnp.float32)
    per_token = jnp.broadcast_to(log_decay, (2, 70, 3))
    per_channel = jnp.broadcast_to(per_token[..., None], (2, 70, 3, 8))
    outs = [JITTED(*stored("query", "key", "value"), g) for g in (log_decay, per_token, per_channel)]
    np.testing.assert_allclose(outs[1], outs[0], atol=1e-6)
    np.testing.assert_allclose(outs[2], outs[0], atol=5e-6)


def test_no_decay_is_a_decay_of_nothing():
    expected = JITTED(*stored("query", "key", "value"))
    for sizes in ((3,), (2, 70, 3), (2, 70, 3, 8)):
        out = JITTED(*stored("query", "key", "value"), jnp.zeros(sizes))
        np.testing.assert_allclose(out, expected, atol=2e-5)


def test_the_strongest_decay_leaves_the_token_itself():
    query, key, value = stored("query", "key", "value")
    for sizes in ((3,), (2, 70, 3), (2, 70, 3, 8)):
        out = JITTED(query, key, value, jnp.full(sizes, -jnp.inf), scale=1.0)
        np.testing.assert_allclose(out, (query * key).sum(-1, keepdims=True) * value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("log_decay", [None, "scalar", "channel"])
def test_weights(log_decay):
    gate = None if log_decay is None else OPERANDS[log_decay]
    query, key, value = stored("query", "key", "value")
    segments = jnp.asarray(np.repeat([[0, 1], [2, 3]], 35, axis=1))
    out, weights = JITTED(query, key, value, gate, segments=segments, return_weights=True)
    assert weights.shape == (2, 3, 70, 70) and weights.dtype == jnp.float32
    np.testing.assert_allclose(jnp.einsum("bhij,bjhe->bihe", weights, value), out, atol=2e-5)
    assert not np.triu(weights, 1).any() and not weights[:, :, 35:, :35].any()
    # After the output comes the state, then the weights, which leave out what came from the initial state.
    out, state, others = JITTED(
        query,
        key,
        value,
        gate,
        initial_state=OPERANDS["state"],
        segments=segments,
        return_state=True,
        return_weights=True,
    )
    np.testing.assert_array_equal(others, weights)
    assert state.shape == (2, 3, 8, 5)


def test_implementations():
    operands = stored("query", "key", "value")
    with record_choices() as choices:
        expected = gated_linear_attention(*operands)
    assert {choice.implementation for choice in choices} == {"xla"}
    np.testing.assert_array_equal(JITTED(*operands, implementation="xla"), expected)
    with pytest.raises(NotImplementedError, match="pallas_tpu: a head has D = 8 channels; the kernel takes multiples"):
        gated_linear_attention(*operands, implementation="pallas_tpu")


def test_flops_grow_with_the_tokens():
    def flops(tokens, form):
        operands = OPS["decay per channel"].operands(RNG, tokens, 16, 16, dtype=np.float32)
        return cost(lambda x: gated_linear_attention(**x, form=form), operands).flops

    assert flops(2048, "chunk") == pytest.approx(2 * flops(1024, "chunk"), rel=0.01)
    assert flops(2048, "parallel") > 3 * flops(1024, "parallel")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(form="chunks"), "unknown form 'chunks'; did you mean 'chunk'"),
        (dict(chunk_size=0), "chunk_size must be at least 1, got 0"),
        (dict(key=(2, 5, 3, 6)), r"key must be \(B, N, H, D\) as query, which is \(2, 5, 3, 4\); got \(2, 5, 3, 6\)"),
        (dict(value=(2, 6, 3, 4)), r"value must be \(B, N, H, E\).*\(2, 5, 3, 4\); got \(2, 6, 3, 4\)"),
        (dict(log_decay=(5,)), r"log_decay must be None, \(H,\).*\(3,\), \(2, 5, 3\) or \(2, 5, 3, 4\); got \(5,\)"),
        (dict(initial_state=(2, 3, 4, 5)), r"initial_state must be \(B, H, D, E\), here \(2, 3, 4, 4\); got"),
        (dict(segments=(5,)), r"segments must be \(B, N\), here \(2, 5\); got \(5,\)"),
    ],
)
def test_names_what_is_wrong(options, words):
    shapes = dict(query=(2, 5, 3, 4), key=(2, 5, 3, 4), value=(2, 5, 3, 4)) | options
    arguments = {name: jnp.zeros(x) if isinstance(x, tuple) else x for name, x in shapes.items()}
    with pytest.raises(ValueError, match=words):
        gated_linear_attention.__wrapped__(**arguments)
