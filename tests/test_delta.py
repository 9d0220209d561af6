"""The delta rule, with and without decay: against other projects' code, its identities, its extremes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.cost import cost
from kernels.delta import delta_rule
from kernels.dispatch import record_choices
from kernels.gated_linear import gated_linear_attention
from tests.parity import REFERENCE, assert_near
from tests.recurrences import OPS
from tests.reference.linear_operands import linear_operands

RECORD = np.load(REFERENCE / "linear_recurrences.npz")
OPERANDS = {name: jnp.asarray(x, jnp.float32) for name, x in linear_operands().items()}
WRITES = tuple(OPERANDS[name] for name in ("query", "unit_key", "value", "beta"))
RNG = np.random.default_rng(0)
JITTED = jax.jit(delta_rule, static_argnames=("scale", "return_state"))


@pytest.mark.parametrize("name", ["delta", "gated_delta"])
def test_equals_the_published_recurrences(name):
    log_decay = OPERANDS["scalar"] if name == "gated_delta" else None
    out, state = JITTED(*WRITES, log_decay, initial_state=OPERANDS["state"], return_state=True)
    assert_near(out, RECORD[f"{name}/out"], 1e-5, name)
    assert_near(state, RECORD[f"{name}/state"], 1e-5, f"state of {name}")


def test_no_decay_is_a_decay_of_nothing():
    out = JITTED(*WRITES, jnp.zeros((2, 70, 3)))
    np.testing.assert_allclose(out, JITTED(*WRITES), atol=2e-6)


def test_with_orthogonal_keys_there_is_nothing_to_correct():
    """Then it is linear attention of values times beta, decay included."""
    query, value, beta, scalar = (OPERANDS[name][:, :8] for name in ("query", "value", "beta", "scalar"))
    key = jnp.broadcast_to(jnp.eye(8)[:, None], query.shape)
    expected = jax.jit(gated_linear_attention)(query, key, beta[..., None] * value, scalar)
    np.testing.assert_allclose(JITTED(query, key, value, beta, scalar), expected, atol=1e-5)


def test_what_was_written_last_is_read_back():
    """With a beta of 1 and a unit key, the key recalls exactly its value, whatever came before."""
    _, key, value, _ = WRITES
    out = JITTED(key, key, value, jnp.ones((2, 70, 3)), OPERANDS["scalar"], scale=1.0)
    np.testing.assert_allclose(out, value, atol=1e-5)


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-4), ("float64", 1e-12)])
def test_twice_the_same_key_with_a_beta_of_two(float64, dtype, bound):
    """Equal keys make the worst system that unit keys can: every entry below the diagonal is beta."""
    op, tokens = OPS["delta"], 150
    arrays = op.operands(np.random.default_rng(1), tokens, 8, 8, dtype=dtype)
    arrays["key"] = np.ascontiguousarray(np.broadcast_to(arrays["key"][:, :1], arrays["key"].shape))
    arrays["beta"] = np.full_like(arrays["beta"], 2)
    out = jax.jit(op)({n: jnp.asarray(x) for n, x in arrays.items()})
    # In float32 LAPACK's substitution, in place of the inverse, is off by as much; either depends on seed and machine.
    assert_near(out, op.loop(arrays)[0], bound, "output")


def test_beta_is_not_clipped():
    query, key, value, beta = WRITES
    expected, _ = OPS["delta"].loop(dict(query=query, key=key, value=value, beta=beta - 1.5))
    assert_near(JITTED(query, key, value, beta - 1.5), expected, 1e-4, "negative strengths")


def test_implementations():
    with record_choices() as choices:
        expected = delta_rule(*WRITES)
    assert {choice.implementation for choice in choices} == {"xla"}
    np.testing.assert_array_equal(delta_rule(*WRITES, implementation="xla"), expected)
    with pytest.raises(NotImplementedError, match="pallas_gpu|not written for this op, which has xla"):
        delta_rule(*WRITES, implementation="pallas_gpu")


def test_flops_grow_with_the_tokens():
    def flops(tokens):
        operands = OPS["gated delta"].operands(RNG, tokens, 16, 16, dtype=np.float32)
        return cost(jax.grad(lambda x: delta_rule(**x).sum()), operands).flops

    assert flops(2048) == pytest.approx(2 * flops(1024), rel=0.01)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(form="recurent"), "unknown form 'recurent'; did you mean 'recurrent'"),
        (dict(chunk_size=-1), "chunk_size must be at least 1, got -1"),
        (dict(beta=(2, 5, 3, 1)), r"beta must be \(B, N, H\), here \(2, 5, 3\); got \(2, 5, 3, 1\)"),
        (dict(log_decay=(3,)), r"log_decay must be \(B, N, H\), here \(2, 5, 3\); got \(3,\)"),
        (dict(value=(2, 5, 2, 4)), r"value must be \(B, N, H, E\).*\(2, 5, 3, 4\); got \(2, 5, 2, 4\)"),
        (dict(initial_state=(2, 3, 4)), r"initial_state must be \(B, H, D, E\), here \(2, 3, 4, 4\); got \(2, 3, 4\)"),
    ],
)
def test_names_what_is_wrong(options, words):
    shapes = dict(query=(2, 5, 3, 4), key=(2, 5, 3, 4), value=(2, 5, 3, 4), beta=(2, 5, 3)) | options
    arguments = {name: jnp.zeros(x) if isinstance(x, tuple) else x for name, x in shapes.items()}
    with pytest.raises(ValueError, match=words):
        delta_rule.__wrapped__(**arguments)
