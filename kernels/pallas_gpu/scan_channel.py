"""Recurrences whose channels decay each on their own, on GPUs, in Triton.

What decays between two tokens of a chunk is a product of two factors of at most 1, one of each token: for blocks of
2, 4, ... tokens, the decay from the middle of a block to a token of its second half, and from one of its first half
to the middle. So no exponent is positive, however strong the decay; and the exponents, sums of log decays, are
products with matrices of zeros and ones, in which nothing cancels.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.pallas_gpu import scan
from kernels.pallas_gpu.tiles import CHUNK, blocks, dot, dot_parts, indices, launch, parts, width
from kernels.scan_plan import backward_flops, forward_flops, transcendentals

SIZES = tuple(1 << level for level in range(CHUNK.bit_length() - 1))


def _summed(mask, log_decay, dtype):
    """Sums of the rows of a tile `(C, channels)` of float32 that a mask `(C, C)` names for each row."""
    return dot_parts([mask.astype(dtype)], parts(log_decay, dtype))


def _level(size, log_decay, dtype):
    """For blocks of `2 * size` tokens the decay between a token and the middle, `(C, channels)`; and two masks.

    The masks are of the tokens of second halves, `(C, 1)`, and of pairs of tokens of the same block, a token of its
    second half and one of its first, `(C, C)`.
    """
    rows, columns = indices()
    same = rows // (2 * size) == columns // (2 * size)
    late, late_column = rows // size % 2 == 1, columns // size % 2 == 1
    # From the middle, exclusive, to a late token, or from an early token, exclusive, to the middle.
    between = same & (late == late_column) & jnp.where(late, columns <= rows, columns > rows)
    decay = jnp.exp(_summed(between, log_decay, dtype))
    token = jnp.arange(CHUNK)[:, None]
    return decay, token // size % 2 == 1, same & late & ~late_column


def _prepare(query, key, log_decay, *, scale: float):
    """The decayed queries and keys and the weights `(B, N, H, C)`, and what chunks leave, `(B, H, chunks, D)`.

    Queries have what is left of the state before the chunk, keys what is left at its end; the weights have `scale`.
    """
    batch, tokens, heads, channels = query.shape
    chunks = tokens // CHUNK
    (keys, _), (square, _) = scan.specs(channels), scan.specs(CHUNK)
    return launch(
        functools.partial(_prepare_body, scale=scale),
        "scan_channel_weights",
        (chunks, heads, batch),
        dict(query=(query, keys), key=(key, keys), log_decay=(log_decay, keys)),
        dict(
            into=(query.shape, query.dtype, keys),
            onto=(query.shape, query.dtype, keys),
            weights=((batch, tokens, heads, CHUNK), query.dtype, square),
            kept=((batch, heads, chunks, channels), jnp.float32, scan.per_chunk(channels)),
        ),
        flops=batch * heads * chunks * CHUNK * CHUNK * channels,
        transcendentals=batch * heads * chunks * transcendentals("channel", CHUNK, channels, True),
    )


def _prepare_body(refs, *, scale):
    dtype = refs.query.dtype
    rows, columns = indices()
    weights = jnp.zeros((CHUNK, CHUNK), jnp.float32)
    for d in blocks(refs.query.shape[1], dtype):
        query, key, log_decay = refs.query[:, d], refs.key[:, d], refs.log_decay[:, d]
        refs.into[:, d] = (query * jnp.exp(_summed(columns <= rows, log_decay, dtype))).astype(dtype)
        refs.onto[:, d] = (key * jnp.exp(_summed(columns > rows, log_decay, dtype))).astype(dtype)
        refs.kept[d] = jnp.exp(jnp.sum(log_decay, axis=0))
        itself = jnp.sum(query.astype(jnp.float32) * key.astype(jnp.float32), axis=1)
        weights += jnp.where(rows == columns, itself[:, None], 0.0)
        for size in SIZES:
            decay, late, pairs = _level(size, log_decay, dtype)
            # Of a token's query and key only one is needed: as of which half of its block it is.
            decayed = (jnp.where(late, query, key) * decay).astype(dtype)
            weights += jnp.where(pairs, dot(decayed, decayed, trans_b=True), 0.0)
    refs.weights[...] = (weights * scale).astype(dtype)


def forward(query, key, value, log_decay, initial_state, *, scale: float):
    """Output, final state, states; `log_decay` is `(B, N, H, D)`."""
    into, onto, weights, kept = _prepare(query, key, log_decay, scale=scale)
    states, final = scan.walk(onto, value, None, None, kept, initial_state, name="scan_channel_states")
    out = scan.outputs(into, None, weights, value, states, None, None, name="scan_channel_outputs", scale=scale)
    return out, final, states


def backward(query, key, value, log_decay, states, d_out, d_final, *, scale: float):
    """Gradients of query, key, value, beta (None), log decay and initial state."""
    into, onto, weights, kept = _prepare(query, key, log_decay, scale=scale)
    d_states, d_initial = scan.walk(
        into, d_out, None, None, kept, d_final, name="scan_channel_d_states", scale=scale, reverse=True
    )
    batch, tokens, heads, channels = query.shape
    values, chunks = value.shape[-1], tokens // CHUNK
    (keys, _), (wide, _), (square, _) = (scan.specs(size) for size in (channels, values, CHUNK))
    state = scan.per_chunk(channels, values)
    flops = backward_flops("channel", CHUNK, channels, values) - 2 * CHUNK * channels * values
    d_query, d_key, d_value, d_log_decay = launch(
        functools.partial(_gradients, scale=scale),
        "scan_channel_gradients",
        (chunks, heads, batch),
        dict(
            query=(query, keys),
            key=(key, keys),
            value=(value, wide),
            log_decay=(log_decay, keys),
            onto=(onto, keys),
            weights=(weights, square),
            states=(states, state),
            d_states=(d_states, state),
            d_out=(d_out, wide),
        ),
        dict(
            d_query=(query.shape, query.dtype, keys),
            d_key=(query.shape, query.dtype, keys),
            d_value=(value.shape, value.dtype, wide),
            d_log_decay=(log_decay.shape, jnp.float32, keys),
        ),
        flops=batch * heads * chunks * flops,
        transcendentals=batch * heads * chunks * transcendentals("channel", CHUNK, channels, True),
        warps=8,
    )
    return d_query, d_key, d_value, None, d_log_decay, d_initial


def _gradients(refs, *, scale):
    dtype = refs.value.dtype
    depths, spans = blocks(refs.key.shape[1], dtype), blocks(refs.value.shape[1], dtype)
    rows, columns = indices()
    for e in spans:
        d_value = sum(dot(refs.onto[:, d], refs.d_states[d, e]) for d in depths)
        d_value += dot(refs.weights[...], refs.d_out[:, e], trans_a=True)
        refs.d_value[:, e] = d_value.astype(dtype)
    d_weights = sum(dot(refs.d_out[:, e], refs.value[:, e], trans_b=True) for e in spans) * scale
    itself = jnp.sum(jnp.where(rows == columns, d_weights, 0.0), axis=1)[:, None]
    for d in depths:
        log_decay = refs.log_decay[:, d]
        d_query = jnp.zeros((CHUNK, width(refs.key.shape[1], dtype)), jnp.float32)
        d_key, whole = d_query, 0.0
        for e in spans:
            state, d_state = refs.states[d, e], refs.d_states[d, e]
            d_query += dot(refs.d_out[:, e], state, trans_b=True)
            d_key += dot(refs.value[:, e], d_state, trans_b=True)
            whole += jnp.sum(state.astype(jnp.float32) * d_state.astype(jnp.float32), axis=1)
        query, key = refs.query[:, d], refs.key[:, d]
        d_query *= jnp.exp(_summed(columns <= rows, log_decay, dtype)) * scale
        d_key *= jnp.exp(_summed(columns > rows, log_decay, dtype))
        upto, after = query * d_query, key * d_key
        for size in SIZES:
            decay, late, pairs = _level(size, log_decay, dtype)
            decayed = (jnp.where(late, query, key) * decay).astype(dtype)
            d_pairs = jnp.where(pairs, d_weights, 0.0).astype(dtype)
            late_query = dot(d_pairs, decayed) * decay
            early_key = dot(d_pairs, decayed, trans_a=True) * decay
            d_query += late_query
            d_key += early_key
            upto += query * late_query - key * early_key
        refs.d_query[:, d] = (d_query + itself * key).astype(dtype)
        refs.d_key[:, d] = (d_key + itself * query).astype(dtype)
        reached = _summed(columns >= rows, upto, dtype) + _summed(columns < rows, after, dtype)
        kept = whole * jnp.exp(jnp.sum(log_decay, axis=0))
        refs.d_log_decay[:, d] = reached + kept[None, :]
