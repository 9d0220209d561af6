"""Attention of the Routing Transformer's decoder to an encoder's output."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.cluster import routing_attention
from kernels.cluster.centroids import centroid_scores, normalize_tokens
from kernels.cluster.members import COUNT_EPSILON, top_members
from kernels.dense import accumulator_dtype
from kernels.masking import dropout, masked_softmax
from zoo.routing_transformer.attention import MultiHead
from zoo.routing_transformer.heads import RoutingHeads

State = dict[str, Any]


class CrossRoutingHeads(RoutingHeads):
    """Routing heads whose queries come from the decoder and whose keys come from the source.

    Every centroid takes keys, the best `window` of the source, and queries. As published it takes the best `window`
    of all queries, so that whether a query is among them depends on later ones. With the memberships `"prefix"` and
    `"nearest"` it does not: a query is in the clusters for which it is among the best so far, or in that of its best
    centroid; all at once this costs as much as attention to the whole source.
    """

    def attend(
        self,
        query: Float[Array, "B N H D"],
        key: Float[Array, "B M H D"],
        value: Float[Array, "B M H D"],
        mask: Bool[Array, "B M"],
        train: bool,
    ) -> Float[Array, "B N H D"]:
        """All queries at once; `mask` is False for padding of the source."""
        heads = self.heads
        rate = heads.dropout if train else 0.0
        options = dict(dropout_rate=rate, dropout_key=self.make_rng("dropout") if rate else None)
        if heads.membership == "sequence":
            means, how = self.means.value, dict(window=heads.window, implementation=self.implementation)
            out = routing_attention(query, key, value, means, causal=False, key_mask=mask, **how, **options)
        else:
            scores = self._scores(query)
            inside = self._prefix_members(scores) if heads.membership == "prefix" else _nearest(scores)
            out = _to_clusters(query, self.clusters_of(key, value, mask), inside, **options)
        if train:
            self.learn(query, key, None, mask)
        return out

    def clusters_of(
        self, key: Float[Array, "B M H D"], value: Float[Array, "B M H D"], mask: Bool[Array, "B M"]
    ) -> State:
        """The keys and values that each centroid takes, `(B, H, K, w, D)`, and which of them are no padding."""
        key = normalize_tokens(key)
        scores = jax.lax.stop_gradient(centroid_scores(key, self.means.value))
        members = top_members(scores, min(self.heads.window, key.shape[1]))

        def taken(x):
            """`(B, M, H, D)` to `(B, H, K, w, D)`."""
            return jnp.take_along_axis(x.swapaxes(1, 2)[:, :, None], members[..., None], axis=3)

        mask = jnp.take_along_axis(mask[:, None, None], members, axis=3)
        return {"key": taken(key).astype(value.dtype), "value": taken(value), "mask": mask}

    def initial_state(
        self, key: Float[Array, "B M H D"], value: Float[Array, "B M H D"], mask: Bool[Array, "B M"]
    ) -> State:
        """The source's clusters and, for membership "prefix", how well the best queries so far fit them."""
        state = self.clusters_of(key, value, mask)
        if self.heads.decode_membership == "prefix":
            acc = accumulator_dtype(key.dtype)
            shape = (*state["key"].shape[:3], self.heads.window)
            state["best"] = jnp.full(shape, -jnp.inf, acc)
        return state

    def prefill(self, query: Float[Array, "B N H D"], state: State) -> tuple[Float[Array, "B N H D"], State]:
        """The output for the first N tokens, and the state after them."""
        scores = self._scores(query)
        if "best" not in state:
            return _to_clusters(query, state, _nearest(scores)), state
        kept = min(self.heads.window, query.shape[1])
        best = state["best"].at[..., :kept].set(jax.lax.top_k(scores.swapaxes(-1, -2), kept)[0])
        return _to_clusters(query, state, self._prefix_members(scores)), {**state, "best": best}

    def step(self, query: Float[Array, "B 1 H D"], state: State) -> tuple[Float[Array, "B 1 H D"], State]:
        """The output for the next token, and the state after it."""
        scores = self._scores(query)
        if "best" not in state:
            return _to_clusters(query, state, _nearest(scores)), state
        score, best = scores[:, :, 0], state["best"]
        enters = score > best.min(-1)
        worst = jax.nn.one_hot(best.argmin(-1), best.shape[-1], dtype=bool) & enters[..., None]
        best = jnp.where(worst, score[..., None], best)
        return _to_clusters(query, state, enters[:, :, None]), {**state, "best": best}

    def _scores(self, query: Float[Array, "B N H D"]) -> Float[Array, "B H N K"]:
        return jax.lax.stop_gradient(centroid_scores(normalize_tokens(query), self.means.value))

    def _prefix_members(self, scores: Float[Array, "B H N K"]) -> Bool[Array, "B H N K"]:
        """Whether a query is among the best so far, of equals the first ones."""
        beaten = scores[:, :, None] >= scores[:, :, :, None]
        earlier = jnp.tri(scores.shape[2], k=-1, dtype=bool)[..., None]
        return (beaten & earlier).sum(3) < self.heads.window


def _nearest(scores: Float[Array, "B H N K"]) -> Bool[Array, "B H N K"]:
    return jax.nn.one_hot(scores.argmax(-1), scores.shape[-1], dtype=bool)


def _to_clusters(
    query: Float[Array, "B N H D"],
    state: State,
    inside: Bool[Array, "B H N K"],
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
) -> Float[Array, "B N H D"]:
    """The mean over the clusters that a query is in of what it takes from the source's tokens there."""
    acc = accumulator_dtype(query.dtype)
    query = normalize_tokens(query).astype(query.dtype)
    logits = jnp.einsum("bnhd,bhkwd->bhnkw", query, state["key"], preferred_element_type=acc)
    weights = masked_softmax(logits, state["mask"][:, :, None] & inside[..., None])
    weights = dropout(weights, dropout_rate, dropout_key)
    weights = weights / (inside.sum(-1) + COUNT_EPSILON["official"])[..., None, None]
    return jnp.einsum("bhnkw,bhkwe->bnhe", weights.astype(query.dtype), state["value"])


class CrossAttention(MultiHead):
    """Attention to a source, without relative positions: routing heads, and local ones, block to block.

    Target block i sees the source's blocks `i - look` to `i + look`. The official code wants as many blocks of the
    one as of the other; here blocks that the source lacks are empty.

    Attributes:
        source_block: tokens in a block of the source.
    """

    source_block: int = 256

    def setup(self):
        super().setup()
        if self.heads.routing:
            self.routing = CrossRoutingHeads(self.heads, self.heads.routing, **self.like())

    def __call__(
        self,
        x: Float[Array, "B N C"],
        source: Float[Array, "B M C"],
        mask: Bool[Array, "B M"],
        train: bool,
    ) -> Float[Array, "B N C"]:
        heads, outs = self.heads, []
        (routing, _, _, local), (keys, _, _, local_keys) = self.queries(x), self.keys_values(source)
        if heads.routing:
            outs.append(self.routing.attend(routing, *keys, mask, train))
        if heads.local:
            blocks = self._cut(*local_keys, mask, -(-x.shape[1] // heads.block))
            rate = heads.dropout if train else 0.0
            key = self.make_rng("dropout") if rate else None
            outs.append(self._to_blocks(local, blocks, dropout_rate=rate, dropout_key=key))
        return self.merge(outs)

    def initial_state(self, source: Float[Array, "B M C"], mask: Bool[Array, "B M"], max_length: int) -> State:
        """All that is read of the source, for at most `max_length` tokens."""
        heads, state = self.heads, {}
        keys, _, _, local_keys = self.keys_values(source)
        if heads.routing:
            state["routing"] = self.routing.initial_state(*keys, mask)
        if heads.local:
            state["local"] = self._cut(*local_keys, mask, -(-max_length // heads.block))
        return state

    def prefill(self, x: Float[Array, "B N C"], state: State) -> tuple[Float[Array, "B N C"], State]:
        """The output for the first N tokens, and the state after them."""
        outs, state = [], dict(state)
        routing, _, _, local = self.queries(x)
        if "routing" in state:
            out, state["routing"] = self.routing.prefill(routing, state["routing"])
            outs.append(out)
        if "local" in state:
            outs.append(self._to_blocks(local, state["local"]))
        return self.merge(outs), state

    def step(self, x: Float[Array, "B C"], state: State, position: Int[Array, ""]) -> tuple[Float[Array, "B C"], State]:
        """The output for the token at `position`, and the state after it."""
        outs, state = [], dict(state)
        routing, _, _, local = self.queries(x[:, None])
        if "routing" in state:
            out, state["routing"] = self.routing.step(routing, state["routing"])
            outs.append(out)
        if "local" in state:
            first, many = position // self.heads.block, 2 * self.heads.look + 1
            seen = {k: jax.lax.dynamic_slice_in_dim(v, first, many, 1) for k, v in state["local"].items()}
            outs.append(self._to_blocks(local, seen))
        return self.merge(outs)[:, 0], state

    def _cut(self, key: Array, value: Array, mask: Array, blocks: int) -> State:
        """The source in blocks, `(B, look + blocks + look, source_block, ...)`; what is not there is masked."""
        look, size = self.heads.look, self.source_block

        def cut(x):
            x = x[:, : (blocks + look) * size]
            x = jnp.pad(x, [(0, 0), (look * size, (blocks + look) * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
            return x.reshape(x.shape[0], -1, size, *x.shape[2:])

        return {"key": cut(key), "value": cut(value), "mask": cut(mask)}

    def _to_blocks(
        self, query: Float[Array, "B N H D"], state: State, dropout_rate: float = 0.0, dropout_key: Any = None
    ) -> Float[Array, "B N H D"]:
        """Queries from the first block on over blocks of the source, of which the state has some around each."""
        b, n, h, d = query.shape
        block, many = min(self.heads.block, n), 2 * self.heads.look + 1
        blocks = -(-n // block)
        query = jnp.pad(query, [(0, 0), (0, blocks * block - n), (0, 0), (0, 0)]).reshape(b, blocks, block, h, d)
        key, value, mask = (
            jnp.concatenate([state[name][:, i : i + blocks] for i in range(many)], axis=2)
            for name in ("key", "value", "mask")
        )
        acc = accumulator_dtype(query.dtype)
        logits = jnp.einsum("bnihd,bnjhd->bnhij", query, key, preferred_element_type=acc)
        weights = dropout(masked_softmax(logits, mask[:, :, None, None]), dropout_rate, dropout_key)
        out = jnp.einsum("bnhij,bnjhd->bnihd", weights.astype(value.dtype), value)
        return out.reshape(b, blocks * block, h, d)[:, :n]
