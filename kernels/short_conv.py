"""A depthwise convolution over the last few tokens, as recurrent mixers put before their heads."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import sequence_parallel
from kernels.chunks import check_segments
from kernels.dense import accumulator_dtype
from kernels.masking import document_runs


def short_conv(
    x: Float[Array, "B N C"],
    kernel: Float[Array, "W C"],
    bias: Float[Array, " C"] | None = None,
    *,
    initial_state: Float[Array, "B S C"] | None = None,
    return_state: bool = False,
    segments: Int[Array, "B N"] | None = None,
):
    """Causal depthwise convolution over time: `out_t = sum_w kernel[w] * x_{t - (W - 1) + w} + bias`.

    The last row of the kernel belongs to the token itself, as in torch's `Conv1d` on an input padded in front.

    Args:
        x: `(B, N, C)`: N tokens of C channels.
        kernel: `(W, C)`.
        bias: `(C,)`, or None for none.
        initial_state: `(B, W - 1, C)`: the tokens before the first; None means zeros. With N = 1 this is a decoding
            step.
        return_state: also return the state after the last token.
        segments: ids of the documents packed into a row, `(B, N)`. A token sees those of its own run of equal ids;
            the first run goes on from `initial_state`, later ones start from zeros.

    Returns:
        `(B, N, C)` in the dtype of `x`, summed in float32 (float64 for float64); with `return_state` a pair with the
        state `(B, W - 1, C)`, in the dtype of `x` as well: the last tokens of the last run, zeros before them.

    Raises:
        ValueError: for shapes that do not fit.

    Source: Mamba (arXiv:2312.00752), figure 3; Gated DeltaNet (arXiv:2412.06464), figure 1.
    """
    batch, tokens, channels = x.shape
    width = kernel.shape[0]
    if kernel.ndim != 2 or not width or kernel.shape[1] != channels:
        raise ValueError(f"kernel must be (W, C) with W at least 1 and C = {channels} of x; got {kernel.shape}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be (C,), here {(channels,)}; got {bias.shape}")
    past = (batch, width - 1, channels)
    if initial_state is None:
        initial_state = jnp.zeros(past, x.dtype)
    elif initial_state.shape != past:
        raise ValueError(f"initial_state must be (B, W - 1, C), here {past}; got {initial_state.shape}")
    check_segments(segments, batch, tokens)
    if sequence_parallel.ranks(tokens) > 1:
        out, state = sequence_parallel.short_conv(short_conv, x, kernel, bias, initial_state, segments)
        return (out, state) if return_state else out

    extended = jnp.concatenate((initial_state.astype(x.dtype), x), axis=1)
    runs = None if segments is None else jnp.pad(document_runs(segments), ((0, 0), (width - 1, 0)))
    out = _convolve(extended, runs, kernel, bias)
    if not return_state:
        return out
    state = extended[:, tokens:]
    if runs is not None:
        state = jnp.where((runs[:, tokens:] == runs[:, -1:])[..., None], state, 0)
    return out, state


# The kernel's gradient needs a shifted copy of the tokens per row, which is not worth keeping.
@jax.checkpoint
def _convolve(extended, runs, kernel, bias):
    acc = accumulator_dtype(extended.dtype)
    width = kernel.shape[0]
    tokens = extended.shape[1] - width + 1
    out = jnp.zeros((), acc) if bias is None else bias.astype(acc)
    for row in range(width):
        seen = extended[:, row : row + tokens].astype(acc)
        if runs is not None:
            seen = jnp.where((runs[:, row : row + tokens] == runs[:, width - 1 :])[..., None], seen, 0)
        out = out + seen * kernel[row].astype(acc)
    return out.astype(extended.dtype)
