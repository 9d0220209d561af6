"""The delta rule on GPUs, in Triton.

Per chunk, with the keys' products decayed and below the diagonal, L, and the state S before it, what the tokens write
is `W = (I + L)^-1 beta (V - decayed K S)`, and the chunk goes on as in a recurrence whose values are W. The inverses
of all chunks are computed first; so only products of matrices are left from chunk to chunk.

Source: the WY form of Yang et al. (arXiv:2406.06484), section 3, with the system applied once the state is known.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import tuning
from kernels.pallas_gpu import scan
from kernels.pallas_gpu.tiles import (
    CHUNK,
    blocks,
    decay_matrix,
    dot,
    dot_parts,
    indices,
    launch,
    over,
    parts,
    warps,
)
from kernels.scan_plan import transcendentals

# Of bfloat16 operands, of how many such numbers a number of the inverse, of a state, of what is missing is the sum.
PARTS = 2


def _inverse(key, beta, log_decay):
    """The inverses of the systems, `(B, N, H, C)`, in the dtype of the key."""
    batch, tokens, heads, channels = key.shape
    chunks = tokens // CHUNK
    (keys, vector), (square, _) = scan.specs(channels), scan.specs(CHUNK)
    size = tuning.blocks(
        "scan_delta_inverse", "gpu", dict(warps=warps(key.dtype), stages=1), channels=channels, dtype=str(key.dtype)
    )
    (inverse,) = launch(
        _inverse_body,
        "scan_delta_inverse",
        (chunks, heads, batch),
        dict(key=(key, keys), beta=(beta, vector), log_decay=(log_decay, vector)),
        dict(inverse=((batch, tokens, heads, CHUNK), key.dtype, square)),
        flops=batch * heads * chunks * CHUNK * CHUNK * (channels + CHUNK // 3),
        transcendentals=batch * heads * chunks * transcendentals("scalar", CHUNK, channels, log_decay is not None),
        **size,
    )
    return inverse


def _inverse_body(refs):
    dtype = refs.key.dtype
    rows, columns = indices()
    system = scan.alike(refs.key, refs.key)
    system = jnp.where(columns < rows, system * refs.beta[...][:, None], 0.0)
    if refs.log_decay is not None:
        system = system * decay_matrix(refs.log_decay[...])

    def inside(level):
        """Whether it is in blocks of `2 << level` tokens, below the blocks of their halves."""
        return ((rows >> (level + 1)) == (columns >> (level + 1))) & ((rows >> level) > (columns >> level))

    # From halves: the inverse of [[A, 0], [L, B]] has -B^-1 L A^-1 below the diagonal.
    def joined(level, inverse):
        split = parts(inverse, dtype)
        below = dot_parts(split, parts(dot_parts(systems, split), dtype))
        return inverse - jnp.where(inside(level), below, 0.0)

    inverse = jnp.where(rows == columns, 1.0, 0.0) - jnp.where(inside(0), system, 0.0)
    systems = parts(system, dtype)
    inverse = jax.lax.fori_loop(1, CHUNK.bit_length() - 1, joined, inverse)
    refs.inverse[...] = inverse.astype(refs.inverse.dtype)


def _walk(operands, wide, vectors, start, *, results, name, body, stages, scale=1.0):
    """A kernel that carries whole columns of states from chunk to chunk.

    Args:
        operands: `query`, `key`, and `inverse`, by name; None where there is no need of one.
        wide: by name what is `(B, N, H, E)`.
        vectors: by name what is `(B, H, N)`, or None.
        start: the first state, `(B, H, D, E)` float32, or None.
        results: the name of the result that is `(B, N, H, E)`.
        name: of the kernel, and of its block sizes.
        stages: of its loop, where none were measured.

    Returns:
        That, the states that each chunk starts from, and the last state.
    """
    key, value = operands["key"], next(iter(wide.values()))
    batch, tokens, heads, channels = key.shape
    values, chunks, dtype = value.shape[-1], tokens // CHUNK, key.dtype
    default = dict(columns=32 if dtype == jnp.bfloat16 else 16, warps=warps(dtype), stages=stages)
    size = tuning.blocks(name, "gpu", default, channels=channels, values=values, dtype=str(dtype))
    column = min(values, size.pop("columns"))

    def whole(size):
        return pl.BlockSpec((None, tokens, None, size), lambda e, h, b: (b, 0, h, 0))

    part = pl.BlockSpec((None, tokens, None, column), lambda e, h, b: (b, 0, h, e))
    vector = pl.BlockSpec((None, None, tokens), lambda e, h, b: (b, h, 0))
    tile = pl.BlockSpec((None, None, channels, column), lambda e, h, b: (b, h, 0, e))
    states = pl.BlockSpec((None, None, chunks, channels, column), lambda e, h, b: (b, h, 0, 0, e))
    pairs = CHUNK * CHUNK * values + 4 * CHUNK * channels * values * (2 if "query" in operands else 1)
    return launch(
        functools.partial(body, chunks=chunks, scale=scale),
        name,
        (values // column, heads, batch),
        {
            **{key: (x, whole(CHUNK if key == "inverse" else channels)) for key, x in operands.items()},
            **{key: (x, part) for key, x in wide.items()},
            **{key: (x, vector) for key, x in vectors.items()},
            "start": (start, tile),
        },
        {
            results: (value.shape, dtype, part),
            "states": ((batch, heads, chunks, channels, values), dtype, states),
            "last": ((batch, heads, channels, values), jnp.float32, tile),
        },
        flops=batch * heads * chunks * pairs,
        **size,
    )


def _start(refs, depths):
    """The first state in blocks of channels."""
    step = depths[0].size
    if refs.start is None:
        return (jnp.zeros((step, refs.last.shape[1]), jnp.float32),) * len(depths)
    return tuple(refs.start[d, :] for d in depths)


def _forward_walk(refs, *, chunks, scale):
    dtype = refs.key.dtype
    depths = blocks(refs.key.shape[1], dtype)

    def step(chunk, states):
        tokens = pl.ds(chunk * CHUNK, CHUNK)
        for d, state in zip(depths, states):
            refs.states[chunk, d, :] = state.astype(dtype)
        recalled = sum(dot_parts([refs.key[tokens, d]], parts(state, dtype, PARTS)) for d, state in zip(depths, states))
        if refs.into is not None:
            recalled = recalled * refs.into[tokens][:, None]
        missing = (refs.value[tokens, :].astype(jnp.float32) - recalled) * refs.beta[tokens][:, None]
        written = dot_parts([refs.inverse[tokens, :]], parts(missing, dtype, PARTS))
        refs.written[tokens, :] = written.astype(dtype)
        if refs.into is not None:
            left = refs.into[chunk * CHUNK + CHUNK - 1]
            states = [state * left for state in states]
            written = written * refs.onto[tokens][:, None]
        written = written.astype(dtype)
        return tuple(state + dot(refs.key[tokens, d], written, trans_a=True) for d, state in zip(depths, states))

    states = jax.lax.fori_loop(0, chunks, step, _start(refs, depths))
    for d, state in zip(depths, states):
        refs.last[d, :] = state


def _backward_walk(refs, *, chunks, scale):
    dtype = refs.key.dtype
    depths = blocks(refs.key.shape[1], dtype)

    def step(position, states):
        chunk = chunks - 1 - position
        tokens = pl.ds(chunk * CHUNK, CHUNK)
        for d, state in zip(depths, states):
            refs.states[chunk, d, :] = state.astype(dtype)
        d_written = sum(
            dot_parts([refs.key[tokens, d]], parts(state, dtype, PARTS)) for d, state in zip(depths, states)
        )
        if refs.onto is not None:
            d_written = d_written * refs.onto[tokens][:, None]
        d_written = d_written + refs.d_written[tokens, :]
        d_missing = dot_parts([refs.inverse[tokens, :]], parts(d_written, dtype, PARTS), trans_a=True)
        refs.d_missing[tokens, :] = d_missing.astype(dtype)
        d_recalled = d_missing * -refs.beta[tokens][:, None]
        d_out, factor = refs.d_out[tokens, :], scale
        if refs.into is not None:
            into, factor = refs.into[tokens][:, None], 1.0
            d_recalled, d_out = d_recalled * into, (d_out * (into * scale)).astype(dtype)
            left = refs.into[chunk * CHUNK + CHUNK - 1]
            states = [state * left for state in states]
        d_recalled = d_recalled.astype(dtype)
        return tuple(
            state
            + dot(refs.query[tokens, d], d_out, trans_a=True) * factor
            + dot(refs.key[tokens, d], d_recalled, trans_a=True)
            for d, state in zip(depths, states)
        )

    states = jax.lax.fori_loop(0, chunks, step, _start(refs, depths))
    for d, state in zip(depths, states):
        refs.last[d, :] = state


def _written_again(operands, states, d_out, *, scale: float):
    """What the tokens wrote, `(B, N, H, E)`, and its gradient through the outputs of the chunk, in float32."""
    query, value = operands["query"], operands["value"]
    batch, tokens, heads, channels = query.shape
    values, chunks = value.shape[-1], tokens // CHUNK
    (keys, vector), (wide, _), (square, _) = (scan.specs(size) for size in (channels, values, CHUNK))
    kinds = dict(query=keys, key=keys, value=wide, inverse=square)
    given = {key: (array, kinds.get(key, vector)) for key, array in operands.items()}
    given |= dict(states=(states, scan.per_chunk(channels, values)), d_out=(d_out, wide))
    flops = 2 * CHUNK * channels * values + CHUNK * CHUNK * (channels + 2 * values)
    decayed = transcendentals("scalar", CHUNK, channels, operands["log_decay"] is not None)
    size = dict(warps=warps(query.dtype), stages=1)
    bucket = dict(channels=channels, values=values, dtype=str(query.dtype))
    size = tuning.blocks("scan_delta_written", "gpu", size, **bucket)
    return launch(
        functools.partial(_written_again_body, scale=scale),
        "scan_delta_written",
        (chunks, heads, batch),
        given,
        dict(written=(value.shape, value.dtype, wide), d_written=(value.shape, jnp.float32, wide)),
        flops=batch * heads * chunks * flops,
        transcendentals=batch * heads * chunks * decayed,
        **size,
    )


def _written_again_body(refs, *, scale):
    dtype = refs.key.dtype
    weights = scan.chunk_weights(refs, scale)

    def block(e, carry):
        refs.d_written[:, e] = dot(weights, refs.d_out[:, e], trans_a=True)
        recalled = scan.times_states(refs.key, refs.states, e)
        if refs.into is not None:
            recalled = recalled * refs.into[...][:, None]
        missing = (refs.value[:, e].astype(jnp.float32) - recalled) * refs.beta[...][:, None]
        refs.written[:, e] = dot_parts([refs.inverse[...]], parts(missing, dtype, PARTS)).astype(dtype)
        return carry

    over(refs.value.shape[1], dtype, block, 0)


def forward(query, key, value, beta, log_decay, initial_state, *, scale: float):
    """Output, final state, states; `log_decay` is `(B, N, H)` or None."""
    into, onto = scan.ends(log_decay)
    beta, log_decay = scan.by_head(beta), scan.by_head(log_decay)
    written, states, final = _walk(
        dict(key=key, inverse=_inverse(key, beta, log_decay)),
        dict(value=value),
        dict(beta=beta, into=into, onto=onto),
        initial_state,
        results="written",
        name="scan_delta_states",
        body=_forward_walk,
        stages=2,
    )
    out = scan.outputs(query, key, None, written, states, log_decay, into, name="scan_delta_outputs", scale=scale)
    return out, final, states


def backward(query, key, value, beta, log_decay, states, d_out, d_final, *, scale: float):
    """Gradients of query, key, value, beta, log decay (or None) and initial state."""
    into, onto = scan.ends(log_decay)
    beta, log_decay = scan.by_head(beta), scan.by_head(log_decay)
    inverse = _inverse(key, beta, log_decay)
    operands = dict(query=query, key=key, value=value, beta=beta, log_decay=log_decay, into=into)
    written, d_written = _written_again(operands | dict(inverse=inverse), states, d_out, scale=scale)
    d_missing, d_states, d_initial = _walk(
        dict(query=query, key=key, inverse=inverse),
        dict(d_written=d_written, d_out=d_out),
        dict(beta=beta, into=into, onto=onto),
        d_final,
        results="d_missing",
        name="scan_delta_d_states",
        body=_backward_walk,
        stages=1,
        scale=scale,
    )
    operands |= dict(onto=onto, written=written, d_missing=d_missing)
    gradients = scan.gradients(operands, states, d_states, d_out, name="scan_delta_gradients", scale=scale)
    return *gradients, d_initial
