"""Chunked recurrences on GPUs, in Triton: few programs carry states from chunk to chunk, many compute the rest.

The backward pass goes the same way: the states' gradients are carried from the last chunk to the first, and all
other gradients are computed chunk by chunk. Of bfloat16 operands states are kept in float32 and rounded where they
are multiplied.

Source: Yang et al. (arXiv:2312.06635, section 4.3) for the two kernels, Dao and Gu (arXiv:2405.21060, section 6) for
scalar decay.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import tuning
from kernels.pallas_gpu.tiles import CHUNK, decay_matrix, dot, indices, launch, loop, over, warps, width, zeros
from kernels.scan_plan import backward_flops, forward_flops, transcendentals


def ends(log_decay):
    """What is left at a token of the state before its chunk, and at its chunk's end of what the token writes.

    Takes `(B, N, H)` or None, gives two arrays `(B, H, N)` or None.
    """
    if log_decay is None:
        return None, None
    batch, tokens, heads = log_decay.shape
    chunks = log_decay.transpose(0, 2, 1).reshape(batch, heads, -1, CHUNK)
    after = jnp.pad(chunks[..., 1:], ((0, 0),) * 3 + ((0, 1),))
    sums = jnp.cumsum(chunks, -1), jax.lax.cumsum(after, 3, reverse=True)
    into, onto = (jnp.exp(x).reshape(batch, heads, tokens) for x in sums)
    return into, onto


def by_head(x):
    """`(B, N, H)` as `(B, H, N)`; None for None."""
    return None if x is None else x.swapaxes(1, 2)


def walk(left, right, factor, into, kept, start, *, name: str, scale: float = 1.0, reverse: bool = False):
    """States from chunk to chunk: `S' = decay * S + left^T (factor * right)`.

    Args:
        left, right: `(B, N, H, D)` and `(B, N, H, E)`.
        factor: on the tokens of `right`, `(B, H, N)`; None for `scale`.
        into: `(B, H, N)`, whose values at the chunks' last tokens are the decays; or None.
        kept: `(B, H, chunks, D)`, decays of the states' rows; or None.
        start: the first state, `(B, H, D, E)` float32; None for zeros.
        reverse: from the last chunk to the first.

    Returns:
        The states that each chunk starts from (in its order of going), `(B, H, chunks, D, E)` in the dtype of `left`,
        and the last state, float32.
    """
    batch, tokens, heads, rows = left.shape
    columns, chunks = right.shape[-1], tokens // CHUNK
    row, column = width(rows, left.dtype), width(columns, left.dtype)
    size = tuning.blocks(
        "scan_states", "gpu", dict(warps=warps(left.dtype), stages=3), rows=rows, columns=columns, dtype=str(left.dtype)
    )
    grid = (columns // column, rows // row, heads, batch)
    vector = pl.BlockSpec((None, None, tokens), lambda e, d, h, b: (b, h, 0))
    tile = pl.BlockSpec((None, None, row, column), lambda e, d, h, b: (b, h, d, e))
    return launch(
        functools.partial(_walk, chunks=chunks, scale=scale, reverse=reverse),
        name,
        grid,
        dict(
            left=(left, pl.BlockSpec((None, tokens, None, row), lambda e, d, h, b: (b, 0, h, d))),
            right=(right, pl.BlockSpec((None, tokens, None, column), lambda e, d, h, b: (b, 0, h, e))),
            factor=(factor, vector),
            into=(into, vector),
            kept=(kept, pl.BlockSpec((None, None, chunks, row), lambda e, d, h, b: (b, h, 0, d))),
            start=(start, tile),
        ),
        dict(
            states=(
                (batch, heads, chunks, rows, columns),
                left.dtype,
                pl.BlockSpec((None, None, chunks, row, column), lambda e, d, h, b: (b, h, 0, d, e)),
            ),
            last=((batch, heads, rows, columns), jnp.float32, tile),
        ),
        flops=2 * batch * heads * tokens * rows * columns,
        **size,
    )


def _walk(refs, *, chunks, scale, reverse):
    def step(position, state):
        chunk = chunks - 1 - position if reverse else position
        tokens = pl.ds(chunk * CHUNK, CHUNK)
        refs.states[chunk] = state.astype(refs.states.dtype)
        left, right = refs.left[tokens, :], refs.right[tokens, :]
        if refs.factor is not None:
            right = (right * refs.factor[tokens][:, None]).astype(right.dtype)
        if refs.into is not None:
            state = state * refs.into[chunk * CHUNK + CHUNK - 1]
        elif refs.kept is not None:
            state = state * refs.kept[chunk, :][:, None]
        # Not on the operand, which would be rounded once more.
        return state + dot(left, right, trans_a=True) * (1.0 if refs.factor is not None else scale)

    start = jnp.zeros(refs.last.shape, jnp.float32) if refs.start is None else refs.start[...]
    refs.last[...] = jax.lax.fori_loop(0, chunks, step, start)


def specs(channels: int):
    """Blocks of a grid of (chunks, H, B): of `(B, N, H, channels)`, of `(B, H, N)`."""
    return (
        pl.BlockSpec((None, CHUNK, None, channels), lambda c, h, b: (b, c, h, 0)),
        pl.BlockSpec((None, None, CHUNK), lambda c, h, b: (b, h, c)),
    )


def per_chunk(*shape: int):
    """Blocks of a grid of (chunks, H, B) of `(B, H, chunks, *shape)`."""
    return pl.BlockSpec((None, None, None, *shape), lambda c, h, b: (b, h, c) + (0,) * len(shape))


def outputs(query, key, weights, value, states, log_decay, into, *, name: str, scale: float, transposed: bool = False):
    """The outputs `(B, N, H, E)` from the states before each chunk.

    Either `key`, with `log_decay` and `into` `(B, H, N)` or None; or the `weights` `(B, N, H, C)`, which have `scale`
    and can be `transposed`.
    """
    batch, tokens, heads, channels = query.shape
    values, chunks = value.shape[-1], tokens // CHUNK
    (keys, vector), (wide, _), (square, _) = specs(channels), specs(values), specs(CHUNK)
    decayed = transcendentals("scalar", CHUNK, channels, log_decay is not None)
    size = dict(warps=warps(query.dtype), stages=1)
    bucket = dict(channels=channels, values=values, dtype=str(query.dtype))
    size = tuning.blocks("scan_outputs", "gpu", size, **bucket)
    flops = forward_flops("scalar", CHUNK, channels, values) - 2 * CHUNK * channels * values
    (out,) = launch(
        functools.partial(_outputs, scale=scale, transposed=transposed),
        name,
        (chunks, heads, batch),
        dict(
            query=(query, keys),
            key=(key, keys),
            weights=(weights, square),
            value=(value, wide),
            states=(states, per_chunk(channels, values)),
            log_decay=(log_decay, vector),
            into=(into, vector),
        ),
        dict(out=(value.shape, value.dtype, wide)),
        flops=batch * heads * chunks * flops,
        transcendentals=batch * heads * chunks * decayed,
        **size,
    )
    return out


def alike(left, right):
    """`left right^T` of two operands of a chunk, `(C, C)`."""
    channels, dtype = left.shape[1], left.dtype
    return over(channels, dtype, lambda d, sums: sums + dot(left[:, d], right[:, d], trans_b=True), zeros(CHUNK, CHUNK))


def times_states(left, states, e):
    """`left states` of a chunk for a block of the states' columns."""
    channels, dtype = left.shape[1], left.dtype
    return over(channels, dtype, lambda d, sums: sums + dot(left[:, d], states[d, e]), zeros(CHUNK, e.size))


def chunk_weights(refs, scale):
    """What each token of a chunk takes from each value, `(C, C)` in the dtype of the operands."""
    rows, columns = indices()
    decay = 1.0 if refs.log_decay is None else decay_matrix(refs.log_decay[...])
    return jnp.where(columns <= rows, alike(refs.query, refs.key) * decay * scale, 0.0).astype(refs.value.dtype)


def _outputs(refs, *, scale, transposed):
    dtype = refs.value.dtype
    weights = chunk_weights(refs, scale) if refs.weights is None else refs.weights[...]

    def block(e, carry):
        out = times_states(refs.query, refs.states, e) * scale
        if refs.into is not None:
            out = out * refs.into[...][:, None]
        refs.out[:, e] = (out + dot(weights, refs.value[:, e], trans_a=transposed)).astype(dtype)
        return carry

    over(refs.value.shape[1], dtype, block, 0)


def forward(query, key, value, log_decay, initial_state, *, scale: float):
    """Output, final state, states: scalar decay, or none."""
    into, onto = ends(log_decay)
    states, final = walk(key, value, onto, into, None, initial_state, name="scan_states")
    out = outputs(query, key, None, value, states, by_head(log_decay), into, name="scan_outputs", scale=scale)
    return out, final, states


def backward(query, key, value, log_decay, states, d_out, d_final, *, scale: float):
    """Gradients of query, key, value, log decay (or None) and initial state."""
    into, onto = ends(log_decay)
    scaled = None if into is None else into * scale
    d_states, d_initial = walk(
        query, d_out, scaled, into, None, d_final, name="scan_d_states", scale=scale, reverse=True
    )
    operands = dict(query=query, key=key, value=value, log_decay=by_head(log_decay), into=into, onto=onto)
    d_query, d_key, d_value, _, d_log_decay = gradients(
        operands, states, d_states, d_out, name="scan_gradients", scale=scale
    )
    return d_query, d_key, d_value, None, d_log_decay, d_initial


def gradients(operands, states, d_states, d_out, *, name: str, scale: float):
    """All gradients of a chunk from the states before it and the gradients of those after it.

    Args:
        operands: `query`, `key`, `value` and `(B, H, N)` or None `log_decay`, `into`, `onto`; for the delta rule
            `beta` `(B, H, N)`, what was `written` and `d_missing`, the gradient of what was missing, both
            `(B, N, H, E)`.

    Returns:
        d_query, d_key, d_value, d_beta or None, d_log_decay or None.
    """
    query, value, delta = operands["query"], operands["value"], "written" in operands
    batch, tokens, heads, channels = query.shape
    values, chunks = value.shape[-1], tokens // CHUNK
    (keys, vector), (wide, _) = specs(channels), specs(values)
    state = per_chunk(channels, values)
    kinds = dict(query=keys, key=keys, value=wide, written=wide, d_missing=wide)
    arrays = dict.fromkeys(("beta", "log_decay", "into", "onto", "written", "d_missing")) | operands
    given = {key: (array, kinds.get(key, vector)) for key, array in arrays.items()}
    given |= dict(states=(states, state), d_states=(d_states, state), d_out=(d_out, wide))
    results = dict(
        d_query=(query.shape, query.dtype, keys),
        d_key=(query.shape, query.dtype, keys),
        d_value=(value.shape, value.dtype, wide),
    )
    scalars = (batch, heads, tokens), jnp.float32, vector
    results |= dict(d_beta=scalars) if delta else {}
    decayed = arrays["log_decay"] is not None
    results |= dict(d_log_decay=scalars) if decayed else {}
    kind = "delta" if delta else "scalar"
    flops = backward_flops(kind, CHUNK, channels, values) - 2 * CHUNK * channels * values
    # The widest whose sums fit the registers.
    size = dict(narrow=32, wide=64, warps=warps(query.dtype), stages=1 if delta or query.dtype == jnp.float32 else 2)
    bucket = dict(kind=kind, channels=channels, values=values, dtype=str(query.dtype))
    size = tuning.blocks("scan_gradients", "gpu", size, **bucket)
    body = functools.partial(_gradients, scale=scale, narrow=size.pop("narrow"), wide=size.pop("wide"))
    made = launch(
        body,
        name,
        (chunks, heads, batch),
        given,
        results,
        flops=batch * heads * chunks * flops,
        transcendentals=batch * heads * chunks * transcendentals("scalar", CHUNK, channels, decayed),
        **size,
    )
    made = dict(zip(results, made))
    d_beta, d_log_decay = (by_head(made.get(key)) for key in ("d_beta", "d_log_decay"))
    return made["d_query"], made["d_key"], made["d_value"], d_beta, d_log_decay


def _gradients(refs, *, scale, narrow, wide):
    dtype, channels, values = refs.value.dtype, refs.key.shape[1], refs.value.shape[1]
    delta, decayed = refs.written is not None, refs.log_decay is not None
    narrow, wide = width(channels, dtype, narrow), width(values, dtype, wide)
    written = refs.written if delta else refs.value
    rows, columns = indices()
    square, vector = zeros(CHUNK, CHUNK), zeros(CHUNK)
    seen = columns <= rows
    decay = decay_matrix(refs.log_decay[...]) if decayed else jnp.where(seen, 1.0, 0.0)
    into, onto = (refs.into[...], refs.onto[...]) if decayed else (vector + 1, vector + 1)

    def products_of(left, right):
        return loop(channels, narrow, lambda d, sums: sums + dot(left[:, d], right[:, d], trans_b=True), square)

    # Of each token: what the sum of log decays up to it does, and what the sum of those after it does.
    upto, d_beta, d_system = vector, None, None
    if delta:
        beta = refs.beta[...]

        def system(e, sums):
            d_system, d_beta = sums
            d_missing = refs.d_missing[:, e]
            d_system -= dot(d_missing, written[:, e], trans_b=True)
            d_missing = d_missing.astype(jnp.float32)
            refs.d_value[:, e] = (d_missing * beta[:, None]).astype(dtype)
            return d_system, d_beta + jnp.sum(d_missing * refs.value[:, e].astype(jnp.float32), axis=1)

        d_system, d_beta = loop(values, wide, system, (square, vector))
        d_system = jnp.where(columns < rows, d_system * decay, 0.0)
        moved = d_system * products_of(refs.key, refs.key)
        d_beta += jnp.sum(moved, axis=1)
        upto = beta * jnp.sum(moved, axis=1) - jnp.sum(beta[:, None] * moved, axis=0)
        d_system = (d_system * beta[:, None]).astype(dtype)

    products = products_of(refs.query, refs.key) * decay * scale
    d_weights = loop(values, wide, lambda e, sums: sums + dot(refs.d_out[:, e], written[:, e], trans_b=True), square)
    moved = jnp.where(columns < rows, products * d_weights, 0.0)
    upto += jnp.sum(moved, axis=1) - jnp.sum(moved, axis=0)
    d_weights = jnp.where(seen, d_weights * decay * scale, 0.0).astype(dtype)
    if not delta:
        weights = jnp.where(seen, products, 0.0).astype(dtype)

        def valued(e, carry):
            d_value = zeros(CHUNK, wide)
            d_value = loop(channels, narrow, lambda d, sums: sums + dot(refs.key[:, d], refs.d_states[d, e]), d_value)
            d_value = d_value * onto[:, None] + dot(weights, refs.d_out[:, e], trans_a=True)
            refs.d_value[:, e] = d_value.astype(dtype)
            return carry

        loop(values, wide, valued, 0)

    def states(d, sums):
        upto, after, whole, d_beta = sums
        tile = zeros(CHUNK, narrow)

        def inner(e, sums):
            d_query, d_key, d_read, whole = sums
            state, d_state = refs.states[d, e], refs.d_states[d, e]
            d_query += dot(refs.d_out[:, e], state, trans_b=True)
            d_key += dot(written[:, e], d_state, trans_b=True)
            if delta:
                d_read -= dot(refs.d_missing[:, e], state, trans_b=True)
            if decayed:
                whole += jnp.sum(state.astype(jnp.float32) * d_state.astype(jnp.float32), axis=1)
            return d_query, d_key, d_read, whole

        d_query, d_key, d_read, whole = loop(values, wide, inner, (tile, tile, tile if delta else None, whole))
        query, key = refs.query[:, d], refs.key[:, d]
        d_query, d_key = d_query * (into * scale)[:, None], d_key * onto[:, None]
        if decayed:
            upto += jnp.sum(query.astype(jnp.float32) * d_query, axis=1)
            after += jnp.sum(key.astype(jnp.float32) * d_key, axis=1)
        if delta:
            d_read *= into[:, None]
            read = jnp.sum(key.astype(jnp.float32) * d_read, axis=1)
            d_beta += read
            upto += beta * read
            d_key += beta[:, None] * d_read + dot(d_system, key) + dot(d_system, key, trans_a=True)
        refs.d_query[:, d] = (d_query + dot(d_weights, key)).astype(dtype)
        refs.d_key[:, d] = (d_key + dot(d_weights, query, trans_a=True)).astype(dtype)
        return upto, after, whole, d_beta

    upto, after, whole, d_beta = loop(channels, narrow, states, (upto, vector, zeros(narrow), d_beta))
    if delta:
        refs.d_beta[...] = d_beta
    if decayed:
        reached = jnp.sum(jnp.where(rows >= columns, upto[:, None], 0.0), axis=0)
        reached += jnp.sum(jnp.where(rows < columns, after[:, None], 0.0), axis=0)
        refs.d_log_decay[...] = reached + jnp.sum(whole) * refs.into[CHUNK - 1]
