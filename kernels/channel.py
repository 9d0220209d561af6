"""Attention between channels: every channel of a group attends to the channels of its group over all tokens."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.dense import accumulator_dtype
from kernels.dispatch import Implementation, dispatch


def _xla(query, key, value, *, scale, return_weights):
    acc = accumulator_dtype(query.dtype)
    # The logits are sums over all tokens and grow with their number: never in 16 bits.
    logits = jnp.einsum("bnhd,bnhe->bhde", query, key, preferred_element_type=acc) * scale
    weights = jax.nn.softmax(logits, axis=-1)
    out = jnp.einsum("bhde,bnhe->bnhd", weights.astype(value.dtype), value)
    return (out, weights) if return_weights else out


TABLE = (Implementation("xla", _xla),)


def channel_attention(
    query: Float[Array, "B N H D"],
    key: Float[Array, "B N H D"],
    value: Float[Array, "B N H D"],
    *,
    scale: float | None = None,
    implementation: str | Sequence[str] | None = None,
    return_weights: bool = False,
):
    """Channel-group attention: `out = value @ softmax(scale * query^T key)^T` in each group. Noncausal.

    The names are those of the arithmetic, not of any checkpoint: row i of the D x D weights belongs to query
    channel i, the softmax runs over key channels, and the weights mix value channels.

    Args:
        query, key, value: `(B, N, H, D)`: N tokens, H groups of D channels.
        scale: factor on the logits; None means `D ** -0.5`.
        implementation: None, a name or an order of preference; see `kernels.dispatch`.
        return_weights: also return the weights.

    Returns:
        `(B, N, H, D)` in the dtype of `value`; with `return_weights` a pair with the weights `(B, H, D, D)`.
        Logits and softmax are float32 (float64 for float64 inputs).

    Raises:
        NotImplementedError: if a forced implementation cannot serve the call.

    Source: DaViT (arXiv:2204.03645), section 3.3, equation 5.
    """
    options = dict(scale=query.shape[-1] ** -0.5 if scale is None else scale, return_weights=return_weights)
    return dispatch("channel_attention", TABLE, implementation, (query, key, value), options)
