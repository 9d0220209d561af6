"""A chunk of a head whose tokens write what the memory got wrong; its layout is that of `scan_scalar`."""

import jax.numpy as jnp

from kernels.pallas_tpu.scan_parts import NT, TN, decay_gradient, level_mask, places, scalar_decay, sizes


def inverse(product, above):
    """The inverse of `I + above`, `above` being `(C, C)` and 0 on and below the diagonal.

    Put together from the inverses of blocks of 1, 2, 4, ... tokens, all of them at once: nothing in it is larger than
    such inverses are, as powers of `above` would be.
    """
    chunk = len(above)
    rows, columns = places(chunk, chunk)
    found = jnp.where(rows == columns, 1.0, 0.0)
    for size in sizes(chunk):
        level = jnp.where(level_mask(chunk, size), above, 0.0)
        if size == 1:
            found -= level
        elif size < 8:
            found -= product.precise(found, product.precise(level, found))
        else:
            # Rows of second halves are 0, and whole tiles here.
            change = _with_second_halves(product.precise(_first_halves(level, size), found), size)
            found -= _with_second_halves(product.precise(_first_halves(found, size), change), size)
    return found


def _first_halves(x, size: int):
    """The rows of the first half of each block of `2 * size`."""
    return jnp.concatenate([x[start : start + size] for start in range(0, len(x), 2 * size)])


def _with_second_halves(x, size: int):
    """The same rows with second halves of zeros."""
    zeros = jnp.zeros((size, x.shape[1]), x.dtype)
    return jnp.concatenate([y for start in range(0, len(x), size) for y in (x[start : start + size], zeros)])


class _Chunk:
    """What both passes compute of a chunk, from its operands and the state before it."""

    def __init__(self, product, query, key, value, gates, state):
        chunk = query.shape[1]
        rows, columns = places(chunk, chunk)
        self.decay = scalar_decay(chunk, gates.sums)
        self.between_others = jnp.where(rows < columns, self.decay.between, 0.0)
        self.alike = product(key, key, TN) * self.between_others
        self.inverse = inverse(product, gates.beta * self.alike)
        self.recalled = product.of_state(state, key, TN) * self.decay.into
        self.wrong = value - self.recalled
        self.written = product.precise(gates.beta * self.wrong, self.inverse)
        self.asked = product(key, query, TN)


def forward(product, query, key, value, gates, state, scale):
    at = _Chunk(product, query, key, value, gates, state)
    out = product(at.written, at.asked * at.decay.between) + product.of_state(state, query, TN) * at.decay.into
    state = state * at.decay.total + product(key, at.written * at.decay.onto, NT)
    return out * scale, state


def backward(product, query, key, value, gates, state, d_out, d_state):
    at = _Chunk(product, query, key, value, gates, state)
    decay, beta = at.decay, gates.beta
    d_weights = product(at.written, d_out, TN) * decay.between
    d_written_end = product(d_state, key, TN) * decay.onto
    d_written = product(d_out, at.asked * decay.between, NT) + d_written_end
    d_missing = product.precise(d_written, at.inverse, NT)
    d_value = beta * d_missing
    d_system = -product(at.written, d_missing, TN)
    d_alike = d_system * beta * at.between_others
    d_query_start = product(state, d_out) * decay.into
    d_query = product(key, d_weights) + d_query_start
    d_recalled = -d_value * decay.into
    d_key = product(query, d_weights, NT) + product(d_state, at.written) * decay.onto
    d_key += product(state, d_recalled) + product(key, d_alike) + product(key, d_alike, NT)
    d_beta = (d_missing * at.wrong).sum(0, keepdims=True) + (d_system * at.alike).sum(0, keepdims=True)
    d_log_decay = None
    if gates.sums is not None:
        rows, columns = places(*d_weights.shape)
        pairs = jnp.where(rows < columns, d_weights * at.asked, 0.0) + d_system * beta * at.alike
        into = (query * d_query_start).sum(0, keepdims=True) - (d_value * at.recalled).sum(0, keepdims=True)
        onto = (at.written * d_written_end).sum(0, keepdims=True)
        d_log_decay = decay_gradient(pairs, into, onto, decay.total * (state * d_state).sum(keepdims=True))
    d_state = d_state * decay.total + product(query * decay.into, d_out, NT) + product(key, d_recalled, NT)
    return d_query, d_key, d_value, d_beta, d_log_decay, d_state
