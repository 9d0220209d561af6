"""Attention rollout: how much of every input token reaches every output token through all layers."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.choices import check_choice
from kernels.dense import accumulator_dtype

HEAD_FUSIONS = ("mean", "max", "min")


def attention_rollout(
    weights: Sequence[Float[Array, "B H N N"]],
    *,
    head_fusion: str = "mean",
    residual: float = 0.5,
    token: int | None = None,
) -> Float[Array, "B *rows N"]:
    """The product of all layers' attention, each mixed with the identity for its residual connection.

    Args:
        weights: softmax weights of every layer, first layer first.
        head_fusion: how heads become one: `"mean"`, or their `"max"` or `"min"` with rows made to sum to 1 again. A
            row of which the minimum leaves nothing becomes the identity's.
        residual: share of the identity in every layer, in [0, 1).
        token: only the row of this token, which takes a vector through the layers and not a matrix; None for all.

    Returns:
        `(B, N, N)`, or with `token` `(B, N)`: entry [i, j] is how much input token j counts in output token i, the
        latest layer leftmost in the product. Rows sum to 1. float32 (float64 for float64 weights), no gradient.

    Raises:
        ValueError: for no layers, layers of different shapes, an unknown fusion, a residual or token out of range.

    Source: Abnar and Zuidema (arXiv:2005.00928), section 3; DCAL (arXiv:2205.02151), which is
    silent on how heads are fused; the mean is the convention.
    """
    if not weights:
        raise ValueError("weights is empty; give every layer's, first layer first")
    if len({layer.shape for layer in weights}) > 1:
        raise ValueError(f"weights must all have one shape, got {[layer.shape for layer in weights]}")
    check_choice("head_fusion", head_fusion, HEAD_FUSIONS)
    if not 0 <= residual < 1:
        raise ValueError(f"residual must be at least 0 and below 1, got {residual}")
    tokens = weights[0].shape[-1]
    if token is not None and not 0 <= token < tokens:
        raise ValueError(f"token must be from 0 to {tokens - 1}, got {token}")
    identity = jnp.eye(tokens, dtype=accumulator_dtype(weights[0].dtype))
    rows = identity if token is None else identity[token : token + 1]
    total = jnp.broadcast_to(rows, (weights[0].shape[0], *rows.shape))
    for layer in reversed(weights):
        fused = _fuse(jax.lax.stop_gradient(layer).astype(identity.dtype), head_fusion, identity)
        total = residual * total + (1 - residual) * jnp.matmul(total, fused, precision=jax.lax.Precision.HIGHEST)
    return total if token is None else total[:, 0]


def _fuse(layer, head_fusion: str, identity):
    if head_fusion == "mean":
        return layer.mean(1)
    fused = layer.max(1) if head_fusion == "max" else layer.min(1)
    total = fused.sum(-1, keepdims=True)
    return jnp.where(total > 0, fused / jnp.where(total > 0, total, 1), identity)
