"""Block-sparse attention for NVIDIA GPUs from Ampere on, in Triton.

A program takes some queries of one block and head and goes through the keys of its list, read where they lie; for the
gradient of keys another goes through the queries of all blocks that list them, in the order of their places. The
blocks may be as small as one token: every row of a tile has an address of its own.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from kernels import block_sparse_plan, compat, tuning
from kernels.block_sparse_plan import Plan, inverted
from kernels.pallas_gpu.tiles import dot, gather, put, side, softmax_step

# Rows of a tile by the bytes of a number, and bytes of a tile at most: a product in float32 has no matrix instruction
# and holds both its operands in registers.
TILES, TILE_BYTES = {2: 64, 4: 32}, 8192
INT32 = 2**31


def refusal(arrays, plan: Plan, weights=None, valid=None, mask=None) -> str | None:
    """Why this backend does not serve such a call, or None."""
    reason = block_sparse_plan.refusal(arrays, plan)
    if reason is not None:
        return reason
    batch, places = arrays[0].shape[0], plan.query.count * plan.k
    sizes = {"operands": max(math.prod(x.shape) for x in arrays), "lists": batch * places}
    sizes["sorted lists"] = places * (plan.key.count + 1)
    if mask is not None:
        sizes["mask"] = math.prod(mask.shape)
    for name, size in sizes.items():
        if size >= INT32:
            return f"{name} have {size} elements, which 32 bits cannot count; a smaller batch would do"
    return None


def attend(plan: Plan, arrays, lists, weights=None, valid=None, mask=None):
    """As `block_sparse_plan.attend`, but `valid` and `mask` are bool."""
    bits = [x if x is None else x.astype(jnp.int8) for x in (valid, mask)]
    return block_sparse_plan.attend(plan, _forward, _backward, arrays, lists, weights, *bits)


def _tile(tokens: int, width: int, dtype) -> int:
    """Rows of a tile."""
    itemsize = jnp.dtype(dtype).itemsize
    most = max(16, min(TILES[itemsize], TILE_BYTES // (pl.next_power_of_2(width) * itemsize)))
    return min(side(tokens), most)


def _blocks(plan: Plan, dtype) -> dict[str, int]:
    width = max(plan.dim, plan.value_dim)
    default = dict(
        queries=_tile(plan.query.tokens, width, dtype),
        keys=_tile(plan.k * pl.next_power_of_2(plan.key.tokens), width, dtype),
        own_keys=_tile(plan.key.tokens, width, dtype),
        listing_queries=_tile(plan.query.count * pl.next_power_of_2(plan.query.tokens), width, dtype),
        warps=4 if jnp.dtype(dtype).itemsize == 4 or plan.query.tokens > 32 else 2,
        stages=2,
    )
    bucket = dict(
        tokens=tuning.bucket(plan.query.tokens),
        k=tuning.bucket(plan.k),
        dim=pl.next_power_of_2(width),
        dtype=str(dtype),
    )
    return tuning.blocks("block_sparse", "gpu", default, **bucket)


def _range(size: int, start=0):
    return start + jax.lax.broadcasted_iota(jnp.int32, (size,), 0)


class _Channels:
    """Reads and writes tiles of one head's channels."""

    def __init__(self, batch, first, width: int):
        self.batch, self.width = batch, width
        self.channels = _range(side(width))
        self.first = first

    def _at(self, ref, rows, inside, outside=(0, 0)):
        """Where a tile lies, which of it is there, what is not having the row and column `outside`."""
        shape = rows.shape[0], self.channels.shape[0]
        rows, columns = jnp.where(inside, rows, outside[0]), self.channels + self.first
        # Tiles as wide as the head have no mask along it: without one a load is of 16 bytes.
        there = inside[:, None]
        if self.width < shape[1]:
            real = self.channels < self.width
            columns, there = jnp.where(real, columns, outside[1]), there & real[None, :]
        index = (self.batch, *(jnp.broadcast_to(x, shape) for x in (rows[:, None], columns[None, :])))
        return ref.at[index], jnp.broadcast_to(there, shape)

    def load(self, ref, rows, inside):
        at, mask = self._at(ref, rows, inside)
        return triton.load(at, mask=mask, other=0.0)

    def store(self, ref, rows, inside, value):
        # See `put`.
        at, mask = self._at(ref, rows, inside, outside=ref.shape[1:])
        triton.store(at, value.astype(ref.dtype), mask=mask)


class _Heads:
    """Which channels hold the head of this program in each operand, and in the output."""

    def __init__(self, plan: Plan):
        self.head, self.batch = pl.program_id(1), pl.program_id(2)
        _, (q, k, v) = plan.operands((None,) if plan.packed else (None,) * 3)
        self.query = _Channels(self.batch, q + self.head * plan.dim, plan.dim)
        self.key = _Channels(self.batch, k + self.head * plan.dim, plan.dim)
        self.value = _Channels(self.batch, v + self.head * plan.value_dim, plan.value_dim)
        self.out = _Channels(self.batch, self.head * plan.value_dim, plan.value_dim)


def _own(blocks, tile: int):
    """The tokens of this program: their block, numbers in it, rows, and whether they are on the map."""
    tiles = -(-blocks.tokens // tile)
    block = jax.lax.div(pl.program_id(0), tiles)
    token = _range(tile, jax.lax.rem(pl.program_id(0), tiles) * tile)
    row, inside = blocks.place(jnp.full_like(token, block), token)
    return block, row, inside & (token < blocks.tokens)


def _listed(plan: Plan, tile: int, step, block, heads, lists, weights, valid):
    """Keys number `step * tile` and so on of a list.

    Returns:
        Entries of the list, tokens of their blocks, rows, whether they are loaded, whether they are seen, and factors.
    """
    padded = pl.next_power_of_2(plan.key.tokens)
    place = _range(tile, step * tile)
    entry, token = jax.lax.div(place, jnp.full_like(place, padded)), jax.lax.rem(place, jnp.full_like(place, padded))
    real = (entry < plan.k) & (token < plan.key.tokens)
    listed = gather(lists, heads.batch, block * plan.k + entry, mask=real, other=-1)
    seen = listed >= 0
    row, inside = plan.key.place(jnp.where(seen, listed, 0), token)
    if valid is not None:
        seen = seen & (gather(valid, heads.batch, row, mask=seen) != 0)
    factor = None
    if weights is not None:
        factor = gather(weights, heads.batch, block * plan.k + entry, mask=seen, other=0.0).astype(jnp.float32)
    return entry, token, row, seen & inside, seen, factor


def _masked(mask, batch, queries, columns, both):
    """Where `mask` lets a query see a listed key; indices and `both` have the same shape."""
    batch = batch if mask.shape[0] > 1 else 0
    return both & (gather(mask, batch, queries, columns, mask=both) != 0)


def _forward_body(*refs, plan: Plan, tiles: dict[str, int], present):
    (query, key, value), (lists, weights, valid, mask), (out, summed) = _named(refs, present)
    heads = _Heads(plan)
    block, rows, inside = _own(plan.query, tiles["queries"])
    q = heads.query.load(query, rows, inside)
    steps = -(-plan.k * pl.next_power_of_2(plan.key.tokens) // tiles["keys"])

    def step(i, carry):
        acc, peak, total = carry
        entry, token, row, loaded, seen, factor = _listed(plan, tiles["keys"], i, block, heads, lists, weights, valid)
        k, v = heads.key.load(key, row, loaded), heads.value.load(value, row, loaded)
        logits = dot(q, k, trans_b=True) * plan.scale
        if factor is not None:
            logits = logits * factor[None, :]
        both = jnp.broadcast_to(seen[None, :], logits.shape)
        if mask is not None:
            column = jnp.broadcast_to((entry * plan.key.tokens + token)[None, :], logits.shape)
            both = both & inside[:, None]
            both = _masked(mask, heads.batch, jnp.broadcast_to(rows[:, None], logits.shape), column, both)
        p, shrink, peak, total = softmax_step(logits, both, peak, total)
        if factor is not None:
            p = p * factor[None, :]
        return acc * shrink[:, None] + dot(p.astype(v.dtype), v), peak, total

    carry = (
        jnp.zeros((rows.shape[0], heads.value.channels.shape[0]), jnp.float32),
        jnp.full(rows.shape, -jnp.inf, jnp.float32),
        jnp.zeros(rows.shape, jnp.float32),
    )
    acc, peak, total = step(0, carry) if steps == 1 else jax.lax.fori_loop(0, steps, step, carry)
    some = total != 0
    heads.out.store(out, rows, inside, acc / jnp.where(some, total, 1.0)[:, None])
    log = jnp.where(some, peak + jnp.log(jnp.where(some, total, 1.0)), 0.0)
    put(summed, heads.batch, heads.head, rows, value=log, mask=inside)


def _query_body(*refs, plan: Plan, tiles: dict[str, int], present):
    """Gradients of queries and factors, and what the gradient of keys needs: the weighted means of the gradient."""
    operands, extras, rest = _named(refs, present)
    (query, key, value), (lists, weights, valid, mask) = operands, extras
    out, cotangent, summed, gradient, means = rest[:5]
    heads = _Heads(plan)
    block, rows, inside = _own(plan.query, tiles["queries"])
    q = heads.query.load(query, rows, inside)
    do, o = heads.out.load(cotangent, rows, inside), heads.out.load(out, rows, inside)
    log = gather(summed, heads.batch, heads.head, rows, mask=inside, other=0.0)
    mean = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=1)
    put(means, heads.batch, heads.head, rows, value=mean, mask=inside)
    tile = jax.lax.rem(pl.program_id(0), -(-plan.query.tokens // tiles["queries"]))
    steps = -(-plan.k * pl.next_power_of_2(plan.key.tokens) // tiles["keys"])

    def step(i, acc):
        entry, token, row, loaded, seen, factor = _listed(plan, tiles["keys"], i, block, heads, lists, weights, valid)
        k, v = heads.key.load(key, row, loaded), heads.value.load(value, row, loaded)
        products = dot(q, k, trans_b=True) * plan.scale
        logits = products if factor is None else products * factor[None, :]
        both = inside[:, None] & seen[None, :]
        if mask is not None:
            column = jnp.broadcast_to((entry * plan.key.tokens + token)[None, :], logits.shape)
            both = _masked(mask, heads.batch, jnp.broadcast_to(rows[:, None], logits.shape), column, both)
        p = jnp.where(both, jnp.exp(logits - log[:, None]), 0.0)
        plain = dot(do, v, trans_b=True)
        ds = jnp.where(both, p * ((plain if factor is None else plain * factor[None, :]) - mean[:, None]), 0.0)
        if factor is not None:
            by_key = jnp.sum(ds * products + jnp.where(both, p * plain, 0.0), axis=0)
            place = _range(tiles["keys"], i * tiles["keys"])
            wanted = place < rest[5].shape[-1]
            put(rest[5], heads.batch, heads.head, tile, block, place, value=by_key, mask=wanted)
            ds = ds * factor[None, :]
        return acc + dot(ds.astype(k.dtype), k)

    acc = jnp.zeros((rows.shape[0], heads.query.channels.shape[0]), jnp.float32)
    acc = step(0, acc) if steps == 1 else jax.lax.fori_loop(0, steps, step, acc)
    heads.query.store(gradient, rows, inside, acc * plan.scale)


def _key_body(*refs, plan: Plan, tiles: dict[str, int], present):
    """Gradients of keys and values."""
    operands, (_, weights, valid, mask), rest = _named(refs, present)
    query, key, value = operands
    places, starts, cotangent, summed, means = rest[:5]
    key_gradient, value_gradient = (rest[-1], rest[-1]) if plan.packed else rest[-2:]
    heads = _Heads(plan)
    own_tiles = -(-plan.key.tokens // tiles["own_keys"])
    block, rows, inside = _own(plan.key, tiles["own_keys"])
    number = _range(tiles["own_keys"], jax.lax.rem(pl.program_id(0), own_tiles) * tiles["own_keys"])
    seen = number < plan.key.tokens
    if valid is not None:
        seen = seen & (gather(valid, heads.batch, rows, mask=inside) != 0)
    k, v = heads.key.load(key, rows, inside), heads.value.load(value, rows, inside)
    start, end = starts[heads.batch, block], starts[heads.batch, block + 1]
    padded, tile = pl.next_power_of_2(plan.query.tokens), tiles["listing_queries"]

    def step(i, carry):
        key_acc, value_acc = carry
        row = _range(tile, i * tile)
        at, token = start + jax.lax.div(row, jnp.full_like(row, padded)), jax.lax.rem(row, jnp.full_like(row, padded))
        real = (at < end) & (token < plan.query.tokens)
        place = gather(places, heads.batch, at, mask=real)
        asking = jax.lax.div(place, jnp.full_like(place, plan.k))
        query_row, on_map = plan.query.place(asking, token)
        on_map = on_map & real
        q, do = heads.query.load(query, query_row, on_map), heads.out.load(cotangent, query_row, on_map)
        log, mean = (gather(x, heads.batch, heads.head, query_row, mask=on_map, other=0.0) for x in (summed, means))
        logits = dot(k, q, trans_b=True) * plan.scale
        if weights is not None:
            factor = gather(weights, heads.batch, place, mask=on_map, other=0.0).astype(jnp.float32)[None, :]
            logits = logits * factor
        both = seen[:, None] & on_map[None, :]
        if mask is not None:
            entry = jax.lax.rem(place, jnp.full_like(place, plan.k))
            column = (entry * plan.key.tokens)[None, :] + number[:, None]
            both = _masked(mask, heads.batch, jnp.broadcast_to(query_row[None, :], both.shape), column, both)
        p = jnp.where(both, jnp.exp(logits - log[None, :]), 0.0)
        moved = dot(v, do, trans_b=True)
        if weights is not None:
            moved = moved * factor
        ds = jnp.where(both, p * (moved - mean[None, :]), 0.0)
        if weights is not None:
            p, ds = jnp.where(both, p * factor, 0.0), jnp.where(both, ds * factor, 0.0)
        return key_acc + dot(ds.astype(q.dtype), q), value_acc + dot(p.astype(do.dtype), do)

    shape = rows.shape[0]
    carry = tuple(jnp.zeros((shape, c.channels.shape[0]), jnp.float32) for c in (heads.key, heads.value))
    steps = jax.lax.div((end - start) * padded + tile - 1, tile)
    key_acc, value_acc = jax.lax.fori_loop(0, steps, step, carry)
    heads.key.store(key_gradient, rows, inside, key_acc * plan.scale)
    heads.value.store(value_gradient, rows, inside, value_acc)


def _named(refs, present):
    """References to queries, keys and values, to what there may be beside them, None where it is not, and the rest."""
    left = iter(refs)
    operands = [next(left) for _ in range(3)]
    extras = [next(left) if there else None for there in present]
    return operands, extras, list(left)


def _call(body, name: str, plan: Plan, grid, inputs, outputs, cost, extras, aliases=None):
    """Runs a kernel over whole arrays; extras of None are left out."""
    tiles = _blocks(plan, inputs[0].dtype)
    present = tuple(x is not None for x in extras)
    operands = [*inputs[:3], *(x for x in extras if x is not None), *inputs[3:]]
    return compat.pallas_call(
        functools.partial(body, plan=plan, tiles=tiles, present=present),
        name=f"block_sparse_{name}",
        grid=grid,
        in_specs=[pl.no_block_spec] * len(operands),
        out_specs=[pl.no_block_spec] * len(outputs),
        out_shape=[compat.shape_like(*output, *operands) for output in outputs],
        input_output_aliases={} if aliases is None else {len(operands) - 1: 0},
        compiler_params=compat.triton_params(tiles["warps"], tiles["stages"]),
        cost_estimate=cost,
    )(*operands)


def _flat(lists, weights, valid, mask):
    """Lists and factors with one axis for blocks and entries."""
    batch = lists.shape[0]
    return lists.reshape(batch, -1), None if weights is None else weights.reshape(batch, -1), valid, mask


def _grid(plan: Plan, blocks, tile: int, batch: int):
    return blocks.count * -(-blocks.tokens // tile), plan.heads, batch


def _forward(plan: Plan, arrays, lists, weights, valid, mask):
    operands, _ = plan.operands(arrays)
    batch, tokens = operands[0].shape[:2]
    tiles = _blocks(plan, operands[0].dtype)
    outputs = [
        ((batch, tokens, plan.heads * plan.value_dim), operands[2].dtype),
        ((batch, plan.heads, tokens), jnp.dtype(jnp.float32)),
    ]
    extras = _flat(lists, weights, valid, mask)
    moved = (arrays, extras, [jax.ShapeDtypeStruct(*output) for output in outputs])
    cost = plan.cost(batch, 1, 1, moved)
    grid = _grid(plan, plan.query, tiles["queries"], batch)
    out, summed = _call(_forward_body, "forward", plan, grid, operands, outputs, cost, extras)
    return out, (out, summed)


def _backward(plan: Plan, arrays, lists, weights, valid, mask, kept, cotangent):
    out, summed = kept
    operands, _ = plan.operands(arrays)
    batch, tokens = operands[0].shape[:2]
    tiles = _blocks(plan, operands[0].dtype)
    extras = _flat(lists, weights, valid, mask)
    padded = pl.next_power_of_2(plan.key.tokens)
    parts = -(-plan.query.tokens // tiles["queries"])
    outputs = [(operands[0].shape, operands[0].dtype), (summed.shape, summed.dtype)]
    if weights is not None:
        shape = (batch, plan.heads, parts, plan.query.count, plan.k * padded)
        outputs.append((shape, jnp.dtype(jnp.float32)))
    inputs = (*operands, out, cotangent, summed)
    rows = jax.ShapeDtypeStruct((batch, tokens, plan.heads * plan.dim), operands[0].dtype)
    written = [rows, *(jax.ShapeDtypeStruct(*output) for output in outputs[1:])]
    cost = plan.cost(batch, 2, 1, (arrays, extras, inputs[3:], written))
    grid = _grid(plan, plan.query, tiles["queries"], batch)
    query_gradient, means, *by_key = _call(_query_body, "query_gradient", plan, grid, inputs, outputs, cost, extras)

    weights_gradient = None
    if weights is not None:
        by_key = by_key[0].reshape(batch, plan.heads, parts, plan.query.count, plan.k, padded)
        weights_gradient = by_key.sum((1, 2, 5)).astype(weights.dtype)

    places, starts = inverted(lists, plan.key.count)
    inputs = (*operands, places, starts, cotangent, summed, means)
    outputs = [(x.shape, x.dtype) for x in operands[1:]]
    if plan.packed:
        # Into the array that holds the gradient of the queries already.
        inputs, outputs = (*inputs, query_gradient), outputs[:1]
    keys = jax.ShapeDtypeStruct((batch, operands[1].shape[1], plan.heads * plan.dim), operands[1].dtype)
    values = jax.ShapeDtypeStruct((*keys.shape[:2], plan.heads * plan.value_dim), keys.dtype)
    cost = plan.cost(batch, 2, 2, (arrays, extras, places, starts, cotangent, summed, means, keys, values))
    grid = _grid(plan, plan.key, tiles["own_keys"], batch)
    gradients = _call(
        _key_body, "key_gradient", plan, grid, inputs, outputs, cost, extras, "last" if plan.packed else None
    )
    return (tuple(gradients) if plan.packed else (query_gradient, *gradients)), weights_gradient
