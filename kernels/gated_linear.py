"""Linear attention that forgets: a matrix per head that decays, by itself or as the tokens say, and is added to."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import scan_plan, sequence_parallel
from kernels.chunks import (
    check_operands,
    decay_matrix,
    decayed_products,
    document_starts,
    doublings,
    kept_share,
    one_chunk,
    scan_chunks,
    triangle,
)
from kernels.dense import accumulator_dtype
from kernels.dispatch import Implementation, dispatch
from kernels.pallas_gpu import recurrence
from kernels.pallas_tpu import scan


def _weights(query, key, levels):
    """What each token takes from each value of its chunk, `(B, H, C, C)`."""
    if levels[0][0].shape[-1] == query.shape[-1] > 1:
        return triangle((query * key).sum(-1), decayed_products(query, key, levels))
    return query @ key.swapaxes(-1, -2) * decay_matrix(levels)


def _xla(
    query, key, value, log_decay, initial_state, segments, *, scale, form, chunk_size, return_state, return_weights
):
    acc = accumulator_dtype(value.dtype)

    def operands(arrays):
        query, key, value, log_decay, starts = arrays
        query, key = query.astype(acc) * scale, key.astype(acc)
        return query, key, value.astype(acc), kept_share(log_decay, starts, query)

    def chunk(state, arrays):
        query, key, value, kept = operands(arrays)
        levels = doublings(kept)
        into, onto = levels[-1]
        out = _weights(query, key, levels) @ value + (query * into) @ state
        state = state * into[..., -1, :, None] + (key * onto).swapaxes(-1, -2) @ value
        return state, out.astype(arrays[2].dtype)

    def token(state, arrays):
        query, key, value, kept = operands(arrays)
        state = state * kept[..., None] + key[..., None] * value[..., None, :]
        return state, jnp.einsum("bhd,bhde->bhe", query, state).astype(arrays[2].dtype)

    batch, tokens, heads, channels = key.shape
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, channels, value.shape[-1]), acc)
    arrays = (query, key, value, log_decay, document_starts(segments))
    state, out = scan_chunks(chunk, token, arrays, initial_state.astype(acc), form=form, chunk_size=chunk_size)
    results = (out,)
    if return_state:
        results += (state,)
    if return_weights:
        query, key, _, kept = operands(tuple(map(one_chunk, arrays)))
        results += (_weights(query, key, doublings(kept))[..., :tokens, :tokens],)
    return results if len(results) > 1 else out


TABLE = (
    Implementation("xla", _xla),
    scan_plan.implementation(scan.BACKEND, beta=False),
    scan_plan.implementation(recurrence.BACKEND, beta=False),
)


def gated_linear_attention(
    query: Float[Array, "B N H D"],
    key: Float[Array, "B N H D"],
    value: Float[Array, "B N H E"],
    log_decay: Float[Array, "H"] | Float[Array, "B N H"] | Float[Array, "B N H D"] | None = None,
    *,
    scale: float | None = None,
    form: str = "chunk",
    chunk_size: int = 64,
    initial_state: Float[Array, "B H D E"] | None = None,
    return_state: bool = False,
    segments: Int[Array, "B N"] | None = None,
    implementation: str | Sequence[str] | None = None,
    return_weights: bool = False,
):
    """Linear attention with decay, self, causal, not normalised. Per head, with a state S of D x E:

        S_t = Diag(exp(log_decay_t)) S_{t-1} + key_t value_t^T
        out_t = scale * query_t S_t

    This is linear attention where `log_decay` is None, RetNet and Lightning Attention where it is fixed per head
    (see `kernels.decay`), the core of Mamba-2 where it is a scalar of head and token, and GLA and HGRN-2 where every
    channel of the key has its own.

    Args:
        query, key: `(B, N, H, D)`: N tokens, H heads of D channels.
        value: `(B, N, H, E)`.
        log_decay: natural logarithm of what a token leaves of the state before it, at most 0; not checked, as it is
            data. None: everything. `(H,)`, `(B, N, H)` or `(B, N, H, D)`. Any strength will do, `-inf` too.
        scale: factor on the query; None means `D ** -0.5`.
        form: `"chunk"`: matmuls within chunks, states from chunk to chunk, time and memory linear in N.
            `"recurrent"`: one token after the other. `"parallel"`: all N x N pairs at once.
        chunk_size: tokens per chunk, rounded up to a power of two; the backward pass keeps one state per chunk, also
            in the recurrent form. The parallel form has no use for it, and kernels have chunks of their own.
        initial_state: `(B, H, D, E)`, before the first token; None means zeros. With N = 1 this is a decoding step.
        return_state: also return the state after the last token.
        segments: ids of the documents packed into a row, `(B, N)`. A token sees those of its own run of equal ids;
            the first run goes on from `initial_state`, later ones start from zeros.
        implementation: None, a name or an order of preference; see `kernels.dispatch`.
        return_weights: also return what each token takes from each value, which costs N * N in any form.

    Returns:
        `(B, N, H, E)` in the dtype of `value`; or a tuple of it, then with `return_state` the state `(B, H, D, E)` of
        the last run, then with `return_weights` the weights `(B, H, N, N)`, without what came from `initial_state`.
        States, decays, weights and sums are float32 (float64 for float64 values).

    Raises:
        ValueError: for shapes that do not fit, an unknown form, a chunk size below 1.
        NotImplementedError: if a forced implementation cannot serve the call.

    Source: the chunk form is that of Yang et al. (arXiv:2312.06635, section 4.2) with their secondary chunking
    (section 4.3) carried on to blocks of one token, so that no block is left to be computed element by element;
    Sun et al. (arXiv:2307.08621, equation 7) for fixed decay, Dao and Gu (arXiv:2405.21060, section 6) for scalars.
    """
    check_operands(query, key, value, initial_state, segments, form, chunk_size)
    per_token = _per_token(log_decay, key)
    options = dict(
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        form=form,
        chunk_size=chunk_size,
    )
    if not return_weights and sequence_parallel.ranks(key.shape[1]) > 1:
        arrays = (query, key, value, log_decay, initial_state, segments)
        options |= dict(implementation=implementation)
        out, state = sequence_parallel.gated_linear(gated_linear_attention, *arrays, **options)
        return (out, state) if return_state else out
    options |= dict(return_state=return_state, return_weights=return_weights)
    arrays = (query, key, value, per_token, initial_state, segments)
    return dispatch("gated_linear_attention", TABLE, implementation, arrays, options)


def _per_token(log_decay, key):
    """Any log decay as `(B, N, H, K)` with K = 1 or D; B is 1 where it is fixed."""
    if log_decay is None:
        return None
    batch, tokens, heads, channels = key.shape
    if log_decay.shape == (heads,):
        return jnp.broadcast_to(log_decay[:, None], (1, tokens, heads, 1))
    if log_decay.shape == (batch, tokens, heads):
        return log_decay[..., None]
    if log_decay.shape != key.shape:
        raise ValueError(
            f"log_decay must be None, (H,), (B, N, H) or (B, N, H, D), here {(heads,)}, {(batch, tokens, heads)} or "
            f"{key.shape}; got {log_decay.shape}"
        )
    return log_decay
