"""Routing attention as published: within the clusters that the whole sequence has, gathered and put back."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.cluster_plan import COMMON, NO_KEY, Backend, Plan, attend
from kernels.dense import accumulator_dtype
from kernels.masking import dropout, masked_softmax
from kernels.relative import relative_logits, relative_values


class Clusters(NamedTuple):
    """What is gathered.

    Attributes:
        query, key, value: `(B, H, K, w, channels)`.
        at, of: positions of queries and keys, `(B, H, K, w)`.
        present: which keys are no padding, likewise, or None.
        runs: documents of queries and of keys, likewise, or None.
        memory_key, memory_value: `(H, K, S, channels)`, or None.
        relative_key, relative_value: as in `routing_attention`.
    """

    query: Any
    key: Any
    value: Any
    at: Any
    of: Any
    present: Any
    runs: Any
    memory_key: Any
    memory_value: Any
    relative_key: Any
    relative_value: Any


def sequence_attention(
    query,
    key,
    value,
    members,
    relative_key,
    relative_value,
    key_mask,
    runs,
    memory_key,
    memory_value,
    *,
    backend,
    epsilon,
    return_weights,
    **options,
):
    """Attention within clusters of listed members, of operands `(B, H, tokens, channels)`.

    `backend` has the kernels that compute it, None is XLA.
    """
    b, h, n, _ = query.shape
    at, of = members
    acc = accumulator_dtype(query.dtype)

    def gather(x, indices):
        """`(B, H, tokens, channels)` to `(B, H, K, w, channels)`."""
        flat = indices.reshape(b, h, math.prod(indices.shape[2:]), 1)
        return jnp.take_along_axis(x, flat, axis=2).reshape(*indices.shape, x.shape[-1])

    def per_token(x, indices):
        """`(B, tokens)` to `(B, H, K, w)`."""
        return gather(jnp.broadcast_to(x[:, None, :, None], (b, h, x.shape[1], 1)), indices)[..., 0]

    clusters = Clusters(
        *(gather(query, at), gather(key, of), gather(value, of), at, of),
        None if key_mask is None else per_token(key_mask, of),
        None if runs is None else (per_token(runs, at), per_token(runs, of)),
        *(memory_key, memory_value, relative_key, relative_value),
    )
    # A key that is seen has no higher rank than the query only if both are ranked alike.
    ordered = options["causal"] and at is of
    within = plain if backend is None else functools.partial(fused, backend=backend)
    out, weights = within(clusters, ordered=ordered, **options)

    def sums(x, indices, tokens):
        """`(B, H, K, w, ...)` summed into `(B, H, tokens, ...)`."""
        add = jax.vmap(jax.vmap(lambda x, i: jax.ops.segment_sum(x, i, tokens)))
        listed = math.prod(indices.shape[2:])
        return add(x.reshape(b, h, listed, *x.shape[indices.ndim :]), indices.reshape(b, h, listed))

    times = sums(jnp.ones(at.shape, acc), at, n)
    out = sums(out.astype(acc), at, n) / (times[..., None] + epsilon)
    if not return_weights:
        return out, None, members
    m = value.shape[2]
    pairs = at[..., :, None] * m + of[..., None, :]
    weights = sums(weights, pairs, n * m).reshape(b, h, n, m)
    return out, weights / (times[..., None] + epsilon), members


def plain(clusters: Clusters, *, causal, ordered, scale, self_logit, dropout_rate, dropout_key):
    """Outputs `(B, H, K, w, E)` and weights `(B, H, K, w, w)`, in XLA."""
    q, k, v, at, of = clusters[:5]
    acc = accumulator_dtype(q.dtype)
    logits = jnp.einsum("bhcid,bhcjd->bhcij", q, k, preferred_element_type=acc)
    if clusters.relative_key is not None:
        logits = logits + relative_logits(q, clusters.relative_key, of.shape[-1], causal=ordered)
    logits = logits * scale
    ahead = of[..., None, :] - at[..., :, None]
    mask = jnp.ones(logits.shape, bool)
    if causal:
        mask = mask & (ahead <= 0)
    if clusters.present is not None:
        mask = mask & clusters.present[..., None, :]
    if clusters.runs is not None:
        mask = mask & (clusters.runs[0][..., :, None] == clusters.runs[1][..., None, :])
    if self_logit is not None:
        logits = jnp.where(ahead == 0, self_logit, logits)
    slots = 0
    if clusters.memory_key is not None:
        memory_key, memory_value = clusters.memory_key, clusters.memory_value
        slots = memory_key.shape[2]
        remembered = jnp.einsum("bhcid,hcsd->bhcis", q, memory_key.astype(q.dtype), preferred_element_type=acc)
        logits = jnp.concatenate([remembered * scale, logits], axis=-1)
        mask = jnp.pad(mask, [(0, 0)] * 4 + [(slots, 0)], constant_values=True)
        recalled = jnp.broadcast_to(memory_value.astype(v.dtype), (v.shape[0], *memory_value.shape))
        v = jnp.concatenate([recalled, v], axis=3)
    weights = dropout(masked_softmax(logits, mask), dropout_rate, dropout_key)
    cast = weights.astype(v.dtype)
    out = jnp.einsum("bhcij,bhcje->bhcie", cast, v, preferred_element_type=acc)
    if clusters.relative_value is not None:
        out = out + relative_values(cast[..., slots:], clusters.relative_value, causal=ordered)
    return out, weights[..., slots:]


def sequence_plan(queries: int, keys: int, widths, slots: int, *, ordered: bool, **fields) -> Plan:
    """What `fused` computes of clusters with `slots` memories; `widths` are those of keys and values."""
    return Plan(queries, keys + slots, *widths, ordered=ordered, offset=slots, common=slots > 0, **fields)


def fused(clusters: Clusters, *, backend: Backend, ordered, dropout_rate, dropout_key, **fields):
    """Outputs `(B, H, K, w, E)` in the dtype of the operands, by a backend's kernels, and None for the weights."""
    q, k, v, at, of = clusters[:5]
    runs = clusters.runs
    if runs is None:
        runs = jnp.zeros_like(at), jnp.zeros_like(of)
    if clusters.present is not None:
        runs = runs[0], jnp.where(clusters.present, runs[1], NO_KEY)
    slots = 0 if clusters.memory_key is None else clusters.memory_key.shape[2]
    plan = sequence_plan(q.shape[3], k.shape[3], (q.shape[4], v.shape[4]), slots, ordered=ordered, **fields)
    if slots:

        def remembered(memory, x):
            return jnp.concatenate([jnp.broadcast_to(memory.astype(x.dtype), (len(x), *memory.shape)), x], axis=3)

        k, v = remembered(clusters.memory_key, k), remembered(clusters.memory_value, v)
        before = [(0, 0)] * 3 + [(slots, 0)]
        # No token has their position, and none is before it.
        of = jnp.pad(of, before, constant_values=-1)
        runs = runs[0], jnp.pad(runs[1], before, constant_values=COMMON)
    places = (at, runs[0]), (of, runs[1])
    return attend(backend, plan, q, k, v, *places, clusters.relative_key, clusters.relative_value), None
