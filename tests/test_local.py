"""Local attention against dense attention under its mask, written as loops in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.cost import cost
from kernels.dispatch import record_choices
from kernels.local import local_attention
from kernels.rotary import rotary
from tests.parity import REFERENCE
from tests.reference import cluster as reference
from tests.reference.weights import pseudo_normal

B, N, H, D, E = 2, 19, 2, 5, 4


pytestmark = pytest.mark.usefixtures("float64")


@functools.cache
def program(**options):
    """`local_attention` compiled, with options that are no arrays; tests share what they have in common."""
    return jax.jit(functools.partial(local_attention, **options))


def operands(n=N, d=D, e=E, dtype=np.float64):
    sizes = dict(query=d, key=d, value=e)
    return {name: pseudo_normal(name, (B, n, H, size)).astype(dtype) for name, size in sizes.items()}


def tables(reach, d=D, e=E):
    sizes = dict(relative_key=d, relative_value=e)
    return {name: pseudo_normal(name, (2 * reach + 1, size)) for name, size in sizes.items()}


SEGMENTS = np.array([[5] * 8 + [2] * 6 + [5] * 5, [0] * 18 + [1]])
MASK = pseudo_normal("mask", (B, N)) > -0.7


def loops(
    arrays, *, block, look_back=1, look_ahead=0, causal=True, window=None, scale=None, key_mask=None, segments=None
):
    """What the docstring says who sees whom, one pair at a time."""
    runs = None if segments is None else np.cumsum(np.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0))), 1)

    def sees(b, t, j):
        return (
            -look_back <= j // block - t // block <= look_ahead
            and (not causal or j <= t)
            and (window is None or t - j < window)
            and (key_mask is None or key_mask[b, j])
            and (runs is None or runs[b, j] == runs[b, t])
        )

    return reference.local(**arrays, sees=sees, scale=scale)


CASES = {
    "a block back": dict(block=4),
    "own block": dict(block=5, look_back=0, reach=2),
    "two blocks back": dict(block=3, look_back=2, reach=4),
    "around": dict(block=4, look_ahead=1, causal=False, reach=3),
    "ahead only": dict(block=4, look_back=0, look_ahead=2, causal=False, scale=0.3, reach=20),
    "one block": dict(block=40, reach=30),
    "single tokens": dict(block=1, look_back=4, reach=2),
    "window": dict(block=6, window=6, reach=2),
    "window of other blocks": dict(block=4, look_back=2, window=6),
    "mask": dict(block=4, masked=True, reach=2),
    "segments": dict(block=4, masked=True, segmented=True, reach=2),
    "segments around": dict(block=4, look_ahead=1, causal=False, masked=True, segmented=True),
    "odd channels": dict(block=8, d=129, e=129, reach=7),
}


def case(name):
    """Operands by their name, masks by theirs, and the arguments that are no arrays."""
    options = dict(CASES[name])
    d, e, reach = (options.pop(x, default) for x, default in (("d", D), ("e", E), ("reach", None)))
    arrays = operands(d=d, e=e) | ({} if reach is None else tables(reach, d, e))
    given = (("key_mask", "masked", MASK), ("segments", "segmented", SEGMENTS))
    return arrays, {name: x for name, flag, x in given if options.pop(flag, False)}, options


@pytest.mark.parametrize("name", CASES)
def test_equals_the_loops(name):
    arrays, masks, options = case(name)
    out, weights = program(return_weights=True, **options)(**arrays, **masks)
    expected, expected_weights = loops(arrays, **masks, **options)
    np.testing.assert_allclose(out, expected, atol=1e-11)
    np.testing.assert_allclose(weights, expected_weights, atol=1e-12)


@pytest.mark.parametrize("name", ["segments", "around"])
def test_gradients_equal_differences_of_the_loops(name):
    arrays, masks, options = case(name)
    direction = pseudo_normal("direction", (B, N, H, E))

    def objective(arrays, masks):
        return (local_attention(**arrays, **masks, **options) * direction).sum()

    for name, gradient in jax.jit(jax.grad(objective))(arrays, masks).items():
        step = 1e-6 * pseudo_normal("step", gradient.shape)
        ends = [loops({**arrays, name: arrays[name] + s * step}, **masks, **options)[0] for s in (1, -1)]
        difference = ((ends[0] - ends[1]) / 2 * direction).sum()
        np.testing.assert_allclose((gradient * step).sum(), difference, rtol=1e-5, err_msg=name)


def test_any_block_that_reaches_gives_the_same_window():
    for n in (1, 6, 23):
        arrays = operands(n=n)
        expected = program(block=6, window=6)(**arrays)
        for block, look_back in ((5, 1), (3, 2)):
            np.testing.assert_allclose(
                program(block=block, look_back=look_back, window=6)(**arrays), expected, atol=1e-12
            )


def test_nothing_leaks_and_hidden_tokens_do_nothing():
    arrays = operands()
    out = program(block=4)(**arrays, key_mask=MASK)
    moved = {name: x.copy() for name, x in arrays.items()}
    for x in moved.values():
        x[:, 11:] = np.nan
    np.testing.assert_array_equal(program(block=4)(**moved, key_mask=MASK)[:, :8], out[:, :8])
    moved = {name: np.where(MASK[..., None, None] | (name == "query"), x, 1e6) for name, x in arrays.items()}
    np.testing.assert_array_equal(program(block=4)(**moved, key_mask=MASK), out)


def test_a_query_that_sees_nothing_gives_zero_and_no_gradient():
    arrays = operands()
    mask = np.zeros((B, N), bool)
    mask[:, 12:] = True
    out = program(block=4)(**arrays, key_mask=mask)
    assert not out[:, :12].any() and out[:, 12:].all()

    def early(arrays, mask):
        return local_attention(**arrays, block=4, key_mask=mask)[:, :12].sum()

    for gradient in jax.jit(jax.grad(early))(arrays, mask).values():
        assert not gradient.any()


@pytest.mark.parametrize("name", ["causal", "causal_far", "around"])
def test_equals_lucidrains_with_rotary_positions(name):
    """Their positions start anew at every block's first key, and queries stand at the last block of their span.

    For causal attention that is the distance in the sequence. Looking ahead it makes queries stand `look_ahead` blocks
    later than they do.
    """
    with np.load(REFERENCE / "cluster.npz") as file:
        expected = file[f"local/{name}/out"]
    query, key, value = (pseudo_normal(x, (4, 18, 4))[:, :, None] for x in ("query", "key", "value"))
    ahead = 0 if name.startswith("causal") else 1
    turn = jax.jit(rotary)
    out = program(block=6, look_back=2 if name == "causal_far" else 1, look_ahead=ahead, causal=not ahead)(
        turn(query, np.arange(18) + 6 * ahead), turn(key, np.arange(18)), value
    )
    # Their angles are float32.
    np.testing.assert_allclose(out[:, :, 0], expected, atol=5e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_lower_precisions(dtype):
    arrays = operands(dtype=dtype)
    out, weights = program(block=4, return_weights=True)(**arrays)
    assert out.dtype == dtype and weights.dtype == jnp.float32
    expected, _ = loops({name: np.float64(x) for name, x in arrays.items()}, block=4)
    np.testing.assert_allclose(np.float64(out), expected, atol=2e-2 if dtype == jnp.bfloat16 else 1e-6)


def test_dropped_weights():
    arrays = operands()
    _, kept = program(block=4, return_weights=True)(**arrays)
    run = program(block=4, return_weights=True, dropout_rate=0.25)
    out, weights = (np.asarray(x) for x in run(**arrays, dropout_key=jax.random.key(1)))
    np.testing.assert_allclose(np.einsum("bhnm,bmhe->bnhe", weights, arrays["value"]), out, atol=1e-12)
    ratio = weights[kept > 0] / kept[kept > 0]
    np.testing.assert_allclose(np.unique(ratio.round(9)), [0, 4 / 3], rtol=1e-6)
    assert 0.15 < (ratio == 0).mean() < 0.35


def test_cost_is_linear_in_the_length():
    def flops(n):
        x = jax.ShapeDtypeStruct((1, n, 1, 64), jnp.float32)
        return cost(functools.partial(local_attention, block=128, window=128), x, x, x).flops

    assert flops(65536) == pytest.approx(4 * flops(16384), rel=1e-3)


def test_implementations():
    arrays = {name: jnp.asarray(x) for name, x in operands().items()}
    with record_choices() as choices:
        expected = program.__wrapped__(block=4)(**arrays)
    assert {choice.implementation for choice in choices} == {"xla"}
    np.testing.assert_array_equal(program(block=4, implementation="xla")(**arrays), expected)
    with pytest.raises(NotImplementedError, match="pallas_tpu: not written for this op, which has xla"):
        local_attention(**arrays, block=4, implementation="pallas_tpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(block=0), "block must be at least 1 token, got 0"),
        (dict(look_back=-1), "look_back must be at least 0 blocks, got -1"),
        (dict(look_ahead=1), "causal attention looks at no later block, got look_ahead=1"),
        (dict(window=0), "window must be at least 1, the token itself, got 0"),
        (dict(window=4, causal=False), "window=4 is for causal attention"),
        (dict(window=10), "window=10 reaches further back than look_back=1 blocks of 4; take look_back=3 or block=9"),
        (dict(key=(2, 9, 2, 5)), r"key must have the shape of query, which is \(2, 19, 2, 5\); got \(2, 9, 2, 5\)"),
        (dict(value=(2, 9, 2, 5)), r"value must be \(B, N, H, E\).*got \(2, 9, 2, 5\)"),
        (dict(relative_value=(4, 4)), r"relative_value must be \(2 R \+ 1, 4\).*got \(4, 4\)"),
        (dict(dropout_rate=-0.1), "dropout_rate must be at least 0 and below 1, got -0.1"),
        (dict(dropout_key=(2,)), "dropout_rate 0.0 takes no dropout_key"),
    ],
    ids=str,
)
def test_names_what_is_wrong(options, words):
    options = {name: jnp.zeros(x) if isinstance(x, tuple) else x for name, x in options.items()}
    arguments = {name: jnp.asarray(x) for name, x in operands().items()} | dict(block=4)
    with pytest.raises(ValueError, match=words):
        local_attention.__wrapped__(**arguments | options)
