"""Routing attention: tokens attend within clusters that learned centroids pick by content."""

import functools
from collections.abc import Sequence
from typing import Literal, get_args

from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from kernels.choices import check_choice
from kernels.cluster.causal import nearest_attention, nearest_plan, prefix_attention
from kernels.cluster.centroids import Style
from kernels.cluster.members import (
    COUNT_EPSILON,
    Assignment,
    default_scale,
    on_grid,
    routed,
    self_logit,
    strided_members,
    top_members,
)
from kernels.cluster.within import sequence_attention, sequence_plan
from kernels.dispatch import Implementation, dispatch
from kernels.masking import check_dropout, document_runs
from kernels.pallas_gpu import cluster as gpu
from kernels.pallas_tpu import cluster as tpu
from kernels.relative import check_tables

Membership = Literal["sequence", "prefix", "nearest"]


def routing_attention(
    query: Float[Array, "B N H D"],
    key: Float[Array, "B M H D"] | None,
    value: Float[Array, "B M H E"],
    means: Float[Array, "H K D"],
    *,
    window: int,
    key_window: int | None = None,
    style: str = "official",
    causal: bool = True,
    shared: bool | None = None,
    membership: str = "sequence",
    assignment: str = "topk",
    key_mask: Bool[Array, "B M"] | None = None,
    segments: Int[Array, "B N"] | None = None,
    relative_key: Float[Array, "R D"] | None = None,
    relative_value: Float[Array, "R E"] | None = None,
    memory_key: Float[Array, "H C S D"] | None = None,
    memory_value: Float[Array, "H C S E"] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | UInt32[Array, "2"] | None = None,
    return_weights: bool = False,
    return_membership: bool = False,
    implementation: str | Sequence[str] | None = None,
):
    """Softmax attention within clusters of tokens; self (causal or not) and cross (noncausal).

    Every centroid takes the tokens that fit it best; they attend to each other, in the order in which they stand in
    the sequence, and a token's output is the mean over the clusters that it is in:
    `sum / (number of clusters + epsilon)`, epsilon being 1e-2 (official) or 1e-5 (lucidrains). A token in no cluster
    gets exactly 0. With `K = sqrt(N)` clusters of `window = N / K` the cost is O(N ** 1.5 * D).

    **`membership="sequence"`, as published, leaks the future.** Weights of later tokens are 0, but *which* earlier
    tokens share a cluster depends on all tokens, later ones included: a causal model trained and evaluated with it
    sees, through the choice, something of what it is to predict, and its step-by-step decoder computes something
    else. The other two memberships are strictly causal, and `routing_step` computes the same token by token.

    Args:
        query: `(B, N, H, D)`, projected only: what the style normalises is normalised here. Styles with rotary
            positions in their routing heads rotate `query`, `key` and `value` before.
        key: `(B, M, H, D)`, or None when queries serve as keys (`shared`).
        value: `(B, M, H, E)`.
        means: centroids `(H, K, D)`, to which no gradient flows; the directions of `hash_projections` for `"hash"`.
        window: how many tokens a cluster holds, clamped to N and M. `window * K` need not be N.
        key_window: how many keys a cluster holds, if not `window`; for unshared attention.
        style: `"official"`: queries and keys are layer-normalised, without scale or bias. `"lucidrains"`: they are
            L2-normalised to be routed; they attend as they are, except that shared keys are L2-normalised and that
            a shared token attends to itself only where it sees nothing else.
        causal: no token attends to a later one; needs M = N.
        shared: queries are the keys too, `key` being None; None means what `causal` says, as in both codes. If not
            shared, each centroid takes queries and keys separately. The mask of causal unshared attention compares
            positions, where the official code compares ranks in the two clusters and so lets later keys in.
        membership: `"sequence"`: the best `window` of the whole sequence (see above). `"prefix"`: token t is in the
            clusters for which it is among the best `window` of tokens 0 to t, and attends to these; what the
            official decoder computes one token at a time. All at once it costs O(N * N * (D + K)), an evaluation's
            price; fits are compared on a grid (`kernels.cluster.members.on_grid`), lest rounding tell equal tokens
            apart. `"nearest"`: every token is in the cluster of its best centroid only, and attends to the last
            `window` of it, itself included; for training, at O(N log N + N * window * D). These two are for causal
            shared attention.
        assignment: `"topk"` as described; `"strided"`: `window` tokens evenly spread over the ranking of all by
            their fit (`membership="sequence"` only); `"hash"`: a token fits the cluster whose number its signs
            along fixed directions spell, fully, and no other.
        key_mask: False hides a key from all queries. With `membership="sequence"`, as published, it takes part in
            the choice of members all the same; with the others it is in no cluster, and its own output is 0.
        segments: ids of the documents packed into a row, self-attention only; a token attends to its own run of
            equal ids. With `membership="sequence"` documents compete for places in the clusters; with the others
            every run is routed by itself.
        relative_key, relative_value: `(2 R + 1, D)` and `(2 R + 1, E)`, Shaw's vectors for keys and values, shared
            by the heads: row `clip(j - i, -R, R) + R`, i and j being the ranks of query and key in their cluster,
            not their positions.
        memory_key, memory_value: `(H, K, S, D)` and `(H, K, S, E)`, keys and values that every query of a cluster
            sees besides; `membership="sequence"` only.
        scale: factor on the logits; None means 1 (official) or `D ** -0.5` (lucidrains).
        dropout_rate: share of the weights that are dropped, those that remain being scaled up.
        dropout_key: random key for it; needed exactly when the rate is not 0.
        return_weights: also return what each query takes from each value (XLA form only), which costs N * M.
        return_membership: also return who is in which cluster.
        implementation: None, a name or an order of preference; see `kernels.dispatch`.

    Returns:
        `(B, N, H, E)` in the dtype of `value`. Logits, softmax and averages are float32 (float64 for float64),
        scores are taken at the highest precision, and of equal scores the lowest index wins. A query whose cluster
        holds no key that it may see takes 0 from it.

        With `return_weights` or `return_membership` a tuple that goes on with the weights `(B, H, N, M)`, the mean
        over clusters and dropout included, memories left out, and with the membership: for `"sequence"` a pair of
        the positions of each cluster's queries and keys, `(B, H, K, w)` ascending; for `"prefix"` whether a token
        is in a cluster, `(B, H, N, K)`; for `"nearest"` each token's cluster, `(B, H, N)`.

    Raises:
        ValueError: for shapes that do not fit, unknown names and arguments that exclude each other, naming them.
        NotImplementedError: if a forced implementation cannot serve the call.

    Source: Roy et al. (arXiv:2003.05997), after the official code (google-research `routing_transformer/utils.py`)
    where it differs from the paper; lucidrains/routing-transformer 1.6.1, `KmeansAttention`. `"nearest"` is ours.
    """
    for name, given, known in (("style", style, Style), ("assignment", assignment, Assignment)):
        check_choice(name, given, get_args(known))
    check_choice("membership", membership, get_args(Membership))
    shared = causal if shared is None else shared
    _check_operands(query, key, value, means, shared, causal, assignment)
    _check_windows(query, value, window, key_window, shared, relative_key, relative_value)
    _check_membership(membership, causal, shared, assignment, memory_key)
    _check_memory(query, value, means, assignment, memory_key, memory_value)
    check_tables(query.shape[-1], value.shape[-1], relative_key, relative_value)
    check_dropout(dropout_rate, dropout_key)
    if segments is not None and segments.shape != value.shape[:2]:
        raise ValueError(f"segments are for self-attention over {value.shape[:2]} tokens, got {segments.shape}")
    runs = None if segments is None else document_runs(segments)
    options = dict(
        window=window,
        key_window=window if key_window is None else key_window,
        style=style,
        causal=causal,
        membership=membership,
        assignment=assignment,
        scale=default_scale(style, query.shape[-1]) if scale is None else scale,
        dropout_rate=dropout_rate,
        return_weights=return_weights,
        return_membership=return_membership,
    )
    arrays = (query, key, value, means, key_mask, runs, relative_key, relative_value)
    arrays = (*arrays, memory_key, memory_value, dropout_key)
    return dispatch("routing_attention", TABLE, implementation, arrays, options)


def _check_operands(query, key, value, means, shared, causal, assignment):
    if shared and key is not None:
        why = "the default of causal attention; " if causal else ""
        raise ValueError(f"with shared=True ({why}queries are the keys) key must be None; or pass shared=False")
    if not shared and key is None:
        raise ValueError("with shared=False key must be given; or pass shared=True")
    b, n, h, d = query.shape
    tokens = query if shared else key
    if tokens.shape[0] != b or tokens.shape[2:] != (h, d):
        raise ValueError(f"key must be (B, M, H, D) with B, H and D of query, which is {query.shape}; got {key.shape}")
    if value.shape[:3] != tokens.shape[:3]:
        keys = "query, which are the keys too" if shared else "key"
        raise ValueError(
            f"value must be (B, M, H, E) with B, M and H of {keys}, of shape {tokens.shape}; got {value.shape}"
        )
    if causal and value.shape[1] != n:
        raise ValueError(f"causal attention needs as many keys as queries, {n}; got {value.shape[1]}; or causal=False")
    kind = "(H, bits, D)" if assignment == "hash" else "(H, K, D)"
    if means.shape[0] != h or means.shape[2] != d:
        raise ValueError(f"means must be {kind} with H={h} and D={d} of query; got {means.shape}")


def _check_windows(query, value, window, key_window, shared, relative_key, relative_value):
    for name, tokens in (("window", window), ("key_window", key_window)):
        if tokens is not None and tokens < 1:
            raise ValueError(f"{name} must be at least 1 token, got {tokens}")
    if key_window is None:
        key_window = window
    elif shared:
        raise ValueError(f"key_window={key_window} is for unshared attention; leave it None")
    queries, keys = min(window, query.shape[1]), min(key_window, value.shape[1])
    if queries != keys and not (relative_key is None and relative_value is None):
        raise ValueError(
            f"relative positions compare ranks in clusters of equal size, but these hold {queries} queries and {keys} "
            "keys; leave relative_key and relative_value None"
        )


def _check_membership(membership, causal, shared, assignment, memory_key):
    if membership == "sequence":
        return
    for argument, wrong, wanted in (
        ("causal", not causal, "causal=True"),
        ("shared", not shared, "shared=True"),
        ("assignment", assignment == "strided", "assignment='topk' or 'hash'"),
        ("memory_key", memory_key is not None, "memory_key=None and memory_value=None"),
    ):
        if wrong:
            raise ValueError(f"membership {membership!r} needs {wanted}; other {argument}: membership='sequence'")


def _check_memory(query, value, means, assignment, memory_key, memory_value):
    if (memory_key is None) != (memory_value is None):
        raise ValueError("memory_key and memory_value come together; one of them is None")
    if memory_key is None:
        return
    clusters = 2 ** means.shape[1] if assignment == "hash" else means.shape[1]
    slots = memory_key.shape[2]
    for name, memory, dim in (("key", memory_key, query.shape[-1]), ("value", memory_value, value.shape[-1])):
        wanted = (means.shape[0], clusters, slots, dim)
        if memory.shape != wanted:
            raise ValueError(f"memory_{name} must be (H, K, S, channels) = {wanted}, got {memory.shape}")


def _compute(
    query,
    key,
    value,
    means,
    key_mask,
    runs,
    relative_key,
    relative_value,
    memory_key,
    memory_value,
    dropout_key,
    *,
    backend,
    window,
    key_window,
    style,
    causal,
    membership,
    assignment,
    return_weights,
    return_membership,
    **options,
):
    """`backend` has the kernels that attend within clusters, None is XLA."""
    q, k, query_scores, key_scores = routed(query, key, means, style, assignment)
    operands = (q, k, value.transpose(0, 2, 1, 3))
    tables, masks = (relative_key, relative_value), (key_mask, runs)
    options |= dict(
        dropout_key=dropout_key,
        self_logit=self_logit(style, key is None),
        epsilon=COUNT_EPSILON[style],
        return_weights=return_weights,
    )
    if membership == "prefix":
        parts = prefix_attention(*operands, on_grid(query_scores), *tables, *masks, window=window, **options)
    elif membership == "nearest":
        options |= dict(window=window, backend=backend)
        parts = nearest_attention(*operands, query_scores, *tables, *masks, **options)
    else:
        choose = strided_members if assignment == "strided" else top_members
        members = choose(query_scores, min(window, query.shape[1]))
        chosen = members if key is None else choose(key_scores, min(key_window, value.shape[1]))
        memory = (memory_key, memory_value)
        options |= dict(causal=causal, backend=backend)
        parts = sequence_attention(*operands, (members, chosen), *tables, *masks, *memory, **options)
    out, weights, members = parts
    out = out.transpose(0, 2, 1, 3).astype(value.dtype)
    extras = ((weights,) if return_weights else ()) + ((members,) if return_membership else ())
    return (out, *extras) if extras else out


def _unsupported(
    query,
    key,
    value,
    means,
    key_mask,
    runs,
    relative_key,
    relative_value,
    memory_key,
    memory_value,
    dropout_key,
    *,
    backend,
    window,
    key_window,
    causal,
    membership,
    assignment,
    scale,
    dropout_rate,
    return_weights,
    **options,
):
    relative = not (relative_key is None and relative_value is None)
    if return_weights:
        return "return_weights: a fused kernel never holds the weights; implementation='xla' returns them"
    if dropout_rate:
        return f"dropout_rate={dropout_rate}: a kernel drops no weights; 0 would do"
    if membership == "prefix":
        return "membership='prefix' is for evaluation and not written; 'sequence' and 'nearest' would do"
    if relative and memory_key is not None:
        return "memory_key with relative positions: not written; one of them None would do"
    (b, n, h, dim), m = query.shape, value.shape[1]
    widths, fields = (dim, value.shape[-1]), dict(scale=scale, relative=relative)
    if membership == "nearest":
        plan = nearest_plan(n, widths, window=window, **fields)
        clusters = -(-n // max(1, plan.queries))
    else:
        slots = 0 if memory_key is None else memory_key.shape[2]
        fields |= dict(causal=causal, ordered=causal and key is None)
        plan = sequence_plan(min(window, n), min(key_window, m), widths, slots, **fields)
        clusters = 2 ** means.shape[1] if assignment == "hash" else means.shape[1]
    dtypes = {str(x.dtype) for x in (query, key, value) if x is not None}
    return backend.refusal(plan, b * h * clusters, dtypes, max(n, m))


def _kernel(backend):
    """A backend as an implementation."""
    shared = (False,) * 5
    return Implementation(
        backend.name,
        functools.partial(_compute, backend=backend),
        functools.partial(_unsupported, backend=backend),
        platforms=backend.platforms,
        batched=(True, True, True, False, True, True, *shared),
    )


TABLE = (_kernel(tpu.BACKEND), _kernel(gpu.BACKEND), Implementation("xla", functools.partial(_compute, backend=None)))
