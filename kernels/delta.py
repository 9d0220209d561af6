"""The delta rule: a memory that is corrected by what it got wrong, not only added to."""

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
    scan_chunks,
    solve_triangular,
)
from kernels.dense import accumulator_dtype
from kernels.dispatch import Implementation, dispatch
from kernels.pallas_gpu import recurrence
from kernels.pallas_tpu import scan


def _xla(query, key, value, beta, log_decay, initial_state, segments, *, scale, form, chunk_size, return_state):
    acc = accumulator_dtype(value.dtype)

    def operands(arrays):
        query, key, value, beta, log_decay, starts = arrays
        query, key, value, beta = (x.astype(acc) for x in (query, key, value, beta))
        return query * scale, key, value, beta, kept_share(log_decay, starts, query)

    def chunk(state, arrays):
        query, key, value, beta, kept = operands(arrays)
        levels = doublings(kept)
        into, onto = levels[-1]
        # What a token writes depends on what those before it in the chunk have written: a triangular system.
        missing = beta * (value - (key * into) @ state)
        written = solve_triangular(decayed_products(beta * key, key, levels), missing)
        weights = query @ key.swapaxes(-1, -2) * decay_matrix(levels)
        out = weights @ written + (query * into) @ state
        state = state * into[..., -1, :, None] + (key * onto).swapaxes(-1, -2) @ written
        return state, out.astype(arrays[2].dtype)

    def token(state, arrays):
        query, key, value, beta, kept = operands(arrays)
        state = state * kept[..., None]
        written = beta * (value - jnp.einsum("bhd,bhde->bhe", key, state))
        state = state + key[..., None] * written[..., None, :]
        return state, jnp.einsum("bhd,bhde->bhe", query, state).astype(arrays[2].dtype)

    batch, _, heads, channels = key.shape
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, channels, value.shape[-1]), acc)
    arrays = (query, key, value, beta[..., None], log_decay, document_starts(segments))
    state, out = scan_chunks(chunk, token, arrays, initial_state.astype(acc), form=form, chunk_size=chunk_size)
    return (out, state) if return_state else out


TABLE = (
    Implementation("xla", _xla),
    scan_plan.implementation(scan.BACKEND, beta=True),
    scan_plan.implementation(recurrence.BACKEND, beta=True),
)


def delta_rule(
    query: Float[Array, "B N H D"],
    key: Float[Array, "B N H D"],
    value: Float[Array, "B N H E"],
    beta: Float[Array, "B N H"],
    log_decay: Float[Array, "B N H"] | None = None,
    *,
    scale: float | None = None,
    form: str = "chunk",
    chunk_size: int = 64,
    initial_state: Float[Array, "B H D E"] | None = None,
    return_state: bool = False,
    segments: Int[Array, "B N"] | None = None,
    implementation: str | Sequence[str] | None = None,
):
    """DeltaNet, and Gated DeltaNet where there is decay: self, causal. Per head, with a state S of D x E:

        R_t = exp(log_decay_t) S_{t-1}
        S_t = R_t + beta_t key_t (value_t - R_t^T key_t)^T
        out_t = scale * query_t S_t

    It decays first, and what the key recalls is read from the decayed state. Keys are used as they are: both papers
    give them length 1, with which no state grows for beta in [0, 2]; with longer keys it may, without bound.
    Queries are not normalised either.

    Args:
        query, key: `(B, N, H, D)`: N tokens, H heads of D channels.
        value: `(B, N, H, E)`.
        beta: `(B, N, H)`: how much of what the key recalls is replaced by the value, in [0, 2]; not clipped.
        log_decay: `(B, N, H)`: natural logarithm of what a token leaves of the state before it, at most 0; not
            checked, as it is data. None: everything, which is DeltaNet. Any strength will do, `-inf` too.
        scale: factor on the query; None means `D ** -0.5`.
        form: `"chunk"`: matmuls and a triangular system within chunks, states from chunk to chunk, time and memory
            linear in N. `"recurrent"`: one token after the other. `"parallel"`: one system of all N tokens.
        chunk_size: tokens per chunk, rounded up to a power of two; the backward pass keeps one state per chunk, also
            in the recurrent form. The parallel form has no use for it, and kernels have chunks of their own.
        initial_state: `(B, H, D, E)`, before the first token; None means zeros. With N = 1 this is a decoding step.
        return_state: also return the state after the last token.
        segments: ids of the documents packed into a row, `(B, N)`. A token sees those of its own run of equal ids;
            the first run goes on from `initial_state`, later ones start from zeros.
        implementation: None, a name or an order of preference; see `kernels.dispatch`.

    Returns:
        `(B, N, H, E)` in the dtype of `value`; with `return_state` a pair with the state `(B, H, D, E)` of the last
        run. States, decays, systems and sums are float32 (float64 for float64 values).

    Raises:
        ValueError: for shapes that do not fit, an unknown form, a chunk size below 1.
        NotImplementedError: if a forced implementation cannot serve the call.

    Source: Yang et al. (arXiv:2406.06484), section 3, and Yang, Kautz and Hatamizadeh (arXiv:2412.06464), section 3.
    The chunk form is their WY form, with the triangular system solved once the state is known, for what the tokens
    write: fewer right-hand sides.
    """
    check_operands(query, key, value, initial_state, segments, form, chunk_size)
    for name, array in (("beta", beta), ("log_decay", log_decay)):
        if array is not None and array.shape != key.shape[:3]:
            raise ValueError(f"{name} must be (B, N, H), here {key.shape[:3]}; got {array.shape}")
    options = dict(
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        form=form,
        chunk_size=chunk_size,
    )
    if sequence_parallel.ranks(key.shape[1]) > 1:
        arrays = (query, key, value, beta, log_decay, initial_state, segments)
        out, state = sequence_parallel.delta(delta_rule, *arrays, **options, implementation=implementation)
        return (out, state) if return_state else out
    if log_decay is not None:
        log_decay = log_decay[..., None]
    arrays = (query, key, value, beta, log_decay, initial_state, segments)
    return dispatch("delta_rule", TABLE, implementation, arrays, {**options, "return_state": return_state})
