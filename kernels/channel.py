"""Attention between channels: every channel of a group attends to the channels of its group over all tokens."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.dense import accumulator_dtype
from kernels.dispatch import Implementation, dispatch

# A CPU adds up the tokens one after the other. In pieces of at most this many, float32 loses a quarter as much of
# the sum over the 784 tokens of a 28 x 28 map and less than a tenth over 3136; it is faster, its gradient 5 % slower.
MAX_TOKENS_PER_SUM = 64


def _products(query, key):
    # The logits are sums over all tokens and grow with their number: never in 16 bits.
    return jnp.einsum("...nhd,...nhe->...hde", query, key, preferred_element_type=accumulator_dtype(query.dtype))


def _products_in_pieces(query, key):
    b, n, h, d = query.shape
    if n <= MAX_TOKENS_PER_SUM:
        return _products(query, key)
    # A divisor if there is one, else zeros fill the last piece.
    sizes = range(MAX_TOKENS_PER_SUM, MAX_TOKENS_PER_SUM // 2, -1)
    size = next((size for size in sizes if n % size == 0), MAX_TOKENS_PER_SUM)
    margin = ((0, 0), (0, -n % size), (0, 0), (0, 0))
    query, key = (jnp.pad(x, margin).reshape(b, -1, size, h, d) for x in (query, key))
    return _products(query, key).sum(1)


def _xla(query, key, value, *, scale, return_weights):
    # Other platforms do not add in sequence, and would have to write the pieces down.
    products = jax.lax.platform_dependent(query, key, cpu=_products_in_pieces, default=_products)
    weights = jax.nn.softmax(products * scale, axis=-1)
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
