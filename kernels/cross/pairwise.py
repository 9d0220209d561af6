"""Pair-wise cross-attention: the queries of an image over its own keys and those of another image."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.dense import attention


def pairwise_attention(
    query: Float[Array, "B N H D"],
    key: Float[Array, "B N H D"],
    value: Float[Array, "B N H D"],
    partner: Int[Array, "B"] | tuple[Float[Array, "B M H D"], Float[Array, "B M H D"]],
    partner_mask: Bool[Array, "B"] | None = None,
    *,
    scale: float | None = None,
    implementation: str | Sequence[str] | None = None,
    return_weights: bool = False,
):
    """Softmax attention with one softmax over the keys of an image and of its partner. Noncausal.

    With a partner that equals the image this is self-attention: every key is there twice, with half its weight.

    Args:
        query, key, value: `(B, N, H, D)`.
        partner: for every image the index of its partner in the batch; an index outside the batch, such as -1, means
            none. Or the partners' `(key, value)`, `(B, M, H, D)` each.
        partner_mask: True where an image has a partner; None: wherever `partner` gives one.
        scale: factor on the logits; None means `D ** -0.5`.
        implementation: None, a name or an order of preference; see `kernels.attention`.
        return_weights: also return the weights (XLA form only).

    Returns:
        `(B, N, H, D)` in the dtype of `query`; an image without a partner attends to itself alone, and nothing of
        what stands in the partner's place reaches it, nor has it a gradient. With `return_weights` a pair with the
        weights `(B, H, N, N + M)`, the image's own keys first, float32 (float64 for float64 inputs).

    Raises:
        NotImplementedError: if a forced implementation cannot serve the call.

    Source: DCAL (arXiv:2205.02151). Whether the partner's keys and values pass gradients the paper does
    not say; here they do.
    """
    batch, own = query.shape[:2]
    if isinstance(partner, tuple):
        partner_key, partner_value = partner
        if partner_mask is not None:
            present = partner_mask[:, None, None, None]
            partner_key, partner_value = (jnp.where(present, x, 0) for x in (partner_key, partner_value))
    else:
        inside = (partner >= 0) & (partner < batch)
        partner_mask = inside if partner_mask is None else inside & partner_mask
        # Those without a partner get themselves, masked, so that no other image's features are read.
        partner = jnp.where(partner_mask, partner, jnp.arange(batch))
        partner_key, partner_value = key[partner], value[partner]
    mask = None
    if partner_mask is not None:
        is_own = jnp.arange(own + partner_key.shape[1]) < own
        mask = (is_own | partner_mask[:, None])[:, None, None, :]
    key = jnp.concatenate([key, partner_key], axis=1)
    value = jnp.concatenate([value, partner_value], axis=1)
    return attention(
        query, key, value, mask=mask, scale=scale, implementation=implementation, return_weights=return_weights
    )
