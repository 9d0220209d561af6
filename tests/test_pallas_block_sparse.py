"""Block-sparse attention, its kernels interpreted, and bi-level attention on them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import zoo
from kernels import bilevel_attention, block_sparse_attention, compat
from kernels.cost import cost
from kernels.dispatch import record_choices
from tests.triton_kernels import assert_model_has_its_kernels

KERNELS = ("pallas_tpu", "pallas_triton")
# Queries, keys, heads, width of keys and of values, query blocks, listed blocks, tokens of a key block. On a TPU the
# first three are one product, the others are gathered.
CASES = {
    "one token a block, all blocks": (49, 49, 2, 8, 8, 49, 49, 1),
    "one head, odd sizes": (12, 15, 1, 4, 6, 3, 3, 5),
    "lists of one": (12, 12, 2, 8, 8, 3, 1, 4),
    "larger blocks": (30, 48, 2, 16, 8, 2, 3, 12),
    "more than a tile": (144, 96, 1, 8, 8, 2, 2, 48),
}
FACTORS = (30, 35, 2, 8, 8, 3, 3, 5)


def operands(case, batch=2, dtype=jnp.float32, seed=0):
    """Arrays, lists with duplicates and empty entries, and a direction in which to differentiate."""
    n, m, heads, dim, value_dim, blocks, k, key_block = case
    rng = np.random.default_rng(seed)
    shapes = ((n, heads, dim), (m, heads, dim), (m, heads, value_dim))
    query, key, value = (jnp.asarray(rng.standard_normal((batch, *shape)), dtype) for shape in shapes)
    lists = rng.integers(-1, m // key_block, (batch, blocks, k))
    lists[0, 0], lists[0, 1] = -1, 0
    arrays = dict(query=query, key=key, value=value)
    direction = jnp.asarray(rng.standard_normal((batch, n, heads, value_dim)), jnp.float32)
    return arrays, jnp.asarray(lists, jnp.int32), direction


def with_factors(case):
    arrays, lists, direction = operands(case)
    factors = np.random.default_rng(1).uniform(0.5, 1.5, lists.shape)
    return arrays | {"block_weights": jnp.asarray(factors, jnp.float32)}, lists, direction


def gradient_program(op, direction):
    """A compiled function of arrays that gives the result and the gradients."""

    def loss(arrays):
        out = op(**arrays)
        return (out * direction.astype(jnp.promote_types(out.dtype, jnp.float32))).sum(), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def differentiated(op, arrays, direction):
    """Result and gradients."""
    (_, out), gradients = gradient_program(op, direction)(arrays)
    return jax.device_get(out), jax.device_get(gradients)


def by_kernel(arrays, lists, direction, implementation, **options):
    op = functools.partial(block_sparse_attention, lists=lists, implementation=implementation, **options)
    with compat.interpret():
        return differentiated(op, arrays, direction)


def by_xla(arrays, lists, direction, **options):
    """In float64."""
    with jax.enable_x64(True):
        arrays = jax.tree.map(lambda x: x.astype(jnp.float64), arrays)
        op = functools.partial(block_sparse_attention, lists=lists, implementation="xla", **options)
        return differentiated(op, arrays, direction)


def assert_close(found, expected, atol):
    found, expected = (jax.tree.map(lambda x: np.asarray(x, np.float64), x) for x in (found, expected))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol, rtol=atol), found, expected)


def full(query, key, value, *, lists, key_block, seen=None, scale=None):
    """Attention of all queries to all keys, of which each counts as often as it is listed."""
    n, m, blocks = query.shape[1], key.shape[1], lists.shape[1]
    times = (lists[..., None] == jnp.arange(m // key_block)).sum(2)
    times = jnp.repeat(jnp.repeat(times, n // blocks, axis=1), key_block, axis=2)[:, None]
    if seen is not None:
        times = times * seen
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    exponentials = times * jnp.exp(logits)
    total = exponentials.sum(-1, keepdims=True)
    weights = exponentials / jnp.where(total == 0, 1, total)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


@pytest.mark.parametrize("name", ["one head, odd sizes", "larger blocks"])
def test_the_xla_form_is_full_attention_weighted_by_how_often_keys_are_listed(name, float64):
    arrays, lists, direction = operands(CASES[name], dtype=jnp.float64)
    options = dict(lists=lists, key_block=CASES[name][-1], scale=0.7)
    expected = differentiated(functools.partial(full, **options), arrays, direction)
    found = differentiated(
        functools.partial(block_sparse_attention, implementation="xla", **options), arrays, direction
    )
    assert_close(found, expected, 1e-12)


def test_hidden_keys_are_as_if_they_were_not_there(float64):
    case = CASES["larger blocks"]
    arrays, lists, direction = operands(case, dtype=jnp.float64)
    n, m, blocks, key_block = case[0], case[1], case[5], case[7]
    rng = np.random.default_rng(2)
    valid, pairs = rng.random((2, m)) < 0.7, rng.random((2, n, m)) < 0.7
    at = np.where(lists < 0, 0, lists)[..., None] * key_block + np.arange(key_block)
    at = np.repeat(at.reshape(2, blocks, -1), n // blocks, axis=1)
    mask = np.take_along_axis(pairs, at, axis=2)
    seen = jnp.asarray(valid[:, None] & pairs)[:, None]
    options = dict(lists=lists, key_block=key_block)
    expected = differentiated(functools.partial(full, seen=seen, **options), arrays, direction)
    options |= dict(valid=jnp.asarray(valid), mask=jnp.asarray(mask), implementation="xla")
    found = differentiated(functools.partial(block_sparse_attention, **options), arrays, direction)
    assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_xla_form(name, implementation):
    arrays, lists, direction = operands(CASES[name])
    options = dict(key_block=CASES[name][-1])
    found = by_kernel(arrays, lists, direction, implementation, **options)
    assert found[0].dtype == jnp.float32
    assert_close(found, by_xla(arrays, lists, direction, **options), 2e-6)
    np.testing.assert_array_equal(found[0][0, : CASES[name][0] // CASES[name][5]], 0)


@pytest.mark.parametrize("implementation", KERNELS)
def test_factors_of_listed_blocks_have_gradients(implementation):
    arrays, lists, direction = with_factors(FACTORS)
    found = by_kernel(arrays, lists, direction, implementation, key_block=5)
    assert_close(found, by_xla(arrays, lists, direction, key_block=5), 4e-6)


@pytest.mark.parametrize("implementation", KERNELS)
def test_bfloat16_is_accumulated_in_float32(implementation):
    case = CASES["larger blocks"]
    arrays, lists, direction = operands(case, dtype=jnp.bfloat16)
    found = by_kernel(arrays, lists, direction, implementation, key_block=case[-1])
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(found))
    # Weights, and the results, are rounded to 8 bits of mantissa.
    assert_close(found, by_xla(arrays, lists, direction, key_block=case[-1]), 2**-5)


@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_masks_on_a_gpu(batch):
    arrays, lists, direction = with_factors(FACTORS)
    rng = np.random.default_rng(2)
    valid, mask = (jnp.asarray(rng.random(shape) < 0.7) for shape in ((2, 35), (batch, 30, 15)))
    found = by_kernel(arrays, lists, direction, "pallas_triton", key_block=5, valid=valid, mask=mask)
    assert_close(found, by_xla(arrays, lists, direction, key_block=5, valid=valid, mask=mask), 4e-6)


@pytest.mark.parametrize("implementation", ("xla", *KERNELS))
@pytest.mark.parametrize("name", ["lists of one", "larger blocks"])
def test_empty_lists_give_zeros(name, implementation):
    arrays, lists, direction = operands(CASES[name])
    lists = jnp.full_like(lists, -1)
    found = by_kernel(arrays, lists, direction, implementation, key_block=CASES[name][-1])
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), found)


@pytest.mark.parametrize("implementation", KERNELS)
def test_the_order_of_a_list_does_not_matter_and_results_repeat(implementation):
    case = CASES["larger blocks"]
    arrays, lists, direction = operands(case)

    def op(lists, arrays):
        return block_sparse_attention(**arrays, lists=lists, key_block=case[-1], implementation=implementation)

    with compat.interpret():
        program = jax.jit(lambda lists: gradient_program(lambda **x: op(lists, x), direction)(arrays))
        first, again, reversed_ = (jax.device_get(program(x)) for x in (lists, lists, lists[..., ::-1]))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert_close(reversed_, first, 1e-5)


@pytest.mark.parametrize("implementation", ("xla", *KERNELS))
@pytest.mark.parametrize("name", ["lists of one", "larger blocks"])
def test_what_is_not_a_number_reaches_those_who_see_it(name, implementation):
    """In a block of head 0 of sample 1: other samples, heads and who does not list it have exactly what they had."""
    case = CASES[name]
    arrays, _, direction = operands(case)
    blocks, k, key_block = case[5:]
    # Only block 0 of the queries lists block 0 of the keys, which has the number.
    lists = jnp.asarray((np.arange(blocks)[:, None] + np.arange(k)) % (case[1] // key_block), jnp.int32)
    lists = jnp.where(lists == 0, -1, lists).at[0, 0].set(0)[None].repeat(2, 0)
    queries, keys = np.zeros((2, case[0], case[2]), bool), np.zeros((2, case[1], case[2]), bool)
    queries[1, : case[0] // blocks, 0] = True
    for block in np.asarray(lists[1, 0]):
        keys[1, block * key_block : (block + 1) * key_block, 0] = block >= 0
    op = functools.partial(block_sparse_attention, lists=lists, key_block=key_block, implementation=implementation)
    program = gradient_program(op, direction)
    with compat.interpret():
        (_, out), gradients = jax.device_get(program(arrays))
        for operand in ("query", "key", "value"):
            dirty = arrays | {operand: arrays[operand].at[1, 0, 0].set(jnp.nan)}
            (_, found), moved = jax.device_get(program(dirty))
            np.testing.assert_array_equal(found[~queries], out[~queries])
            for of, reached in dict(query=queries, key=keys, value=keys).items():
                np.testing.assert_array_equal(moved[of][~reached], gradients[of][~reached])
            assert np.isnan(found[1, 0, 0]).all()


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("devices", [2, 4])
def test_each_device_computes_its_part_of_the_batch(devices, implementation):
    arrays, lists, direction = operands(CASES["lists of one"], batch=4)
    expected = by_xla(arrays, lists, direction, key_block=4)
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])
    rows = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        found = by_kernel(jax.device_put(arrays, rows), jax.device_put(lists, rows), direction, implementation)
    assert_close(found, expected, 2e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(case=(12, 12, 2, 129, 8, 3, 2, 4)), "a head is 129 channels wide; up to 128 would do"),
        (dict(batch=0), "a size is zero"),
        (dict(dtype=jnp.float16), "operands are float16; all bfloat16 or all float32"),
        (dict(options=dict(return_weights=True)), "implementation='xla' returns them"),
    ],
    ids=str,
)
def test_what_no_kernel_serves_is_left_to_xla(change, words):
    case = change.get("case", CASES["lists of one"])
    batch, dtype = change.get("batch", 2), change.get("dtype", jnp.float32)
    shapes = ((case[0], case[2], case[3]), (case[1], case[2], case[3]), (case[1], case[2], case[4]))
    query, key, value = (jnp.ones((batch, *shape), dtype) for shape in shapes)
    lists = jnp.zeros((batch, *case[5:7]), jnp.int32)
    call = functools.partial(block_sparse_attention, query, key, value, lists, **change.get("options", {}))
    with record_choices() as choices:
        jax.block_until_ready(call())
    assert {choice.implementation for choice in choices} == {"xla"}
    for implementation in KERNELS:
        with pytest.raises(NotImplementedError, match=words):
            call(implementation=implementation)


def test_what_only_a_tpu_does_not_serve():
    shape = jax.ShapeDtypeStruct((1, 8192, 8, 128), jnp.float32)
    lists = jax.ShapeDtypeStruct((1, 128, 4), jnp.int32)
    call = functools.partial(jax.eval_shape, functools.partial(block_sparse_attention, implementation="pallas_tpu"))
    with pytest.raises(NotImplementedError, match="MiB of fast memory, of 40; about"):
        call(shape, shape, shape, lists)
    small = jax.ShapeDtypeStruct((1, 64, 1, 8), jnp.float32)
    valid = jax.ShapeDtypeStruct((1, 64), bool)
    with pytest.raises(NotImplementedError, match="valid: not written for TPUs"):
        jax.eval_shape(
            lambda x, lists, valid: block_sparse_attention(x, x, x, lists, valid=valid, implementation="pallas_tpu"),
            *(small, jax.ShapeDtypeStruct((1, 8, 2), jnp.int32), valid),
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(lists=(2, 5, 2)), "lists is for 5 blocks of queries, which do not divide the 12 queries"),
        (dict(lists=(2, 3, 0)), "at least one entry a block"),
        (dict(key_block=5), "key_block must divide the 12 keys, got 5"),
        (dict(value=(2, 8, 2, 8)), "value"),
        (dict(mask=(2, 12, 9)), r"mask must be \(B or 1, 12, 8\)"),
        (dict(implementation="cudnn"), "which has pallas_tpu, pallas_triton, xla"),
    ],
    ids=str,
)
def test_names_what_is_wrong(change, words):
    shapes = dict(query=(2, 12, 2, 8), key=(2, 12, 2, 8), value=(2, 12, 2, 8), lists=(2, 3, 2)) | change
    dtypes = dict(lists=jnp.int32, mask=bool)
    arrays = {k: jnp.zeros(v, dtypes.get(k, jnp.float32)) if isinstance(v, tuple) else v for k, v in shapes.items()}
    with pytest.raises((ValueError, NotImplementedError), match=words):
        block_sparse_attention.__wrapped__(**arrays)


# Map, channels, heads, region, k, further options; on a TPU the first is one product and the others are gathered.
AVERAGED = dict(kv_downsample_mode="avgpool", kv_downsample_ratio=2)
MAPS = {
    "small regions": ((6, 8), 16, 2, (3, 2), 3, {}),
    "regions": ((8, 12), 8, 1, (4, 4), 4, {}),
    "ragged": ((7, 5), 12, 2, (3, 3), 4, dict(pad="zeros")),
    "pooled": ((8, 8), 16, 2, (4, 4), 2, dict(kv_downsample_mode="ada_maxpool", kv_per_win=3)),
    "ragged and pooled": (
        (9, 8),
        16,
        2,
        (4, 4),
        3,
        dict(pad="zeros", kv_downsample_mode="avgpool", kv_downsample_ratio=2),
    ),
}


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "pooled" else ()) for n in MAPS])
def test_bilevel_attention_by_kernels(name, implementation):
    (h, w), c, heads, region, k, options = MAPS[name]
    rng = np.random.default_rng(0)
    regions = -(-h // region[0]) * -(-w // region[1])
    indices = jnp.asarray(np.argsort(rng.random((2, regions, regions)))[..., :k], jnp.int32)
    arrays = dict(qkv=jnp.asarray(rng.standard_normal((2, h, w, 3 * c)), jnp.float32))
    if "ragged" in name:
        arrays["route_weights"] = jnp.asarray(rng.uniform(0.5, 1.5, indices.shape), jnp.float32)
    direction = jnp.asarray(rng.standard_normal((2, h, w, c)), jnp.float32)
    op = functools.partial(bilevel_attention, indices=indices, num_heads=heads, region=region, **options)
    with compat.interpret():
        found = differentiated(functools.partial(op, implementation=implementation), arrays, direction)
    with jax.enable_x64(True):
        arrays = jax.tree.map(lambda x: x.astype(jnp.float64), arrays)
        expected = differentiated(functools.partial(op, implementation="xla"), arrays, direction)
    assert_close(found, expected, 4e-6)


@pytest.mark.slow
def test_a_model_lowered_for_a_platform_holds_its_kernels():
    model = zoo.create_model("biformer_nano")
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 3)), jnp.float32)
    assert_model_has_its_kernels(model, images, "block_sparse_key_gradient")


def test_cost_is_what_the_mathematics_needs():
    b, n, heads, dim, blocks, k = 2, 64, 2, 16, 4, 3
    x = jax.ShapeDtypeStruct((b, n, heads, dim), jnp.float32)
    lists = jax.ShapeDtypeStruct((b, blocks, k), jnp.int32)
    pairs = b * heads * n * k * (n // blocks)

    def run(implementation, x, lists):
        return block_sparse_attention(x, x, x, lists, implementation=implementation)

    def gradient(implementation, x, lists):
        return jax.grad(lambda x: run(implementation, x, lists).sum())(x)

    def kernels(function, implementation):
        return cost(functools.partial(function, implementation), x, lists).by_primitive["pallas_call"]

    moved = 4 * b * n * heads * dim
    forward = kernels(run, "pallas_tpu")
    assert forward.flops == 2 * 2 * pairs * dim and forward.transcendentals == pairs
    assert forward.bytes == 4 * moved + 4 * b * blocks * k
    # The logits once more, and the gradients of weights, queries, keys and values; the result is not needed.
    backward = kernels(gradient, "pallas_tpu")
    assert backward.flops == 5 * 2 * pairs * dim and backward.bytes == 7 * moved + 4 * b * blocks * k
    # In two kernels logits and the gradient of weights are computed twice.
    assert kernels(gradient, "pallas_triton").flops == (2 + 3 + 4) * 2 * pairs * dim
