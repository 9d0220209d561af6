"""A chunk of a head whose tokens write what the memory got wrong, with or without decay."""

import jax.numpy as jnp

from kernels.pallas_tpu.scan_parts import (
    NT,
    TN,
    as_row,
    decay_gradient,
    level_mask,
    places,
    scalar_decay,
    sizes,
)


def inverse(product, below):
    """The inverse of `I + below`, `below` being `(C, C)` and 0 on and above the diagonal.

    Put together from the inverses of blocks of 1, 2, 4, ... tokens, all of them at once: nothing in it is larger than
    such inverses are, as powers of `below` would be.
    """
    chunk = len(below)
    rows, columns = places(chunk)
    found = jnp.where(rows == columns, 1.0, 0.0)
    for size in sizes(chunk):
        level = jnp.where(level_mask(chunk, size), below, 0.0)
        found -= level if size == 1 else product.precise(found, product.precise(level, found))
    return found


class _Chunk:
    """What both passes compute of a chunk, from its operands and the state before it."""

    def __init__(self, product, query, key, value, gates, state):
        rows, columns = places(len(query))
        self.decay = scalar_decay(len(query), gates.sums)
        self.beta = gates.beta[0]
        self.between_strictly = jnp.where(rows > columns, self.decay.between, 0.0)
        self.alike = product(key, key, NT) * self.between_strictly
        self.inverse = inverse(product, self.beta * self.alike)
        self.recalled = product.of_state(key, state) * self.decay.into
        self.wrong = value - self.recalled
        self.written = product.precise(self.inverse, self.beta * self.wrong)
        self.weights = product(query, key, NT) * self.decay.between


def forward(product, query, key, value, gates, state, scale):
    at = _Chunk(product, query, key, value, gates, state)
    out = product(at.weights, at.written) + product.of_state(query, state) * at.decay.into
    state = state * at.decay.total + product(key, at.written * at.decay.onto, TN)
    return out * scale, state


def backward(product, query, key, value, gates, state, d_out, d_state):
    at = _Chunk(product, query, key, value, gates, state)
    decay = at.decay
    d_weights = product(d_out, at.written, NT) * decay.between
    d_written_end = product(key, d_state) * decay.onto
    d_written = product(at.weights, d_out, TN) + d_written_end
    d_missing = product.precise(at.inverse, d_written, TN)
    d_value = at.beta * d_missing
    d_system = -product(d_missing, at.written, NT)
    d_alike = d_system * at.beta * at.between_strictly
    d_query_start = product(d_out, state, NT) * decay.into
    d_query = product(d_weights, key) + d_query_start
    d_recalled = -d_value * decay.into
    d_key = product(d_weights, query, TN) + product(at.written, d_state, NT) * decay.onto
    d_key += product(d_recalled, state, NT) + product(d_alike, key) + product(d_alike, key, TN)
    d_beta = (d_missing * at.wrong).sum(1, keepdims=True) + (d_system * at.alike).sum(1, keepdims=True)
    d_log_decay = None
    if gates.sums is not None:
        rows, columns = places(len(query))
        pairs = jnp.where(rows > columns, d_weights * product(query, key, NT), 0.0)
        pairs += d_system * at.beta * at.alike
        into = (query * d_query_start).sum(1, keepdims=True) - (d_value * at.recalled).sum(1, keepdims=True)
        onto = (at.written * d_written_end).sum(1, keepdims=True)
        d_log_decay = decay_gradient(pairs, into, onto, decay.total * (state * d_state).sum(keepdims=True))
    d_state = d_state * decay.total + product(query * decay.into, d_out, TN) + product(key, d_recalled, TN)
    return d_query, d_key, d_value, as_row(d_beta), d_log_decay, d_state
