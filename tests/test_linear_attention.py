"""Linear attention against the quadratic form in float64, its gradients, and what must not change it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import linear_attention
from kernels.dispatch import record_choices
from kernels.linear import FEATURE_MAPS

RNG = np.random.default_rng(0)

# Independent of the module's own: numpy, by definition.
PHI = {
    "elu1": lambda x: np.where(x > 0, x, np.expm1(x)) + 1,
    "relu": lambda x: np.maximum(x, 0),
    "identity": lambda x: x,
}


def operands(n=9, m=9, heads=3, d=4, e=4, batch=2, dtype=np.float32):
    shapes = ((batch, n, heads, d), (batch, m, heads, d), (batch, m, heads, e))
    return tuple(jnp.asarray(RNG.standard_normal(shape), dtype) for shape in shapes)


def quadratic(query, key, value, phi=PHI["elu1"], epsilon=1e-6):
    """Output and weights in float64, every weight written down: what query n takes from value m."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    query, key = phi(query), phi(key)
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    weights = np.zeros((query.shape[0], query.shape[2], query.shape[1], key.shape[1]))
    for b, h, n in np.ndindex(query.shape[0], query.shape[2], query.shape[1]):
        row = key[b, :, h] @ query[b, n, h]
        if epsilon is not None:
            row = row / len(row) / (row.mean() + epsilon)
        weights[b, h, n] = row
        out[b, n, h] = row @ value[b, :, h]
    return out, weights


@pytest.mark.parametrize("shape", [dict(), dict(n=5, m=11, e=7), dict(n=1, m=1, heads=1, d=1)], ids=str)
@pytest.mark.parametrize("name", PHI)
@pytest.mark.parametrize("epsilon", [1e-6, 0.3, None])
def test_equals_the_quadratic_form(shape, name, epsilon):
    query, key, value = operands(**shape)
    if name == "identity" and epsilon is not None:
        # Of either sign the sum of the weights comes near zero, where neither form means anything.
        query, key = abs(query), abs(key)
    expected, expected_weights = quadratic(query, key, value, PHI[name], epsilon)
    options = dict(feature_map=name, epsilon=epsilon)
    out = linear_attention(query, key, value, **options)
    same, weights = linear_attention(query, key, value, return_weights=True, **options)
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=5e-6)
    np.testing.assert_array_equal(same, out)
    np.testing.assert_allclose(weights, expected_weights, rtol=2e-5, atol=1e-6)
    assert weights.dtype == jnp.float32


def test_a_function_as_feature_map():
    query, key, value = operands()
    features = RNG.standard_normal((4, 6)).astype(np.float32)
    out = linear_attention(query, key, value, feature_map=lambda x: jax.nn.relu(x @ features))
    expected, _ = quadratic(query, key, value, lambda x: np.maximum(x @ features, 0))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_the_feature_map_keeps_its_digits_below_zero():
    x = np.float32([-80.0, -30.0, -1.0, -1e-4, 0.0, 1e-4, 2.0, 200.0])
    expected = np.exp(np.minimum(x.astype(np.float64), 0)) + np.maximum(x, 0)
    np.testing.assert_allclose(FEATURE_MAPS["elu1"](jnp.asarray(x)), expected, rtol=3e-7)
    slope = jax.vmap(jax.grad(FEATURE_MAPS["elu1"]))(jnp.asarray(x))
    np.testing.assert_allclose(slope, np.exp(np.minimum(x.astype(np.float64), 0)), rtol=3e-7)


@pytest.mark.parametrize("epsilon", [1e-6, None])
@pytest.mark.parametrize("name", ["elu1", "relu"])
def test_gradients_equal_those_of_the_quadratic_form(name, epsilon):
    with jax.enable_x64(True):
        query, key, value = operands(n=5, m=7, e=3, dtype=np.float64)
        direction = jnp.asarray(RNG.standard_normal((2, 5, 3, 3)))
        phi = {"elu1": lambda x: jax.nn.elu(x) + 1, "relu": jax.nn.relu}[name]

        def written_out(query, key, value):
            weights = jnp.einsum("bnhd,bmhd->bhnm", phi(query), phi(key))
            if epsilon is not None:
                weights = weights / 7 / (weights.mean(-1, keepdims=True) + epsilon)
            return (jnp.einsum("bhnm,bmhe->bnhe", weights, value) * direction).sum()

        def ours(query, key, value):
            out = linear_attention(query, key, value, feature_map=name, epsilon=epsilon)
            assert out.dtype == jnp.float64
            return (out * direction).sum()

        expected = jax.jit(jax.grad(written_out, (0, 1, 2)))(query, key, value)
        for actual, wanted in zip(jax.jit(jax.grad(ours, (0, 1, 2)))(query, key, value), expected):
            np.testing.assert_allclose(actual, wanted, rtol=1e-10, atol=1e-12)


def test_the_order_of_the_keys_does_not_matter_and_that_of_the_queries_is_kept():
    query, key, value = operands(n=6, m=8)
    out, weights = linear_attention(query, key, value, return_weights=True)
    keys, queries = RNG.permutation(8), RNG.permutation(6)
    shuffled, moved = linear_attention(query, key[:, keys], value[:, keys], return_weights=True)
    np.testing.assert_allclose(shuffled, out, atol=2e-6)
    np.testing.assert_allclose(moved, weights[..., keys], atol=1e-6)
    np.testing.assert_allclose(linear_attention(query[:, queries], key, value), out[:, queries], atol=1e-6)


def test_heads_and_samples_do_not_mix():
    query, key, value = operands()
    value = value.at[1, 2, 0, 1].set(jnp.nan)
    bad = jnp.isnan(linear_attention(query, key, value))
    assert bad[1, :, 0, 1].all() and bad.sum() == bad.shape[1]


def test_equal_keys_give_the_mean_of_the_values():
    query, key, value = operands()
    out = linear_attention(query, jnp.zeros_like(key), value)
    np.testing.assert_allclose(out, jnp.broadcast_to(value.mean(1, keepdims=True), out.shape), atol=1e-5)


def test_a_query_that_fits_no_key_gives_zero():
    query, key, value = operands()
    out, weights = linear_attention(-abs(query), key, value, feature_map="relu", return_weights=True)
    assert not out.any() and not weights.any()


def test_repeating_the_keys_changes_nothing():
    """Means, not sums: epsilon weighs the same however many keys there are."""
    query, key, value = operands()
    twice = linear_attention(query, jnp.tile(key, (1, 2, 1, 1)), jnp.tile(value, (1, 2, 1, 1)), epsilon=0.5)
    np.testing.assert_allclose(twice, linear_attention(query, key, value, epsilon=0.5), atol=1e-6)


def test_bfloat16_is_summed_in_float32():
    query, key, value = operands(n=300, m=3000, heads=2, d=16, e=16, batch=1, dtype=jnp.bfloat16)
    expected, _ = quadratic(*(x.astype(jnp.float32) for x in (query, key, value)))
    out, weights = linear_attention(query, key, value, return_weights=True)
    assert out.dtype == jnp.bfloat16 and weights.dtype == jnp.float32
    # One rounding to 8 bits at the end is all: the inputs are bfloat16 for the reference as well.
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2**-8, atol=1e-6)
    # A 16-bit sum of 3000 positive terms would stall at 256 times the largest of them.
    ones = jnp.ones((1, 3000, 1, 1), jnp.bfloat16)
    total = linear_attention(ones[:, :1], ones, ones, feature_map="identity", epsilon=None)
    assert float(total[0, 0, 0, 0]) == float(jnp.bfloat16(3000))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_values_far_from_zero(dtype):
    """No norm comes before CARE's attention: queries and keys may be large."""
    query, key, value = operands(m=200, dtype=dtype)
    query, key = query * 100, key * 100
    expected, _ = quadratic(*(x.astype(jnp.float32) for x in (query, key, value)))
    out = np.asarray(linear_attention(query, key, value), np.float64)
    np.testing.assert_allclose(out, expected, rtol=float(jnp.finfo(dtype).eps), atol=2e-6)


def test_implementations():
    query, key, value = operands()
    with record_choices() as choices:
        expected = linear_attention(query, key, value)
    assert {choice.implementation for choice in choices} == {"xla"}
    np.testing.assert_array_equal(linear_attention(query, key, value, implementation="xla"), expected)
    with pytest.raises(NotImplementedError, match="pallas_tpu: causal=False is two products"):
        linear_attention(query, key, value, implementation="pallas_tpu")


@pytest.mark.parametrize(
    ("shapes", "options", "error", "words"),
    [
        ("nnn", dict(feature_map="elu+1"), ValueError, "unknown feature_map 'elu.1'.*did you mean 'elu1'"),
        ("nnn", dict(feature_map="softmax"), ValueError, "known: 'elu1', 'relu', 'identity'"),
        ("nnn", dict(epsilon=-1e-6), ValueError, "epsilon must be at least 0, or None.*got -1e-06"),
        ("nnm", dict(), ValueError, r"value must be \(B, M, H, E\).*\(2, 9, 3, 4\); got \(2, 7, 3, 4\)"),
        ("nhh", dict(), ValueError, r"key must be \(B, M, H, D\).*\(2, 9, 3, 4\); got \(2, 9, 2, 4\)"),
    ],
)
def test_names_what_is_wrong(shapes, options, error, words):
    made = {"n": (2, 9, 3, 4), "m": (2, 7, 3, 4), "h": (2, 9, 2, 4)}
    with pytest.raises(error, match=words):
        linear_attention.__wrapped__(*(jnp.zeros(made[s]) for s in shapes), **options)
