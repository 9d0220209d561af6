"""Kernels of chunked recurrences, interpreted: against one token after the other in float64, and at their limits."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import compat
from kernels.delta import delta_rule
from kernels.dispatch import record_choices
from kernels.gated_linear import gated_linear_attention
from kernels.linear import LinearState
from kernels.scan_plan import FLOOR, decay_sums
from tests.recurrences import OPS
from tests.test_linear_recurrences import assert_close

IMPLEMENTATIONS = ("pallas_tpu", "pallas_triton")
KINDS = ("no decay", "decay per head", "decay per token", "decay per channel", "delta", "gated delta")
# One with each body.
DISTINCT = ("decay per token", "decay per channel", "gated delta")

every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every_kind = pytest.mark.parametrize("kind", KINDS)
distinct_kinds = pytest.mark.parametrize("kind", DISTINCT)


@functools.cache
def jitted(kind, implementation, gradient=False):
    """Operands, initial state, segments and directions to output and last state, and the gradients along those.

    Without an implementation it is the recurrence token by token.
    """
    op = OPS[kind]

    def run(arrays, state, segments):
        if implementation is None:
            out, last = op.plain(arrays, state, segments)
            return out, LinearState(*last) if isinstance(state, LinearState) else last
        options = dict(initial_state=state, segments=segments, return_state=True, implementation=implementation)
        return op(arrays, **options)

    def both(arrays, state, segments, directions):
        results, pull = jax.vjp(lambda arrays, state: run(arrays, state, segments), arrays, state)
        return results, pull(directions)

    function = jax.jit(both if gradient else run)

    def interpreted(*operands):
        with compat.interpret():
            return function(*operands)

    return interpreted


def operands(kind, tokens, channels=16, values=16, batch=1, heads=1, seed=0, dtype=np.float32):
    """Operands, initial state and directions of output and state, of that dtype and rounded to it in float64."""
    op, rng = OPS[kind], np.random.default_rng(seed)
    sizes = dict(batch=batch, heads=heads, dtype=np.float32)
    arrays, state = op.operands(rng, tokens, channels, values, **sizes), op.state(rng, channels, values, **sizes)
    wide = {name: jnp.asarray(arrays[name], dtype) for name in ("query", "key", "value")}
    arrays = {name: jnp.asarray(x) for name, x in arrays.items()} | wide
    directions = jnp.asarray(rng.standard_normal(wide["value"].shape), dtype), jax.tree.map(lambda x: x[::-1], state)
    return arrays, *jax.tree.map(jnp.asarray, (state, directions))


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@functools.cache
def in_float64(kind, implementation, gradient=False):
    function = jitted(kind, implementation, gradient)

    def run(arrays, state, segments, *directions):
        with jax.enable_x64(True):
            return jax.device_get(function(*float64((arrays, state)), segments, *float64(directions)))

    return run


# A document of one token, one that ends with a chunk, ids that come again.
SEGMENTS = np.repeat([3, 0, 3, 1, 2], [30, 1, 97, 12, 10])[None]


@every_implementation
@every_kind
def test_equals_one_token_after_the_other(kind, implementation):
    """Two chunks, the second not full; D is not E; gradients of everything, also through the last state."""
    arrays, state, directions = operands(kind, SEGMENTS.shape[1], 32, 16)
    found = jitted(kind, implementation, True)(arrays, state, SEGMENTS, directions)
    assert_close(found, in_float64(kind, None, True)(arrays, state, SEGMENTS, directions), 3e-6)


@every_implementation
def test_the_normaliser_comes_along(implementation):
    """Causal linear attention, whose tokens are counted outside."""
    arrays, state, directions = operands("normalised", 40, 16, 32)
    found, gradients = jitted("normalised", implementation, True)(arrays, state, None, directions)
    expected, exact = in_float64("normalised", None, True)(arrays, state, None, directions)
    assert_close(found, expected, 3e-6)
    assert_close((gradients[0], gradients[1][:2]), (exact[0], exact[1][:2]), 3e-6)


@pytest.mark.slow
@every_implementation
@every_kind
def test_equals_the_xla_form(kind, implementation):
    """With several rows and heads, three chunks, and no documents."""
    arrays, state, directions = operands(kind, 300, 64, 64, batch=2, heads=3)
    found = jitted(kind, implementation, True)(arrays, state, None, directions)
    assert_close(found, in_float64(kind, "xla", True)(arrays, state, None, directions), 3e-6)


@every_implementation
@pytest.mark.parametrize("kind", ["no decay", pytest.param("decay per token", marks=pytest.mark.slow)])
def test_starts_from_nothing(kind, implementation):
    """Without an initial state, and a gradient of the output alone."""
    arrays, _, (direction, _) = operands(kind, 20, heads=2)

    def gradient(arrays, implementation):
        out, pull = jax.vjp(lambda arrays: OPS[kind](arrays, implementation=implementation), arrays)
        return out, pull(direction.astype(out.dtype))

    with compat.interpret():
        found = jax.jit(functools.partial(gradient, implementation=implementation))(arrays)
    with jax.enable_x64(True):
        expected = jax.jit(functools.partial(gradient, implementation="xla"))(float64(arrays))
    assert_close(found, jax.device_get(expected), 3e-6)


@every_implementation
@pytest.mark.parametrize(
    "kind", ["decay per token", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "decay per token")]
)
def test_bfloat16_loses_about_what_rounding_loses(kind, implementation):
    """Twice what comes of rounding operands and results once more, at most."""
    arrays, state, directions = operands(kind, 130, 32, 32, dtype=jnp.bfloat16)
    found = jitted(kind, implementation, True)(arrays, state, None, directions)
    assert [x.dtype for x in jax.tree.leaves(found)] == [
        x.dtype for x in jax.tree.leaves(((arrays["value"], state), (arrays, state)))
    ]
    reference, rng = in_float64(kind, None, True), np.random.default_rng(5)

    def rounded(x):
        noise = 1 + rng.uniform(-(2.0**-9), 2.0**-9, x.shape)
        return np.asarray(x, np.float64) * (noise if x.dtype == jnp.bfloat16 else 1)

    expected = reference(arrays, state, None, directions)
    moved = reference(*jax.tree.map(rounded, (arrays, state)), None, jax.tree.map(rounded, directions))
    for f, m, e in zip(*map(jax.tree.leaves, (found, moved, expected)), strict=True):
        f, size = np.asarray(f, np.float64), np.linalg.norm(e)
        assert np.linalg.norm(f - e) <= 2 * max(np.linalg.norm(m - e), 2**-9 * size)


@every_implementation
@pytest.mark.parametrize("tokens", [1, 5])
@distinct_kinds
def test_few_tokens(kind, tokens, implementation):
    arrays, state, _ = operands(kind, tokens, heads=2)
    found = jitted(kind, implementation)(arrays, state, None)
    assert_close(found, OPS[kind].loop(arrays, state), 3e-6)


@every_implementation
@pytest.mark.parametrize("strength", [0.0, 50.0, np.inf])
@distinct_kinds
def test_decay_of_any_strength(kind, strength, implementation):
    arrays, state, directions = operands(kind, 40)
    arrays["log_decay"] = jnp.full(arrays["log_decay"].shape, -strength)
    found = jitted(kind, implementation, True)(arrays, state, None, directions)
    expected = in_float64(kind, None, True)(arrays, state, None, directions)
    # What a token of e^-50 left is there to its digits too.
    chex.assert_trees_all_close(jax.device_get(found), float64(expected), rtol=2e-4, atol=3e-6 * np.exp(-strength))


@every_implementation
@distinct_kinds
def test_weak_decay_after_strong_keeps_its_digits(kind, implementation):
    """Differences of sums of logarithms would have lost them."""
    arrays, state, _ = operands(kind, 40)
    arrays["log_decay"] = jnp.where(jnp.arange(arrays["log_decay"].size) % 640 < 480, -90.3, -0.01234567).reshape(
        arrays["log_decay"].shape
    )
    if kind != "decay per channel":
        arrays["log_decay"] = jnp.where(jnp.arange(40) < 30, -90.3, -0.01234567).reshape(1, 40, 1)
    found = jitted(kind, implementation)(arrays, state, None)
    assert_close(found, OPS[kind].loop(arrays, state), 1e-6)


def test_sums_of_decays_have_the_digits_of_their_differences():
    rng = np.random.default_rng(0)
    log_decay = np.where(rng.random((1, 256, 1)) < 0.8, FLOOR, -rng.random((1, 256, 1)) / 100).astype(np.float32)
    coarse, fine = (np.asarray(x)[0, :, 0] for x in decay_sums(log_decay, 128))
    exact = np.cumsum(np.asarray(log_decay, np.float64)[0, :, 0].reshape(2, 128), 1).reshape(-1)
    found = (coarse[:128, None] - coarse[None, :128]) + (fine[:128, None] - fine[None, :128])
    expected = exact[:128, None] - exact[None, :128]
    assert np.all(np.abs(found - expected) <= 2e-7 * np.abs(expected) + 2e-9)


@every_implementation
@distinct_kinds
def test_two_calls_are_one(kind, implementation):
    arrays, state, _ = operands(kind, 40)
    whole = jitted(kind, implementation)(arrays, state, None)
    first, state = jitted(kind, implementation)({n: x[:, :23] for n, x in arrays.items()}, state, None)
    second, state = jitted(kind, implementation)({n: x[:, 23:] for n, x in arrays.items()}, state, None)
    assert_close((jnp.concatenate((first, second), 1), state), whole, 2e-6)


@every_implementation
@distinct_kinds
def test_a_nan_stays_in_its_row_and_head(kind, implementation):
    arrays, state, directions = operands(kind, 20, batch=2, heads=2)
    clean = jitted(kind, implementation, True)(arrays, state, None, directions)
    arrays["value"] = arrays["value"].at[1, 3, 0].set(jnp.nan)
    (out, last), (gradients, initial) = jitted(kind, implementation, True)(arrays, state, None, directions)
    assert np.isnan(out[1, 3:, 0]).all()
    others = np.array([[True, True], [False, True]])

    def by_head(tree):
        (out, last), (gradients, initial) = tree
        wide = jax.tree.map(lambda x: np.asarray(x).swapaxes(1, 2)[others], (out, gradients))
        return wide, np.asarray(last)[others], np.asarray(initial)[others]

    chex.assert_trees_all_equal(by_head(((out, last), (gradients, initial))), by_head(clean))


@every_implementation
def test_the_same_twice(implementation):
    arrays, state, directions = operands("gated delta", 40)
    run = jitted("gated delta", implementation, True)
    chex.assert_trees_all_equal(*(run(arrays, state, None, directions) for _ in range(2)))


@every_implementation
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_keys_that_are_all_the_same(beta, implementation):
    """The worst there is for the triangular system, powers of which have numbers of 1e30 and more."""
    arrays, state, directions = operands("delta", 128)
    arrays["key"] = jnp.broadcast_to(arrays["key"][:, :1], arrays["key"].shape)
    arrays["beta"] = jnp.full(arrays["beta"].shape, beta)
    found = jitted("delta", implementation)(arrays, state, None)
    # With beta 2 a factor of 1 - 2 |key|^2 is raised to the power of 128: an error of 2^-24 in the length of the key
    # alone makes 1.5e-5 of it.
    assert_close(found, OPS["delta"].loop(arrays, state), 4e-5)


def test_what_a_kernel_does_not_serve_is_left_to_xla():
    arrays, state, _ = operands("gated delta", 20)
    gated = {name: x for name, x in arrays.items() if name not in ("beta", "log_decay")}

    def refusal(op, given, **options):
        with record_choices() as choices:
            jax.eval_shape(functools.partial(op, **options), **given)
        assert {choice.implementation for choice in choices} == {"xla"}
        with pytest.raises(NotImplementedError) as error:
            jax.eval_shape(functools.partial(op, **options, implementation="pallas_tpu"), **given)
        assert str(error.value).split(": ", 2)[2] in choices[0].refused[0]
        return str(error.value)

    def resized(given, **sizes):
        batch, tokens, heads, channels = (sizes.get(n, s) for n, s in zip("BNHD", given["key"].shape))
        return {n: jnp.zeros((batch, tokens, heads, channels)[: x.ndim], x.dtype) for n, x in given.items()}

    assert "form='recurrent'" in refusal(delta_rule, arrays, form="recurrent")
    assert "return_weights=True" in refusal(gated_linear_attention, gated, return_weights=True)
    half = arrays["value"].astype(jnp.float16)
    assert "value is float16" in refusal(delta_rule, arrays | {"value": half})
    assert "D = 129 channels" in refusal(delta_rule, resized(arrays, D=129))
    assert "nothing to compute" in refusal(gated_linear_attention, resized(gated, B=0))
    for sizes in (dict(B=0), dict(H=0)):
        assert "nothing to compute" in refusal(delta_rule, resized(arrays, **sizes))


@every_implementation
@pytest.mark.parametrize(("kind", "ways"), [("decay per head", 2), ("gated delta", 4)])
def test_over_a_mesh(kind, ways, implementation):
    """Each device has its part of the batch; a decay that all share gets the gradients of all."""
    arrays, state, directions = operands(kind, 20, batch=4, heads=2)
    expected = jitted(kind, "xla", True)(arrays, state, None, directions)
    axes = jax.make_mesh(
        (2, ways // 2), ("data", "fsdp"), (jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:ways]
    )
    with jax.set_mesh(axes):
        found = jax.jit(lambda *x: jitted.__wrapped__(kind, implementation, True)(*x))(arrays, state, None, directions)
        chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), rtol=1e-4, atol=1e-4)


@distinct_kinds
def test_what_is_lowered_for_a_mesh_holds_kernels_that_vary_with_it(kind):
    """Not interpreted, where kernels say over which axes their results vary."""
    arrays, state, directions = operands(kind, 20, batch=4)
    axes = jax.sharding.AbstractMesh((4,), ("data",), (jax.sharding.AxisType.Auto,))

    def both(arrays, state, directions):
        options = dict(return_state=True, implementation="pallas_tpu")
        results, pull = jax.vjp(lambda a, s: OPS[kind](a, initial_state=s, **options), arrays, state)
        return results, pull(directions)

    with jax.sharding.use_abstract_mesh(axes):
        text = jax.jit(both).trace(arrays, state, directions).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 2
