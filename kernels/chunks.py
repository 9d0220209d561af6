"""What causal recurrences share: tokens in chunks, and the decay between the tokens of a chunk.

A chunk is a power of two of tokens, and what decays between its tokens is put together from halves: for blocks of
1, 2, 4, ... tokens, the decay from the block's start to each token and from each token to the block's end. Between
a token of the second half and one of the first the decay is the product of the two, so that everything is a
product of factors of at most 1. Nothing can overflow, and nothing cancels as it does in differences of cumulative
logarithms, however strong the decay; a factor of 0 ends one document and begins the next.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.choices import check_choice
from kernels.masking import document_runs

FORMS = ("chunk", "recurrent", "parallel")


def check_operands(query, key, value, initial_state, segments, form, chunk_size) -> None:
    """Raises ValueError for operands of a causal recurrence that do not fit each other."""
    check_choice("form", form, FORMS)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if query.ndim != 4 or key.shape != query.shape:
        raise ValueError(f"key must be (B, N, H, D) as query, which is {query.shape}; got {key.shape}")
    if value.ndim != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value must be (B, N, H, E) with B, N and H of key, which is {key.shape}; got {value.shape}")
    batch, tokens, heads, channels = key.shape
    state = (batch, heads, channels, value.shape[-1])
    if initial_state is not None and initial_state.shape != state:
        raise ValueError(f"initial_state must be (B, H, D, E), here {state}; got {initial_state.shape}")
    check_segments(segments, batch, tokens)


def check_segments(segments, batch: int, tokens: int) -> None:
    """Raises ValueError unless there are ids for every token, or none at all."""
    if segments is not None and segments.shape != (batch, tokens):
        raise ValueError(f"segments must be (B, N), here {(batch, tokens)}; got {segments.shape}")


def document_starts(segments):
    """True `(B, N, 1, 1)` at the first token of every document but the first of the row; None for None."""
    if segments is None:
        return None
    runs = document_runs(segments)
    return (jnp.diff(runs, axis=1, prepend=0) > 0)[..., None, None]


def scan_chunks(
    chunk: Callable[..., Any], token: Callable[..., Any], arrays: tuple, state: Any, *, form: str, chunk_size: int
):
    """Runs a recurrence over the tokens of a row, chunk by chunk; the backward pass keeps the chunks' first states.

    Args:
        chunk: `chunk(state, arrays)` for a chunk's arrays `(B, H, C, ...)` gives the state after it and the output
            `(B, H, C, E)`.
        token: the same of one token, arrays and output without the axis C.
        arrays: `(B, N, H, ...)` each, or None; B and H may be 1 where `chunk` and `token` broadcast. Tokens that are
            0 throughout (False for booleans) must leave the state as it is: they fill the last chunk.
        state: before the first token.
        form: `"chunk"`; `"parallel"` makes all tokens one chunk; `"recurrent"` takes the tokens one by one.
        chunk_size: rounded up to a power of two.

    Returns:
        The state after the last token and the output `(B, N, H, E)`.
    """
    tokens = arrays[0].shape[1]
    length = pl.next_power_of_2(tokens if form == "parallel" else min(chunk_size, tokens))
    body = _one_by_one(token) if form == "recurrent" else chunk
    # In the loop nothing can be merged across the barrier that prevent_cse would put up.
    body = jax.checkpoint(body, prevent_cse=False)
    state, out = jax.lax.scan(body, state, jax.tree.map(lambda x: _in_chunks(x, length), arrays))
    out = out.transpose(1, 0, 3, 2, 4)
    return state, out.reshape(out.shape[0], out.shape[1] * length, *out.shape[3:])[:, :tokens]


def one_chunk(x):
    """An array `(B, N, H, ...)` as the only chunk there is, `(B, H, C, ...)`; None for None."""
    return None if x is None else _in_chunks(x, pl.next_power_of_2(x.shape[1]))[0]


def _in_chunks(x, length: int):
    """`(chunks, B, H, C, ...)`, the last chunk filled with zeros."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % length)) + ((0, 0),) * (x.ndim - 2))
    chunks = x.shape[1] // length
    return x.reshape(x.shape[0], chunks, length, *x.shape[2:]).swapaxes(0, 1).swapaxes(2, 3)


def _one_by_one(token):
    """A chunk's function made of a token's."""

    def chunk(state, arrays):
        state, out = jax.lax.scan(token, state, jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), arrays))
        return state, jnp.moveaxis(out, 0, 2)

    return chunk


def kept_share(log_decay, starts, like):
    """What each token leaves of the state before it, `(B, H, ..., K)`: 0 where a document begins, K being 1 or D.

    `like` is an operand without decay, `(B, H, ..., D)`, in the dtype of the state.
    """
    if log_decay is None:
        kept = jnp.ones((1, 1, *like.shape[2:-1], 1), like.dtype)
    else:
        kept = jnp.exp(log_decay.astype(like.dtype))
    return kept if starts is None else jnp.where(starts, 0, kept)


def doublings(kept):
    """For blocks of 1, 2, 4, ... C tokens, pairs `(into, onto)` of shape `(..., C, K)`.

    `into` is what is left at a token, after it, of the state before its block; `onto` what is left at the block's
    end of what the token has written.
    """
    into, onto = kept, jnp.ones_like(kept)
    levels = [(into, onto)]
    while (size := 1 << (len(levels) - 1)) < kept.shape[-2]:
        first, second = _first(into, size), _second(into, size)
        onto_first, onto_second = _first(onto, size) * second[..., -1:, :], _second(onto, size)
        into = jnp.stack((first, second * first[..., -1:, :]), -3).reshape(kept.shape)
        onto = jnp.stack((onto_first, onto_second), -3).reshape(kept.shape)
        levels.append((into, onto))
    return levels


def decay_matrix(levels):
    """What is left at token i of what token j has written, `(..., C, C)`: 1 on the diagonal, 0 above; K is 1."""
    blocks = [rows * columns for rows, columns in _decayed(1, 1, levels)]
    return triangle(jnp.ones_like(levels[0][0][..., 0]), blocks)


def decayed_products(query, key, levels):
    """Blocks of `sum_c query[i, c] * key[j, c] * decay[i, j, c]` for j < i, small ones first.

    There the decay is a product of one factor per row and one per column, hence a matmul. Blocks of `size` tokens
    are `(..., C / (2 size), size, size)`: the rows of every second block, the columns of the block before it.
    """
    return [rows @ columns for rows, columns in _decayed(query, key, levels)]


def triangle(diagonal, blocks):
    """The lower triangular matrix `(..., C, C)` of a diagonal `(..., C)` and the blocks below it, small ones first."""
    matrix = diagonal[..., None, None]
    for block in blocks:
        matrix = _joined(*_pairs(matrix, block), block)
    return matrix[..., 0, :, :]


@jax.custom_vjp
def solve_triangular(blocks, right):
    """The solution of a lower triangular system, from the blocks below its diagonal of ones and its right-hand side.

    The inverse is put together from halves, which on a CPU is faster than LAPACK's `trsm`: that starts threads even
    for a matrix of this size, and when the cores have other work they wait for each other, up to seconds.
    """
    return _solve(blocks, right)[0]


def _solve(blocks, right):
    inverse = jnp.ones((*right.shape[:-1], 1, 1), right.dtype)
    for block in blocks:
        first, second = _pairs(inverse, block)
        inverse = _joined(first, second, -_product(second, _product(block, first)))
    inverse = inverse[..., 0, :, :]
    solution = jnp.matmul(inverse, right, precision="highest")
    return solution, (inverse, solution, len(blocks))


def _solve_backward(kept, gradient):
    inverse, solution, levels = kept
    gradient = jnp.matmul(inverse.swapaxes(-1, -2), gradient, precision="highest")
    blocks = [_second(-gradient, 1 << i) @ _first(solution, 1 << i).swapaxes(-1, -2) for i in range(levels)]
    return blocks, gradient


solve_triangular.defvjp(_solve, _solve_backward)


def _product(left, right):
    """A matmul, written out for matrices so small that calls of a matmul would take longer."""
    if left.shape[-1] > 4:
        return jnp.matmul(left, right, precision="highest")
    return (left[..., None] * right[..., None, :, :]).sum(-2)


def _decayed(query, key, levels):
    """For blocks of 1, 2, 4, ... tokens, the rows of every second block and the columns of the block before it."""
    for level, (into, onto) in enumerate(levels[:-1]):
        yield _second(query * into, 1 << level), _first(key * onto, 1 << level).swapaxes(-1, -2)


def _blocks(x, size: int):
    return x.reshape(*x.shape[:-2], x.shape[-2] // (2 * size), 2, size, x.shape[-1])


def _first(x, size: int):
    """Of every two blocks of so many tokens the first, `(..., C / (2 size), size, K)`."""
    return _blocks(x, size)[..., 0, :, :]


def _second(x, size: int):
    return _blocks(x, size)[..., 1, :, :]


def _pairs(matrices, below):
    """The matrices, as many as twice the blocks `below`, that stand before and after each of these."""
    matrices = matrices.reshape(*below.shape[:-2], 2, *below.shape[-2:])
    return matrices[..., 0, :, :], matrices[..., 1, :, :]


def _joined(first, second, below):
    """Lower triangular matrices of twice the size."""
    above = jnp.concatenate((first, jnp.zeros_like(first)), -1)
    return jnp.concatenate((above, jnp.concatenate((below, second), -1)), -2)
