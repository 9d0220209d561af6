"""What the block-sparse kernels share: where tokens are, what a call costs, what is refused, and the gradient's frame.

Operands are rows of tokens `(B, tokens, channels)`, all heads side by side. A `Blocks` says which rows form a block,
so that regions of a map are read where they lie.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import compat
from kernels.cost import tree_bytes

DTYPES = ("bfloat16", "float32")
# Heads wider than this would not leave a GPU enough registers.
MAX_WIDTH = 128


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tokens of a map in blocks, both in row-major order.

    Attributes:
        size: height and width of the map. A sequence of N tokens is a map of `(1, N)`.
        block: height and width of a block. Those at the bottom and the right may stick out; what sticks out are tokens
            of zero, which take part.
    """

    size: tuple[int, int]
    block: tuple[int, int]

    @property
    def across(self) -> int:
        """Blocks side by side."""
        return -(-self.size[1] // self.block[1])

    @property
    def count(self) -> int:
        """Blocks in all."""
        return self.across * -(-self.size[0] // self.block[0])

    @property
    def tokens(self) -> int:
        """Tokens of a block."""
        return math.prod(self.block)

    @property
    def is_whole(self) -> bool:
        """Whether no block sticks out."""
        return self.size[0] % self.block[0] == 0 and self.size[1] % self.block[1] == 0

    def place(self, block: Any, token: Any) -> tuple[Any, Any]:
        """The row of a token of a block, both int32 scalars or arrays, and whether it is on the map."""
        row = _quotient(block, self.across) * self.block[0] + _quotient(token, self.block[1])
        column = _remainder(block, self.across) * self.block[1] + _remainder(token, self.block[1])
        inside = (row < self.size[0]) & (column < self.size[1])
        return jnp.where(inside, row * self.size[1] + column, 0), inside


def _quotient(x, divisor: int):
    """`x // divisor` of what is not negative, without the steps that correct the sign."""
    return x if divisor == 1 else jax.lax.div(x, jnp.full_like(x, divisor))


def _remainder(x, divisor: int):
    return jnp.zeros_like(x) if divisor == 1 else jax.lax.rem(x, jnp.full_like(x, divisor))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is computed, but for the arrays.

    Attributes:
        query, key: how the tokens lie.
        heads, dim, value_dim: their number and widths.
        k: blocks that a list holds.
        scale: factor on the logits.
        packed: queries, keys and values are one array, side by side.
    """

    query: Blocks
    key: Blocks
    heads: int
    dim: int
    value_dim: int
    k: int
    scale: float
    packed: bool

    def operands(self, arrays: tuple[Any, ...]) -> tuple[tuple[Any, Any, Any], tuple[int, int, int]]:
        """Queries, keys and values, and the first channel of each."""
        if not self.packed:
            return arrays, (0, 0, 0)
        width = self.heads * self.dim
        return arrays * 3, (0, width, 2 * width)

    def pairs(self, batch: int) -> int:
        """Queries times the keys that they see, over all heads."""
        return batch * self.heads * self.query.count * self.query.tokens * self.k * self.key.tokens

    def cost(self, batch: int, by_dim: int, by_value_dim: int, moved: tuple[Any, ...]) -> pl.CostEstimate:
        """Of a kernel with so many products over the width of keys and of values, every array of `moved` once."""
        pairs = self.pairs(batch)
        return pl.CostEstimate(
            flops=2 * pairs * (by_dim * self.dim + by_value_dim * self.value_dim),
            transcendentals=pairs,
            bytes_accessed=tree_bytes(moved),
        )


def refusal(arrays: tuple[Any, ...], plan: Plan) -> str | None:
    """Why no kernel serves such a call, or None."""
    dtypes = {str(array.dtype) for array in arrays}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return f"operands are {' and '.join(sorted(dtypes))}; all bfloat16 or all float32 would do"
    if 0 in (arrays[0].shape[0], plan.pairs(1)):
        return "there is nothing to compute: a size is zero"
    width = max(plan.dim, plan.value_dim)
    if width > MAX_WIDTH:
        return f"a head is {width} channels wide; up to {MAX_WIDTH} would do"
    return None


# forward(plan, arrays, lists, weights, valid, mask) -> (out, what the gradient needs of it);
# backward(plan, arrays, lists, weights, valid, mask, kept, cotangent) -> (arrays' gradients, weights').
Forward = Callable[..., tuple[jax.Array, Any]]
Backward = Callable[..., tuple[tuple[jax.Array, ...], jax.Array | None]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(plan, forward, backward, *operands):
    return compat.traced_once(_results, dict(plan=plan, forward=forward), *operands)[0]


def _attend_forward(plan, forward, backward, arrays, lists, weights, valid, mask):
    operands = arrays, lists, weights, valid, mask
    out, kept = compat.traced_once(_results, dict(plan=plan, forward=forward), *operands)
    return out, (*operands, kept)


def _results(*operands, plan, forward):
    return forward(plan, *operands)


def _gradients(*saved, plan, backward):
    return backward(plan, *saved)


def _attend_backward(plan, forward, backward, saved, cotangent):
    static = dict(plan=plan, backward=backward)
    arrays, weights = compat.traced_once(_gradients, static, *saved, cotangent)
    return arrays, None, weights, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def attend(
    plan: Plan,
    forward: Forward,
    backward: Backward,
    arrays: tuple[jax.Array, ...],
    lists: jax.Array,
    weights: jax.Array | None = None,
    valid: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Runs a backend's kernels.

    Args:
        plan: what is computed.
        forward, backward: functions of the backend's module.
        arrays: queries, keys and values `(B, tokens, channels)`, or one array if they are packed.
        lists: `(B, query blocks, k)` int32, negative for no block.
        weights: `(B, query blocks, k)`, factors on keys and values of the listed blocks, or None.
        valid: `(B, key tokens)` int8, or None.
        mask: `(B or 1, query tokens, k * tokens of a key block)` int8, or None.

    Returns:
        `(B, query tokens, heads * value_dim)`.
    """
    count = len(arrays)
    matched = compat.match_varying(*arrays, lists.astype(jnp.int32), weights, valid, mask)
    return _attend(plan, forward, backward, matched[:count], *matched[count:])


def inverted(lists: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """For every key block the places in the lists at which it is listed.

    Args:
        lists: `(B, query blocks, k)` int32, negative for no block.
        count: of key blocks.

    Returns:
        Places `(B, query blocks * k)` int32, which are `query block * k + entry`, sorted by the block listed there, and
        `(B, count + 1)` int32: those of block j are `places[:, starts[j] : starts[j + 1]]`.
    """
    flat = lists.reshape(lists.shape[0], -1)
    entries = flat.shape[1]
    listed = jnp.where(flat < 0, count, flat)
    # One number each, so that what is sorted is not a pair and no two are equal.
    order = jnp.sort(listed * entries + jnp.arange(entries, dtype=jnp.int32), axis=-1)
    below = listed[:, None, :] < jnp.arange(count + 1, dtype=jnp.int32)[:, None]
    return jax.lax.rem(order, jnp.full_like(order, entries)), below.sum(-1, dtype=jnp.int32)
