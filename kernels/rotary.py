"""Rotary position embedding: pairs of channels turned by angles that grow with the position."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.dense import accumulator_dtype


def rotary(
    x: Float[Array, "B N H D"],
    positions: Int[Array, "N"] | Int[Array, "B N"],
    *,
    base: float = 10000.0,
    interleaved: bool = False,
    dims: int | None = None,
) -> Float[Array, "B N H D"]:
    """Queries or keys turned so that their products depend on the distance between positions only.

    Pair i of the rotated channels turns by `position * base ** (-2 i / dims)`.

    Args:
        x: `(B, N, H, D)`.
        positions: `(N,)` for all samples or `(B, N)`; may be negative.
        base: the longest wavelength is 2 pi times nearly this.
        interleaved: which channels make a pair: i and `i + dims / 2` (Llama, RetNet's successors), or with True the
            neighbours 2 i and 2 i + 1 (RoFormer, lucidrains' routing heads).
        dims: how many channels, from the first, are rotated; the rest stay as they are. None means all.

    Returns:
        `(B, N, H, D)` in the dtype of `x`; angles and products are float32 (float64 for float64).

    Raises:
        ValueError: if `dims` is odd or not between 2 and D, or `base` is not positive.

    Source: Su et al. (arXiv:2104.09864, equations 15 and 34).
    """
    d = x.shape[-1]
    given, dims = dims, d if dims is None else dims
    if dims % 2 or not 2 <= dims <= d:
        hint = "; pass an even dims for the channels to rotate" if given is None else ""
        raise ValueError(f"dims must be even and between 2 and {d}, the channels of x; got {dims}{hint}")
    if base <= 0:
        raise ValueError(f"base must be positive, got {base}")
    acc = accumulator_dtype(x.dtype)
    frequencies = base ** (-jnp.arange(0, dims, 2, dtype=acc) / dims)
    angles = positions[..., None, None].astype(acc) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned = x[..., :dims].astype(acc)
    pairs = (dims // 2, 2) if interleaved else (2, dims // 2)
    axis = -1 if interleaved else -2
    first, second = jnp.moveaxis(turned.reshape(*x.shape[:-1], *pairs), axis, 0)
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis)
    turned = turned.reshape(*x.shape[:-1], dims).astype(x.dtype)
    return turned if dims == d else jnp.concatenate([turned, x[..., dims:]], -1)
