"""float64 references for local and routing attention, written as loops over what the sources define."""

import numpy as np

from tests.reference.attention import softmax

EPSILON = {"official": 1e-2, "lucidrains": 1e-5}


def normal(x, style):
    """Layer norm without scale and bias, or L2."""
    x = np.asarray(x, np.float64)
    if style == "official":
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def best(scores, window):
    """Positions, ascending, of the highest scores, the first of equals."""
    return sorted(np.argsort(-np.asarray(scores), kind="stable")[:window])


def spread(scores, window):
    """Positions, ascending, at equal steps in the ranking by scores."""
    return sorted(np.argsort(-np.asarray(scores), kind="stable")[:: len(scores) // window][:window])


def buckets(tokens, projections):
    """One-hot `(N, 2 ** bits)` of the numbers that the signs of `(N, bits)` products spell, lowest bit first."""
    numbers = [sum(2**i for i, p in enumerate(projections) if token @ p > 0) for token in tokens]
    return np.eye(2 ** len(projections))[numbers]


def attend(query, keys, values, distances, visible, scale, tables, self_logit=None):
    """One query over listed keys; `distances` in the tables; zeros and zero weights if nothing is visible."""
    relative_key, relative_value = tables
    if not any(visible):
        return np.zeros(values.shape[-1]), np.zeros(len(keys))
    rows = None if relative_key is None else np.clip(distances, -(len(relative_key) // 2), len(relative_key) // 2)
    keys = keys if rows is None else keys + relative_key[rows + len(relative_key) // 2]
    logits = scale * keys @ query
    if self_logit is not None:
        logits = np.where(self_logit, -5e4, logits)
    weights = softmax(np.where(visible, logits, -np.inf))
    values = values if rows is None else values + relative_value[rows + len(relative_value) // 2]
    return weights @ values, weights


def local(query, key, value, *, sees, scale=None, relative_key=None, relative_value=None):
    """Dense attention where `sees(b, t, j)` says whether query t sees key j; output and weights."""
    tables = [x if x is None else np.asarray(x) for x in (relative_key, relative_value)]
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    b, n, h, d = query.shape
    out, weights = np.zeros((b, n, h, value.shape[-1])), np.zeros((b, h, n, n))
    for i, head, t in np.ndindex(b, h, n):
        visible = [sees(i, t, j) for j in range(n)]
        out[i, t, head], weights[i, head, t] = attend(
            *(query[i, t, head], key[i, :, head], value[i, :, head], np.arange(n) - t, visible),
            d**-0.5 if scale is None else scale,
            tables,
        )
    return out, weights


def routing(
    query,
    key,
    value,
    means,
    *,
    window,
    style="official",
    causal=True,
    membership="sequence",
    assignment="topk",
    key_window=None,
    key_mask=None,
    segments=None,
    shared=None,
    relative_key=None,
    relative_value=None,
    memory_key=None,
    memory_value=None,
    scale=None,
):
    """Routing attention, token by token; output and what each token takes from each value."""
    assert (key is None) == (causal if shared is None else shared)
    tables = [x if x is None else np.asarray(x) for x in (relative_key, relative_value)]
    query, value, means = (np.asarray(x, np.float64) for x in (query, value, means))
    shared = key is None
    key = query if shared else np.asarray(key, np.float64)
    (b, n, h, d), m = query.shape, key.shape[1]
    scale = (1 if style == "official" else d**-0.5) if scale is None else scale
    routed, routed_key = normal(query, style), normal(key, style)
    q, k = (routed, routed_key) if style == "official" else (query, routed_key if shared else key)
    segments = np.zeros((b, n)) if segments is None else np.asarray(segments)
    runs = np.cumsum(np.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0))), axis=1)
    present = np.ones((b, m), bool) if key_mask is None else np.asarray(key_mask)
    choose = spread if assignment == "strided" else best
    out, weights = np.zeros((b, n, h, value.shape[-1])), np.zeros((b, h, n, m))
    for i, head in np.ndindex(b, h):
        fit, key_fit = (
            buckets(x[i, :, head], means[head]) if assignment == "hash" else x[i, :, head] @ means[head].T
            for x in (routed, routed_key)
        )
        for t in range(n):
            clusters = []
            for c in range(fit.shape[1]):
                # Who are t's fellow members, and in which order, if t is a member.
                alive = [j for j in range(t + 1) if present[i, j] and runs[i, j] == runs[i, t]] if shared else []
                if membership == "sequence":
                    members = choose(key_fit[:, c], min(key_window or window, m))
                    inside = t in choose(fit[:, c], min(window, n))
                    rank = choose(fit[:, c], min(window, n)).index(t) if inside else 0
                elif membership == "prefix":
                    members = [alive[r] for r in best(fit[alive, c], window)] if alive else []
                    inside = t in members
                    rank = len(members) - 1
                else:
                    members = [j for j in alive if fit[j].argmax() == c][-window:]
                    inside = t in members
                    rank = len(members) - 1
                if inside:
                    clusters.append((c, np.array(members), rank))
            for c, members, rank in clusters:
                visible = present[i, members]
                if causal:
                    visible = visible & (members <= t)
                if n == m:
                    visible = visible & (runs[i, members] == runs[i, t])
                keys, values = k[i, members, head], value[i, members, head]
                slots = 0
                if memory_key is not None:
                    slots = memory_key.shape[2]
                    keys, values = np.r_[memory_key[head, c], keys], np.r_[memory_value[head, c], values]
                visible = np.r_[np.ones(slots, bool), visible]
                own = np.r_[np.zeros(slots, bool), members == t] if style == "lucidrains" and shared else None
                distances = np.arange(len(members)) - rank
                got, taken = attend(q[i, t, head], keys, values, distances, visible, scale, tables, own)
                share = len(clusters) + EPSILON[style]
                out[i, t, head] += got / share
                weights[i, head, t, members] += taken[slots:] / share
    return out, weights
