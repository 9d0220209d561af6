"""Flow-Attention: linear attention in which sources compete for what flows out of them, and sinks for what flows in."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.choices import check_choice
from kernels.chunks import FORMS, check_segments
from kernels.dense import accumulator_dtype
from kernels.dispatch import Implementation, dispatch
from kernels.gated_linear import gated_linear_attention
from kernels.masking import masked_softmax
from kernels.running import running


class FlowState(NamedTuple):
    """What causal Flow-Attention remembers of the tokens so far, all of it in float32 (or float64).

    With `phi` the sigmoid, and I and O the incoming and the outgoing flow of a token when it came:

    Attributes:
        products: the sums of `phi(key) (competition value)^T`, `(B, H, D, E)`.
        keys: the sums of `phi(key)`, `(B, H, D)`.
        queries: the sums of `phi(query)`, `(B, H, D)`.
        conserved_keys: the sums of `phi(key) n / O`, `(B, H, D)`, n being the token's number in its document.
        conserved_queries: the sums of `phi(query) n / I`, `(B, H, D)`.
        log_competition: the logarithm of the sum of the exponentials of the conserved outgoing flows, `(B, H)`;
            -inf before the first token.
        tokens: how many tokens there were, `(B,)`.
    """

    products: Float[Array, "B H D E"]
    keys: Float[Array, "B H D"]
    queries: Float[Array, "B H D"]
    conserved_keys: Float[Array, "B H D"]
    conserved_queries: Float[Array, "B H D"]
    log_competition: Float[Array, "B H"]
    tokens: Float[Array, " B"]


def _clipped(flow, clip):
    return flow if clip is None else jnp.clip(flow, -clip, clip)


def _features(x, mask, dtype):
    features = jax.nn.sigmoid(x.astype(dtype))
    return features if mask is None else features * mask[..., None, None]


def _real(x, mask):
    """Flows `(B, N, H)` by which something is divided: 1 where there is no token."""
    return x if mask is None else jnp.where(mask[..., None], x, 1)


def _count(mask, tokens, dtype):
    """How many tokens there are, a number or `(B, 1, 1)`."""
    return tokens if mask is None else jnp.maximum(mask.sum(1), 1)[:, None, None].astype(dtype)


def _noncausal(query, key, value, query_mask, key_mask, *, epsilon, clip):
    acc = accumulator_dtype(value.dtype)
    query, key = _features(query, query_mask, acc), _features(key, key_mask, acc)

    def flow(to, sums):
        return jnp.einsum("bnhd,bhd->bnh", to + epsilon, sums + epsilon)

    incoming = _real(flow(query, key.sum(1)), query_mask)
    outgoing = _real(flow(key, query.sum(1)), key_mask)
    query_share = query / incoming[..., None]
    conserved_in = flow(query, (key / outgoing[..., None]).sum(1))
    conserved_out = _clipped(flow(key, query_share.sum(1)), clip)
    sinks, sources = _count(query_mask, query.shape[1], acc), _count(key_mask, key.shape[1], acc)
    allocation = jax.nn.sigmoid(conserved_in * (sinks / sources))
    # masked_softmax goes along the last axis, here the sources.
    logits = conserved_out.swapaxes(1, 2)
    weights = jax.nn.softmax(logits) if key_mask is None else masked_softmax(logits, key_mask[:, None])
    competition = weights.swapaxes(1, 2) * sources
    products = jnp.einsum("bmhd,bmhe->bhde", key, value.astype(acc) * competition[..., None])
    out = jnp.einsum("bnhd,bhde->bnhe", query_share, products) * allocation[..., None]
    return out.astype(value.dtype)


def _causal(query, key, value, state, segments, *, epsilon, clip, form, chunk_size, return_state):
    dtype, acc = value.dtype, accumulator_dtype(value.dtype)
    query, key = _features(query, None, acc), _features(key, None, acc)
    batch, tokens, heads, channels = key.shape
    options = dict(scale=1.0, form=form, chunk_size=chunk_size, segments=segments, implementation="xla")
    sums = pairs = conserved = None
    before, competed = jnp.zeros(batch, acc), None
    if state is not None:
        state = FlowState(*(x.astype(acc) for x in state))
        sums, before, competed = state.products, state.tokens, state.log_competition
        pairs = jnp.concatenate((state.keys, state.queries), 1)[..., None]
        conserved = jnp.concatenate((state.conserved_keys, state.conserved_queries), 1)[..., None]
    # A flow is causal linear attention to values of one channel. Sinks and sources go side by side, as heads.
    to = jnp.concatenate((query, key), 2) + epsilon
    of = jnp.concatenate((key, query), 2)
    offset = epsilon * to.sum(-1)

    def flows(amounts, first):
        out, sums = gated_linear_attention(
            to, of, amounts[..., None], initial_state=first, return_state=True, **options
        )
        return jnp.split(out[..., 0] + offset, 2, axis=2), jnp.split(sums[..., 0], 2, axis=1)

    seen = running(jnp.ones((batch, tokens, 1), acc), before[:, None], segments)
    (incoming, outgoing), pairs = flows(jnp.ones_like(offset), pairs)
    amounts = jnp.concatenate((seen / outgoing, seen / incoming), 2)
    (conserved_in, conserved_out), conserved = flows(amounts, conserved)
    allocation = jax.nn.sigmoid(conserved_in / seen)
    conserved_out = _clipped(conserved_out / seen, clip)
    # Without a clip the exponentials can overflow, but never the share that is made of their logarithms.
    competed = running(conserved_out, competed, segments, combine=jnp.logaddexp)
    competition = jnp.exp(conserved_out - competed) * seen
    out, products = gated_linear_attention(
        query / incoming[..., None],
        key,
        value.astype(acc) * competition[..., None],
        initial_state=sums,
        return_state=True,
        **options,
    )
    out = (out * allocation[..., None]).astype(dtype)
    if not return_state:
        return out
    return out, FlowState(products, *pairs, *conserved, competed[:, -1], seen[:, -1, 0])


def _xla(
    query, key, value, query_mask, key_mask, state, segments, *, causal, form, chunk_size, return_state, **options
):
    if not causal:
        return _noncausal(query, key, value, query_mask, key_mask, **options)
    options |= dict(form=form, chunk_size=chunk_size, return_state=return_state)
    return _causal(query, key, value, state, segments, **options)


TABLE = (Implementation("xla", _xla),)


def flow_attention(
    query: Float[Array, "B N H D"],
    key: Float[Array, "B M H D"],
    value: Float[Array, "B M H E"],
    *,
    causal: bool = False,
    epsilon: float = 1e-6,
    clip: float | None = 1.0,
    form: str = "chunk",
    chunk_size: int = 64,
    initial_state: FlowState | None = None,
    return_state: bool = False,
    segments: Int[Array, "B N"] | None = None,
    query_mask: Bool[Array, "B N"] | None = None,
    key_mask: Bool[Array, "B M"] | None = None,
    implementation: str | Sequence[str] | None = None,
):
    """Flow-Attention: self or cross noncausal, and self causal; causal cross-attention does not exist.

    Noncausal, with N sinks (queries), M sources (keys), q and k their sigmoids, and sums that run over all of them:

        I_n = <q_n + epsilon, sum_m k_m + epsilon>              what flows into a sink
        O_m = <k_m + epsilon, sum_n q_n + epsilon>              what flows out of a source
        A_n = sigmoid(N / M <q_n + epsilon, sum_m k_m / O_m + epsilon>)
        C_m = M softmax_m(clip(<k_m + epsilon, sum_n q_n / I_n + epsilon>))
        out_n = A_n (q_n / I_n) sum_m k_m (C_m value_m)^T

    A query's output depends on the other queries, so that padding must be masked among queries as well as keys.

    Causal, sums run over the tokens up to the token's own, t of them, and a source competes with those before it:

        I_t = <q_t + epsilon, sum_{s<=t} k_s + epsilon>,  O_t = <k_t + epsilon, sum_{s<=t} q_s + epsilon>
        A_t = sigmoid(<q_t + epsilon, sum_{s<=t} k_s s / O_s + epsilon> / t)
        c_t = clip(<k_t + epsilon, sum_{s<=t} q_s s / I_s + epsilon> / t)
        C_t = t exp(c_t) / sum_{s<=t} exp(c_s)
        out_t = A_t (q_t / I_t) sum_{s<=t} k_s (C_s value_s)^T

    This is another function than the noncausal one of the tokens so far: a source's share stays what it was when it
    came. Time and memory are linear in N and M, and no token has a D x E matrix of its own. There is no factor
    `D ** -0.5`.

    Args:
        query: `(B, N, H, D)`: N tokens, H heads of D channels.
        key: `(B, M, H, D)`; M may differ from N (cross-attention) unless it is causal.
        value: `(B, M, H, E)`.
        causal: token n sees tokens 0 to n.
        epsilon: as above, at least 0.
        clip: to how much on either side of 0 the flow is clipped that sources compete with; None means not at all.
            Published code differs: 1 for the module by itself, 5 for language, 10 for reinforcement learning, none
            for the Long Range Arena and time series.
        form: of causal attention. `"chunk"`: matmuls within chunks, states from chunk to chunk, time and memory
            linear in N. `"recurrent"`: one token after the other. `"parallel"`: all N x N pairs at once.
            Noncausal attention has one form only and no use for this and `chunk_size`.
        chunk_size: tokens per chunk, rounded up to a power of two; the backward pass keeps one state per chunk, also
            in the recurrent form. The parallel form has no use for it.
        initial_state: before the first token, of causal attention; None means that there were none. With N = 1 this
            is a decoding step.
        return_state: also return the state after the last token, of causal attention.
        segments: of causal attention, ids of the documents packed into a row, `(B, N)`. A token sees those of its own
            run of equal ids; the first run goes on from `initial_state`, later ones start from nothing.
        query_mask: of noncausal attention, `(B, N)`: False where there is no query. Its output is 0, and it does not
            count as one of the N.
        key_mask: likewise for keys, `(B, M)`.
        implementation: None, a name or an order of preference; see `kernels.dispatch`.

    Returns:
        `(B, N, H, E)` in the dtype of `value`; with `return_state` a pair with the `FlowState` of the last run.
        Features, flows, states and sums are float32 (float64 for float64 values).

    Raises:
        ValueError: for shapes that do not fit, a negative epsilon, a clip that is not positive, an unknown form, a
            chunk size below 1, causal cross-attention, and arguments of the causal form without `causal=True` or of
            the noncausal one with it.
        NotImplementedError: if a forced implementation cannot serve the call.

    Source: Wu et al. (arXiv:2202.06258), section 3; epsilon, the factors N / M, M and t, the
    clip and the causal form are those of their code, Flowformer's `Flow_Attention.py`. The sum of exponentials is
    kept as its logarithm, which the causal code, clipping always, has no need of.
    """
    _check(query, key, value, causal, epsilon, clip, form, chunk_size, initial_state)
    needs_causal = dict(initial_state=initial_state, return_state=return_state or None, segments=segments)
    needs_noncausal = dict(query_mask=query_mask, key_mask=key_mask)
    given = [n for n, x in (needs_noncausal if causal else needs_causal).items() if x is not None]
    if given and causal:
        raise ValueError(f"{', '.join(given)} need causal=False: with causal=True, end a row with its padding")
    if given:
        raise ValueError(f"{', '.join(given)} need causal=True: noncausal attention has no state along the tokens")
    check_segments(segments, *query.shape[:2])
    for name, mask, like in (("query_mask", query_mask, query), ("key_mask", key_mask, key)):
        if mask is not None and mask.shape != like.shape[:2]:
            raise ValueError(f"{name} must be {like.shape[:2]}, batch and tokens; got {mask.shape}")
    options = dict(
        causal=causal, epsilon=epsilon, clip=clip, form=form, chunk_size=chunk_size, return_state=return_state
    )
    arrays = (query, key, value, query_mask, key_mask, initial_state, segments)
    return dispatch("flow_attention", TABLE, implementation, arrays, options)


def _check(query, key, value, causal, epsilon, clip, form, chunk_size, state):
    if query.shape[0] != key.shape[0] or query.shape[2:] != key.shape[2:]:
        raise ValueError(f"key must be (B, M, H, D) with B, H and D of query, which is {query.shape}; got {key.shape}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value must be (B, M, H, E) with B, M and H of key, which is {key.shape}; got {value.shape}")
    if causal and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"causal=True is self-attention, N = M: how sources compete depends on the queries that came before each "
            f"of them; got {query.shape[1]} queries and {key.shape[1]} keys"
        )
    if epsilon < 0:
        raise ValueError(f"epsilon must be at least 0, got {epsilon}")
    if clip is not None and clip <= 0:
        raise ValueError(f"clip must be positive, or None for no clip; got {clip}")
    check_choice("form", form, FORMS)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if state is not None:
        batch, _, heads, channels = key.shape
        vectors = (batch, heads, channels)
        wanted = ((*vectors, value.shape[-1]), *(vectors,) * 4, vectors[:2], (batch,))
        if tuple(x.shape for x in state) != wanted:
            raise ValueError(
                f"initial_state must be a FlowState of {', '.join(map(str, wanted))}; "
                f"got {', '.join(str(x.shape) for x in state)}"
            )
