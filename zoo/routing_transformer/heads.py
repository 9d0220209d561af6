"""Routing heads of the Routing Transformer with their centroids, which training moves without a gradient."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Bool, Float, Int

from kernels.cluster import routing_attention
from kernels.cluster.centroids import Centroids, commitment_loss, init_centroids, normalize_tokens, update_centroids
from kernels.cluster.members import hash_projections
from kernels.cluster.step import RoutingState, init_routing_state, routing_state, routing_step
from kernels.dense import accumulator_dtype
from zoo.layers import Dtype

# tensor2tensor's "uniform_unit_scaling" with a gain of 0.2, which the official configurations give to all weights
# and tables that have no initial value of their own.
unit_scaling_init = initializers.variance_scaling(0.2, "fan_avg", "uniform")

Membership = Literal["sequence", "prefix", "nearest"]


@dataclasses.dataclass(frozen=True)
class Heads:
    """The heads of one attention and what they see; they stand in the order of the first four attributes.

    Attributes:
        routing: heads that attend within clusters of like tokens.
        cluster_strided: heads that attend within clusters of tokens spread over all grades of likeness.
        strided: heads that attend to the same place of every block.
        local: heads that attend to a block and its neighbours.
        dim: channels of a head.
        causal: no token sees a later one.
        share_qk: the routing heads' queries are their keys; their key projection exists all the same, unused.
        block: tokens in a block; look: blocks seen on either side, if causal before only.
        clusters, window: of the routing heads: how many clusters, and tokens in each.
        hashed: clusters are the buckets of random projections, nothing is learned.
        membership: who is in a cluster, see `kernels.cluster.routing_attention`.
        max_relative: Shaw's relative positions are told apart up to this distance.
        local_relative, routing_relative: whether local heads, and those with clusters, have relative positions.
        decay: of the moving averages that the centroids are made of.
        commitment: factor on the loss that draws tokens to their centroids.
        initial_count: how many tokens the initial centroids weigh as; the official code has 0.
        dropout: of attention weights.
    """

    routing: int
    cluster_strided: int
    strided: int
    local: int
    dim: int
    causal: bool = True
    share_qk: bool = True
    block: int = 256
    look: int = 1
    clusters: int = 16
    window: int = 512
    hashed: bool = False
    membership: Membership = "sequence"
    max_relative: int = 0
    local_relative: bool = False
    routing_relative: bool = False
    decay: float = 0.999
    commitment: float = 1e-4
    initial_count: float = 1.0
    dropout: float = 0.0

    @property
    def total(self) -> int:
        """How many heads there are."""
        return self.routing + self.cluster_strided + self.strided + self.local

    @property
    def decode_membership(self) -> Membership:
        """The membership that decodes one token at a time: as the official decoder does, where it is "sequence"."""
        return "prefix" if self.membership == "sequence" else self.membership

    def split(self, x: Array, axis: int) -> tuple[Array, Array, Array, Array]:
        """What belongs to the routing, cluster-strided, strided and local heads; `axis` is that of the heads."""
        ends = (self.routing, self.routing + self.cluster_strided, self.total - self.local)
        return tuple(jnp.split(x, ends, axis=axis))

    def without_routing(self) -> "Heads":
        """As the layers that `skip_first` names have them: routing heads become local ones."""
        return dataclasses.replace(self, routing=0, local=self.local + self.routing)


class RelativeTables(nn.Module):
    """Shaw's vectors for every distance from -reach to reach, one table for keys and one for values.

    Source: Shaw et al. (arXiv:1803.02155), shared by the heads as in the official code.
    """

    reach: int
    dim: int
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def setup(self):
        shape = (2 * self.reach + 1, self.dim)
        self.key = self.param("key", unit_scaling_init, shape, self.param_dtype)
        self.value = self.param("value", unit_scaling_init, shape, self.param_dtype)

    def __call__(self) -> dict[str, Float[Array, "R D"]]:
        """Both tables, named as the attention primitives call them."""
        dtype = self.dtype or self.param_dtype
        return {"relative_key": self.key.astype(dtype), "relative_value": self.value.astype(dtype)}


class RoutingHeads(nn.Module):
    """Heads that attend within clusters, and the state of these clusters in the collection `"centroids"`.

    In training the centroids are updated where that collection is mutable, after the attention, which reads the old
    ones; and the loss that draws tokens to their centroids is sown into `"losses"`.

    Attributes:
        heads: of the layer.
        number: how many of them are these.
        strided: members are spread over the ranking of all tokens, not the best; such heads never share queries and
            keys, and their averages have the decay that the official code leaves at 0.99.
    """

    heads: Heads
    number: int
    strided: bool = False
    implementation: str | tuple[str, ...] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def setup(self):
        heads = self.heads
        self.shared = heads.share_qk and not self.strided
        self.decay = 0.99 if self.strided else heads.decay
        self.hashed = heads.hashed and not self.strided
        acc = accumulator_dtype(self.param_dtype)
        sizes = (self.number, heads.clusters, heads.dim)
        if self.hashed:
            self.projections = self.variable(
                "centroids", "projections", lambda: hash_projections(self.make_rng("params"), *sizes).astype(acc)
            )
        else:
            self.means = self.variable(
                "centroids", "means", lambda: init_centroids(self.make_rng("params"), *sizes).means.astype(acc)
            )
            count = heads.initial_count
            self.count = self.variable("centroids", "count", jnp.full, sizes[:2], count, acc)
            self.total = self.variable("centroids", "total", lambda: self.means.value * (count or 1.0))
        if heads.routing_relative:
            self.relative = RelativeTables(
                heads.max_relative, heads.dim, dtype=self.dtype, param_dtype=self.param_dtype
            )

    def _assignment(self) -> str:
        return "strided" if self.strided else "hash" if self.hashed else "topk"

    def _tables(self) -> dict[str, Array]:
        return self.relative() if self.heads.routing_relative else {}

    def _centroids(self) -> Array:
        return self.projections.value if self.hashed else self.means.value

    def __call__(
        self,
        query: Float[Array, "B N H D"],
        key: Float[Array, "B N H D"],
        value: Float[Array, "B N H D"],
        train: bool,
        mask: Bool[Array, "B N"] | None = None,
        segments: Int[Array, "B N"] | None = None,
        membership: Membership | None = None,
    ) -> Float[Array, "B N H D"]:
        """Self-attention of whole rows; `membership` in place of that of the heads."""
        heads = self.heads
        keys = None if self.shared else key
        rate = heads.dropout if train else 0.0
        out = routing_attention(
            query,
            keys,
            value,
            self._centroids(),
            window=heads.window,
            causal=heads.causal,
            shared=self.shared,
            assignment=self._assignment(),
            membership=membership or heads.membership,
            key_mask=mask,
            segments=segments,
            dropout_rate=rate,
            dropout_key=self.make_rng("dropout") if rate else None,
            implementation=self.implementation,
            **self._tables(),
        )
        if train and not self.hashed:
            self.learn(query, keys, mask, mask)
        return out

    def learn(
        self,
        query: Float[Array, "B N H D"],
        key: Float[Array, "B M H D"] | None,
        query_mask: Bool[Array, "B N"] | None,
        key_mask: Bool[Array, "B M"] | None,
    ) -> None:
        """Moves the centroids towards queries, then towards keys that are not shared, and sows their losses.

        Padding counts for neither; the official code counts it in the loss, and for the centroids from the second
        layer on.
        """
        groups = [(query, query_mask)] if key is None else [(query, query_mask), (key, key_mask)]
        groups = [(normalize_tokens(tokens), mask) for tokens, mask in groups]
        losses = [commitment_loss(tokens, self.means.value, mask=mask) for tokens, mask in groups]
        # Shared queries and keys both commit.
        self.sow("losses", "commitment", self.heads.commitment * sum(losses) * (2 / len(losses)))
        if not self.is_mutable_collection("centroids") or self.is_initializing():
            return
        state = Centroids(self.means.value, self.count.value, self.total.value)
        for tokens, mask in groups:
            state = update_centroids(state, tokens, mask=mask, decay=self.decay)
        self.means.value, self.count.value, self.total.value = state

    def initial_state(self, batch: int) -> RoutingState:
        """The state before the first token of `batch` rows."""
        heads = self.heads
        return init_routing_state(
            *(batch, self.number, heads.clusters, heads.window, heads.dim),
            membership=heads.decode_membership,
            dtype=self.dtype or self.param_dtype,
        )

    def prefill(
        self, query: Float[Array, "B N H D"], key: Float[Array, "B N H D"], value: Float[Array, "B N H D"]
    ) -> tuple[Float[Array, "B N H D"], RoutingState]:
        """The output for the first N tokens and the state after them."""
        membership = self.heads.decode_membership
        out = self(query, key, value, False, membership=membership)
        options = dict(window=self.heads.window, membership=membership, assignment=self._assignment())
        return out, routing_state(query, value, self._centroids(), **options)

    def step(
        self, query: Float[Array, "B H D"], value: Float[Array, "B H D"], state: RoutingState
    ) -> tuple[Float[Array, "B H D"], RoutingState]:
        """The output for the next token, and the state after it."""
        options = dict(assignment=self._assignment(), **self._tables())
        out, state = routing_step(query[:, None], value[:, None], self._centroids(), state, **options)
        return out[:, 0], state
