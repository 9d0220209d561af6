"""A chunk of a head that decays as a whole, or not at all."""

import jax.numpy as jnp

from kernels.pallas_tpu.scan_parts import NT, TN, decay_gradient, places, scalar_decay


def forward(product, query, key, value, gates, state, scale):
    decay = scalar_decay(len(query), gates.sums)
    weights = product(query, key, NT) * decay.between
    out = product(weights, value) + product.of_state(query, state) * decay.into
    state = state * decay.total + product(key, value * decay.onto, TN)
    return out * scale, state


def backward(product, query, key, value, gates, state, d_out, d_state):
    decay = scalar_decay(len(query), gates.sums)
    weights = product(query, key, NT) * decay.between
    d_weights = product(d_out, value, NT) * decay.between
    # What the gradient of the state is at each token's value, and what reaches the query from the state.
    d_value_end = product(key, d_state) * decay.onto
    d_query_start = product(d_out, state, NT) * decay.into
    d_query = product(d_weights, key) + d_query_start
    d_key = product(d_weights, query, TN) + product(value, d_state, NT) * decay.onto
    d_value = product(weights, d_out, TN) + d_value_end
    d_log_decay = None
    if gates.sums is not None:
        rows, columns = places(len(query))
        pairs = jnp.where(rows > columns, d_weights * product(query, key, NT), 0.0)
        into = (query * d_query_start).sum(1, keepdims=True)
        onto = (value * d_value_end).sum(1, keepdims=True)
        d_log_decay = decay_gradient(pairs, into, onto, decay.total * (state * d_state).sum(keepdims=True))
    d_state = d_state * decay.total + product(query * decay.into, d_out, TN)
    return d_query, d_key, d_value, None, d_log_decay, d_state
