"""Which tokens a cluster of routing attention holds, and what its tokens attend with."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32

from kernels.cluster.centroids import centroid_scores, normalize_tokens

Assignment = Literal["topk", "strided", "hash"]
# Added to the number of clusters that a token is in when its outputs are averaged.
COUNT_EPSILON = {"official": 1e-2, "lucidrains": 1e-5}


def default_scale(style: str, dim: int) -> float:
    """The factor on the logits: layer-normalised queries and keys are not scaled."""
    return 1.0 if style == "official" else dim**-0.5


def self_logit(style: str, shared: bool) -> float | None:
    """A token's logit for itself, None for what the product gives: -5e4 wins only where it sees nothing else."""
    return -5e4 if style == "lucidrains" and shared else None


def routed(query, key, means, style: str, assignment: str):
    """What attends, and how well it fits every cluster.

    Args:
        query: `(B, N, H, D)`, projected only.
        key: `(B, M, H, D)`, likewise; None if keys are the queries.
        means: `(H, K, D)`, or the projections `(H, bits, D)` for `"hash"`.
        style, assignment: as in `routing_attention`.

    Returns:
        Queries `(B, H, N, D)` and keys `(B, H, M, D)` ready for their product, in the dtypes of the inputs, and
        their scores `(B, H, N, K)` and `(B, H, M, K)`, which are the same array if `key` is None.
    """

    def scores(tokens):
        fit = hash_scores if assignment == "hash" else centroid_scores
        return jax.lax.stop_gradient(fit(tokens, means))

    def heads_first(x):
        return x.transpose(0, 2, 1, 3)

    def normal(x):
        tokens = normalize_tokens(x, style)
        return tokens, tokens.astype(x.dtype)

    tokens, unit = normal(query)
    query_scores = key_scores = scores(tokens)
    keys = unit
    if key is not None:
        tokens, keys = normal(key)
        key_scores = scores(tokens)
    if style == "lucidrains":
        unit, keys = query, keys if key is None else key
    return heads_first(unit), heads_first(keys), query_scores, key_scores


def on_grid(scores: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Scores rounded to multiples of 2 ** -10 (of 2 ** -36 for float64).

    How many tokens are computed at once changes the last digits of a score, and so the order of tokens that are
    equal, such as a word that comes again. On the grid they are equal again, and the first goes first.
    """
    digits = 36 if scores.dtype == jnp.float64 else 10
    return jnp.round(scores * 2**digits) / 2**digits


def top_members(scores: Float[Array, "B H N K"], window: int) -> Int[Array, "B H K w"]:
    """For every cluster the `window` tokens with the highest scores, by position; of equals the first ones."""
    _, indices = jax.lax.top_k(scores.swapaxes(-1, -2), window)
    return jnp.sort(indices, axis=-1)


def strided_members(scores: Float[Array, "B H N K"], window: int) -> Int[Array, "B H K w"]:
    """For every cluster `window` tokens spread evenly over the ranking of all by their scores, by position."""
    order = jnp.argsort(-scores.swapaxes(-1, -2), axis=-1, stable=True)
    stride = scores.shape[2] // window
    return jnp.sort(order[..., ::stride][..., :window], axis=-1)


def hash_scores(
    tokens: Float[Array, "B N H D"], projections: Float[Array, "H bits D"]
) -> Float[Array, "B H N buckets"]:
    """One for the bucket of a token among `2 ** bits`, zero for the others; bit i is set where product i is > 0."""
    bits = centroid_scores(tokens, projections) > 0
    bucket = jnp.sum(bits * 2 ** jnp.arange(bits.shape[-1]), axis=-1)
    return jax.nn.one_hot(bucket, 2 ** bits.shape[-1], dtype=tokens.dtype)


def hash_projections(
    key: Key[Array, ""] | UInt32[Array, "2"], heads: int, clusters: int, dim: int
) -> Float[Array, "H bits D"]:
    """Fixed random directions for `assignment="hash"`, orthonormal within a head.

    Args:
        key: random key.
        heads, dim: H and D.
        clusters: K, a power of 2; `log2(K)` directions tell them apart.

    Returns:
        `(H, log2(K), D)` float32, to be passed in the place of the means and never updated.

    Raises:
        ValueError: if K is not a power of 2, at least 2, or too large for D.
    """
    bits = clusters.bit_length() - 1
    if clusters < 2 or clusters != 2**bits or bits > dim:
        near = 2 ** min(max(bits, 1), dim)
        raise ValueError(f"clusters must be a power of 2 from 2 to 2 ** {dim} to be hashed, got {clusters}; try {near}")
    basis, _ = jnp.linalg.qr(jax.random.normal(key, (heads, dim, bits), jnp.float32))
    return basis.swapaxes(-1, -2)
