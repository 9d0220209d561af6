"""Norm-aware linear attention against its equations in float64 numpy and against the published module."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.linear import LinearState, linear_attention
from kernels.norm_aware import norm_aware_linear_attention
from tests.parity import REFERENCE, assert_near
from tests.reference.linear_operands import linear_operands
from tests.reference.weights import pseudo_normal

RECORD = np.load(REFERENCE / "flow.npz")
BATCH, TOKENS, HEADS, CHANNELS, VALUES = 2, 11, 2, 4, 3
SEGMENTS = np.asarray([[5] * 3 + [2] * 8, [1] * 7 + [4] * 1 + [1] * 3])
OPTIONS = dict(power=2.0, tau=0.8, epsilon=0.05)
MAPS = ("sign_split", "cossin")
FORMS = ("chunk", "recurrent", "parallel")


def features(x, map, exponent, direction):
    """One vector's, channel by channel, with 0 to any power 0."""
    length = np.sqrt((x**2).sum())
    unit = np.asarray([c / length if length else 0.0 for c in x])
    base = unit if direction else x
    size = np.asarray([abs(c) ** exponent(length) if c else 0.0 for c in base])
    if map == "cossin":
        return np.stack((size * np.cos(unit), size * np.sin(unit)))
    return np.stack((size * (x > 0), size * (x < 0)))


def turned(halves, position):
    """Both halves, `(2, D)`, with channels i and i + D / 2 as the complex numbers that rotation takes them for."""
    if position is None:
        return halves
    count = halves.shape[-1] // 2
    angles = position * 10000.0 ** (-np.arange(count) / count)
    numbers = (halves[:, :count] + 1j * halves[:, count:]) * np.exp(1j * angles)
    return np.concatenate((numbers.real, numbers.imag), -1)


def loop(query, key, value, map, seen, positions=None, key_positions=None, power=3.0, tau=0.5, epsilon=1e-6):
    """Pair by pair; `seen[b, n]` are the keys that query n takes the means of."""
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    key_positions = positions if key_positions is None else key_positions
    for b, n, h in np.ndindex(query.shape[:3]):
        q = features(query[b, n, h], map, lambda norm: power * (tau + np.tanh(norm)), direction=True)
        at = turned(q, None if positions is None else positions[n])
        normalizer, total = 0.0, 0.0
        for m in seen[b][n]:
            k = features(key[b, m, h], map, lambda norm: power, direction=False)
            normalizer += (q * k).sum()
            total += (at * turned(k, None if positions is None else key_positions[m])).sum() * value[b, m, h]
        count = len(seen[b][n])
        out[b, n, h] = total / count / (normalizer / count + epsilon)
    return out


def everything(query, key):
    return [[range(key.shape[1])] * query.shape[1]] * len(query)


def so_far(segments):
    """Which tokens of its own document came up to each token."""
    documents = np.cumsum(np.diff(segments, axis=1, prepend=segments[:, :1]) != 0, axis=1)
    return [[[m for m in range(n + 1) if ids[m] == ids[n]] for n in range(len(ids))] for ids in documents]


def operands(seed, tokens=TOKENS, sources=None):
    rng = np.random.default_rng(seed)
    shapes = ((tokens, CHANNELS), (sources or tokens, CHANNELS), (sources or tokens, VALUES))
    query, key, value = (rng.standard_normal((BATCH, n, HEADS, d)) for n, d in shapes)
    # Short queries, whose maps are flat, beside long ones; and zeros of all kinds.
    query *= rng.uniform(0.1, 3, (*query.shape[:3], 1))
    query[0, 2] = query[1, 1, 0, 1] = key[1, 0] = key[0, 1, 1, 2:] = 0
    return query, key, value


@functools.cache
def jitted(**options):
    return jax.jit(functools.partial(norm_aware_linear_attention, **options))


@functools.cache
def causal(form, map="sign_split"):
    """Jitted, of operands, positions, initial state and segments to output and state."""

    @jax.jit
    def run(arrays, positions, state, segments):
        options = dict(causal=True, form=form, chunk_size=4, return_state=True, map=map, **OPTIONS)
        return norm_aware_linear_attention(*arrays, rotary=positions, initial_state=state, segments=segments, **options)

    return run


@functools.cache
def differentiated(form):
    """Results, and gradients of `sum(results * directions)` by operands and initial state."""

    @jax.jit
    def run(arrays, state, segments, directions):
        def objective(arrays, state):
            results = causal(form)(arrays, jnp.arange(TOKENS), state, segments)
            pairs = zip(jax.tree.leaves(results), jax.tree.leaves(directions), strict=True)
            return sum((x * direction).sum() for x, direction in pairs), results

        gradient, results = jax.grad(objective, (0, 1), has_aux=True)(arrays, state)
        return results, gradient

    return run


def earlier_state(rng):
    products = rng.standard_normal((BATCH, HEADS, 2 * CHANNELS, VALUES))
    return LinearState(products, rng.uniform(1, 3, products.shape[:3]), np.asarray([2.0, 3.0]))


def assert_close(actual, expected, tolerance=1e-11):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a), np.asarray(e)
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance * np.abs(e).max())


def grid_rotation(rows, columns, channels):
    """NaLaFormer's: the first half of the channels turns with the row, the second with the column."""
    frequencies = 10000.0 ** -np.linspace(0, 1, channels // 4)
    row, column = np.divmod(np.arange(rows * columns), columns)
    angles = np.concatenate((row[:, None] * frequencies, column[:, None] * frequencies), -1)
    cos, sin = (jnp.asarray(f(angles)[None, :, None], jnp.float32) for f in (np.cos, np.sin))

    def turn(x):
        first, second = x[..., ::2], x[..., 1::2]
        pairs = (first * cos - second * sin, second * cos + first * sin)
        return jnp.stack(pairs, -1).reshape(x.shape)

    return turn


def test_equals_the_published_module():
    query, key = (jnp.asarray(linear_operands()[name], jnp.float32) for name in ("query", "key"))
    value = jnp.asarray(pseudo_normal("norm_aware_value", key.shape), jnp.float32)
    out = norm_aware_linear_attention(query, key, value)
    assert out.dtype == jnp.float32
    assert_near(out, RECORD["norm_aware/plain"], 1e-5, "plain")
    turn = grid_rotation(7, 10, key.shape[-1])
    assert_near(norm_aware_linear_attention(query, key, value, rotary=turn), RECORD["norm_aware/rotated"], 1e-5, "grid")


@pytest.mark.parametrize("map", MAPS)
def test_noncausal_equals_its_equations(map):
    arrays = operands(0, 5, 8)
    positions, key_positions = np.arange(5) + 3, np.arange(8)
    seen = everything(*arrays[:2])
    with jax.enable_x64(True):
        assert_close(jitted(map=map)(*arrays), loop(*arrays, map, seen))
        out = jitted(map=map, **OPTIONS)(*arrays, rotary=positions, key_rotary=key_positions)
        assert_close(out, loop(*arrays, map, seen, positions, key_positions, **OPTIONS))


@pytest.mark.parametrize(("form", "map"), [(form, "sign_split") for form in FORMS] + [("chunk", "cossin")])
def test_causal_equals_its_equations(form, map):
    """With positions and documents: of every prefix what the noncausal form gives."""
    arrays, positions = operands(1), np.arange(TOKENS)
    with jax.enable_x64(True):
        out, state = causal(form, map)(arrays, positions, None, SEGMENTS)
    assert_close(out, loop(*arrays, map, so_far(SEGMENTS), positions, **OPTIONS))
    np.testing.assert_array_equal(state.tokens, [8, 3])


def test_without_rotation_it_is_linear_attention_of_its_features():
    arrays = operands(2)
    query, key = (np.zeros((*x.shape[:3], 2 * CHANNELS)) for x in arrays[:2])
    for index in np.ndindex(query.shape[:3]):
        query[index] = features(arrays[0][index], "sign_split", lambda x: 2 * (0.8 + np.tanh(x)), True).reshape(-1)
        key[index] = features(arrays[1][index], "sign_split", lambda x: 2.0, False).reshape(-1)
    with jax.enable_x64(True):
        state = jax.tree.map(jnp.asarray, earlier_state(np.random.default_rng(3)))
        options = dict(feature_map="identity", epsilon=0.05, causal=True, return_state=True)
        run = jax.jit(functools.partial(linear_attention, **options))
        expected = run(query, key, arrays[2], initial_state=state, segments=SEGMENTS)
        assert_close(causal("chunk")(arrays, None, state, SEGMENTS), expected)


def test_a_state_handed_over_and_steps_of_one_token_change_nothing():
    arrays, positions = operands(4), np.arange(TOKENS)
    with jax.enable_x64(True):
        expected = causal("chunk")(arrays, positions, None, None)
        out, state = causal("chunk")(tuple(x[:, :9] for x in arrays), positions[:9], None, None)
        outs = [out]
        for t in range(9, TOKENS):
            out, state = causal("chunk")(tuple(x[:, t : t + 1] for x in arrays), positions[t : t + 1], state, None)
            outs.append(out)
        assert_close((np.concatenate(outs, 1), state), expected)


def test_gradients_equal_finite_differences_and_each_other():
    arrays, rng = operands(5), np.random.default_rng(6)
    directions = [rng.standard_normal(x.shape) for x in arrays]
    # A query of zeros has no direction to be moved from; its gradient is what the documentation says.
    directions[0][0, 2] = 0
    weights = rng.standard_normal(arrays[2].shape)
    with jax.enable_x64(True):
        state = earlier_state(rng)
        nothing = jax.tree.map(np.zeros_like, state)
        by_array, by_state = differentiated("chunk")(arrays, state, SEGMENTS, (weights, nothing))[1]
        other = differentiated("recurrent")(arrays, state, SEGMENTS, (weights, nothing))[1]
        gradient, *_ = differentiated("chunk")(arrays, nothing, SEGMENTS, (weights, nothing))[1]
    assert_close(other, (by_array, by_state), 1e-10)
    assert any(x.any() for x in jax.tree.leaves(by_state))
    assert not gradient[0][0, 2].any() and not gradient[1][1, 0].any()

    def objective(step):
        moved = [x + step * d for x, d in zip(arrays, directions, strict=True)]
        out = loop(*moved, "sign_split", so_far(SEGMENTS), np.arange(TOKENS), **OPTIONS)
        return (out * weights).sum()

    slope = sum((np.asarray(g) * d).sum() for g, d in zip(gradient, directions, strict=True))
    np.testing.assert_allclose((objective(1e-6) - objective(-1e-6)) / 2e-6, slope, rtol=1e-5)


@pytest.mark.parametrize("map", MAPS)
def test_zeros_give_zeros_and_no_nan(map):
    """Queries, keys or both of nothing but zeros, in float32; also with exponents below 1, steepest at 0."""
    for power, tau in ((3.0, 0.5), (0.5, 0.1)):

        @jax.jit
        @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
        def run(*arrays, power=power, tau=tau):
            out = norm_aware_linear_attention(*arrays, map=map, power=power, tau=tau)
            return (out * jnp.arange(VALUES)).sum(), out

        query, key, value = (x.astype(np.float32) for x in operands(7))
        for q, k in ((query * 0, key), (query, key * 0), (query * 0, key * 0)):
            (_, out), gradient = run(q, k, value)
            assert not out.any() and all(np.isfinite(x).all() for x in gradient)
        (_, out), gradient = run(query, key, value)
        assert not out[0, 2].any() and out[0, 1].any() and all(np.isfinite(x).all() for x in gradient)


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_nothing_leaks_from_the_future_or_from_other_documents(form):
    now, rng = 8, np.random.default_rng(8)
    segments = np.where(np.arange(TOKENS) < 3, 1, 2) + np.zeros((BATCH, 1), int)
    arrays, other = operands(9), operands(10)
    changed = tuple(np.concatenate((x[:, :now], y[:, now:]), 1) for x, y in zip(arrays, other, strict=True))
    with jax.enable_x64(True):
        state = earlier_state(rng)
        weights = (np.zeros_like(arrays[2]), jax.tree.map(np.zeros_like, state))
        weights[0][:, 3:now] = 1
        (before, _), (by_array, by_state) = differentiated(form)(arrays, state, segments, weights)
        (after, _), _ = differentiated(form)(changed, state, segments, weights)
    assert (before[:, :now] == after[:, :now]).all() and (before[:, now:] != after[:, now:]).any()
    assert not any(leaf.any() for leaf in by_state)
    for leaf in by_array:
        assert leaf[:, 3:now].any() and not leaf[:, :3].any() and not leaf[:, now:].any()


def test_bfloat16_keeps_float32_inside():
    arrays = tuple(jnp.asarray(x, jnp.bfloat16) for x in operands(11))
    out, state = causal("chunk")(arrays, np.arange(TOKENS), None, None)
    assert out.dtype == jnp.bfloat16 and {x.dtype for x in state} == {jnp.dtype("float32")}
    exact = (np.asarray(x, np.float64) for x in arrays)
    expected = loop(*exact, "sign_split", so_far(np.zeros_like(SEGMENTS)), np.arange(TOKENS), **OPTIONS)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2**-8, atol=1e-5)


def test_errors_name_the_argument():
    query, key, value = (jnp.asarray(x, jnp.float32) for x in operands(0, 4, 5))
    with pytest.raises(ValueError, match="did you mean 'sign_split'"):
        norm_aware_linear_attention(query, key, value, map="sign-split")
    with pytest.raises(ValueError, match="causal=True is self-attention"):
        norm_aware_linear_attention(query, key, value, causal=True)
    with pytest.raises(ValueError, match="segments need causal=True"):
        norm_aware_linear_attention(query, key, value, segments=jnp.zeros((2, 4), int))
    with pytest.raises(ValueError, match="epsilon must be positive"):
        norm_aware_linear_attention(query, key, value, epsilon=0.0)
    with pytest.raises(ValueError, match="positions of the keys go into key_rotary"):
        norm_aware_linear_attention(query, key, value, rotary=jnp.arange(4))
    with pytest.raises(ValueError, match="key_rotary is given without rotary"):
        norm_aware_linear_attention(query, key, value, key_rotary=jnp.arange(5))
    with pytest.raises(ValueError, match="initial_state must have products"):
        state = jax.tree.map(lambda x: jnp.asarray(x[:1], jnp.float32), earlier_state(np.random.default_rng(0)))
        norm_aware_linear_attention(key, key, value, causal=True, initial_state=state)
