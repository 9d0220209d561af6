"""Routing attention one token at a time, for the two strictly causal memberships."""

from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.choices import check_choice
from kernels.cluster.centroids import Style
from kernels.cluster.members import COUNT_EPSILON, Assignment, default_scale, on_grid, routed, self_logit
from kernels.dense import accumulator_dtype
from kernels.masking import masked_softmax
from kernels.relative import check_tables, relative_logits, relative_values

CAUSAL_MEMBERSHIPS = ("prefix", "nearest")


class RoutingState(NamedTuple):
    """What later tokens may attend to: up to W members of every cluster, whatever the number of tokens so far.

    Attributes:
        key: `(B, H, K, W, D)`, ready for the product.
        value: `(B, H, K, W, E)`.
        score: `(B, H, K, W)`, how well each member fits, -inf in free places; members stand in the order of their
            positions, the last one last. Membership "prefix"; else None.
        count: `(B, H, K)` int32, members that ever were; number m is in place m modulo W. Membership "nearest"; else
            None.
    """

    key: Float[Array, "B H K W D"]
    value: Float[Array, "B H K W E"]
    score: Float[Array, "B H K W"] | None
    count: Int[Array, "B H K"] | None


def init_routing_state(
    batch: int,
    heads: int,
    clusters: int,
    window: int,
    dim: int,
    value_dim: int | None = None,
    *,
    membership: str = "nearest",
    dtype=jnp.float32,
) -> RoutingState:
    """The state before the first token.

    Args:
        batch, heads, clusters, window, dim, value_dim: B, H, K, W, D and E, which is D if None.
        membership: `"prefix"` or `"nearest"`.
        dtype: of keys and values; scores are float32 (float64 for float64).

    Raises:
        ValueError: for a membership that is no causal one, or an unknown name.
    """
    _check_membership(membership)
    key = jnp.zeros((batch, heads, clusters, window, dim), dtype)
    value = jnp.zeros((batch, heads, clusters, window, dim if value_dim is None else value_dim), dtype)
    if membership == "prefix":
        return RoutingState(key, value, jnp.full(key.shape[:-1], -jnp.inf, accumulator_dtype(dtype)), None)
    return RoutingState(key, value, None, jnp.zeros(key.shape[:3], jnp.int32))


def routing_state(
    query: Float[Array, "B N H D"],
    value: Float[Array, "B N H E"],
    means: Float[Array, "H K D"],
    *,
    window: int,
    membership: str = "nearest",
    style: str = "official",
    assignment: str = "topk",
    key_mask: Bool[Array, "B N"] | None = None,
) -> RoutingState:
    """The state after a prompt, all its tokens at once: what as many `routing_step`s from the empty one give.

    Args:
        query, value, means, style, assignment, key_mask: as in `routing_attention`, queries being the keys too.
        window: W, which is not clamped to N.
        membership: `"prefix"` or `"nearest"`.

    Raises:
        ValueError: for a membership that is no causal one, or an unknown name.
    """
    _check_names(style, assignment)
    _check_membership(membership)
    _, key, _, scores = routed(query, None, means, style, assignment)
    value = value.transpose(0, 2, 1, 3)
    b, h, n, clusters = scores.shape
    valid = jnp.ones((b, 1, n), bool) if key_mask is None else key_mask[:, None]
    if membership == "prefix":
        scores = jnp.pad(
            jnp.where(valid[..., None], on_grid(scores), -jnp.inf),
            [(0, 0), (0, 0), (0, window), (0, 0)],
            constant_values=-jnp.inf,
        )
        best, chosen = jax.lax.top_k(scores.swapaxes(-1, -2), window)
        # Free places come first.
        chosen = jnp.sort(jnp.where(best > -jnp.inf, chosen, -1), axis=-1)
        free = chosen < 0
        best = jnp.take_along_axis(scores.swapaxes(-1, -2), jnp.maximum(chosen, 0), axis=-1)
        key, value = (_members(x, jnp.maximum(chosen, 0), ~free) for x in (key, value))
        return RoutingState(key, value, jnp.where(free, -jnp.inf, best), None)
    belongs = jax.nn.one_hot(jnp.argmax(scores, axis=-1), clusters, axis=2, dtype=jnp.int32) * valid[:, :, None]
    count = belongs.sum(-1)
    # Places are filled from the last member of a cluster backwards: member number m, counted from 0, is in place
    # m modulo W.
    place = jnp.arange(window)
    number = count[..., None] - 1 - (count[..., None] - 1 - place) % window
    at = jax.vmap(jax.vmap(jax.vmap(lambda upto, number: jnp.searchsorted(upto, number + 1))))(
        jnp.cumsum(belongs, axis=-1), number
    )
    key, value = (_members(x, jnp.clip(at, 0, n - 1), number >= 0) for x in (key, value))
    return RoutingState(key, value, None, count)


def routing_step(
    query: Float[Array, "B 1 H D"],
    value: Float[Array, "B 1 H E"],
    means: Float[Array, "H K D"],
    state: RoutingState,
    *,
    style: str = "official",
    assignment: str = "topk",
    key_mask: Bool[Array, "B 1"] | None = None,
    relative_key: Float[Array, "R D"] | None = None,
    relative_value: Float[Array, "R E"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B 1 H E"], RoutingState]:
    """The next token of causal shared routing attention, at a cost that does not grow with its position.

    Args:
        query, value: `(B, 1, H, D)` and `(B, 1, H, E)` of that token.
        means: `(H, K, D)`, the same for all tokens.
        state: of the tokens before; it says which membership it is, and the window.
        style, assignment, relative_key, relative_value, scale: as in `routing_attention`.
        key_mask: False passes a sample over: its output is 0 and its state stays.

    Returns:
        The token's output, as `routing_attention` gives it for the whole sequence, and the state after it. Membership
        "prefix" costs O(K * W * D), "nearest" O((K + W) * D).

    Raises:
        ValueError: for shapes that do not fit and unknown names.
    """
    _check_names(style, assignment)
    check_tables(query.shape[-1], value.shape[-1], relative_key, relative_value)
    q, k, scores, _ = routed(query, None, means, style, assignment)
    q, k, v, scores = q[:, :, 0], k[:, :, 0], value[:, 0], scores[:, :, 0]
    if scores.shape[-1] != state.key.shape[2]:
        raise ValueError(f"state is for {state.key.shape[2]} clusters, means for {scores.shape[-1]}")
    present = jnp.ones((q.shape[0], 1), bool) if key_mask is None else key_mask
    if state.count is None:
        state, members, inside = _store_best(state, k, v, on_grid(scores), present)
    else:
        state, members, inside = _store_last(state, k, v, scores, present)
    options = dict(
        scale=default_scale(style, query.shape[-1]) if scale is None else scale, logit=self_logit(style, True)
    )
    out = _attend_last(q, *members, inside, relative_key, relative_value, **options)
    inside = inside[..., None]
    out = jnp.where(inside, out, 0).sum(2) / (inside.sum(2) + COUNT_EPSILON[style])
    return out[:, None].astype(value.dtype), state


def _store_best(state, key, value, score, present):
    """A token takes the place of the worst member of every cluster for which it fits better.

    Returns the state, the members `(B, H, K, W, channels)` and which places are taken, and whether the token, which
    is the last of them, is one `(B, H, K)`.
    """
    window = state.score.shape[-1]
    # Of equals the latest goes, as in a choice among all.
    worst = window - 1 - jnp.argmin(state.score[..., ::-1], axis=-1)[..., None]
    enters = (score > state.score.min(-1)) & present[..., None]
    place = jnp.arange(window)

    def move(places, new):
        """Everything after the worst moves up by one, and the token comes last."""
        shape = (...,) + (None,) * (places.ndim - 4)
        new = jnp.broadcast_to(new, places.shape[:3] + places.shape[4:]).astype(places.dtype)
        shifted = jnp.concatenate([places[:, :, :, 1:], new[:, :, :, None]], axis=3)
        return jnp.where(((place >= worst) & enters[..., None])[shape], shifted, places)

    state = RoutingState(
        move(state.key, key[:, :, None]), move(state.value, value[:, :, None]), move(state.score, score), None
    )
    return state, (state.key, state.value, state.score > -jnp.inf), enters


def _store_last(state, key, value, score, present):
    """A token takes the place of the oldest member of its best cluster, the only one `(K = 1)` that is returned."""
    b, h, _, window, _ = state.key.shape
    cluster = jnp.argmax(score, axis=-1)
    own = (jnp.arange(b)[:, None], jnp.arange(h), cluster)
    before = state.count[own]
    place = (*own, before % window)

    def put(places, new):
        return places.at[place].set(jnp.where(present[..., None], new.astype(places.dtype), places[place]))

    state = RoutingState(
        put(state.key, key), put(state.value, value), None, state.count.at[own].add(present.astype(jnp.int32))
    )
    # In the order of their positions, the token last; places not yet filled come first.
    newest_last = (before[..., None] + 1 + jnp.arange(window)) % window
    members = (
        jnp.take_along_axis(places[own], newest_last[..., None], axis=2)[:, :, None]
        for places in (state.key, state.value)
    )
    taken = jnp.arange(window) >= window - 1 - before[..., None]
    return state, (*members, taken[:, :, None]), jnp.broadcast_to(present, (b, h))[..., None]


def _attend_last(query, key, value, taken, inside, relative_key, relative_value, *, scale, logit):
    """Attention of `(B, H, D)` to members `(B, H, K, W, channels)` of which the last is the query's own token."""
    acc, window = accumulator_dtype(query.dtype), key.shape[3]
    logits = jnp.einsum("bhd,bhcjd->bhcj", query, key.astype(query.dtype), preferred_element_type=acc)
    diagonals = dict(offset=window - 1, causal=True)
    if relative_key is not None:
        logits = logits + relative_logits(query[:, :, None], relative_key, window, **diagonals)
    logits = logits * scale
    if logit is not None:
        logits = logits.at[..., -1].set(logit)
    weights = masked_softmax(logits, taken & inside[..., None]).astype(value.dtype)
    out = jnp.einsum("bhcj,bhcje->bhce", weights, value, preferred_element_type=acc)
    if relative_value is not None:
        out = out + relative_values(weights[..., None, :], relative_value, **diagonals)[..., 0, :]
    return out


def _members(x, indices, taken):
    """`(B, H, N, channels)` at `(B, H, K, W)`, zero in free places."""
    flat = jnp.take_along_axis(x, indices.reshape(*indices.shape[:2], -1, 1), axis=2)
    return jnp.where(taken[..., None], flat.reshape(*indices.shape, x.shape[-1]), 0)


def _check_names(style, assignment):
    check_choice("style", style, get_args(Style))
    if assignment == "strided":
        raise ValueError("assignment 'strided' has no causal membership; use 'topk' or 'hash'")
    check_choice("assignment", assignment, get_args(Assignment))


def _check_membership(membership):
    if membership == "sequence":
        raise ValueError("membership 'sequence' depends on later tokens and has no step; use 'prefix' or 'nearest'")
    check_choice("membership", membership, CAUSAL_MEMBERSHIPS)
