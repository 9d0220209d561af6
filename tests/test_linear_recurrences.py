"""What all causal linear recurrences must do, in all their forms, against one token after the other in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.residuals import residual_bytes
from tests.recurrences import OPS

# The others differ from one of these by a decay of another shape only.
DISTINCT = ("decay per channel", "gated delta", "normalised")
FORMS = [(name, "chunk") for name in OPS] + [(name, form) for name in DISTINCT for form in ("recurrent", "parallel")]

every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
distinct_ops = pytest.mark.parametrize("op", [OPS[name] for name in DISTINCT], ids=DISTINCT)
every_form = pytest.mark.parametrize(
    ("op", "form"), [(OPS[n], f) for n, f in FORMS], ids=[f"{n}, {f}" for n, f in FORMS]
)

# Ids that come again later are another document; a document of one token; one that ends with a chunk.
SEGMENTS = np.asarray([[7] * 3 + [3] * 6 + [7] * 1 + [0] * 5, [1] * 8 + [2] * 3 + [1] * 1 + [4] * 3])
ONE_DOCUMENT = np.zeros_like(SEGMENTS)
TOKENS, CHUNK, CHANNELS, VALUES = SEGMENTS.shape[1], 4, 3, 5


def as_jax(tree):
    return jax.tree.map(jnp.asarray, tree)


def assert_close(actual, expected, relative):
    """Leaf by leaf, relative to the largest value of each."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape and np.isfinite(a).all()
        error = np.abs(a - e).max()
        assert error <= relative * np.abs(e).max(), f"{error / np.abs(e).max():.1e} of the largest value"


@functools.cache
def jitted(op, form, chunk_size):
    """A jitted function of operands and initial state to output and state."""
    return jax.jit(
        lambda arrays, state: op(arrays, form=form, chunk_size=chunk_size, initial_state=state, return_state=True)
    )


@functools.cache
def differentiated(op, form, chunk_size=CHUNK):
    """A jitted function to output and last state, and the gradients of `sum(results * directions)`."""

    @jax.jit
    def run(arrays, state, segments, directions):
        def objective(arrays, state):
            if form == "plain":
                results = op.plain(arrays, state, segments)
            else:
                options = dict(form=form, chunk_size=chunk_size, initial_state=state, segments=segments)
                results = op(arrays, return_state=True, **options)
            pairs = zip(jax.tree.leaves(results), jax.tree.leaves(directions), strict=True)
            return sum((result * direction).sum() for result, direction in pairs), results

        gradient, results = jax.grad(objective, (0, 1), has_aux=True)(arrays, state)
        return results, gradient

    return run


def operands(op, seed, dtype=np.float64):
    """Operands, initial state and directions, all of one size so that programs are compiled once."""
    rng = np.random.default_rng(seed)
    arrays = op.operands(rng, TOKENS, CHANNELS, VALUES, dtype=dtype)
    state = op.state(rng, CHANNELS, VALUES, dtype=dtype)
    directions = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(dtype), (arrays["value"], state))
    return arrays, state, directions


# tokens, chunk size, D, E: divisible or not, a chunk of one token, chunks that are no power of two, larger than N.
SHAPES = [(1, 64, 4, 4), (5, 1, 4, 3), (64, 16, 6, 6), (100, 3, 2, 5), (129, 64, 4, 4), (33, 100, 129, 7)]
CASES = [(name, shape) for name in OPS for shape in (SHAPES if name in DISTINCT else SHAPES[-1:])]


@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_equals_the_loop(name, shape):
    tokens, chunk_size, channels, values = shape
    op, rng = OPS[name], np.random.default_rng(tokens)
    with jax.enable_x64(True):
        arrays, state = op.operands(rng, tokens, channels, values), op.state(rng, channels, values)
        actual = jitted(op, "chunk", chunk_size)(as_jax(arrays), as_jax(state))
        assert_close(actual, op.loop(arrays, state), 1e-12)


@distinct_ops
def test_float32(op):
    rng = np.random.default_rng(1)
    arrays, state = op.operands(rng, 150, 16, 8, dtype=np.float32), op.state(rng, 16, 8, dtype=np.float32)
    out, last = jitted(op, "chunk", 64)(as_jax(arrays), as_jax(state))
    assert {x.dtype for x in jax.tree.leaves((out, last))} == {jnp.dtype("float32")}
    assert_close((out, last), op.loop(arrays, state), 2e-6)


@distinct_ops
def test_bfloat16_keeps_float32_inside(op):
    rng = np.random.default_rng(2)
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), op.operands(rng, 40))
    out, state = jitted(op, "chunk", 16)(arrays, None)
    assert out.dtype == jnp.bfloat16 and {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    expected, expected_state = op.loop({name: x.astype(jnp.float32) for name, x in arrays.items()})
    # The output is rounded once; what the operands were rounded to is the same for both.
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2**-8, atol=1e-5)
    assert_close(state, expected_state, 2e-6)


@every_form
@pytest.mark.parametrize("segments", [ONE_DOCUMENT, SEGMENTS], ids=["one document", "packed"])
def test_gradients_equal_those_of_the_plain_recurrence(op, form, segments):
    with jax.enable_x64(True):
        arrays, state, directions = operands(op, seed=3)
        case = as_jax((arrays, state, segments, directions))
        results, gradient = differentiated(op, form)(*case)
        assert_close(results, op.loop(arrays, state, segments), 1e-12)
        expected_results, expected = differentiated(op, "plain")(*case)
        assert_close(expected_results, results, 1e-12)
        assert_close(gradient, expected, 1e-10)


@distinct_ops
def test_gradients_in_float32(op):
    arrays, state, directions = operands(op, seed=4, dtype=np.float32)
    case = (arrays, state, ONE_DOCUMENT, directions)
    _, gradient = differentiated(op, "chunk", 16)(*as_jax(case))
    with jax.enable_x64(True):
        case = jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, case)
        _, expected = differentiated(op, "plain")(*as_jax(case))
    assert_close(gradient, expected, 1e-5)


@pytest.mark.parametrize("name", ["decay per token", "decay per channel", "gated delta"])
def test_any_strength_of_decay(name):
    """From none to everything at once, side by side, in float32: no digit is lost, and no gradient is nan."""
    op, rng, tokens = OPS[name], np.random.default_rng(10), 90
    arrays, state = op.operands(rng, tokens, 8, 8), op.state(rng, 8, 8)
    sizes = arrays["log_decay"].shape
    uniform = rng.uniform(-50, 0, sizes)
    steps = [uniform < -40, uniform < -30, uniform < -20]
    arrays["log_decay"] = np.select(steps, [uniform, np.zeros(sizes), uniform * 1e-6], -np.exp(uniform))
    arrays["log_decay"][:, 17] = -np.inf
    arrays["log_decay"][:, 40:45] = -1e30
    directions = jax.tree.map(lambda x: rng.standard_normal(x.shape), (arrays["value"], state))
    single = jax.tree.map(lambda x: x.astype(np.float32), (arrays, state, directions))
    segments = np.zeros((2, tokens), int)
    actual = differentiated(op, "chunk", 64)(*as_jax(single[:2]), jnp.asarray(segments), as_jax(single[2]))
    with jax.enable_x64(True):
        exact = as_jax(jax.tree.map(lambda x: x.astype(np.float64), single))
        results, gradient = differentiated(op, "plain")(*exact[:2], jnp.asarray(segments), exact[2])
    assert_close(actual[0], results, 2e-6)
    assert_close(actual[1], gradient, 1e-5)


@every_op
def test_a_state_handed_over_and_steps_of_one_token_change_nothing(op):
    rng = np.random.default_rng(5)
    with jax.enable_x64(True):
        arrays, first = op.operands(rng, 14), as_jax(op.state(rng))

        def cut(start, end):
            return {name: jnp.asarray(x if x.ndim == 1 else x[:, start:end]) for name, x in arrays.items()}

        run = jitted(op, "chunk", 4)
        expected = run(cut(0, 14), first)
        before, state = run(cut(0, 7), first)
        after, state = run(cut(7, 14), state)
        assert_close((jnp.concatenate((before, after), 1), state), expected, 1e-13)
        outs, state = [], first
        for t in range(14):
            out, state = run(cut(t, t + 1), state)
            outs.append(out)
        assert_close((jnp.concatenate(outs, 1), state), expected, 1e-13)


@every_form
def test_documents_do_not_see_each_other(op, form):
    with jax.enable_x64(True):
        arrays, first, directions = operands(op, seed=6)
        (out, last), _ = differentiated(op, form)(*as_jax((arrays, first, SEGMENTS, directions)))
        # Each document alone: the same, and the first goes on from the initial state.
        for row, ids in enumerate(SEGMENTS):
            ends = [*np.flatnonzero(np.diff(ids)) + 1, TOKENS]
            for start, end in zip([0, *ends], ends):
                part = {n: x if x.ndim == 1 else x[row : row + 1, start:end] for n, x in arrays.items()}
                mine = functools.partial(jax.tree.map, lambda x, row=row: x[row : row + 1])
                alone, state = op.loop(part, mine(first) if start == 0 else None)
                np.testing.assert_allclose(out[row, start:end], alone[0], rtol=1e-9, atol=1e-11)
            assert_close(mine(last), state, 1e-11)


@every_form
def test_documents_stay_apart_in_gradients(op, form):
    with jax.enable_x64(True):
        arrays, state, directions = jax.tree.map(np.copy, operands(op, seed=7))
        # Only row 0's tokens 3 to 8 are looked at: no other token, and no initial state, has a part in them.
        for leaf in jax.tree.leaves(directions):
            leaf[...] = 0
        directions[0][0, 3:9] = 1
        _, (by_array, by_state) = differentiated(op, form)(*as_jax((arrays, state, SEGMENTS, directions)))
    assert not any(leaf.any() for leaf in jax.tree.leaves(by_state))
    for name, leaf in by_array.items():
        if leaf.ndim > 1:
            assert leaf[0, 3:9].any(), name
            assert not leaf[0, :3].any() and not leaf[0, 9:].any() and not leaf[1].any(), name
    if op.decay in ("scalar", "channel"):
        # What a document's first token would leave of the state before it is of no account.
        assert not by_array["log_decay"][0, 3].any() and by_array["log_decay"][0, 4].any()


@every_form
def test_nothing_leaks_from_the_future(op, form):
    now = 9
    with jax.enable_x64(True):
        arrays, state, directions = operands(op, seed=8)
        other, _, _ = operands(op, seed=9)
        directions = jax.tree.map(np.zeros_like, directions)
        directions[0][:, :now] = np.random.default_rng(0).standard_normal(directions[0][:, :now].shape)
        changed = {
            n: np.concatenate((x[:, :now], 3 * other[n][:, now:]), 1) if x.ndim > 1 else x for n, x in arrays.items()
        }
        run, rest = differentiated(op, form), as_jax((state, ONE_DOCUMENT, directions))
        (before, _), (by_array, _) = run(as_jax(arrays), *rest)
        (after, _), (by_changed, _) = run(as_jax(changed), *rest)
    assert (before[:, :now] == after[:, :now]).all() and (before[:, now:] != after[:, now:]).any()
    for name, leaf in by_array.items():
        if leaf.ndim > 1:
            assert not leaf[:, now:].any() and leaf[:, :now].any(), name
            assert (leaf == by_changed[name]).all(), name


@every_op
def test_the_backward_pass_keeps_a_state_per_chunk(op):
    """Bytes of the states that are kept: in proportion to N / chunk size, and never N states."""
    batch, heads, channels = 2, 3, 32
    one_state = 4 * batch * heads * channels * (channels + (op is OPS["normalised"]))
    arrays = op.operands(np.random.default_rng(0), 512, channels, channels, batch, heads, np.float32)

    def residuals(tokens, chunk_size, form="chunk"):
        rows = {name: x if x.ndim == 1 else x[:, :tokens] for name, x in arrays.items()}
        options = dict(form=form, chunk_size=chunk_size, implementation="xla")
        return residual_bytes(lambda rows: op(rows, **options), rows)

    whole = residuals(512, 64)
    assert residuals(512, 16) - whole == (512 // 16 - 512 // 64) * one_state
    assert whole == pytest.approx(2 * residuals(256, 64), rel=0.01)
    assert residuals(512, 64, "recurrent") == whole
    # A few copies of the operands beside it, where a state per token would be 32 times a copy of the keys.
    assert whole <= 5 * sum(x.nbytes for x in arrays.values()) + 512 // 64 * one_state < 512 * one_state
