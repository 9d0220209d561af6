"""Block-sparse attention for TPUs: bodies for many small blocks, one product of all queries and all keys.

How often a query block lists a key block is a factor on the exponentials. What is not listed is then multiplied by
zero, which holds no number back that is not finite: an element of the batch that has one is computed again for every
block of queries, with zeros in the place of what it does not list.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels.block_sparse_plan import Blocks, Plan
from kernels.pallas_tpu.block_sparse_listed import product, softmax


def tokens(plan: Plan) -> tuple[int, int]:
    """How many queries and keys there are."""
    return plan.query.count * plan.query.tokens, plan.key.count * plan.key.tokens


def _block_of(blocks: Blocks) -> np.ndarray:
    """The block of every token of the map."""
    rows, columns = (np.arange(s) // b for s, b in zip(blocks.size, blocks.block))
    return (rows[:, None] * blocks.across + columns).reshape(-1)


def constants(plan: Plan) -> tuple[jax.Array, ...]:
    """Blocks of the queries and of the keys, one-hot `(tokens, blocks)`, and of queries as a column and as a row."""
    query, key = _block_of(plan.query), _block_of(plan.key)
    one_hot = (query[:, None] == np.arange(plan.query.count), key[:, None] == np.arange(plan.key.count))
    return tuple(jnp.asarray(x, jnp.float32) for x in (*one_hot, query[:, None], query[None, :]))


def _counts(plan: Plan, lists):
    """How often each block of queries lists each of keys, `(query blocks, key blocks)` float32."""
    listed = lists[0]
    block = jax.lax.broadcasted_iota(jnp.int32, (plan.query.count, plan.key.count), 1)
    counts = jnp.zeros(block.shape, jnp.float32)
    for entry in range(plan.k):
        counts = counts + jnp.where(listed[:, entry : entry + 1] == block, 1.0, 0.0)
    return counts


def _spread(counts, query_blocks, key_blocks):
    """Counts for every query and key: sums of one product by 1, which is exact."""

    def exact(a, b, over):
        return jax.lax.dot_general(a, b, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32)

    return exact(exact(query_blocks, counts, (1, 0)), key_blocks, (1, 1))


def _run(plan: Plan, arrays, lists, constant, compute):
    """Calls `compute(times, rows, keys)` once, or for every block of queries if a number is not finite.

    Args:
        arrays: references to all operands.
        compute: takes how often each query counts each key, and which queries `(tokens, 1)` and keys `(tokens, 1)`
            take part, or None for all.
    """
    query_blocks, key_blocks, column, row = (x[...] for x in constant)
    counts = _counts(plan, lists)
    # Zero times a number is zero, unless it is not finite.
    finite = sum(jnp.sum(x[0].astype(jnp.float32) * 0.0) for x in arrays) == 0.0

    @pl.when(finite)
    def _():
        compute(_spread(counts, query_blocks, key_blocks), None, None)

    @pl.when(jnp.logical_not(finite))
    def _():
        times = _spread(counts, query_blocks, key_blocks)
        transposed = _spread(counts.T, key_blocks, query_blocks)

        def block(r, _):
            number = jax.lax.convert_element_type(r, jnp.float32)
            rows = column == number
            keys = jnp.sum(jnp.where(row == number, transposed, 0.0), axis=1, keepdims=True) > 0
            compute(jnp.where(rows, times, 0.0), rows, keys)
            return 0

        jax.lax.fori_loop(0, plan.query.count, block, 0)


class _Heads:
    """Operands of each head, zero where they do not take part, and where its results go."""

    def __init__(self, plan: Plan, refs):
        self.plan = plan
        self.refs, self.first = plan.operands(tuple(refs))

    def _at(self, which: int, head: int):
        width = (self.plan.dim, self.plan.dim, self.plan.value_dim)[which]
        first = self.first[which] + head * width
        return slice(first, first + width)

    def load(self, which: int, head: int, part):
        return taking_part(self.refs[which][0, :, self._at(which, head)], part)

    def put(self, which: int, head: int, value, part):
        """Writes what has a part."""
        at = self._at(which, head)
        ref = self.refs[which]
        ref[:, at] = value if part is None else jnp.where(part, value, ref[:, at])

    def add(self, which: int, head: int, value, part):
        """Adds to what has a part, or writes all."""
        at = self._at(which, head)
        ref = self.refs[which]
        ref[:, at] = value if part is None else ref[:, at] + jnp.where(part, value, 0.0)


def taking_part(x, part):
    """Zeros where `part`, unless it is None, is False."""
    return x if part is None else jnp.where(part, x.astype(jnp.float32), 0.0)


def forward(*refs, plan: Plan):
    """A batch element's outputs. References: operands, lists, constants, outputs, scratch like the outputs."""
    arrays, lists, constant, out, held = refs[:-7], refs[-7], refs[-6:-2], refs[-2], refs[-1]
    operands = _Heads(plan, arrays)
    dtype = arrays[0].dtype

    def compute(times, rows, keys):
        for head in range(plan.heads):
            query, key, value = (operands.load(i, head, part) for i, part in enumerate((rows, keys, keys)))
            p = softmax(product(query, key, (1, 1), dtype) * plan.scale, times)
            at = slice(head * plan.value_dim, (head + 1) * plan.value_dim)
            result = product(p, value, (1, 0), dtype)
            held[:, at] = result if rows is None else jnp.where(rows, result, held[:, at])

    _run(plan, arrays, lists, constant, compute)
    out[0] = held[...].astype(out.dtype)


def backward(*refs, plan: Plan):
    """A batch element's gradients.

    References: operands, the outputs' gradient, lists, constants, gradients, scratch like the gradients.
    """
    count = 1 if plan.packed else 3
    arrays, (cotangent, lists, *rest) = refs[:count], refs[count:]
    constant, targets, held = rest[:4], rest[4 : 4 + count], rest[4 + count :]
    operands, sums = _Heads(plan, arrays), _Heads(plan, held)
    dtype = arrays[0].dtype
    for sum_ in held:
        sum_[...] = jnp.zeros(sum_.shape, sum_.dtype)

    def compute(times, rows, keys):
        for head in range(plan.heads):
            query, key, value = (operands.load(i, head, part) for i, part in enumerate((rows, keys, keys)))
            at = slice(head * plan.value_dim, (head + 1) * plan.value_dim)
            do = taking_part(cotangent[0, :, at], rows)
            p = softmax(product(query, key, (1, 1), dtype) * plan.scale, times)
            dp = product(do, value, (1, 1), dtype)
            mean = jnp.sum(jnp.where(times > 0, p * dp, 0.0), axis=-1, keepdims=True)
            ds = jnp.where(times > 0, p * (dp - mean), 0.0) * plan.scale
            sums.put(0, head, product(ds, key, (1, 0), dtype), rows)
            sums.add(1, head, product(ds, query, (0, 0), dtype), keys)
            sums.add(2, head, product(p, do, (0, 0), dtype), keys)

    _run(plan, (*arrays, cotangent), lists, constant, compute)
    for source, target in zip(held, targets):
        target[0] = source[...].astype(target.dtype)
