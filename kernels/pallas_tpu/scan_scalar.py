"""A chunk of a head that decays as a whole, or not at all.

Operands are `(D, C)` and `(E, C)`: tokens are lanes. A matrix of tokens has those who write as rows, those who read as
columns.
"""

import jax.numpy as jnp

from kernels.pallas_tpu.scan_parts import NT, TN, decay_gradient, places, scalar_decay


def forward(product, query, key, value, gates, state, scale):
    decay = scalar_decay(query.shape[1], gates.sums)
    weights = product(key, query, TN) * decay.between
    out = product(value, weights) + product.of_state(state, query, TN) * decay.into
    state = state * decay.total + product(key, value * decay.onto, NT)
    return out * scale, state


def backward(product, query, key, value, gates, state, d_out, d_state):
    decay = scalar_decay(query.shape[1], gates.sums)
    alike = product(key, query, TN)
    d_weights = product(value, d_out, TN) * decay.between
    # By way of the state: what reaches the query from its start, and the value from its end.
    d_query_start = product(state, d_out) * decay.into
    d_value_end = product(d_state, key, TN) * decay.onto
    d_query = product(key, d_weights) + d_query_start
    d_key = product(query, d_weights, NT) + product(d_state, value) * decay.onto
    d_value = product(d_out, alike * decay.between, NT) + d_value_end
    d_log_decay = None
    if gates.sums is not None:
        rows, columns = places(*alike.shape)
        pairs = jnp.where(rows < columns, d_weights * alike, 0.0)
        into = (query * d_query_start).sum(0, keepdims=True)
        onto = (value * d_value_end).sum(0, keepdims=True)
        d_log_decay = decay_gradient(pairs, into, onto, decay.total * (state * d_state).sum(keepdims=True))
    d_state = d_state * decay.total + product(query * decay.into, d_out, NT)
    return d_query, d_key, d_value, None, d_log_decay, d_state
