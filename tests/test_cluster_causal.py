"""Routing attention with causal memberships: loops in float64, no leak of the future, one token at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.cluster import causal as cluster_causal
from kernels.cluster import routing_attention
from kernels.cluster.members import hash_projections
from kernels.cluster.step import init_routing_state, routing_state, routing_step
from tests.reference import cluster as reference
from tests.reference.weights import pseudo_normal

B, N, H, D, E, K, W = 2, 27, 2, 5, 4, 3, 5
MEMBERSHIPS = ("prefix", "nearest")


@pytest.fixture(autouse=True)
def several_blocks(float64, monkeypatch):
    """In 64 bits; the last block is not full."""
    monkeypatch.setattr(cluster_causal, "PREFIX_ROWS", 8)


def normal(name, *shape):
    return pseudo_normal(name, shape)


@functools.cache
def program(**options):
    return jax.jit(functools.partial(routing_attention, **options))


CASES = {
    "official": dict(),
    "tables": dict(reach=2),
    "tables that reach far": dict(reach=9, style="lucidrains"),
    "mask": dict(masked=True, style="lucidrains", reach=2),
    "segments": dict(segmented=True, masked=True, reach=2),
    "hash": dict(assignment="hash"),
    "one": dict(window=1, assignment="hash"),
    "all": dict(window=40, scale=0.5),
}


def case(name):
    """Operands by their name, and the arguments that are no arrays."""
    options = dict(window=W) | CASES[name]
    masked, segmented, reach = (options.pop(x, None) for x in ("masked", "segmented", "reach"))
    arrays = dict(query=normal("query", B, N, H, D), key=None, value=normal("value", B, N, H, E))
    arrays["means"] = normal("means", H, K, D)
    if options.get("assignment") == "hash":
        arrays["means"] = np.float64(hash_projections(jax.random.key(0), H, 4, D))
    if reach is not None:
        arrays["relative_key"] = normal("relative_key", 2 * reach + 1, D)
        arrays["relative_value"] = normal("relative_value", 2 * reach + 1, E)
    if masked:
        arrays["key_mask"] = normal("mask", B, N) > -0.7
    if segmented:
        arrays["segments"] = np.array([[5] * 9 + [2] * 6 + [5] * 12, [0] * 26 + [1]])
    return arrays, options


@pytest.mark.parametrize("membership", MEMBERSHIPS)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_loops(name, membership):
    arrays, options = case(name)
    out, weights = program(membership=membership, return_weights=True, **options)(**arrays)
    expected, expected_weights = reference.routing(**arrays, membership=membership, **options)
    np.testing.assert_allclose(out, expected, atol=1e-11)
    np.testing.assert_allclose(weights, expected_weights, atol=1e-12)


@pytest.mark.parametrize("membership", MEMBERSHIPS)
def test_gradients_equal_differences_of_the_loops(membership):
    arrays, options = case("segments")
    options["membership"] = membership
    direction = normal("direction", B, N, H, E)
    moving = {name: x for name, x in arrays.items() if x is not None and x.dtype == np.float64}

    def objective(moving, arrays):
        return (routing_attention(**{**arrays, **moving}, **options) * direction).sum()

    for name, gradient in jax.jit(jax.grad(objective))(moving, arrays).items():
        step = 1e-6 * normal("step", *gradient.shape)
        ends = [reference.routing(**{**arrays, name: arrays[name] + s * step}, **options)[0] for s in (1, -1)]
        difference = ((ends[0] - ends[1]) / 2 * direction).sum()
        np.testing.assert_allclose((gradient * step).sum(), difference, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("membership", MEMBERSHIPS)
def test_nothing_leaks_from_the_future(membership):
    """Outputs bit for bit, and the gradients of early outputs with respect to late inputs."""
    arrays, options = case("tables")

    def early(tokens, others):
        out = routing_attention(**tokens, **others, membership=membership, **options)
        return (out[:, :8] ** 2).sum(), out

    run = jax.jit(jax.grad(early, has_aux=True))
    tokens = {name: arrays.pop(name) for name in ("query", "value")}
    gradients, out = run(tokens, arrays)
    for gradient in gradients.values():
        assert not gradient[:, 8:].any() and gradient[:, :8].any()
    for start in (1, 8, 20):
        moved = {name: x.copy() for name, x in tokens.items()}
        moved["query"][:, start:] *= -3
        moved["value"][:, start:] += 100
        _, after = run(moved, arrays)
        np.testing.assert_array_equal(after[:, :start], out[:, :start])
        assert (after[:, start:] != out[:, start:]).any()


@pytest.mark.parametrize("name", ["tables", "mask", "one"])
@pytest.mark.parametrize("membership", MEMBERSHIPS)
def test_token_by_token_equals_all_at_once(membership, name):
    arrays, options = case(name)
    expected = program(membership=membership, **options)(**arrays)
    window = options.pop("window")
    clusters = 4 if options.get("assignment") == "hash" else K
    empty = init_routing_state(B, H, clusters, window, D, E, membership=membership, dtype=jnp.float64)
    mask = arrays.pop("key_mask", np.ones((B, N), bool))
    tables = {name: x for name, x in arrays.items() if name.startswith("relative")}
    # The state also holds what it is after a prompt, all tokens of it at once.
    named = {x: options[x] for x in ("style", "assignment") if x in options}

    @jax.jit
    def run(query, value, means, mask, tables):
        def step(state, token):
            query, value, mask = (x[:, None] for x in token)
            out, state = routing_step(query, value, means, state, key_mask=mask, **tables, **options)
            return state, (out[:, 0], state)

        _, (out, states) = jax.lax.scan(step, empty, [x.swapaxes(0, 1) for x in (query, value, mask)])
        prompts = {
            n: routing_state(
                query[:, :n], value[:, :n], means, window=window, membership=membership, key_mask=mask[:, :n], **named
            )
            for n in (3, N)
        }
        return out.swapaxes(0, 1), states, prompts

    out, states, prompts = run(arrays["query"], arrays["value"], arrays["means"], mask, tables)
    np.testing.assert_allclose(out, expected, atol=1e-10)
    for n, prompt in prompts.items():
        for mine, after in zip(jax.tree.leaves(prompt), jax.tree.leaves(states), strict=True):
            np.testing.assert_allclose(mine, after[n - 1], atol=1e-12)


def test_equal_tokens_are_equal_however_many_are_computed_at_once():
    """A token that comes again differs in the last digits, by how many rows the products before had."""
    dim, tokens = 64, 96
    rows = normal("repeated", 1, 5, H, dim)[:, np.arange(tokens) * 7 % 5]
    value, means = normal("value32", 1, tokens, H, E), normal("means32", H, K, dim)
    rows, value, means = (jnp.asarray(x, jnp.float32) for x in (rows, value, means))
    rounded = rows * (1 + 1e-7 * jnp.asarray(normal("rounding", 1, tokens, H, dim), jnp.float32))
    assert (rounded != rows).any()
    expected = routing_attention(rounded, None, value, means, window=8, membership="prefix")

    @jax.jit
    def run(rows, value):
        def step(state, token):
            out, state = routing_step(token[0][:, None], token[1][:, None], means, state)
            return state, out[:, 0]

        empty = init_routing_state(1, H, K, 8, dim, E, membership="prefix", dtype=jnp.float32)
        return jax.lax.scan(step, empty, (rows.swapaxes(0, 1), value.swapaxes(0, 1)))[1].swapaxes(0, 1)

    # Rounding is 1e-5 and depends on the machine; another member of a cluster would be 0.1.
    np.testing.assert_allclose(run(rows, value), expected, atol=1e-4)


@pytest.mark.parametrize("membership", MEMBERSHIPS)
def test_equal_scores_take_the_first(membership):
    """Tokens that all fit alike: the first ones stay for "prefix", the last ones for "nearest"."""
    value = np.eye(6)[None, :, None]
    query, means = np.ones((1, 6, 1, 4)) * [1.0, 2.0, 3.0, 4.0], np.ones((1, 2, 4))
    run = program(membership=membership, window=3, return_weights=True, return_membership=True)
    _, weights, members = run(query, None, value, means)
    seen = (np.asarray(weights[0, 0]) > 0).astype(int)
    if membership == "prefix":
        assert seen.tolist() == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]] + [[0] * 6] * 3
        assert members[0, 0].tolist() == [[True, True]] * 3 + [[False, False]] * 3
    else:
        assert seen.tolist() == [[int(t - 3 < j <= t) for j in range(6)] for t in range(6)]
        assert members.tolist() == [[[0] * 6]]
    state = init_routing_state(1, 1, 2, 3, 4, 6, membership=membership, dtype=jnp.float64)
    step = jax.jit(routing_step)
    for t in range(6):
        out, state = step(query[:, t : t + 1], value[:, t : t + 1], means, state)
        np.testing.assert_allclose(out[0, 0, 0], weights[0, 0, t], atol=1e-15)


def test_prefix_with_room_for_all_is_the_published_membership():
    arrays, _ = case("tables")
    published = program(window=N)(**arrays)
    np.testing.assert_allclose(program(window=N, membership="prefix")(**arrays), published, atol=1e-12)


@pytest.mark.parametrize("membership", MEMBERSHIPS)
def test_dropped_weights(membership):
    arrays, options = case("official")
    kept = program(membership=membership, return_weights=True, **options)(**arrays)[1]
    run = program(membership=membership, return_weights=True, dropout_rate=0.25, **options)
    out, weights = run(**arrays, dropout_key=jax.random.key(1))
    np.testing.assert_allclose(np.einsum("bhnm,bmhe->bnhe", weights, arrays["value"]), out, atol=1e-12)
    dropped = (np.asarray(weights) == 0)[np.asarray(kept) > 0].mean()
    # In several clusters a token may be dropped from one only.
    assert 0.02 < dropped < 0.32


def test_the_published_membership_has_no_step():
    with pytest.raises(ValueError, match="membership 'sequence' depends on later tokens and has no step"):
        init_routing_state(1, 1, 2, 3, 4, membership="sequence")
    with pytest.raises(ValueError, match="unknown membership 'nearst'; did you mean 'nearest'"):
        init_routing_state(1, 1, 2, 3, 4, membership="nearst")
    query, value, means = jnp.zeros((1, 1, 1, 4)), jnp.zeros((1, 1, 1, 4)), jnp.zeros((1, 3, 4))
    state = init_routing_state(1, 1, 2, 3, 4)
    with pytest.raises(ValueError, match="state is for 2 clusters, means for 3"):
        routing_step(query, value, means, state)
    with pytest.raises(ValueError, match="assignment 'strided' has no causal membership"):
        routing_step(query, value, means, state, assignment="strided")
