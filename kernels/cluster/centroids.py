"""Centroids of routing attention: their state, how training moves them, and the loss that pulls tokens to them."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from kernels.choices import check_choice
from kernels.dense import accumulator_dtype

Style = Literal["official", "lucidrains"]
LAYER_NORM_EPSILON = 1e-6
L2_EPSILON = 1e-12
COUNT_EPSILON = 1e-5


class Centroids(NamedTuple):
    """State of the K centroids of every head, all float32; `means` is what attention reads.

    Attributes:
        means: `(H, K, D)`.
        count: `(H, K)`, moving average of the number of tokens that a step assigns to a centroid.
        total: `(H, K, D)`, moving average of the sum of these tokens.

    The lucidrains style moves the means themselves and leaves the other two alone.
    """

    means: Float[Array, "H K D"]
    count: Float[Array, "H K"]
    total: Float[Array, "H K D"]


def init_centroids(
    key: Key[Array, ""] | UInt32[Array, "2"],
    heads: int,
    clusters: int,
    dim: int,
    *,
    style: str = "official",
    count: float = 1.0,
) -> Centroids:
    """Random centroids: standard normal, layer-normalised in the official style.

    Args:
        key: random key.
        heads, clusters, dim: H, K and D.
        style: `"official"` or `"lucidrains"`, whose centroids are meant to be replaced by `kmeans_init`.
        count: how many tokens the initial means weigh as in the moving averages. 0.0 is what the official code
            starts with, its total being the means all the same: one step then multiplies a centroid to which it
            assigns c tokens by about `decay / ((1 - decay) * c)`. That is harmless with thousands of tokens per
            centroid and step; with a few, assignment and commitment loss are governed by the blown-up centroids.

    Returns:
        The state, float32.

    Raises:
        ValueError: for an unknown style or a negative count.
    """
    check_choice("style", style, get_args(Style))
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    means = jax.random.normal(key, (heads, clusters, dim), jnp.float32)
    if style == "official":
        means = normalize_tokens(means, style)
    return Centroids(means, jnp.full((heads, clusters), count, jnp.float32), means * (count or 1.0))


def normalize_tokens(x: Float[Array, "*batch D"], style: str = "official") -> Float[Array, "*batch D"]:
    """Tokens as they are compared with centroids.

    Args:
        x: queries or keys, `(..., D)`.
        style: `"official"`: layer norm without scale and bias, epsilon 1e-6; vectors of norm `sqrt(D)`.
            `"lucidrains"`: L2, vectors of norm 1.

    Returns:
        `(..., D)`, float32 (float64 for float64). Zeros stay zeros.
    """
    check_choice("style", style, get_args(Style))
    x = x.astype(accumulator_dtype(x.dtype))
    if style == "official":
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + LAYER_NORM_EPSILON)
    # A norm's gradient at zero is nan; of the square's maximum it is zero.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), L2_EPSILON**2))


def centroid_scores(tokens: Float[Array, "B N H D"], means: Float[Array, "H K D"]) -> Float[Array, "B H N K"]:
    """Products of tokens and centroids, at the highest precision: noise near a tie changes a choice whole."""
    acc = accumulator_dtype(tokens.dtype)
    return jnp.einsum("bnhd,hkd->bhnk", tokens.astype(acc), means.astype(acc), precision=jax.lax.Precision.HIGHEST)


def nearest_centroid(tokens: Float[Array, "B N H D"], means: Float[Array, "H K D"]) -> Int[Array, "B H N"]:
    """For every token the centroid with the largest product, the lowest index among equals."""
    return jnp.argmax(centroid_scores(tokens, means), axis=-1)


def update_centroids(
    state: Centroids,
    tokens: Float[Array, "B N H D"],
    *,
    mask: Bool[Array, "B N"] | None = None,
    decay: float = 0.999,
    style: str = "official",
    axis_name: str | Sequence[str] | None = None,
) -> Centroids:
    """One step of online k-means: every token is assigned to the centroid with the largest product.

    With c the number of tokens of a centroid and m their sum, over batch and positions:

        count <- decay * count + (1 - decay) * c
        total <- decay * total + (1 - decay) * m
        means <- total / ((count + 1e-5) / (sum(count) + K * 1e-5) * sum(count))

    in the official style, where nothing normalises the means again; in the lucidrains style
    `means <- decay * means + (1 - decay) * m / |m|`, the second term being the old mean where c is 0.

    Call it after the forward pass, which reads the old means, in training only. For unshared attention the
    official code calls it twice, with queries and then with keys; lucidrains' once, with both in one sequence.

    Args:
        state: centroids before.
        tokens: `(B, N, H, D)`, as `normalize_tokens` gives them. No gradient passes.
        mask: True for tokens that count. In the official style all-zero tokens never do, which is how that code
            tells padding.
        decay: of the moving averages.
        style: `"official"` or `"lucidrains"`.
        axis_name: axes of an enclosing `shard_map` over which the statistics are summed. Under plain `jit` sums
            over a sharded batch are global by themselves.

    Returns:
        The new state, in the dtypes of the old one.

    Raises:
        ValueError: for an unknown style, or a decay outside of [0, 1].

    Source: `online_kmeans` in the official code of arXiv:2003.05997; the paper's own equation averages means
    instead, which that code does not do. lucidrains/routing-transformer, `kmeans_iter` and `Kmeans.update`.
    """
    check_choice("style", style, get_args(Style))
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be between 0 and 1, got {decay}")
    state, tokens = jax.lax.stop_gradient((state, tokens))
    if style == "lucidrains":
        means = kmeans_step(state.means, tokens, mask=mask, axis_name=axis_name)
        means = decay * state.means + (1 - decay) * means
        return state._replace(means=means.astype(state.means.dtype))
    counted = jnp.any(tokens != 0, axis=-1).transpose(0, 2, 1)
    if mask is not None:
        counted = counted & mask[:, None]
    count, total = _statistics(state.means, tokens, counted, axis_name)
    count = decay * state.count + (1 - decay) * count
    total = decay * state.total + (1 - decay) * total
    mass = count.sum(-1, keepdims=True)
    smoothed = (count + COUNT_EPSILON) / (mass + count.shape[-1] * COUNT_EPSILON) * mass
    new = Centroids(total / smoothed[..., None], count, total)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), new, state)


def commitment_loss(
    tokens: Float[Array, "B N H D"],
    means: Float[Array, "H K D"],
    *,
    mask: Bool[Array, "B N"] | None = None,
) -> Float[Array, ""]:
    """Mean squared distance, over all elements, of tokens from the centroids that they are assigned to.

    Args:
        tokens: `(B, N, H, D)`, as `normalize_tokens` gives them; the gradient reaches them only.
        means: `(H, K, D)`.
        mask: True for tokens that count. Neither published code leaves padding out.

    Returns:
        A scalar, float32 (float64 for float64 tokens). The official code adds it, times 1e-4, once for queries and
        once for keys, hence twice when they are shared; lucidrains' adds it once.
    """
    means = jax.lax.stop_gradient(means).astype(accumulator_dtype(tokens.dtype))
    assigned = nearest_centroid(jax.lax.stop_gradient(tokens), means)
    routed = jax.vmap(lambda means, i: means[i], in_axes=(0, 1), out_axes=1)(means, assigned)
    squares = jnp.square(tokens.astype(means.dtype) - routed.transpose(0, 2, 1, 3))
    if mask is None:
        return squares.mean()
    squares = jnp.where(mask[:, :, None, None], squares, 0)
    return squares.sum() / jnp.maximum(mask.sum() * squares.shape[2] * squares.shape[3], 1)


def kmeans_step(
    means: Float[Array, "H K D"],
    tokens: Float[Array, "B N H D"],
    *,
    mask: Bool[Array, "B N"] | None = None,
    axis_name: str | Sequence[str] | None = None,
) -> Float[Array, "H K D"]:
    """L2-normalised sums of the tokens assigned to each centroid; a centroid without tokens stays as it is."""
    counted = jnp.ones(tokens.shape[:2], bool) if mask is None else mask
    counted = jnp.broadcast_to(counted[:, None], (tokens.shape[0], tokens.shape[2], tokens.shape[1]))
    count, total = _statistics(means, tokens, counted, axis_name)
    return jnp.where(count[..., None] > 0, normalize_tokens(total, "lucidrains"), means)


def kmeans_init(
    key: Key[Array, ""] | UInt32[Array, "2"],
    tokens: Float[Array, "B N H D"],
    clusters: int,
    *,
    iterations: int = 10,
) -> Float[Array, "H K D"]:
    """Means that lucidrains' modules start with: random tokens of a first batch, moved by rounds of k-means.

    Args:
        key: random key; all heads start from the same positions.
        tokens: `(B, N, H, D)`, not normalised, queries and keys in one sequence if they are not shared.
        clusters: K. With fewer than K tokens some are taken more than once.
        iterations: rounds of `kmeans_step`.

    Returns:
        `(H, K, D)`, float32 (float64 for float64 tokens).
    """
    b, n, h, d = tokens.shape
    flat = tokens.astype(accumulator_dtype(tokens.dtype)).reshape(b * n, h, d)
    start = jax.random.choice(key, b * n, (clusters,), replace=b * n < clusters)
    means = flat[start].transpose(1, 0, 2)
    return jax.lax.fori_loop(0, iterations, lambda _, means: kmeans_step(means, tokens), means)


def _statistics(means, tokens, counted, axis_name):
    """Tokens of each centroid, `(H, K)` and their sums `(H, K, D)`; `counted` is `(B, H, N)`."""
    acc = accumulator_dtype(tokens.dtype)
    assigned = jax.nn.one_hot(nearest_centroid(tokens, means), means.shape[1], dtype=acc)
    assigned = jnp.where(counted[..., None], assigned, 0)
    count = assigned.sum((0, 2))
    # Exact factors 0 and 1: without the highest precision the tokens would be rounded on TPU and GPU.
    total = jnp.einsum("bhnk,bnhd->hkd", assigned, tokens.astype(acc), precision=jax.lax.Precision.HIGHEST)
    return (count, total) if axis_name is None else jax.lax.psum((count, total), axis_name)
