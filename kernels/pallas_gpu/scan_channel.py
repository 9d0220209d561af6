"""Recurrences whose channels decay each on their own, on GPUs, in Triton.

What decays between two tokens of a chunk is a product of two factors of at most 1, one of each token: for blocks of
2, 4, ... tokens, the decay from the middle of a block to a token of its second half, and from one of its first half
to the middle. So no exponent is positive, however strong the decay; and the exponents, sums of log decays, are
products with matrices of zeros and ones, in which nothing cancels.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import tuning
from kernels.pallas_gpu import scan
from kernels.pallas_gpu.tiles import CHUNK, dot, dot_parts, indices, launch, loop, parts, warps, width, zeros
from kernels.scan_plan import backward_flops, transcendentals

LEVELS = CHUNK.bit_length() - 1


def _summed(mask, log_decay, dtype):
    """Sums of the rows of a tile `(C, channels)` of float32 that a mask `(C, C)` names for each row."""
    return dot_parts([jnp.where(mask, 1.0, 0.0).astype(dtype)], parts(log_decay, dtype))


def _level(level, log_decay, dtype):
    """For blocks of `2 << level` tokens the decay between a token and the middle, `(C, channels)`; and two masks.

    The masks are of the tokens of second halves, `(C, 1)`, and of pairs of tokens of the same block, a token
    of its second half and one of its first, `(C, C)`.
    """
    rows, columns = indices()
    same = (rows >> (level + 1)) == (columns >> (level + 1))
    late, late_column = ((x >> level) & 1 == 1 for x in (rows, columns))
    # From the middle, exclusive, to a late token, or from an early token, exclusive, to the middle.
    between = same & jnp.where(late, late_column & (columns <= rows), ~late_column & (columns > rows))
    decay = jnp.exp(_summed(between, log_decay, dtype))
    return decay, late, same & late & ~late_column


def _prepare(query, key, log_decay, *, scale: float):
    """The decayed queries and keys and the weights `(B, N, H, C)`, and what chunks leave, `(B, H, chunks, D)`.

    Queries have what is left of the state before the chunk, keys what is left at its end; the weights have `scale`.
    """
    batch, tokens, heads, channels = query.shape
    chunks = tokens // CHUNK
    (keys, _), (square, _) = scan.specs(channels), scan.specs(CHUNK)
    size = dict(narrow=16, warps=warps(query.dtype), stages=1)
    size = tuning.blocks("scan_weights", "gpu", size, channels=channels, dtype=str(query.dtype))
    return launch(
        functools.partial(_prepare_body, scale=scale, narrow=size.pop("narrow")),
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
        **size,
    )


def _prepare_body(refs, *, scale, narrow):
    dtype, channels = refs.query.dtype, refs.query.shape[1]
    depth = width(channels, dtype, narrow)
    rows, columns = indices()

    def block(d, weights):
        query, key, log_decay = refs.query[:, d], refs.key[:, d], refs.log_decay[:, d]
        refs.into[:, d] = (query * jnp.exp(_summed(columns <= rows, log_decay, dtype))).astype(dtype)
        refs.onto[:, d] = (key * jnp.exp(_summed(columns > rows, log_decay, dtype))).astype(dtype)
        refs.kept[d] = jnp.exp(jnp.sum(log_decay, axis=0))
        itself = jnp.sum(query.astype(jnp.float32) * key.astype(jnp.float32), axis=1)
        weights += jnp.where(rows == columns, itself[:, None], 0.0)

        def halves(level, weights):
            decay, late, pairs = _level(level, log_decay, dtype)
            # Of a token's query and key only one is needed: as of which half of its block it is.
            decayed = (jnp.where(late, query, key) * decay).astype(dtype)
            return weights + jnp.where(pairs, dot(decayed, decayed, trans_b=True), 0.0)

        return jax.lax.fori_loop(0, LEVELS, halves, weights)

    refs.weights[...] = (loop(channels, depth, block, zeros(CHUNK, CHUNK)) * scale).astype(dtype)


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
    d_value = scan.outputs(
        onto, None, weights, d_out, d_states, None, None, name="scan_channel_d_values", scale=1.0, transposed=True
    )
    batch, tokens, heads, channels = query.shape
    values, chunks = value.shape[-1], tokens // CHUNK
    default = dict(narrow=16, wide=32, warps=warps(query.dtype), stages=2)
    bucket = dict(kind="channel", channels=channels, values=values, dtype=str(query.dtype))
    size = tuning.blocks("scan_gradients", "gpu", default, **bucket)
    depth, span = width(channels, query.dtype, size.pop("narrow")), width(values, query.dtype, size.pop("wide"))
    keys = pl.BlockSpec((None, CHUNK, None, depth), lambda d, c, h, b: (b, c, h, d))
    wide = pl.BlockSpec((None, CHUNK, None, values), lambda d, c, h, b: (b, c, h, 0))
    state = pl.BlockSpec((None, None, None, depth, values), lambda d, c, h, b: (b, h, c, d, 0))
    flops = backward_flops("channel", CHUNK, channels, values) - 4 * CHUNK * channels * values - CHUNK * CHUNK * values
    d_query, d_key, d_log_decay = launch(
        functools.partial(_gradients, scale=scale, span=span),
        "scan_channel_gradients",
        (channels // depth, chunks, heads, batch),
        dict(
            query=(query, keys),
            key=(key, keys),
            value=(value, wide),
            log_decay=(log_decay, keys),
            states=(states, state),
            d_states=(d_states, state),
            d_out=(d_out, wide),
        ),
        dict(
            d_query=(query.shape, query.dtype, keys),
            d_key=(query.shape, query.dtype, keys),
            d_log_decay=(log_decay.shape, jnp.float32, keys),
        ),
        flops=batch * heads * chunks * flops,
        transcendentals=batch * heads * chunks * transcendentals("channel", CHUNK, channels, True),
        **size,
    )
    return d_query, d_key, d_value, None, d_log_decay, d_initial


def _gradients(refs, *, scale, span):
    dtype, depth, values = refs.value.dtype, refs.key.shape[1], refs.value.shape[1]
    rows, columns = indices()

    def alike(e, sums):
        return sums + dot(refs.d_out[:, e], refs.value[:, e], trans_b=True)

    d_weights = loop(values, span, alike, zeros(CHUNK, CHUNK)) * scale
    itself = jnp.sum(jnp.where(rows == columns, d_weights, 0.0), axis=1)[:, None]
    d_weights = d_weights.astype(dtype)
    tile = zeros(CHUNK, depth)
    log_decay = refs.log_decay[...]

    def halves(level, sums):
        d_query, d_key, upto = sums
        decay, late, pairs = _level(level, log_decay, dtype)
        decayed = (jnp.where(late, refs.query[...], refs.key[...]) * decay).astype(dtype)
        d_pairs = jnp.where(pairs, d_weights, jnp.zeros((), dtype))
        d_late, d_early = dot(d_pairs, decayed), dot(d_pairs, decayed, trans_a=True)
        # From what was multiplied, rounded as it is: so a pair is the same number at both of its tokens.
        upto += decayed.astype(jnp.float32) * (d_late - d_early)
        return d_query + d_late * decay, d_key + d_early * decay, upto

    # Of each token: what the sum of log decays up to it does.
    d_query_inside, d_key_inside, upto = jax.lax.fori_loop(0, LEVELS, halves, (tile, tile, tile))

    def inner(e, sums):
        d_query, d_key, whole = sums
        state, d_state = refs.states[:, e], refs.d_states[:, e]
        d_query += dot(refs.d_out[:, e], state, trans_b=True)
        d_key += dot(refs.value[:, e], d_state, trans_b=True)
        whole += jnp.sum(state.astype(jnp.float32) * d_state.astype(jnp.float32), axis=1)
        return d_query, d_key, whole

    d_query, d_key, whole = loop(values, span, inner, (tile, tile, zeros(depth)))
    query, key, log_decay = refs.query[...], refs.key[...], refs.log_decay[...]
    d_query *= jnp.exp(_summed(columns <= rows, log_decay, dtype)) * scale
    d_key *= jnp.exp(_summed(columns > rows, log_decay, dtype))
    after = key * d_key
    upto += query * d_query
    refs.d_query[...] = (d_query + d_query_inside + itself * key).astype(dtype)
    refs.d_key[...] = (d_key + d_key_inside + itself * query).astype(dtype)
    kept = whole * jnp.exp(jnp.sum(log_decay, axis=0))
    reached = _summed(columns >= rows, upto, dtype) + _summed(columns < rows, after, dtype)
    refs.d_log_decay[...] = reached + kept[None, :]
