"""Attention weights under a mask, their dropout, and the runs of packed documents."""

import jax
import jax.numpy as jnp


@jax.custom_jvp
def masked_softmax(logits, mask):
    """Softmax over the last axis of what `mask` leaves; zeros, and no gradient, where it leaves nothing.

    For its gradient it keeps the result and nothing else, as `jax.nn.softmax` does.
    """
    peak = jnp.max(jnp.where(mask, logits, -jnp.inf), axis=-1, keepdims=True)
    exponentials = jnp.where(mask, jnp.exp(logits - jnp.where(jnp.isfinite(peak), peak, 0)), 0)
    total = exponentials.sum(-1, keepdims=True)
    return exponentials / jnp.where(total > 0, total, 1)


@masked_softmax.defjvp
def _masked_softmax_jvp(primals, tangents):
    weights = masked_softmax(*primals)
    moved = weights * tangents[0]
    return weights, moved - weights * moved.sum(-1, keepdims=True)


def check_dropout(dropout_rate: float, dropout_key) -> None:
    """Raises ValueError unless the rate is in [0, 1) and a key is there exactly when it is needed."""
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"dropout_rate must be at least 0 and below 1, got {dropout_rate}")
    if (dropout_key is None) != (dropout_rate == 0):
        wanted = "needs a dropout_key" if dropout_key is None else "takes no dropout_key; leave it None"
        raise ValueError(f"dropout_rate {dropout_rate} {wanted}")


def dropout(weights, dropout_rate: float, dropout_key):
    """Weights of which each stays with probability `1 - dropout_rate`, scaled up to keep the mean."""
    if dropout_rate == 0:
        return weights
    kept = jax.random.bernoulli(dropout_key, 1 - dropout_rate, weights.shape)
    return jnp.where(kept, weights / (1 - dropout_rate), 0)


def document_runs(segments):
    """Numbers `(B, N)`, from 0, of the runs of equal ids: an id that comes again later is another document."""
    changes = segments[:, 1:] != segments[:, :-1]
    return jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
