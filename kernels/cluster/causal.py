"""Routing attention whose clusters do not depend on later tokens, all tokens at once."""

import jax
import jax.numpy as jnp

from kernels.cluster_plan import NO_KEY, NO_QUERY, Plan, attend
from kernels.dense import accumulator_dtype
from kernels.local import block_attention
from kernels.masking import dropout, masked_softmax

# Queries that `prefix_attention` takes at a time: its memory is this times N for every cluster.
PREFIX_ROWS = 64


def nearest_attention(
    query,
    key,
    value,
    scores,
    relative_key,
    relative_value,
    key_mask,
    runs,
    *,
    window,
    scale,
    self_logit,
    epsilon,
    dropout_rate,
    dropout_key,
    return_weights,
    backend,
):
    """Every token attends to the last `window` tokens of the cluster of its best centroid.

    Sorted by cluster, and by position within, that is a sliding window which ends where the cluster begins.

    Args:
        query, key, value: `(B, H, N, channels)`.
        scores: `(B, H, N, K)`.
        relative_key, relative_value, key_mask: as in `routing_attention`.
        runs: `(B, N)`, of packed documents, or None.
        backend: has the kernels that compute it, None is XLA.

    Returns:
        Outputs `(B, H, N, E)`, weights `(B, H, N, N)` or None, and the clusters `(B, H, N)`.
    """
    b, h, n, _ = query.shape
    clusters = scores.shape[-1]
    cluster = jnp.argmax(scores, axis=-1)
    group, valid = cluster, None
    if key_mask is not None:
        valid = jnp.broadcast_to(key_mask[:, None], cluster.shape)
        group = jnp.where(valid, group, clusters)
    if runs is not None:
        group = group + runs[:, None] * (clusters + 1)
    order = jnp.argsort(group, axis=-1, stable=True)
    back = jnp.argsort(order, axis=-1)

    def ordered(x):
        """`(B, H, N, ...)` sorted, every head a sample: `(B * H, N, ...)`."""
        indices = order.reshape(*order.shape, *(1,) * (x.ndim - 3))
        return jnp.take_along_axis(x, indices, axis=2).reshape(b * h, n, *x.shape[3:])

    rows = [ordered(x) for x in (query, key, value)]
    tables, groups = (relative_key, relative_value), (None if valid is None else ordered(valid), ordered(group))
    fields = dict(window=window, scale=scale, self_logit=self_logit)
    if backend is None:
        parts = block_attention(
            *(x[:, :, None] for x in rows),
            *tables,
            *groups,
            dropout_key,
            block=window,
            look_back=1,
            look_ahead=0,
            causal=True,
            dropout_rate=dropout_rate,
            return_weights=return_weights,
            **fields,
        )
        out, weights = parts if return_weights else (parts, None)
    else:
        out, weights = _fused(backend, *rows, *tables, *groups, **fields), None
    out = out.reshape(b, h, n, -1).astype(accumulator_dtype(query.dtype)) / (1 + epsilon)
    out = jnp.take_along_axis(out, back[..., None], axis=2)
    if return_weights:
        weights = weights.reshape(b, h, n, n) / (1 + epsilon)
        weights = jnp.take_along_axis(weights, back[..., :, None], axis=2)
        weights = jnp.take_along_axis(weights, back[..., None, :], axis=3)
    return out, weights, cluster


def nearest_plan(tokens: int, widths, *, window: int, **fields) -> Plan:
    """What a kernel computes of a sequence that is sorted by cluster: blocks that see themselves and those before."""
    block = min(window, tokens)
    before = block if tokens > block else 0
    options = dict(causal=True, ordered=True, offset=before, window=window)
    return Plan(block, before + block, *widths, **options, **fields)


def _fused(backend, query, key, value, relative_key, relative_value, valid, group, **fields):
    """`block_attention` of blocks and those before, `(G, N, channels)` sorted, by a backend's kernels."""
    plan = nearest_plan(query.shape[1], (query.shape[2], value.shape[2]), **fields)
    n, block = query.shape[1], plan.queries
    blocks = -(-n // block)

    def cut(x, filler=0):
        """`(G, N, ...)` to `(G, blocks, block, ...)`."""
        x = jnp.pad(x, [(0, 0), (0, blocks * block - n)] + [(0, 0)] * (x.ndim - 2), constant_values=filler)
        return x.reshape(len(x), blocks, block, *x.shape[2:])

    def with_earlier(x, filler=0):
        """The same with the block before in front of every block."""
        x = cut(x, filler)
        if not plan.offset:
            return x
        earlier = jnp.pad(x[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2), constant_values=filler)
        return jnp.concatenate([earlier, x], axis=2)

    rank = jnp.broadcast_to(jnp.arange(n), group.shape)
    of_keys = group if valid is None else jnp.where(valid, group, NO_KEY)
    places = (cut(rank), cut(group, NO_QUERY)), (with_earlier(rank), with_earlier(of_keys, NO_KEY))
    operands = cut(query), with_earlier(key), with_earlier(value)
    out = attend(backend, plan, *operands, *places, relative_key, relative_value)
    return out.reshape(len(out), blocks * block, -1)[:, :n]


def prefix_attention(
    query,
    key,
    value,
    scores,
    relative_key,
    relative_value,
    key_mask,
    runs,
    *,
    window,
    scale,
    self_logit,
    epsilon,
    dropout_rate,
    dropout_key,
    return_weights,
):
    """Every token attends within the clusters that have it among the best `window` of the tokens so far.

    A member that is beaten by `window` others leaves for good, so that one number per token and cluster says when it
    is a member. Softmaxes are over all earlier tokens, those that are no members masked, for some queries at a time.

    Args, Returns: as `nearest_attention`, but the last array says `(B, H, N, K)` who is in which cluster.
    """
    b, h, n, _ = query.shape
    rows = min(PREFIX_ROWS, n)
    blocks = -(-n // rows)
    total = blocks * rows
    acc = accumulator_dtype(query.dtype)
    valid = jnp.ones((b, n), bool) if key_mask is None else key_mask
    runs = jnp.zeros((b, n), jnp.int32) if runs is None else runs
    leaves = _leaving_times(scores, valid, runs, min(window, n))
    position = jnp.arange(n)
    # Padded queries are in no cluster.
    padded = jnp.pad(leaves, [(0, 0)] * 3 + [(0, total - n)], constant_values=-1)
    padded_query = jnp.pad(query, ((0, 0), (0, 0), (0, total - n), (0, 0)))
    padded_runs = jnp.pad(runs, ((0, 0), (0, total - n)))

    @jax.checkpoint
    def attend(start):
        at = start + jnp.arange(rows)
        q = jax.lax.dynamic_slice_in_dim(padded_query, start, rows, 2)
        together = jax.lax.dynamic_slice_in_dim(padded_runs, start, rows, 1)[:, :, None] == runs[:, None]
        inside = (jax.lax.dynamic_slice_in_dim(padded, start, rows, 3) > at)[..., None]
        # (B, H, K, rows, N), as all with five axes.
        member = (at[:, None] < leaves[..., None, :]) & (position <= at[:, None]) & together[:, None, None]
        logits = jnp.einsum("bhid,bhjd->bhij", q, key, preferred_element_type=acc)[:, :, None]
        if not (relative_key is None and relative_value is None):
            # How many members come after each, which for the query's own token is none.
            ranks = jnp.cumsum(member, axis=-1, dtype=jnp.int32)
            distance = ranks[..., -1:] - ranks
        if relative_key is not None:
            reach = relative_key.shape[0] // 2
            vectors = relative_key[reach::-1].astype(q.dtype)
            terms = jnp.einsum("bhid,rd->bhir", q, vectors, preferred_element_type=acc)
            terms = jnp.broadcast_to(terms[:, :, None], (*distance.shape[:-1], reach + 1))
            logits = logits + jnp.take_along_axis(terms, jnp.minimum(distance, reach), axis=-1)
        logits = logits * scale
        if self_logit is not None:
            logits = jnp.where(position == at[:, None], self_logit, logits)
        weights = masked_softmax(logits, member & inside)
        if dropout_rate:
            weights = dropout(weights, dropout_rate, jax.random.fold_in(dropout_key, start))
        weights = weights / (inside.sum(2, keepdims=True) + epsilon)
        merged = weights.sum(2)
        out = jnp.einsum("bhij,bhje->bhie", merged.astype(value.dtype), value, preferred_element_type=acc)
        if relative_value is not None:
            out = out + _relative_values(weights, relative_value, distance, member).sum(2)
        return out, merged if return_weights else None

    out, weights = jax.lax.map(attend, jnp.arange(blocks) * rows)
    out = jnp.moveaxis(out, 0, 2).reshape(b, h, total, -1)[:, :, :n]
    if return_weights:
        weights = jnp.moveaxis(weights, 0, 2).reshape(b, h, total, n)[:, :, :n]
    return out, weights, (leaves > position).swapaxes(-1, -2)


def _leaving_times(scores, valid, runs, window):
    """`(B, H, K, N)`: which token makes each token leave each cluster, itself if it never is a member, N if none.

    Of the tokens so far in its run a cluster holds those with the `window` highest scores, of equals the first.
    """
    b, h, n, clusters = scores.shape
    starts = jnp.pad(runs[:, 1:] != runs[:, :-1], ((0, 0), (1, 0)))
    scores = jnp.where(valid[:, None, :, None], scores, -jnp.inf)
    places = jnp.arange(window)

    def step(members, token):
        fit, who = members
        t, score, start = token
        fit = jnp.where(start[:, None, None, None], -jnp.inf, fit)
        worst = fit.min(-1, keepdims=True)
        enters = score[..., None] > worst
        last = jnp.argmax(jnp.where(fit == worst, who, -1), axis=-1, keepdims=True)
        left = jnp.where(worst > -jnp.inf, jnp.take_along_axis(who, last, axis=-1), n)
        replaced = enters & (places == last)
        fit, who = jnp.where(replaced, score[..., None], fit), jnp.where(replaced, t, who)
        return (fit, who), jnp.where(enters, left, t)[..., 0]

    shape = (b, h, clusters, window)
    empty = jnp.full(shape, -jnp.inf, scores.dtype), jnp.zeros(shape, jnp.int32)
    order = jnp.arange(n, dtype=jnp.int32)
    _, left = jax.lax.scan(step, empty, (order, jnp.moveaxis(scores, 2, 0), starts.swapaxes(0, 1)))

    def times(left):
        return jnp.full(n, n, jnp.int32).at[left].set(order, mode="drop")

    return jax.vmap(jax.vmap(jax.vmap(times)))(jnp.moveaxis(left, 0, -1))


def _relative_values(weights, table, distance, member):
    """Weights `(..., rows, N)` times the vectors of the members' distances in rank."""
    reach = table.shape[0] // 2
    # Below the reach a distance has one member, so that setting is enough and nothing depends on an order of sums.
    near = member & (distance < reach)
    indices = jnp.where(near, distance, reach)

    def place(weights, indices):
        return jnp.zeros(reach, weights.dtype).at[indices].set(weights, mode="drop")

    flat = jax.vmap(place)(weights.reshape(-1, weights.shape[-1]), indices.reshape(-1, weights.shape[-1]))
    far = jnp.where(member & ~near, weights, 0).sum(-1, keepdims=True)
    by_distance = jnp.concatenate([flat.reshape(*weights.shape[:-1], reach), far], axis=-1)
    return jnp.einsum("...ir,re->...ie", by_distance, table[reach::-1].astype(weights.dtype))
