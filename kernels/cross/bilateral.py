"""Bilateral attention: the left half of a feature map and its mirrored right half attend to each other."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.dense import accumulator_dtype, attention


def bilateral_attention(
    query: Float[Array, "B h w H D"],
    key: Float[Array, "B h w H D"],
    value: Float[Array, "B h w H D"],
    *,
    scale: float | None = None,
    implementation: str | Sequence[str] | None = None,
    return_weights: bool = False,
):
    """Softmax attention between the halves of a map, in both directions with the same projections. Cross, noncausal.

    The right half is flipped, so that token (i, j) of either half is as far from the vertical midline. Mirroring the
    map exchanges the two results; on a map that is its own mirror image they are equal.

    Args:
        query, key, value: projected tokens of the whole map, `(B, h, w, H, D)`; w is even.
        scale: factor on the logits; None means `D ** -0.5`.
        implementation: None, a name or an order of preference; see `kernels.attention`.
        return_weights: also return the weights (XLA form only).

    Returns:
        What the left half finds in the right one, and the flipped right half in the left one, both
        `(B, h, w / 2, H, D)` in the dtype of `query`; with `return_weights` a pair of this pair and that of the
        weights, `(B, H, n, n)` each for the n tokens of a half in row-major order, float32 (float64 for float64
        inputs).

    Raises:
        ValueError: for an odd width.
        NotImplementedError: if a forced implementation cannot serve the call.

    Source: the asymmetry module of AHAN (arXiv:2602.21503).
    """
    b, h, w, heads, d = query.shape
    if w % 2:
        raise ValueError(f"a map of {h}x{w} tokens has no halves; its width must be even, such as {w - 1} or {w + 1}")

    def halves(x, first: int):
        """Both halves as images of one batch, the left one before or after the right one of the same image.

        One batch behind the other would send images from device to device where the batch is divided.
        """
        parts = x[:, :, : w // 2], x[:, :, : w // 2 - 1 : -1]
        return jnp.stack([parts[first], parts[1 - first]], axis=1).reshape(2 * b, -1, heads, d)

    found = attention(
        halves(query, 0),
        halves(key, 1),
        halves(value, 1),
        scale=scale,
        implementation=implementation,
        return_weights=return_weights,
    )
    out, weights = found if return_weights else (found, None)
    out = out.reshape(b, 2, h, w // 2, heads, d)
    if return_weights:
        weights = weights.reshape(b, 2, *weights.shape[1:])
        return (out[:, 0], out[:, 1]), (weights[:, 0], weights[:, 1])
    return out[:, 0], out[:, 1]


def asymmetry_signature(left: Float[Array, "B h w C"], right: Float[Array, "B h w C"]) -> Float[Array, "B C"]:
    """The mean over tokens of the absolute difference of what two halves found in each other.

    Args:
        left, right: the two results of `bilateral_attention`, with or without a projection after it.

    Returns:
        `(B, C)` in the dtype of `left`, summed in float32 (float64 for float64): zero for a map that is its own
        mirror image, and the same for a map and its mirror image.

    Source: AHAN (arXiv:2602.21503).
    """
    wide = accumulator_dtype(left.dtype)
    return abs(left.astype(wide) - right.astype(wide)).mean((1, 2)).astype(left.dtype)
