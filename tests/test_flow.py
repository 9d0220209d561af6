"""Flow-Attention against its equations in float64 numpy and against the published modules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.flow import FlowState, flow_attention
from kernels.residuals import residual_bytes
from tests.parity import REFERENCE, assert_near
from tests.reference.linear_operands import linear_operands

RECORD = np.load(REFERENCE / "flow.npz")
SEGMENTS = np.asarray([[7] * 3 + [3] * 6 + [7] * 1 + [0] * 5, [1] * 8 + [2] * 3 + [1] * 1 + [4] * 3])
BATCH, TOKENS, HEADS, CHANNELS, VALUES = *SEGMENTS.shape, 2, 3, 4
FORMS = ("chunk", "recurrent", "parallel")
# Flows are around 1: this clips about every other one, and it is no more the default than anything else here.
OPTIONS = dict(epsilon=0.02, clip=0.9)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def clipped(flow, clip):
    return flow if clip is None else np.clip(flow, -clip, clip)


def noncausal_loop(query, key, value, epsilon=1e-6, clip=1.0):
    """One sample and head after the other, `(N, D)`, `(M, D)` and `(M, E)`; flow by flow from the capacities."""
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    for sample, head in np.ndindex(query.shape[0], query.shape[2]):
        q, k, v = sigmoid(query[sample, :, head]), sigmoid(key[sample, :, head]), value[sample, :, head]
        incoming = [(x + epsilon) @ (k.sum(0) + epsilon) for x in q]
        outgoing = [(x + epsilon) @ (q.sum(0) + epsilon) for x in k]
        per_source = sum(x / flow for x, flow in zip(k, outgoing, strict=True))
        per_sink = sum(x / flow for x, flow in zip(q, incoming, strict=True))
        competing = [np.exp(clipped((x + epsilon) @ (per_sink + epsilon), clip)) for x in k]
        share = [len(k) * x / sum(competing) for x in competing]
        for n, x in enumerate(q):
            allocated = sigmoid((x + epsilon) @ (per_source + epsilon) * len(q) / len(k))
            taken = sum((x @ y) * s * z for y, s, z in zip(k, share, v, strict=True))
            out[sample, n, head] = allocated * taken / incoming[n]
    return out


def causal_step(state, query, key, value, epsilon, clip):
    """One token of all samples and heads, `(B, H, D)` and `(B, H, E)`."""
    q, k, tokens = sigmoid(query), sigmoid(key), state.tokens + 1
    n = tokens[:, None]
    keys, queries = state.keys + k, state.queries + q
    incoming = ((q + epsilon) * (keys + epsilon)).sum(-1)
    outgoing = ((k + epsilon) * (queries + epsilon)).sum(-1)
    conserved_keys = state.conserved_keys + k * (n / outgoing)[..., None]
    conserved_queries = state.conserved_queries + q * (n / incoming)[..., None]
    conserved_in = ((q + epsilon) * (conserved_keys + epsilon)).sum(-1) / n
    conserved_out = clipped(((k + epsilon) * (conserved_queries + epsilon)).sum(-1) / n, clip)
    competition = np.logaddexp(state.log_competition, conserved_out)
    weighed = value * (np.exp(conserved_out - competition) * n)[..., None]
    products = state.products + k[..., None] * weighed[..., None, :]
    out = np.einsum("bhd,bhde->bhe", q / incoming[..., None], products) * sigmoid(conserved_in)[..., None]
    return out, FlowState(products, keys, queries, conserved_keys, conserved_queries, competition, tokens)


def no_tokens(batch=BATCH):
    vector = np.zeros((batch, HEADS, CHANNELS))
    products = np.zeros((batch, HEADS, CHANNELS, VALUES))
    return FlowState(products, vector, vector, vector, vector, np.full((batch, HEADS), -np.inf), np.zeros(batch))


def causal_loop(query, key, value, state=None, epsilon=OPTIONS["epsilon"], clip=OPTIONS["clip"]):
    state, outs = no_tokens(len(query)) if state is None else state, []
    for t in range(query.shape[1]):
        out, state = causal_step(state, query[:, t], key[:, t], value[:, t], epsilon, clip)
        outs.append(out)
    return np.stack(outs, 1), state


def packed_loop(arrays, state, segments):
    """Every document by itself; outputs `(B, N, H, E)` and the states of the last ones."""
    outs, states = np.zeros_like(arrays[2]), []
    for row, ids in enumerate(segments):
        ends = [*np.flatnonzero(np.diff(ids)) + 1, len(ids)]
        for start, end in zip([0, *ends], ends):
            first = jax.tree.map(lambda x, row=row: x[row : row + 1], state) if start == 0 else None
            part, last = causal_loop(*(x[row : row + 1, start:end] for x in arrays), first)
            outs[row, start:end] = part[0]
        states.append(last)
    return outs, jax.tree.map(lambda *rows: np.concatenate(rows), *states)


def operands(seed, tokens=TOKENS, sources=None, size=2.0):
    rng = np.random.default_rng(seed)
    shapes = ((tokens, CHANNELS), (sources or tokens, CHANNELS), (sources or tokens, VALUES))
    return tuple(size * rng.standard_normal((BATCH, n, HEADS, d)) for n, d in shapes)


@functools.cache
def earlier_state():
    return causal_loop(*operands(99, 4))[1]


def assert_close(actual, expected, tolerance):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a), np.asarray(e)
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance * np.abs(e).max())


@functools.cache
def noncausal(**options):
    return jax.jit(functools.partial(flow_attention, **options))


@functools.cache
def causal(form="chunk", chunk_size=4):
    """Jitted, of operands, initial state and segments to output and state."""

    @jax.jit
    def run(arrays, state, segments):
        options = dict(causal=True, form=form, chunk_size=chunk_size, return_state=True, **OPTIONS)
        return flow_attention(*arrays, initial_state=state, segments=segments, **options)

    return run


@functools.cache
def differentiated(form):
    """Results, and gradients of `sum(results * directions)` by operands and initial state."""

    @jax.jit
    def run(arrays, state, segments, directions):
        def objective(arrays, state):
            results = causal(form)(arrays, state, segments)
            pairs = zip(jax.tree.leaves(results), jax.tree.leaves(directions), strict=True)
            return sum((x * direction).sum() for x, direction in pairs), results

        gradient, results = jax.grad(objective, (0, 1), has_aux=True)(arrays, state)
        return results, gradient

    return run


def directions_of(results, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape), results)


def test_equals_the_published_modules():
    query, key, value = (jnp.asarray(linear_operands()[name], jnp.float32) for name in ("query", "key", "value"))
    for name, sinks, options in (("self", 70, {}), ("cross", 40, {}), ("causal", 70, dict(causal=True))):
        out = noncausal(**options)(query[:, :sinks], key, value)
        assert out.dtype == jnp.float32
        assert_near(out, RECORD[f"flow/{name}"], 1e-5, name)


@pytest.mark.parametrize(("sinks", "sources"), [(6, 6), (4, 9), (9, 1)])
def test_noncausal_equals_its_equations(sinks, sources):
    arrays = operands(sinks, sinks, sources)
    with jax.enable_x64(True):
        for options in ({}, OPTIONS, dict(clip=None)):
            assert_close(noncausal(**options)(*arrays), noncausal_loop(*arrays, **options), 1e-12)


def test_masked_tokens_are_as_if_they_were_not_there():
    query, key, value = operands(1, 5, 7)
    query_mask, key_mask = np.arange(5) < [[5], [3]], np.arange(7) < [[4], [7]]

    def objective(query, key, value, masks):
        return (noncausal(**OPTIONS)(query, key, value, **masks) ** 2).sum()

    with jax.enable_x64(True):
        masks = dict(query_mask=jnp.asarray(query_mask), key_mask=jnp.asarray(key_mask))
        out = noncausal(**OPTIONS)(query, key, value, **masks)
        gradients = jax.jit(jax.grad(objective, (0, 1, 2)))(query, key, value, masks)
        nothing = dict(query_mask=jnp.zeros((2, 5), bool), key_mask=jnp.zeros((2, 7), bool))
        empty = noncausal(epsilon=0.0)(query, key, value, **nothing)
    for row, (sinks, sources) in enumerate(((5, 4), (3, 7))):
        alone = (query[row : row + 1, :sinks], key[row : row + 1, :sources], value[row : row + 1, :sources])
        assert_close(out[row, :sinks], noncausal_loop(*alone, **OPTIONS)[0], 1e-12)
    assert not out[1, 3:].any() and not empty.any()
    for gradient, mask in zip(gradients, (query_mask, key_mask, key_mask), strict=True):
        assert np.isfinite(gradient).all() and not gradient[~mask].any() and gradient[mask].any()


@pytest.mark.parametrize("form", FORMS)
def test_causal_equals_its_equations(form):
    arrays, state = operands(2), earlier_state()
    for segments in (np.zeros_like(SEGMENTS), SEGMENTS):
        with jax.enable_x64(True):
            actual = causal(form)(arrays, state, segments)
        assert_close(actual, packed_loop(arrays, state, segments), 1e-11)


def test_a_state_handed_over_and_steps_of_one_token_change_nothing():
    arrays = operands(3, 10)
    with jax.enable_x64(True):
        expected = causal_loop(*arrays)
        out, state = causal()(tuple(x[:, :7] for x in arrays), None, None)
        outs = [out]
        for t in range(7, 10):
            out, state = causal()(tuple(x[:, t : t + 1] for x in arrays), state, None)
            outs.append(out)
        assert_close((np.concatenate(outs, 1), state), expected, 1e-12)
        # The state before all tokens, spelled out.
        first = causal()(tuple(x[:, :1] for x in arrays), no_tokens(), None)
        assert_close(first, causal_loop(*(x[:, :1] for x in arrays)), 1e-12)


def test_gradients_equal_finite_differences_and_each_other():
    arrays, state = operands(4), earlier_state()
    direction = directions_of((arrays, state), 5)
    with jax.enable_x64(True):
        weights = directions_of(causal_loop(*arrays, state), 6)
        _, gradient = differentiated("chunk")(arrays, state, SEGMENTS, weights)
        _, other = differentiated("recurrent")(arrays, state, SEGMENTS, weights)
    gradient = [np.asarray(x) for x in jax.tree.leaves(gradient)]
    assert_close(other, gradient, 1e-10)

    def objective(step):
        moved, first = jax.tree.map(lambda x, d: x + step * d, (arrays, state), direction)
        results = packed_loop(moved, first, SEGMENTS)
        return sum((x * w).sum() for x, w in zip(jax.tree.leaves(results), jax.tree.leaves(weights), strict=True))

    slope = sum((g * d).sum() for g, d in zip(gradient, jax.tree.leaves(direction), strict=True))
    np.testing.assert_allclose((objective(1e-6) - objective(-1e-6)) / 2e-6, slope, rtol=1e-6)


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_nothing_leaks_from_the_future_or_from_other_documents(form):
    now, state, segments = 9, earlier_state(), np.where(np.arange(TOKENS) < 4, 1, 2) + np.zeros((BATCH, 1), int)
    arrays, other = operands(7), operands(8)
    changed = tuple(np.concatenate((x[:, :now], y[:, now:]), 1) for x, y in zip(arrays, other, strict=True))
    weights = jax.tree.map(np.zeros_like, causal_loop(*arrays, state))
    weights[0][:, 4:now] = 1
    with jax.enable_x64(True):
        (before, _), (by_array, by_state) = differentiated(form)(arrays, state, segments, weights)
        (after, _), _ = differentiated(form)(changed, state, segments, weights)
    assert (before[:, :now] == after[:, :now]).all() and (before[:, now:] != after[:, now:]).any()
    assert not any(leaf.any() for leaf in by_state)
    for leaf in by_array:
        assert leaf[:, 4:now].any() and not leaf[:, :4].any() and not leaf[:, now:].any()


def test_without_a_clip_no_flow_is_too_large():
    """Keys near nothing, then one of size 1: its flow is beyond what float32 has an exponential of."""
    query, key, value = (x.astype(np.float32) for x in operands(9, 8))
    key[:, :5] = -7
    expected, state = causal_loop(query, key, value, epsilon=1e-6, clip=None)
    assert state.log_competition.min() > 100

    @functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def run(*arrays):
        out = flow_attention(*arrays, causal=True, clip=None)
        return (out**2).sum(), out

    gradient, out = jax.jit(run)(query, key, value)
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-4)
    assert all(np.isfinite(x).all() for x in gradient)


def test_bfloat16_keeps_float32_inside():
    arrays = tuple(jnp.asarray(x, jnp.bfloat16) for x in operands(10))
    out, state = causal()(arrays, None, None)
    assert out.dtype == jnp.bfloat16 and {x.dtype for x in state} == {jnp.dtype("float32")}
    expected, last = causal_loop(*(np.asarray(x, np.float64) for x in arrays))
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2**-8, atol=1e-5)
    assert_close(state, last, 1e-5)


def test_no_state_per_token_is_kept():
    """A D x E matrix of every token would be 16 times the keys."""
    arrays = tuple(np.ones((1, n, 1, 16), np.float32) for n in (256,) * 3)
    kept = residual_bytes(lambda arrays: flow_attention(*arrays, causal=True, chunk_size=64), arrays)
    assert kept < 9 * sum(x.nbytes for x in arrays) < 256 * 16 * 16 * 4 * 2


def test_errors_name_the_argument():
    query, key, value = (jnp.asarray(x, jnp.float32) for x in operands(0, 3, 4))
    with pytest.raises(ValueError, match="causal=True is self-attention, N = M: how sources compete"):
        flow_attention(query, key, value, causal=True)
    with pytest.raises(ValueError, match="return_state need causal=True"):
        flow_attention(query, key, value, return_state=True)
    with pytest.raises(ValueError, match="key_mask need causal=False"):
        flow_attention(key, key, value, causal=True, key_mask=jnp.ones((2, 4), bool))
    with pytest.raises(ValueError, match="did you mean 'chunk'"):
        flow_attention(key, key, value, causal=True, form="chunks")
    with pytest.raises(ValueError, match="clip must be positive, or None"):
        flow_attention(query, key, value, clip=0.0)
    with pytest.raises(ValueError, match="initial_state must be a FlowState"):
        wrong = jax.tree.map(lambda x: jnp.asarray(x[:1], jnp.float32), no_tokens())
        flow_attention(key, key, value, causal=True, initial_state=wrong)
