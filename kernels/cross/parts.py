"""Part cross-attention: regions of a feature map, pooled to several scales, ask all of its tokens."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.dense import accumulator_dtype, attention


def roi_align(
    features: Float[Array, "B H W C"],
    boxes: Float[Array, "B R 4"],
    size: tuple[int, int],
    sampling_ratio: int = 2,
) -> Float[Array, "B R h w C"]:
    """Every box of a feature map, resampled to a fixed number of cells.

    A cell is the mean of `sampling_ratio` squared samples, each bilinear between the centres of four tokens. A sample
    up to one token outside the map takes its edge, one further out is zero.

    Args:
        features: `(B, H, W, C)`.
        boxes: `(left, top, right, bottom)` as shares of the map's width and height, from 0 to 1. A box may reach out
            of the map; nothing is checked when the program runs.
        size: rows and columns of cells.
        sampling_ratio: samples of a cell along each side.

    Returns:
        `(B, R, h, w, C)` in the dtype of `features`, computed in float32 (float64 for float64). Gradients reach the
        features and, piecewise, the boxes.

    Raises:
        ValueError: for a size or sampling ratio below 1.

    Source: He et al., Mask R-CNN (arXiv:1703.06870, section 3), as torchvision's `roi_align` with `aligned=True` has
    it, where a token's centre lies half a token inside its edge.
    """
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be a pair of positive numbers of cells, got {size}")
    if sampling_ratio < 1:
        raise ValueError(f"sampling_ratio must be at least 1, got {sampling_ratio}")
    wide = accumulator_dtype(features.dtype)
    left, top, right, bottom = jnp.moveaxis(boxes.astype(wide), -1, 0)
    # The weight of a token is the product of one for its row and one for its column, so both sums are matrix products.
    rows = _sampling_weights(top, bottom, features.shape[1], size[0], sampling_ratio)
    columns = _sampling_weights(left, right, features.shape[2], size[1], sampling_ratio)
    how = dict(precision=jax.lax.Precision.HIGHEST, preferred_element_type=wide)
    bands = jnp.einsum("brhi,bijc->brhjc", rows, features.astype(wide), **how)
    return jnp.einsum("brwj,brhjc->brhwc", columns, bands, **how).astype(features.dtype)


def _sampling_weights(start, stop, tokens: int, cells: int, sampling_ratio: int):
    """What every token along an axis counts in every cell, `(B, R, cells, tokens)`."""
    samples = cells * sampling_ratio
    place = (jnp.arange(samples, dtype=start.dtype) + 0.5) / samples
    at = (start[..., None] + (stop - start)[..., None] * place) * tokens - 0.5
    seen = (at >= -1) & (at <= tokens)
    at = jnp.clip(at, 0, tokens - 1)
    weights = jnp.maximum(0, 1 - abs(at[..., None] - jnp.arange(tokens)))
    weights = jnp.where(seen[..., None], weights, 0)
    return weights.reshape(*start.shape, cells, sampling_ratio, tokens).mean(-2)


def pool_parts(parts: Float[Array, "B R h w C"], scale: int) -> Float[Array, "B R n C"]:
    """Means over squares of `scale` times `scale` cells, as tokens in row-major order, in the dtype of `parts`.

    Raises:
        ValueError: if the cells do not divide into such squares.
    """
    b, r, h, w, c = parts.shape
    if scale < 1 or h % scale or w % scale:
        raise ValueError(f"scale must divide the {h}x{w} cells of a part, got {scale}")
    squares = parts.reshape(b, r, h // scale, scale, w // scale, scale, c)
    pooled = squares.mean((3, 5), dtype=accumulator_dtype(parts.dtype)).astype(parts.dtype)
    return pooled.reshape(b, r, -1, c)


def part_attention(
    query: Float[Array, "B R n H D"],
    key: Float[Array, "B N H D"] | Float[Array, "B R N H D"],
    value: Float[Array, "B N H D"] | Float[Array, "B R N H D"],
    *,
    scale: float | None = None,
    implementation: str | Sequence[str] | None = None,
    return_weights: bool = False,
):
    """Softmax attention of the tokens of every part to all tokens of its image. Cross, noncausal.

    Args:
        query: `(B, R, n, H, D)`, of R parts of n tokens.
        key, value: of all tokens, `(B, N, H, D)` where all parts see the same, or `(B, R, N, H, D)` where every part
            has its own projections.
        scale: factor on the logits; None means `D ** -0.5`.
        implementation: None, a name or an order of preference; see `kernels.attention`.
        return_weights: also return the weights (XLA form only).

    Returns:
        `(B, R, n, H, D)` in the dtype of `query`; with `return_weights` a pair with the weights `(B, R, H, n, N)`,
        float32 (float64 for float64 inputs).

    Raises:
        ValueError: if only one of `key` and `value` has an axis of parts, or as many as `query` has not.
        NotImplementedError: if a forced implementation cannot serve the call.

    Source: the part attention of AHAN (arXiv:2602.21503): queries of a face's regions, keys and values of all tokens.
    """
    b, r, n, h, d = query.shape
    if key.shape != value.shape or (key.ndim == 5 and key.shape[1] != r):
        raise ValueError(
            f"key and value must both be (B, N, H, D), or (B, {r}, N, H, D) for the {r} parts of query; got "
            f"{key.shape} and {value.shape}"
        )
    shared = key.ndim == 4
    # Parts become more queries of an image, or more images.
    query = query.reshape(b, r * n, h, d) if shared else query.reshape(b * r, n, h, d)
    if not shared:
        key, value = (x.reshape(b * r, *x.shape[2:]) for x in (key, value))
    found = attention(query, key, value, scale=scale, implementation=implementation, return_weights=return_weights)
    out, weights = found if return_weights else (found, None)
    out = out.reshape(b, r, n, h, d)
    if not return_weights:
        return out
    if shared:
        return out, weights.reshape(b, h, r, n, -1).swapaxes(1, 2)
    return out, weights.reshape(b, r, h, n, -1)


def mix_scales(
    outputs: Sequence[Float[Array, "B R C"]], logits: Float[Array, "R S"]
) -> tuple[Float[Array, "B R C"], Float[Array, "R S"]]:
    """Sums over scales with weights that every part learns for itself.

    Args:
        outputs: of every scale, the mean token of every part. The means come first because a part has another number
            of tokens at every scale.
        logits: of every part, one for each scale; equal logits weigh all scales alike.

    Returns:
        `(B, R, C)` in the dtype of `outputs`, and the weights `(R, S)`, softmax over the scales in float32 (float64
        for float64 logits).

    Raises:
        ValueError: if there is not one output for every scale.
    """
    if len(outputs) != logits.shape[1]:
        raise ValueError(f"logits are for {logits.shape[1]} scales, outputs has {len(outputs)}")
    weights = jax.nn.softmax(logits.astype(accumulator_dtype(logits.dtype)), axis=-1)
    mixed = sum(weights[:, i, None] * output for i, output in enumerate(outputs))
    return mixed.astype(outputs[0].dtype), weights
