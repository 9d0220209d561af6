"""What Triton kernels share: how they are launched, products of tiles, a softmax in parts, decays within a chunk.

A kernel's values have sizes that are powers of two and are not sliced: parts of an operand are loads of their own.
Wide operands are gone through in blocks of channels, so that a program needs little shared memory and several
programs share a multiprocessor, one loading while another multiplies.
"""

import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from kernels import compat
from kernels.scan_plan import estimate

# Tokens computed at once.
CHUNK = 64


def launch(
    body: Callable[..., None],
    name: str,
    grid: tuple[int, ...],
    operands: dict[str, tuple[Any, pl.BlockSpec]],
    results: dict[str, tuple[tuple[int, ...], Any, pl.BlockSpec]],
    *,
    flops: int,
    transcendentals: int = 0,
    warps: int = 4,
    stages: int = 1,
    zeroed: tuple[str, ...] = (),
) -> tuple[jax.Array, ...]:
    """Runs `body(refs)`, whose refs are attributes by name; an operand that is None is None there too.

    Args:
        operands: by name the array, or None, and its blocks.
        results: by name shape, dtype and blocks.
        flops, transcendentals: of the whole grid.
        zeroed: results that are zero where nothing is written.
    """
    present = {key: value for key, value in operands.items() if value[0] is not None}
    arrays = [array for array, _ in present.values()]
    shapes = [compat.shape_like(shape, dtype, *arrays) for shape, dtype, _ in results.values()]

    order = list(results)
    blank = [jnp.zeros(*results[key][:2]) for key in zeroed]

    def positional(*refs):
        names = types.SimpleNamespace(**dict.fromkeys(operands))
        vars(names).update(zip([*present, *zeroed, *results], refs))
        body(names)

    made = compat.pallas_call(
        positional,
        name=name,
        grid=grid,
        in_specs=[spec for _, spec in present.values()] + [results[key][2] for key in zeroed],
        out_specs=[spec for _, _, spec in results.values()],
        out_shape=shapes,
        input_output_aliases={len(arrays) + i: order.index(key) for i, key in enumerate(zeroed)},
        cost_estimate=estimate(flops, transcendentals, arrays, shapes),
        compiler_params=compat.triton_params(warps, stages),
    )(*arrays, *compat.match_varying(*arrays, *blank)[len(arrays) :])
    return tuple(made)


def gather(ref, *index, mask, other=0):
    """Single entries, `other` where the mask is False."""
    index = tuple(jnp.where(mask, i, 0) if getattr(i, "ndim", 0) else i for i in index)
    return triton.load(ref.at[index], mask=mask, other=other)


def put(ref, *index, value, mask):
    """Writes single entries, the last index being an array.

    Interpreted, what the mask leaves out is written too, as it was before: not over what is new.
    """
    index = (*index[:-1], jnp.where(mask, index[-1], ref.shape[-1]))
    triton.store(ref.at[index], value, mask=mask)


def side(size: int) -> int:
    """The side of a tile that holds so many: a power of two, at least the 16 of a matrix instruction."""
    return max(16, pl.next_power_of_2(size))


def widened(x, *axes: int):
    """An array with zeros up to the `side` of a tile along the axes; None for None."""
    if x is None:
        return None
    filled = {axis % x.ndim: side(x.shape[axis]) - x.shape[axis] for axis in axes}
    return jnp.pad(x, [(0, filled.get(axis, 0)) for axis in range(x.ndim)]) if any(filled.values()) else x


def width(size: int, dtype: Any, most: int = 64) -> int:
    """Channels of an operand that are loaded at once; of float32 32 at most."""
    return min(size, most if dtype == jnp.bfloat16 else min(most, 32))


def blocks(size: int, dtype: Any) -> list[Any]:
    """The channels of an operand in blocks."""
    step = width(size, dtype)
    return [pl.ds(start, step) for start in range(0, size, step)]


def over(size: int, dtype: Any, step: Callable[..., Any], carry: Any) -> Any:
    """`carry = step(block, carry)` for the `blocks`: of bfloat16 all in one go, that their loads overlap.

    Products of float32 are thousands of instructions each; of these a loop.
    """
    if dtype == jnp.float32:
        return loop(size, width(size, dtype), step, carry)
    for block in blocks(size, dtype):
        carry = step(block, carry)
    return carry


def warps(dtype: Any) -> int:
    """How many warps of a program share a tile of a chunk's tokens: that of float32 products no thread has too many."""
    return 8 if dtype == jnp.float32 else 4


def loop(size: int, channels: int, step: Callable[..., Any], carry: Any) -> Any:
    """`carry = step(block, carry)` for blocks of `channels` one after another: a loop, that its loads stay in it."""
    if channels == size:
        return step(pl.ds(0, channels), carry)
    return jax.lax.fori_loop(0, size // channels, lambda i, kept: step(pl.ds(i * channels, channels), kept), carry)


def zeros(*shape: int):
    """A float32 tile to sum in."""
    return jnp.zeros(shape, jnp.float32)


def dot(a, b, **transposed: bool):
    """The product of two tiles, summed in float32: of float32 tiles all digits, never TF32."""
    return compat.triton_dot(a, b, precision=jax.lax.Precision.HIGHEST, **transposed)


def parts(x, dtype, count: int = 2):
    """A float32 tile as a sum of so many tiles of `dtype`, the largest first; as it is for float32."""
    if dtype == jnp.float32:
        return [x]
    split = []
    for _ in range(count):
        split.append(x.astype(dtype))
        x = x - split[-1].astype(jnp.float32)
    return split


def dot_parts(left, right, **transposed: bool):
    """The product of two tiles in parts, without the products of small with small."""
    most = max(len(left), len(right))
    pairs = [(i, j) for i in range(len(left)) for j in range(len(right)) if i + j < most]
    return sum(dot(left[i], right[j], **transposed) for i, j in sorted(pairs, key=sum, reverse=True))


def softmax_step(logits, seen, peak, total):
    """A softmax along the rows of tiles that come one after another: what the next tile makes of it.

    Args:
        logits, seen: `(queries, keys)`, float32 and bool.
        peak, total: `(queries,)` of the tiles before: the largest logit, -inf if none was seen, and the sum of the
            exponentials of logits less that.

    Returns:
        Exponentials less the new peak, 0 where not seen; the factor of what was summed before; new peak, new total.
    """
    logits = jnp.where(seen, logits, -jnp.inf)
    new = jnp.maximum(peak, jnp.max(logits, axis=1))
    # Nothing seen so far: any finite number will do.
    safe = jnp.where(new == -jnp.inf, 0.0, new)
    p = jnp.where(seen, jnp.exp(logits - safe[:, None]), 0.0)
    shrink = jnp.exp(peak - safe)
    return p, shrink, new, total * shrink + jnp.sum(p, axis=1)


def indices():
    """Numbers of the tokens of a chunk as rows, `(C, 1)`, and as columns, `(1, C)`."""
    return tuple(
        jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis, shape in enumerate(((CHUNK, 1), (1, CHUNK)))
    )


def decay_matrix(log_decay):
    """What is left at token i of what token j has written, `(C, C)`, 0 for j > i; `log_decay` is `(C,)`.

    The exponent is a difference of sums. Sums of multiples of 1 / 1024 are exact, and what they leave is small: so
    a strong decay does not cost weak ones their digits.
    """
    rows, columns = indices()
    coarse = jnp.floor(log_decay * 1024 + 0.5) / 1024

    def differences(x):
        at_row = jnp.sum(jnp.where(columns <= rows, x[None, :], 0.0), axis=1)
        at_column = jnp.sum(jnp.where(rows <= columns, x[:, None], 0.0), axis=0)
        return at_row[:, None] - at_column[None, :]

    exponent = differences(coarse) + differences(log_decay - coarse)
    return jnp.where(columns <= rows, jnp.exp(jnp.where(columns <= rows, exponent, 0.0)), 0.0)
