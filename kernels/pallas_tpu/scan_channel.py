"""A chunk of a head whose channels decay each at its own rate.

As in the XLA form (`kernels.chunks`) the decay between two tokens is put together from blocks of 1, 2, 4, ... tokens:
from the second half of a block's start to its tokens, and from the tokens of its first half to that half's end. So it
is a product of a factor per row and one per column, each at most 1, and no exponent is ever positive. Every size of
block is one product of all rows and columns, of which a mask takes what is in halves of one block.
"""

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels.pallas_tpu.scan_parts import NT, TN, level_mask, places, sizes


def _levels(log_decay):
    """For halves of 1, 2, 4, ... tokens `(into, onto)`, each `(C, D)`, as in `kernels.chunks.doublings`.

    Last comes the pair of the whole chunk, then `(1, D)`, what is left at its end of the state before it.
    """
    chunk = len(log_decay)
    into = jnp.exp(log_decay)
    onto, total = jnp.ones_like(into), into
    rows = places(chunk, log_decay.shape[1])[0]
    pairs = []
    for size in sizes(chunk):
        pairs.append((into, onto))
        second = (rows & size) != 0
        # Of the other half of its block, what is left from end to end.
        other = jnp.where(second, pltpu.roll(total, size, 0), pltpu.roll(total, chunk - size, 0))
        into, onto = jnp.where(second, into * other, into), jnp.where(second, onto, onto * other)
        total = total * other
    return pairs, into, onto, total[:1]


def _weights(product, query, key, levels):
    rows, columns = places(len(query))
    weights = jnp.where(rows == columns, (query * key).sum(1, keepdims=True), 0.0)
    for size, (into, onto) in zip(sizes(len(query)), levels):
        weights = jnp.where(level_mask(len(query), size), product(query * into, key * onto, NT), weights)
    return weights


def forward(product, query, key, value, gates, state, scale):
    levels, into, onto, total = _levels(gates.log_decay)
    out = product(_weights(product, query, key, levels), value) + product.of_state(query * into, state)
    state = state * total.T + product(key * onto, value, TN)
    return out * scale, state


def backward(product, query, key, value, gates, state, d_out, d_state):
    chunk = len(query)
    levels, into, onto, total = _levels(gates.log_decay)
    rows, columns = places(chunk)
    d_value_end = product(key * onto, d_state)
    d_value = product(_weights(product, query, key, levels), d_out, TN) + d_value_end
    d_weights = product(d_out, value, NT)
    own = jnp.where(rows == columns, d_weights, 0.0).sum(1, keepdims=True)
    from_start, to_end = product(d_out, state, NT) * into, product(value, d_state, NT) * onto
    d_query, d_key = own * key + from_start, own * query + to_end
    received = query * from_start
    for size, (level_into, level_onto) in zip(sizes(chunk), levels):
        masked = jnp.where(level_mask(chunk, size), d_weights, 0.0)
        q, k = product.rounded(query * level_into), product.rounded(key * level_onto)
        dq, dk = product(masked, k), product(masked, q, TN)
        d_query, d_key = d_query + dq * level_into, d_key + dk * level_onto
        # Of the factors as they were multiplied, so that what two tokens have between them cancels outside.
        received += q * dq - k * dk
    total = total.T
    kept = (total * (state * d_state).sum(1, keepdims=True)).T
    after, before = (rows <= columns).astype(jnp.float32), (rows > columns).astype(jnp.float32)
    d_log_decay = product.of_state(after, received) + product.of_state(before, key * to_end) + kept
    d_state = d_state * total + product(query * into, d_out, TN)
    return d_query, d_key, d_value, None, d_log_decay, d_state
