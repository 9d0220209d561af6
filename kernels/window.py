"""Attention inside small windows of a feature map: contiguous blocks, or the strided grid of MaxViT."""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from kernels import window_plan
from kernels.dense import accumulator_dtype
from kernels.dispatch import Implementation, dispatch
from kernels.pallas_gpu import window as gpu
from kernels.pallas_tpu import window as tpu

Partition = Literal["block", "grid"]


def partition_windows(x: Shaped[Array, "B H W C"], window: tuple[int, int], partition: Partition = "block"):
    """Cuts a map into windows.

    Args:
        x: `(B, H, W, C)`; H and W divide by the window's height and width.
        window: height and width in tokens.
        partition: `"block"`, a window is a contiguous patch; `"grid"`, a window takes every
            (H / height)-th row and (W / width)-th column (MaxViT, arXiv:2204.01697, section 3.2).

    Returns:
        `(B * windows, height * width, C)`, windows and tokens in row-major order.
    """
    b, h, w, c = x.shape
    wh, ww = window
    if partition == "block":
        x = x.reshape(b, h // wh, wh, w // ww, ww, c).transpose(0, 1, 3, 2, 4, 5)
    else:
        x = x.reshape(b, wh, h // wh, ww, w // ww, c).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(b * (h // wh) * (w // ww), wh * ww, c)


def merge_windows(
    x: Shaped[Array, "BW N C"], size: tuple[int, int], window: tuple[int, int], partition: Partition = "block"
):
    """The inverse of `partition_windows`: `(B * windows, tokens, C)` to `(B, H, W, C)` with `size = (H, W)`."""
    (h, w), (wh, ww), c = size, window, x.shape[-1]
    rows, cols = h // wh, w // ww
    x = x.reshape(-1, rows, cols, wh, ww, c)
    x = x.transpose(0, 1, 3, 2, 4, 5) if partition == "block" else x.transpose(0, 3, 1, 4, 2, 5)
    return x.reshape(-1, h, w, c)


def _fill_edges(x, pad_h: int, pad_w: int, value):
    """Grows a map at the bottom and the right with tokens of one value, `(C,)`."""
    b, h, w, c = x.shape
    if value is None:
        return jnp.pad(x, ((0, 0), (0, pad_h), (0, pad_w), (0, 0)))
    value = value.astype(x.dtype)
    if pad_w:
        x = jnp.concatenate([x, jnp.broadcast_to(value, (b, h, pad_w, c))], axis=2)
    if pad_h:
        x = jnp.concatenate([x, jnp.broadcast_to(value, (b, pad_h, w + pad_w, c))], axis=1)
    return x


def _xla(qkv, bias, pad, *, num_heads, window, partition, mask_pad, scale, return_weights):
    b, h, w, c3 = qkv.shape
    (wh, ww), n, d = window, window[0] * window[1], c3 // 3 // num_heads
    pad_h, pad_w = -h % wh, -w % ww
    size = (h + pad_h, w + pad_w)
    if pad_h or pad_w:
        qkv = _fill_edges(qkv, pad_h, pad_w, pad)

    # Heads are folded into the batch, so that both products are plain batched matrix products; parted before they
    # are moved, query, key and value have a gradient that takes a CPU a fifth less time, the projections included.
    def fold(x):
        x = partition_windows(x, window, partition)
        return x.reshape(-1, n, num_heads, d).transpose(0, 2, 1, 3).reshape(-1, n, d)

    query, key, value = map(fold, jnp.split(qkv, 3, axis=-1))
    acc = accumulator_dtype(qkv.dtype)
    logits = jnp.einsum("bnd,bmd->bnm", query, key, preferred_element_type=acc) * scale
    if bias is not None or (mask_pad and (pad_h or pad_w)):
        logits = logits.reshape(b, -1, num_heads, n, n)
        if bias is not None:
            logits = logits + bias.astype(acc)
        if mask_pad and (pad_h or pad_w):
            real = jnp.zeros((1, *size, 1), bool).at[:, :h, :w].set(True)
            real = partition_windows(real, window, partition)[..., 0]
            logits = jnp.where(real[:, None, None, :], logits, -jnp.inf)
        logits = logits.reshape(-1, n, n)
    weights = jax.nn.softmax(logits, axis=-1)
    out = jnp.einsum("bnm,bmd->bnd", weights.astype(qkv.dtype), value)
    out = out.reshape(-1, num_heads, n, d).transpose(0, 2, 1, 3).reshape(-1, n, num_heads * d)
    out = merge_windows(out, size, window, partition)[:, :h, :w]
    if return_weights:
        return out, weights.reshape(b, -1, num_heads, n, n)
    return out


_BATCHED = (True, False, False)

TABLE = (
    Implementation(
        "pallas_tpu",
        functools.partial(window_plan.run, tpu.BACKEND),
        tpu.unsupported,
        platforms=("tpu",),
        batched=_BATCHED,
    ),
    Implementation(
        "pallas_triton",
        functools.partial(window_plan.run, gpu.BACKEND),
        gpu.unsupported,
        platforms=("cuda",),
        batched=_BATCHED,
    ),
    Implementation("xla", _xla),
)


def window_attention(
    qkv: Float[Array, "B H W C3"],
    *,
    num_heads: int,
    window: tuple[int, int],
    partition: Partition = "block",
    bias: Float[Array, "heads n n"] | None = None,
    pad: Literal["mask"] | Float[Array, "C3"] | None = None,
    scale: float | None = None,
    implementation: str | Sequence[str] | None = None,
    return_weights: bool = False,
):
    """Multi-head softmax attention inside the windows of a feature map. Self-attention, noncausal.

    Args:
        qkv: packed queries, keys, values, `(B, H, W, 3 * C)`: first C channels q, then k, then v, the
            `num_heads` heads contiguous in each.
        num_heads: divides C.
        window: height and width of a window in tokens; may exceed the map where `pad` allows it.
        partition: `"block"` (contiguous patches) or `"grid"` (strided, MaxViT).
        bias: `(heads, n, n)` with n = tokens of a window, added to the scaled logits; `bias[h, i, j]` goes to
            query token i and key token j, in row-major order inside the window.
        pad: what happens when H or W do not divide by the window. None: an error. `"mask"`: the bottom and
            right edges are filled up and the filled keys excluded. An array `(3 * C,)`: filled tokens have
            this value and take part; it receives their gradient (DaViT pads *before* its projection, so its
            filled tokens equal the projection's bias).
        scale: factor on the logits; None means `(C / num_heads) ** -0.5`.
        implementation: None, a name or an order of preference; see `kernels.dispatch`.
        return_weights: also return the attention weights (XLA form only; fused kernels never hold them).

    Returns:
        `(B, H, W, C)` in the dtype of `qkv`; with `return_weights` a pair with the weights
        `(B, windows, heads, n, n)` in the accumulator's dtype. Logits, softmax and sums are float32 (float64
        for float64 inputs).

    Raises:
        ValueError: for shapes that do not fit, naming the argument.
        NotImplementedError: if a forced implementation cannot serve the call.

    Source: Swin (arXiv:2103.14030, section 3.2), MaxViT (arXiv:2204.01697), DaViT (arXiv:2204.03645, 3.1).
    """
    b, h, w, c3 = qkv.shape
    if c3 % 3 or (c3 // 3) % num_heads:
        raise ValueError(f"qkv has {c3} channels, which is not 3 * C with C divisible by num_heads={num_heads}")
    if len(window) != 2 or min(window) < 1:
        raise ValueError(f"window must be a pair of positive sizes, got {window}")
    if partition not in ("block", "grid"):
        raise ValueError(f"partition must be 'block' or 'grid', got {partition!r}")
    n = math.prod(window)
    if bias is not None and bias.shape != (num_heads, n, n):
        raise ValueError(f"bias must have shape {(num_heads, n, n)} for {window} windows, got {bias.shape}")
    if isinstance(pad, str) and pad != "mask":
        raise ValueError(f"pad must be None, 'mask' or an array of shape ({c3},), got {pad!r}")
    if pad is None and (h % window[0] or w % window[1]):
        raise ValueError(
            f"a map of {h}x{w} tokens does not divide into {window[0]}x{window[1]} windows; pass pad='mask' or "
            f"pad=array, or resize to {h + -h % window[0]}x{w + -w % window[1]}"
        )
    mask_pad = isinstance(pad, str)
    if not mask_pad and pad is not None and pad.shape != (c3,):
        raise ValueError(f"pad must have shape ({c3},), got {pad.shape}")
    options = dict(
        num_heads=num_heads,
        window=tuple(window),
        partition=partition,
        mask_pad=mask_pad,
        scale=(c3 // 3 // num_heads) ** -0.5 if scale is None else scale,
        return_weights=return_weights,
    )
    arrays = (qkv, bias, None if mask_pad else pad)
    return dispatch("window_attention", TABLE, implementation, arrays, options)
