"""Kernels of attention within clusters, interpreted, against the XLA form in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import zoo
from kernels import compat
from kernels.cluster import routing_attention
from kernels.cluster_plan import Plan
from kernels.cost import cost
from kernels.dispatch import record_choices
from tests.test_pallas_block_sparse import assert_close, differentiated, gradient_program
from tests.triton_kernels import assert_model_has_its_kernels

KERNELS = ("pallas_tpu", "pallas_triton")
UNSHARED = dict(shared=False, key=True)
# Tokens, width of keys and of values, clusters, window; more operands, and options. Tiles are of 256 tokens at most.
CASES = {
    "small": (19, 5, 4, 3, 7, {}),
    "one cluster, larger than the sequence": (19, 8, 8, 1, 50, {}),
    "several tiles": (300, 8, 4, 2, 270, {}),
    "own keys": (90, 8, 8, 3, 70, UNSHARED),
    "cross, with hidden keys": (40, 8, 4, 3, 20, dict(UNSHARED, causal=False, keys=50, key_window=30, mask=True)),
    "documents and hidden keys": (60, 8, 8, 3, 40, dict(mask=True, documents=True)),
    "itself last, with memories": (40, 8, 4, 3, 20, dict(style="lucidrains", documents=True, memories=3)),
    "itself last, all together": (40, 8, 8, 3, 20, dict(style="lucidrains", causal=False, shared=True)),
    "last tokens of the best cluster": (90, 8, 4, 3, 20, dict(membership="nearest", mask=True, documents=True)),
    "itself last, of all tokens so far": (19, 8, 8, 3, 30, dict(membership="nearest", style="lucidrains")),
}
RELATIVE = {
    "ranks": (60, 8, 4, 3, 40, dict(reach=9)),
    "ranks over several tiles": (300, 8, 4, 1, 270, dict(reach=70)),
    "ranks of the last tokens": (700, 8, 4, 2, 300, dict(membership="nearest", reach=70)),
    "ranks of own keys": (40, 8, 4, 3, 20, dict(UNSHARED, reach=50)),
}


def operands(case, batch=2, heads=2, dtype=jnp.float32, seed=0):
    """What is differentiated, what is not, options, and a direction in which to differentiate.

    Two clusters have the same centroid, and some tokens are in no cluster.
    """
    n, dim, value_dim, clusters, window, options = case
    rng, options = np.random.default_rng(seed), dict(options)
    m = options.pop("keys", n)

    def normal(*shape, dtype=dtype):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    arrays = dict(query=normal(batch, n, heads, dim), key=None, value=normal(batch, m, heads, value_dim))
    if options.pop("key", False):
        arrays["key"] = normal(batch, m, heads, dim)
    if reach := options.pop("reach", 0):
        arrays |= dict(relative_key=normal(2 * reach + 1, dim), relative_value=normal(2 * reach + 1, value_dim))
    if slots := options.pop("memories", 0):
        memories = heads, clusters, slots
        arrays |= dict(memory_key=normal(*memories, dim), memory_value=normal(*memories, value_dim))
    fixed = dict(means=normal(heads, clusters, dim, dtype=jnp.float32))
    fixed["means"] = fixed["means"].at[:, -1].set(fixed["means"][:, 0])
    if options.pop("mask", False):
        fixed["key_mask"] = jnp.asarray(rng.random((batch, m)) < 0.8)
    if options.pop("documents", False):
        fixed["segments"] = jnp.asarray(np.sort(rng.integers(0, 3, (batch, n)), axis=1), jnp.int32)
    direction = normal(batch, n, heads, value_dim, dtype=jnp.float32)
    return arrays, fixed, dict(options, window=window, scale=0.3), direction


def attend(implementation, fixed, options, **arrays):
    return routing_attention(**arrays, **fixed, **options, implementation=implementation)


def by_kernel(arrays, fixed, options, direction, implementation):
    with compat.interpret():
        return differentiated(functools.partial(attend, implementation, fixed, options), arrays, direction)


def by_xla(arrays, fixed, options, direction):
    """In float64."""
    with jax.enable_x64(True):
        arrays = jax.tree.map(lambda x: x.astype(jnp.float64), arrays)
        return differentiated(functools.partial(attend, "xla", fixed, options), arrays, direction)


@functools.cache
def expected(name):
    return by_xla(*operands((CASES | RELATIVE)[name]))


# Parts of these are in others.
SLOW = ("own keys", "documents and hidden keys", "itself last, all together", "ranks of the last tokens")


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES | RELATIVE]
)
def test_kernels_equal_the_xla_form(name, implementation):
    found = by_kernel(*operands((CASES | RELATIVE)[name]), implementation)
    assert found[0].dtype == jnp.float32
    assert_close(found, expected(name), 4e-6)


@pytest.mark.parametrize("implementation", KERNELS)
def test_bfloat16_is_accumulated_in_float32(implementation):
    arguments = operands(RELATIVE["ranks"], dtype=jnp.bfloat16)
    found = by_kernel(*arguments, implementation)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(found))
    exact = by_xla(*arguments)
    for gradient, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        # Weights, and results of each cluster, are rounded to 8 bits of mantissa.
        assert_close(gradient, wanted, 2**-6 * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("implementation", KERNELS)
def test_results_repeat_and_what_is_not_a_number_stays_in_its_head(implementation):
    arrays, fixed, options, direction = operands(CASES["small"])
    with compat.interpret():
        program = gradient_program(functools.partial(attend, implementation, fixed, options), direction)
        first, again = (jax.device_get(program(arrays)) for _ in range(2))
        dirty = jax.device_get(program(arrays | {"value": arrays["value"].at[1, :, 0].set(jnp.nan)}))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    (_, clean), gradients = first
    (_, found), moved = dirty
    np.testing.assert_array_equal(found[0], clean[0])
    np.testing.assert_array_equal(found[:, :, 1], clean[:, :, 1])
    assert np.isnan(found[1, :, 0]).any()
    for name in ("query", "value"):
        np.testing.assert_array_equal(moved[name][0], gradients[name][0])
        np.testing.assert_array_equal(moved[name][:, :, 1], gradients[name][:, :, 1])


@pytest.mark.parametrize("implementation", KERNELS)
def test_each_device_computes_its_part_of_the_batch(implementation):
    case = RELATIVE["ranks"] if implementation == "pallas_tpu" else CASES["itself last, with memories"]
    arrays, fixed, options, direction = arguments = operands(case)
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])

    def spread(x):
        shared = x is None or x.shape[0] != 2 or x is fixed["means"] or x.ndim == 4 and x.shape[2] == 3
        return x if x is None else jax.device_put(x, NamedSharding(mesh, PartitionSpec(*["data"] * (not shared))))

    with jax.set_mesh(mesh):
        arrays, fixed = ({name: spread(x) for name, x in some.items()} for some in (arrays, fixed))
        found = by_kernel(arrays, fixed, options, direction, implementation)
    assert_close(found, by_xla(*arguments), 4e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(case=(12, 129, 8, 2, 4, {})), "a head is 129 channels wide; up to 128 would do"),
        (dict(batch=0), "a size is zero"),
        (dict(dtype=jnp.float16), "operands are float16; all bfloat16 or all float32"),
        (dict(options=dict(return_weights=True)), "implementation='xla' returns them"),
        (dict(options=dict(dropout_rate=0.5, dropout_key=jax.random.key(0))), "a kernel drops no weights; 0 would do"),
        (dict(options=dict(membership="prefix")), "membership='prefix'"),
    ],
    ids=str,
)
def test_what_no_kernel_serves_is_left_to_xla(change, words):
    case, batch, dtype = change.get("case", CASES["small"]), change.get("batch", 2), change.get("dtype", jnp.float32)
    arrays, fixed, options, _ = operands(case, batch, dtype=dtype)
    options |= change.get("options", {})
    with record_choices() as choices:
        jax.eval_shape(functools.partial(attend, None, fixed, options), **arrays)
    assert {choice.implementation for choice in choices} == {"xla"}
    for implementation in KERNELS:
        with pytest.raises(NotImplementedError, match=words):
            attend(implementation, fixed, options, **arrays)


def test_what_a_tpu_does_not_serve():
    wide = jax.ShapeDtypeStruct((1, 16384, 1, 128), jnp.float32)
    means = jax.ShapeDtypeStruct((1, 1, 128), jnp.float32)

    def call(query, means):
        return routing_attention(query, None, query, means, window=16384, implementation="pallas_tpu")

    with pytest.raises(NotImplementedError, match="MiB of fast memory, of 40; a smaller window would do"):
        jax.eval_shape(call, wide, means)


def test_rows_are_rolled_as_a_tpu_rolls_them():
    x = jnp.arange(8 * 16, dtype=jnp.float32).reshape(8, 16)
    with compat.interpret():
        found = compat.tpu_roll_rows(x, 5)
    rolled = jax.jit(functools.partial(pltpu.roll, shift=5, axis=1, stride=1, stride_axis=0))(x)
    np.testing.assert_array_equal(found, rolled)


@pytest.mark.slow
@pytest.mark.parametrize("membership", ["nearest", "sequence"])
def test_a_model_lowered_for_a_platform_holds_its_kernels(membership):
    model = zoo.create_model("routing_transformer_nano", membership=membership, depth=1)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 64)), jnp.int32)
    assert_model_has_its_kernels(model, tokens, "cluster_key_gradient")


def test_pairs_are_counted_as_ranks_see_each_other():
    for offset, window in ((0, None), (3, None), (4, 5), (0, 2)):
        plan = Plan(9, 11, 8, 8, 1.0, True, True, offset=offset, window=window)
        ahead = np.arange(11) - np.arange(9)[:, None] - offset
        assert plan.pairs == ((ahead <= 0) & (ahead > -(window or 99))).sum()
    assert Plan(9, 11, 8, 8, 1.0, True, False).pairs == 99


@pytest.mark.parametrize("case", ["several tiles", "ranks over several tiles"])
def test_cost_is_what_the_mathematics_needs(case):
    arrays, fixed, options, _ = operands((CASES | RELATIVE)[case])
    n, dim, value_dim, clusters, window, _ = (CASES | RELATIVE)[case]
    relative = "ranks" in case
    groups, pairs = 2 * 2 * clusters, window * (window + 1) // 2

    def gradient(implementation, **arrays):
        run = functools.partial(attend, implementation, fixed, options)
        return jax.grad(lambda arrays: run(**arrays).sum())(arrays)

    def kernels(function, implementation):
        return cost(functools.partial(function, implementation), **arrays).by_primitive["pallas_call"]

    def run(implementation, **arrays):
        return attend(implementation, fixed, options, **arrays)

    # Logits and outputs, each a second time of ranks; transposed, with the logits again, three and two of each.
    times, forward = 1 + relative, kernels(run, "pallas_tpu")
    assert forward.flops == 2 * groups * pairs * times * (dim + value_dim)
    assert forward.transcendentals == groups * pairs
    filled = 512
    tables = relative * 4 * 2 * filled * (dim + value_dim)
    assert forward.bytes == groups * filled * 4 * (2 * dim + 2 * value_dim + 5) + tables
    backward = kernels(gradient, "pallas_tpu")
    assert backward.flops - forward.flops == 2 * groups * pairs * times * (3 * dim + 2 * value_dim)
    if not relative:
        # In two kernels logits and the gradient of weights are computed twice.
        both = kernels(gradient, "pallas_triton").flops - kernels(run, "pallas_triton").flops
        assert both == 2 * groups * pairs * (4 * dim + 3 * value_dim)
