"""Global-local attention: the few tokens that matter most ask all tokens."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.dense import attention


def select_tokens(scores: Float[Array, "B N"], ratio: float, *, prefix: int = 1) -> Int[Array, "B R"]:
    """The tokens with the highest scores, after those that are always kept.

    Args:
        scores: of all tokens, such as the class token's row of `attention_rollout`; the first `prefix` are not
            looked at.
        ratio: share of the other tokens to choose, in (0, 1]; rounded down, but at least one is chosen.
        prefix: how many tokens at the start are kept whatever their scores (the class token).

    Returns:
        `(B, prefix + R)` int32: the kept tokens in their order, then the chosen ones, best first; of equal scores
        the one with the lowest index comes first. How many depends on shapes only.

    Raises:
        ValueError: for a ratio out of range, or a prefix that leaves no token to choose from.

    Source: DCAL (arXiv:2205.02151). That the class token is always kept, and the rounding, the paper
    does not say; its retrieval head reads the class token after this attention, so it must be among the queries.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be above 0 and at most 1, got {ratio}")
    tokens = scores.shape[1]
    if not 0 <= prefix < tokens:
        raise ValueError(f"prefix must be from 0 to {tokens - 1} for {tokens} tokens, got {prefix}")
    # 0.29 * 100 is a little less than 29.
    count = max(1, math.floor(ratio * (tokens - prefix) + 1e-6))
    _, chosen = jax.lax.top_k(jax.lax.stop_gradient(scores[:, prefix:]), count)
    kept = jnp.broadcast_to(jnp.arange(prefix, dtype=jnp.int32), (scores.shape[0], prefix))
    return jnp.concatenate([kept, chosen.astype(jnp.int32) + prefix], axis=1)


def take_tokens(x: Float[Array, "B N *rest"], indices: Int[Array, "B R"]) -> Float[Array, "B R *rest"]:
    """The tokens of every row of the batch at its own indices, which must be from 0 to N - 1; nothing is checked."""
    return jax.vmap(lambda row, i: row.at[i].get(mode="promise_in_bounds"))(x, indices)


def global_local_attention(
    query: Float[Array, "B M H D"],
    key: Float[Array, "B N H D"],
    value: Float[Array, "B N H D"],
    indices: Int[Array, "B R"] | None = None,
    *,
    scale: float | None = None,
    implementation: str | Sequence[str] | None = None,
    return_weights: bool = False,
):
    """Softmax attention of selected tokens to all tokens. Cross, noncausal.

    Args:
        query: of all tokens, M = N; or, with `indices=None`, of the selected ones alone, which saves the projection
            of the others.
        key, value: `(B, N, H, D)`, of all tokens.
        indices: which tokens ask, `select_tokens` gives them; nothing is checked when the program runs.
        scale: factor on the logits; None means `D ** -0.5`.
        implementation: None, a name or an order of preference; see `kernels.attention`.
        return_weights: also return the weights (XLA form only).

    Returns:
        `(B, R, H, D)` in the dtype of `query`, in the order of `indices`; with `return_weights` a pair with the
        weights `(B, H, R, N)`, float32 (float64 for float64 inputs).

    Raises:
        ValueError: if `indices` come with queries that are not those of all tokens.
        NotImplementedError: if a forced implementation cannot serve the call.

    Source: DCAL (arXiv:2205.02151).
    """
    if indices is not None:
        if query.shape[1] != key.shape[1]:
            raise ValueError(
                f"query has {query.shape[1]} tokens and key {key.shape[1]}; indices select from the queries of all "
                "tokens, leave them None where query holds the selected ones"
            )
        query = take_tokens(query, indices)
    return attention(query, key, value, scale=scale, implementation=implementation, return_weights=return_weights)
