"""Causal linear attention: the noncausal form on every prefix, and what only the causal one takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.linear import LinearState, linear_attention
from tests.parity import REFERENCE, assert_near
from tests.reference.linear_operands import linear_operands

RECORD = np.load(REFERENCE / "linear_recurrences.npz")
OPERANDS = {name: jnp.asarray(x, jnp.float32) for name, x in linear_operands().items()}
JITTED = jax.jit(
    linear_attention, static_argnames=("feature_map", "epsilon", "causal", "form", "return_state", "return_weights")
)
ROWS = tuple(OPERANDS[name] for name in ("query", "key", "value"))


@pytest.mark.parametrize("epsilon", [1e-6, 0.3, None])
def test_a_token_gets_what_the_noncausal_form_gives_it_with_the_keys_so_far(epsilon):
    query, key, value = ROWS
    out, weights = JITTED(query, key, value, epsilon=epsilon, causal=True, return_weights=True)
    for t in (0, 33, 69):
        options = dict(epsilon=epsilon, return_weights=True)
        expected, row = JITTED(query[:, t : t + 1], key[:, : t + 1], value[:, : t + 1], **options)
        np.testing.assert_allclose(out[:, t : t + 1], expected, rtol=2e-5, atol=1e-5)
        np.testing.assert_allclose(weights[:, :, t : t + 1, : t + 1], row, rtol=2e-5, atol=1e-6)
    assert not np.triu(weights, 1).any()


def test_equals_the_published_recurrence():
    """Whose state counts no tokens: without an epsilon they do not matter."""
    query, key, value = ROWS
    first = LinearState(OPERANDS["state"], OPERANDS["key_sums"], jnp.full(2, 17.0))
    out, state = JITTED(
        abs(query),
        abs(key),
        value,
        feature_map="relu",
        epsilon=0.0,
        causal=True,
        initial_state=first,
        return_state=True,
    )
    assert_near(out, RECORD["normalised/out"], 1e-5, "output")
    assert_near(state.products, RECORD["normalised/state"], 1e-5, "products")
    assert_near(state.keys, RECORD["normalised/keys"], 1e-5, "keys")
    np.testing.assert_array_equal(state.tokens, [87, 87])


@pytest.mark.parametrize("form", ["chunk", "recurrent", "parallel"])
def test_a_feature_map_may_change_the_width(form):
    query, key, value = ROWS
    features = jnp.asarray(np.random.default_rng(0).standard_normal((8, 12)), jnp.float32)
    options = dict(causal=True, return_state=True, form=form)
    out, state = JITTED(query, key, value, feature_map=lambda x: jax.nn.relu(x @ features), **options)
    mapped = tuple(jax.nn.relu(x @ features) for x in (query, key))
    expected, _ = JITTED(*mapped, value, feature_map="identity", **options)
    assert state.products.shape == (2, 3, 12, 5) and state.keys.shape == (2, 3, 12)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_documents_have_counts_of_their_own():
    """Equal keys give the mean of the document's values so far, less what epsilon takes of it."""
    _, key, value = ROWS
    segments = jnp.asarray(np.repeat([[4, 9], [5, 5]], [20, 50], axis=1))
    ones = jnp.ones_like(key)
    first = LinearState(jnp.zeros((2, 3, 8, 5)), jnp.zeros((2, 3, 8)), jnp.asarray([0.0, 30.0]))
    options = dict(feature_map="identity", epsilon=2.0, causal=True, return_state=True)
    out, state = JITTED(ones, ones, value, segments=segments, initial_state=first, **options)
    lengths = np.concatenate((np.arange(1, 21), np.arange(1, 51)))
    sums = np.concatenate((np.cumsum(value[0, :20], 0), np.cumsum(value[0, 20:], 0)))
    np.testing.assert_allclose(out[0], 8 * sums / (10 * lengths)[:, None, None], rtol=1e-5, atol=1e-5)
    # Thirty tokens without keys are in the other row's mean.
    seen = np.arange(1, 71)
    expected = 8 * np.cumsum(value[1], 0) / (8 * seen + 2 * (seen + 30))[:, None, None]
    np.testing.assert_allclose(out[1], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(state.tokens, [50, 100])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(return_state=True, segments=(2, 5)), "return_state, segments need causal=True"),
        (dict(initial_state=((2, 3, 4, 4), (2, 3, 4), (2,))), "initial_state need causal=True"),
        (dict(causal=True, key=(2, 6, 3, 4), value=(2, 6, 3, 4)), "N = M; got 5 queries and 6 keys"),
        (dict(causal=True, form="scan"), "unknown form 'scan'; known: 'chunk', 'recurrent', 'parallel'"),
        (dict(causal=True, chunk_size=0), "chunk_size must be at least 1, got 0"),
        (dict(causal=True, segments=(2, 6)), r"segments must be \(B, N\), here \(2, 5\); got \(2, 6\)"),
        (
            dict(causal=True, initial_state=((2, 3, 4, 5), (2, 3, 4), (2,))),
            r"products being \(2, 3, 4, 4\) here; got \(2, 3, 4, 5\), \(2, 3, 4\), \(2,\)",
        ),
    ],
)
def test_names_what_is_wrong(options, words):
    shapes = dict(query=(2, 5, 3, 4), key=(2, 5, 3, 4), value=(2, 5, 3, 4)) | options
    if "initial_state" in shapes:
        shapes["initial_state"] = LinearState(*map(jnp.zeros, shapes["initial_state"]))
    if "segments" in shapes:
        shapes["segments"] = jnp.zeros(shapes["segments"], int)
    arguments = {n: jnp.zeros(x) if type(x) is tuple else x for n, x in shapes.items()}
    with pytest.raises(ValueError, match=words):
        linear_attention.__wrapped__(**arguments)
