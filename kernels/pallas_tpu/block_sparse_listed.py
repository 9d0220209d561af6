"""Block-sparse attention for TPUs: bodies that gather the listed blocks, one block of queries at a time."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.block_sparse_plan import Blocks, Plan
from kernels.pallas_tpu.scan_parts import Products


def rounded(tokens: int) -> int:
    """Rows that a block has in fast memory: whole tiles."""
    return tokens + -tokens % 8


def _cut(plan: Plan, arrays):
    """Shapes of the arrays in blocks."""
    layouts = (plan.query,) if plan.packed else (plan.query, plan.key, plan.key)
    return [(blocks.count, rounded(blocks.tokens), x.shape[-1]) for x, blocks in zip(arrays, layouts)]


def _gathered(plan: Plan):
    """Shape of the listed keys and values, side by side."""
    return plan.k, rounded(plan.key.tokens), plan.heads * (plan.dim + plan.value_dim)


def _own(plan: Plan):
    """Shape of the outputs in blocks."""
    return plan.query.count, rounded(plan.query.tokens), plan.heads * plan.value_dim


def forward_scratch(plan: Plan, arrays) -> list[tuple[int, ...]]:
    """What `forward` holds in fast memory, all float32."""
    return [*_cut(plan, arrays), _gathered(plan), _own(plan)]


def backward_scratch(plan: Plan, arrays) -> list[tuple[int, ...]]:
    """What `backward` holds in fast memory, all float32."""
    return [*_cut(plan, arrays) * 2, _own(plan), *[_gathered(plan)] * 2]


def _loop(count: int, step):
    """`step(i)` for every i."""

    def body(i, _):
        step(i)
        return 0

    jax.lax.fori_loop(0, count, body, 0)


def _to_blocks(source, target, blocks: Blocks):
    """Cuts a map `(1, H, W, channels)` into `(blocks, tokens, channels)`, filled up to whole tiles with zeros."""
    height, width = blocks.block
    if blocks.tokens % 8:
        target[...] = jnp.zeros(target.shape, target.dtype)

    def row_of_blocks(i):
        for y in range(height):
            row = source[0, i * height + y].astype(jnp.float32)
            for x in range(blocks.across):
                target[i * blocks.across + x, y * width : (y + 1) * width] = row[x * width : (x + 1) * width]

    _loop(blocks.count // blocks.across, row_of_blocks)


def _from_blocks(source, target, blocks: Blocks):
    """The inverse of `_to_blocks`."""
    height, width = blocks.block

    def row_of_blocks(i):
        for y in range(height):
            parts = [source[i * blocks.across + x, y * width : (y + 1) * width] for x in range(blocks.across)]
            row = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)
            target[0, i * height + y] = row.astype(target.dtype)

    _loop(blocks.count // blocks.across, row_of_blocks)


class _Operands:
    """Queries, keys and values in blocks, and the channels that are theirs."""

    def __init__(self, plan: Plan, cut):
        self.plan = plan
        self.blocks, self.first = plan.operands(tuple(cut))

    def query(self, block, head: int):
        at = self.first[0] + head * self.plan.dim
        return self.blocks[0][block, :, at : at + self.plan.dim]

    def add_query(self, block, head: int, value):
        at = self.first[0] + head * self.plan.dim
        self.blocks[0][block, :, at : at + self.plan.dim] = value

    def parts(self):
        """Keys and values: the blocks, their channels there, and their channels where they are gathered."""
        keys, values = self.plan.heads * self.plan.dim, self.plan.heads * self.plan.value_dim
        return (
            (self.blocks[1], slice(self.first[1], self.first[1] + keys), slice(0, keys)),
            (self.blocks[2], slice(self.first[2], self.first[2] + values), slice(keys, keys + values)),
        )


def _gather(plan: Plan, operands: _Operands, block, lists, weights, gathered):
    """Copies the listed keys and values side by side.

    Returns:
        `(1, k * rows)`: 1 where there is a key and 0 elsewhere, int32, and the factors, float32, or None.
    """
    rows, tokens = rounded(plan.key.tokens), plan.key.tokens
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, plan.k * rows), 1)

    def step(entry, carry):
        seen, factors = carry
        place = block * plan.k + entry
        at = lists[0, 0, place]

        @pl.when(at >= 0)
        def _():
            for source, there, here in operands.parts():
                gathered[entry, :, here] = source[at, :, there]

        @pl.when(at < 0)
        def _():
            gathered[entry] = jnp.zeros(gathered.shape[1:], gathered.dtype)

        first = entry * rows
        mine = (lane >= first) & (lane < first + jnp.where(at >= 0, tokens, 0))
        seen = jnp.where(mine, 1, seen)
        if weights is not None:
            factors = jnp.where(mine, weights[0, 0, place], factors)
        return seen, factors

    factors = None if weights is None else jnp.zeros(lane.shape, jnp.float32)
    return jax.lax.fori_loop(0, plan.k, step, (jnp.zeros_like(lane), factors))


def _head(plan: Plan, gathered, head: int):
    """Keys and values of a head, `(k * rows, channels)`."""
    keys = plan.heads * plan.dim + head * plan.value_dim
    of_keys = gathered[:, :, head * plan.dim : (head + 1) * plan.dim]
    of_values = gathered[:, :, keys : keys + plan.value_dim]
    return tuple(x.reshape(-1, x.shape[-1]) for x in (of_keys, of_values))


def product(a, b, over: tuple[int, int], dtype):
    """The product of two matrices over an axis of each, taken in `dtype` and summed in float32."""
    return Products(dtype == jnp.bfloat16)(a, b, ((over[0],), (over[1],)))


def softmax(logits, times):
    """Softmax over the last axis in which every logit counts `times`; zero where that is zero everywhere."""
    there = times > 0
    peak = jnp.max(jnp.where(there, logits, -jnp.inf), axis=-1, keepdims=True)
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)
    exponentials = jnp.where(there, jnp.exp(logits - peak) * times, 0.0)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    return exponentials / jnp.where(total == 0, 1.0, total)


def forward(*refs, plan: Plan, maps, weighted: bool):
    """A batch element's outputs. References: maps, lists, factors if `weighted`, outputs, `forward_scratch`."""
    count = len(maps)
    sources, (lists, *rest) = refs[:count], refs[count:]
    weights = rest.pop(0) if weighted else None
    out, cut, (gathered, outputs) = rest[0], rest[1 : 1 + count], rest[1 + count :]
    dtype = sources[0].dtype
    for source, target, blocks in zip(sources, cut, maps):
        _to_blocks(source, target, blocks)
    operands = _Operands(plan, cut)

    def block(r):
        seen, factors = _gather(plan, operands, r, lists, weights, gathered)
        for head in range(plan.heads):
            key, value = _head(plan, gathered, head)
            logits = product(operands.query(r, head), key, (1, 1), dtype) * plan.scale
            if weighted:
                logits = logits * factors
            p = softmax(logits, seen.astype(jnp.float32))
            if weighted:
                p = p * factors
            at = head * plan.value_dim
            outputs[r, :, at : at + plan.value_dim] = product(p, value, (1, 0), dtype)

    _loop(plan.query.count, block)
    _from_blocks(outputs, out, maps[0])


def backward(*refs, plan: Plan, maps, weighted: bool):
    """A batch element's gradients.

    References: maps, the outputs' gradient, lists, factors if `weighted`, gradients of the maps, for every listed key
    that of its factor if `weighted`, `backward_scratch`.
    """
    count = len(maps)
    sources, (cotangent, lists, *rest) = refs[:count], refs[count:]
    weights = rest.pop(0) if weighted else None
    targets, rest = rest[:count], rest[count:]
    by_key = rest.pop(0) if weighted else None
    cut, gradients, (moved, gathered, changes) = rest[:count], rest[count : 2 * count], rest[2 * count :]
    dtype = sources[0].dtype
    for source, target, blocks in zip((*sources, cotangent), (*cut, moved), (*maps, maps[0])):
        _to_blocks(source, target, blocks)
    for gradient in gradients:
        gradient[...] = jnp.zeros(gradient.shape, gradient.dtype)
    operands, sums = _Operands(plan, cut), _Operands(plan, gradients)

    def block(r):
        seen, factors = _gather(plan, operands, r, lists, weights, gathered)
        times = seen.astype(jnp.float32)
        of_factors = jnp.zeros(times.shape, jnp.float32)
        for head in range(plan.heads):
            key, value = _head(plan, gathered, head)
            query = operands.query(r, head)
            at = head * plan.value_dim
            do = moved[r, :, at : at + plan.value_dim]
            products = product(query, key, (1, 1), dtype) * plan.scale
            plain = product(do, value, (1, 1), dtype)
            p = softmax(products * factors if weighted else products, times)
            dp = plain * factors if weighted else plain
            mean = jnp.sum(jnp.where(times > 0, p * dp, 0.0), axis=-1, keepdims=True)
            ds = jnp.where(times > 0, p * (dp - mean), 0.0)
            if weighted:
                change = jnp.where(times > 0, ds * products + p * plain, 0.0)
                of_factors = of_factors + jnp.sum(change, axis=0, keepdims=True)
                p, ds = p * factors, ds * factors
            ds = ds * plan.scale
            sums.add_query(r, head, product(ds, key, (1, 0), dtype))
            of_keys, of_values = product(ds, query, (0, 0), dtype), product(p, do, (0, 0), dtype)
            shape = changes.shape[:2]
            keys = plan.heads * plan.dim + at
            changes[:, :, head * plan.dim : (head + 1) * plan.dim] = of_keys.reshape(*shape, plan.dim)
            changes[:, :, keys : keys + plan.value_dim] = of_values.reshape(*shape, plan.value_dim)
        if weighted:
            by_key[0, r] = of_factors

        def add(entry):
            at = lists[0, 0, r * plan.k + entry]

            @pl.when(at >= 0)
            def _():
                for target, there, here in sums.parts():
                    target[at, :, there] = target[at, :, there] + changes[entry, :, here]

        _loop(plan.k, add)

    _loop(plan.query.count, block)
    for source, target, blocks in zip(gradients, targets, maps):
        _from_blocks(source, target, blocks)
