"""Block-sparse attention for TPUs, in Mosaic: what a call is split into, and what it takes of the VMEM.

A program has one batch element whole in fast memory, so that a listed block is an index into it and the gradient of
keys is summed there, in the order of the lists. Two bodies: many small blocks are one product of all queries and all
keys, weighted by how often each is listed (`block_sparse_dense`); larger ones are gathered (`block_sparse_listed`).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import block_sparse_plan, compat
from kernels.block_sparse_plan import Blocks, Plan
from kernels.pallas_tpu import block_sparse_dense as dense
from kernels.pallas_tpu import block_sparse_listed as listed

# Of the 64 to 128 MiB that a core has; the compiler needs some for what it spills.
VMEM_BYTES = 40 * 2**20
SMEM_BYTES = 128 * 1024
# Up to so many tokens all products together cost less than a product per block.
DENSE_TOKENS, DENSE_BLOCK, DENSE_ENTRIES = 256, 8, 256


def refusal(arrays, plan: Plan, weights=None, valid=None, mask=None) -> str | None:
    """Why this backend does not serve such a call, or None."""
    reason = block_sparse_plan.refusal(arrays, plan)
    if reason is not None:
        return reason
    for name, array in (("valid", valid), ("mask", mask)):
        if array is not None:
            return f"{name}: not written for TPUs; None would do"
    entries = plan.query.count * plan.k
    if 8 * entries > SMEM_BYTES:
        return f"lists have {entries} entries a batch element; up to {SMEM_BYTES // 8} would do"
    need = _vmem(arrays, plan, weights is not None)
    if need > VMEM_BYTES:
        tokens = plan.query.count * plan.query.tokens
        fits = tokens * VMEM_BYTES // need
        return (
            f"a batch element takes {need / 2**20:.0f} MiB of fast memory, of {VMEM_BYTES >> 20}; about {fits} queries "
            f"and keys of this width would do, not {tokens}"
        )
    return None


def attend(plan: Plan, arrays, lists, weights=None, valid=None, mask=None):
    """As `block_sparse_plan.attend`; without `valid` and `mask`."""
    return block_sparse_plan.attend(plan, _forward, _backward, arrays, lists, weights)


def _is_dense(plan: Plan, weighted: bool) -> bool:
    tokens = max(plan.query.count * plan.query.tokens, plan.key.count * plan.key.tokens)
    small = tokens <= DENSE_TOKENS and plan.query.tokens <= DENSE_BLOCK and plan.k <= DENSE_ENTRIES
    return small and plan.query.is_whole and plan.key.is_whole and not weighted


def _padded(shape, itemsize: int) -> int:
    """Bytes of an array in fast memory, where rows are of 128 numbers and tiles of 8 rows."""
    *outer, rows, lanes = shape
    return math.prod(outer) * (rows + -rows % (32 // itemsize)) * (lanes + -lanes % 128) * itemsize


def _vmem(arrays, plan: Plan, weighted: bool) -> int:
    """Bytes that the gradient, which takes more than the result, has in fast memory."""
    itemsize = jnp.dtype(arrays[0].dtype).itemsize
    if _is_dense(plan, weighted):
        blocks = [x.shape[1:] for x in arrays]
        blocks = [*blocks, (arrays[0].shape[1], plan.heads * plan.value_dim)]
        tokens = dense.tokens(plan)
        return sum(_padded(x, 4) + 4 * _padded(x, itemsize) for x in blocks) + 8 * _padded(tokens, 4)
    maps = _maps(plan)
    blocks = [(*m.size, x.shape[-1]) for m, x in zip(maps, arrays)]
    blocks.append((*maps[0].size, plan.heads * plan.value_dim))
    scratch = sum(_padded(shape, 4) for shape in listed.backward_scratch(plan, arrays))
    logits = _padded((plan.query.tokens, plan.k * listed.rounded(plan.key.tokens)), 4)
    return sum(4 * _padded(x, itemsize) for x in blocks) + scratch + 8 * logits


def _maps(plan: Plan) -> tuple[Blocks, ...]:
    """How each array lies as a map that whole blocks cover; contiguous blocks are its rows."""

    def whole(blocks: Blocks) -> Blocks:
        if blocks.size[0] == 1:
            return Blocks((blocks.count, blocks.block[1]), (1, blocks.block[1]))
        return Blocks(tuple(s + -s % b for s, b in zip(blocks.size, blocks.block)), blocks.block)

    query, key = whole(plan.query), whole(plan.key)
    return (query,) if plan.packed else (query, key, key)


def _grow(x, blocks: Blocks):
    """Rows `(B, tokens, channels)` as the map, filled up with zeros where blocks stick out."""
    h, w = blocks.size
    x = x.reshape(x.shape[0], h, w, -1)
    below, beside = -h % blocks.block[0], -w % blocks.block[1]
    return jnp.pad(x, ((0, 0), (0, below), (0, beside), (0, 0))) if below or beside else x


def _as_maps(plan: Plan, arrays):
    layouts = (plan.query,) if plan.packed else (plan.query, plan.key, plan.key)
    maps = _maps(plan)
    return tuple(
        _grow(x, blocks).reshape(x.shape[0], *m.size, x.shape[-1]) for x, blocks, m in zip(arrays, layouts, maps)
    )


def _as_rows(x, blocks: Blocks):
    """The inverse of `_grow`."""
    h, w = blocks.size
    if blocks.size[0] > 1:
        x = x[:, :h, :w]
    return x.reshape(x.shape[0], h * w, -1)


def _whole(x):
    """One batch element of an array."""
    return pl.BlockSpec((1, *x.shape[1:]), lambda b, rest=x.ndim - 1: (b, *(0,) * rest))


def _shared(x):
    """An array that is the same for all."""
    return pl.BlockSpec(x.shape, lambda b, rest=x.ndim: (0,) * rest)


def _scalars(x):
    """A batch element's entries, read one by one."""
    return pl.BlockSpec((1, 1, x.shape[-1]), lambda b: (b, 0, 0), memory_space=pltpu.SMEM)


def _call(body, name, plan, inputs, in_specs, outputs, scratch, cost):
    return compat.pallas_call(
        functools.partial(body, plan=plan),
        name=f"block_sparse_{name}",
        grid=(inputs[0].shape[0],),
        in_specs=in_specs,
        out_specs=[_whole(x) for x in outputs],
        out_shape=[compat.shape_like(x.shape, x.dtype, *inputs) for x in outputs],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=compat.tpu_params(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES + VMEM_BYTES // 4
        ),
        cost_estimate=cost,
    )(*inputs)


def _of(shape, like):
    return jax.ShapeDtypeStruct(shape, like.dtype)


def _forward(plan: Plan, arrays, lists, weights, valid, mask):
    batch = lists.shape[0]
    width = plan.heads * plan.value_dim
    cost = plan.cost(batch, 1, 1, (arrays, lists, weights, _of((*arrays[0].shape[:2], width), arrays[-1])))
    if _is_dense(plan, weights is not None):
        out = _of((*arrays[0].shape[:2], width), arrays[-1])
        constants = dense.constants(plan)
        inputs = (*arrays, lists, *constants)
        specs = [*map(_whole, (*arrays, lists)), *map(_shared, constants)]
        return _call(dense.forward, "forward", plan, inputs, specs, [out], [out.shape[1:]], cost)[0], None
    maps, scalars = _as_maps(plan, arrays), _entries(lists, weights)
    out = _of((*maps[0].shape[:3], width), arrays[-1])
    specs = [*map(_whole, maps), *map(_scalars, scalars)]
    body = functools.partial(listed.forward, maps=_maps(plan), weighted=weights is not None)
    scratch = listed.forward_scratch(plan, arrays)
    (out,) = _call(body, "forward", plan, (*maps, *scalars), specs, [out], scratch, cost)
    return _as_rows(out, plan.query), None


def _entries(lists, weights):
    """Lists, and factors if there are any, as `(B, 1, entries)`."""
    present = [lists] if weights is None else [lists, weights.astype(jnp.float32)]
    return [x.reshape(x.shape[0], 1, -1) for x in present]


def _backward(plan: Plan, arrays, lists, weights, valid, mask, _, cotangent):
    batch = lists.shape[0]
    weighted = weights is not None
    moved = (arrays, arrays, lists, weights, weights, cotangent)
    cost = plan.cost(batch, 3, 2, moved)
    if _is_dense(plan, weighted):
        constants = dense.constants(plan)
        inputs = (*arrays, cotangent, lists, *constants)
        specs = [*map(_whole, (*arrays, cotangent, lists)), *map(_shared, constants)]
        outputs = [_of(x.shape, x) for x in arrays]
        scratch = [x.shape[1:] for x in arrays]
        return tuple(_call(dense.backward, "gradient", plan, inputs, specs, outputs, scratch, cost)), None
    maps, scalars = _as_maps(plan, arrays), _entries(lists, weights)
    (moved_back,) = _as_maps(Plan(**{**plan.__dict__, "packed": True}), (cotangent,))
    inputs = (*maps, moved_back, *scalars)
    specs = [*map(_whole, (*maps, moved_back)), *map(_scalars, scalars)]
    outputs = [_of(x.shape, x) for x in maps]
    padded = listed.rounded(plan.key.tokens)
    if weighted:
        outputs.append(jax.ShapeDtypeStruct((batch, plan.query.count, 1, plan.k * padded), jnp.float32))
    body = functools.partial(listed.backward, maps=_maps(plan), weighted=weighted)
    scratch = listed.backward_scratch(plan, arrays)
    *gradients, last = (*_call(body, "gradient", plan, inputs, specs, outputs, scratch, cost), None)
    if weighted:
        *gradients, last = gradients
        last = last.reshape(batch, plan.query.count, plan.k, padded).sum(-1).astype(weights.dtype)
    layouts = (plan.query,) if plan.packed else (plan.query, plan.key, plan.key)
    return tuple(_as_rows(x, blocks) for x, blocks in zip(gradients, layouts)), last
