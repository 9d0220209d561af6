"""A chunk of a head whose channels decay each at its own rate; its layout is that of `scan_scalar`.

As in the XLA form (`kernels.chunks`) the decay between two tokens is put together from blocks of 1, 2, 4, ... tokens:
from the start of a block's second half to its tokens, and from the tokens of its first half to that half's end. So it
is a product of a factor per row and one per column, each at most 1, and no exponent is ever positive. Every size of
block is one product of all rows and columns, of which a mask takes what is in halves of one block.
"""

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels.pallas_tpu.scan_parts import NT, TN, level_mask, places, sizes


def _levels(log_decay):
    """For halves of 1, 2, 4, ... tokens pairs `(into, onto)`, each `(D, C)`, as in `kernels.chunks.doublings`.

    Then the pair of the whole chunk, and `(D, 1)`, what is left at its end of the state before it.
    """
    chunk = log_decay.shape[1]
    into = jnp.exp(log_decay)
    onto, total = jnp.ones_like(into), into
    _, columns = places(*log_decay.shape)
    pairs = []
    for size in sizes(chunk):
        pairs.append((into, onto))
        second = (columns & size) != 0
        # Of the other half of its block, what is left from end to end.
        other = jnp.where(second, pltpu.roll(total, size, 1), pltpu.roll(total, chunk - size, 1))
        into, onto = jnp.where(second, into * other, into), jnp.where(second, onto, onto * other)
        total = total * other
    return pairs, into, onto, total[:, :1]


def _weights(product, query, key, levels):
    chunk = query.shape[1]
    rows, columns = places(chunk, chunk)
    weights = jnp.where(rows == columns, (query * key).sum(0, keepdims=True), 0.0)
    for size, (into, onto) in zip(sizes(chunk), levels):
        weights = jnp.where(level_mask(chunk, size), product(key * onto, query * into, TN), weights)
    return weights


def forward(product, query, key, value, gates, state, scale):
    levels, into, onto, total = _levels(gates.log_decay)
    out = product(value, _weights(product, query, key, levels)) + product.of_state(state, query * into, TN)
    state = state * total + product(key * onto, value, NT)
    return out * scale, state


def backward(product, query, key, value, gates, state, d_out, d_state):
    chunk = query.shape[1]
    levels, into, onto, total = _levels(gates.log_decay)
    rows, columns = places(chunk, chunk)
    d_value = product(d_out, _weights(product, query, key, levels), NT) + product(d_state, key * onto, TN)
    d_weights = product(value, d_out, TN)
    own = jnp.where(rows == columns, d_weights, 0.0).sum(0, keepdims=True)
    from_start, to_end = product(state, d_out) * into, product(d_state, value) * onto
    d_query, d_key = own * key + from_start, own * query + to_end
    received = query * from_start
    for size, (level_into, level_onto) in zip(sizes(chunk), levels):
        masked = jnp.where(level_mask(chunk, size), d_weights, 0.0)
        q, k = product.rounded(query * level_into), product.rounded(key * level_onto)
        dq, dk = product(k, masked), product(q, masked, NT)
        d_query, d_key = d_query + dq * level_into, d_key + dk * level_onto
        # Of the factors as they were multiplied, so that what two tokens have between them cancels outside.
        received += q * dq - k * dk
    from_here, before = (rows >= columns).astype(jnp.float32), (rows < columns).astype(jnp.float32)
    # As in `scan_parts.decay_gradient`.
    d_log_decay = product.of_state(received, from_here) + product.of_state(key * to_end, before)
    d_log_decay += total * (state * d_state).sum(1, keepdims=True)
    d_state = d_state * total + product(query * into, d_out, NT)
    return d_query, d_key, d_value, None, d_log_decay, d_state
