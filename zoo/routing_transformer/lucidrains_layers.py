"""Sublayers of the Routing Transformer as github.com/lucidrains/routing-transformer has them."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from kernels.cluster import routing_attention
from kernels.cluster.centroids import (
    Centroids,
    commitment_loss,
    init_centroids,
    kmeans_init,
    normalize_tokens,
    update_centroids,
)
from kernels.cluster.step import init_routing_state, routing_state, routing_step
from kernels.dense import accumulator_dtype
from kernels.local import local_attention
from kernels.rotary import rotary
from zoo.layers import Dtype, LayerNorm, Linear, exact_gelu, torch_bias_init
from zoo.routing_transformer.cache import local_step, ring, write
from zoo.routing_transformer.heads import Membership

# torch's default for a linear layer: weights, too, within 1 / sqrt(fan_in).
torch_linear_init = initializers.variance_scaling(1 / 3, "fan_in", "uniform")
Norm = Literal["layer", "scale", "rezero"]


class Residual(nn.Module):
    """What stands around a sublayer: a norm before it, or a learned factor after it.

    Attributes:
        kind: `"layer"`, layer norm; `"scale"`, the vector's direction times one learned length (arXiv:1910.05895);
            `"rezero"`, a factor that starts at 0 (arXiv:2003.04887).
    """

    kind: Norm = "layer"
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def setup(self):
        if self.kind == "layer":
            self.norm = LayerNorm(dtype=self.dtype, param_dtype=self.param_dtype)
        else:
            init = initializers.ones if self.kind == "scale" else initializers.zeros
            self.factor = self.param("factor", init, (1,), self.param_dtype)

    def before(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        """The sublayer's input."""
        if self.kind == "rezero":
            return x
        if self.kind == "layer":
            return self.norm(x)
        wide = x.astype(accumulator_dtype(x.dtype))
        length = jnp.sqrt(jnp.maximum(jnp.square(wide).sum(-1, keepdims=True), 1e-5**2))
        return (wide / length * self.factor).astype(x.dtype)

    def after(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        """What the sublayer adds."""
        return x * self.factor.astype(x.dtype) if self.kind == "rezero" else x


class FeedForward(nn.Module):
    """Four times as wide inside, GELU, with biases; if `gated`, gelu(first half) * second half."""

    gated: bool = False
    dropout: float = 0.0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch C"], train: bool) -> Float[Array, "*batch C"]:
        like = dict(kernel_init=torch_linear_init, dtype=self.dtype, param_dtype=self.param_dtype)
        width = x.shape[-1]
        inner = 4 * width * (2 if self.gated else 1)
        hidden = Linear(inner, name="fc1", bias_init=torch_bias_init(width), **like)(x)
        if self.gated:
            hidden, factor = jnp.split(hidden, 2, axis=-1)
            hidden = exact_gelu(hidden) * factor
        else:
            hidden = exact_gelu(hidden)
        hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        return Linear(width, name="fc2", bias_init=torch_bias_init(4 * width), **like)(hidden)


class RotaryRoutingHeads(nn.Module):
    """Attention within clusters; queries, keys and values have been turned by their positions.

    The means of the clusters stand in the collection `"centroids"`. As long as its flag `initted` is False, a
    training step in which the collection is mutable first draws them from its own tokens by k-means, where the
    published module does so in whatever forward pass comes first.

    Attributes:
        number, dim: heads, and channels of one.
        clusters, window: of every head, and tokens in a cluster.
        memories: learned keys and values that every cluster holds.
        causal, share_qk, membership, decay, commitment, dropout: as in `zoo.routing_transformer.heads.Heads`.
    """

    number: int
    dim: int
    clusters: int
    window: int
    memories: int
    causal: bool
    share_qk: bool
    membership: Membership
    decay: float
    commitment: float
    dropout: float
    implementation: str | tuple[str, ...] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def setup(self):
        acc = accumulator_dtype(self.param_dtype)
        sizes = (self.number, self.clusters, self.dim)
        self.means = self.variable(
            *("centroids", "means"),
            lambda: init_centroids(self.make_rng("params"), *sizes, style="lucidrains").means.astype(acc),
        )
        self.initted = self.variable("centroids", "initted", jnp.zeros, (), bool)
        if self.memories:
            shape = (self.number, self.clusters, self.memories, self.dim)
            self.memory_key = self.param("memory_key", initializers.normal(1.0), shape, self.param_dtype)
            self.memory_value = self.param("memory_value", initializers.normal(1.0), shape, self.param_dtype)

    @property
    def decode_membership(self) -> Membership:
        """As in `zoo.routing_transformer.heads.Heads`."""
        return "prefix" if self.membership == "sequence" else self.membership

    def __call__(
        self,
        query: Float[Array, "B N H D"],
        key: Float[Array, "B N H D"] | None,
        value: Float[Array, "B N H D"],
        train: bool,
        segments: Int[Array, "B N"] | None = None,
        membership: Membership | None = None,
    ) -> Float[Array, "B N H D"]:
        tokens = query if key is None else jnp.concatenate([query, key], axis=1)
        learning = train and self.is_mutable_collection("centroids") and not self.is_initializing()
        if learning:
            self._draw(tokens)
        rate = self.dropout if train else 0.0
        memories = {}
        if self.memories:
            dtype = query.dtype
            memories = dict(memory_key=self.memory_key.astype(dtype), memory_value=self.memory_value.astype(dtype))
        out = routing_attention(
            query,
            key,
            value,
            self.means.value,
            window=self.window,
            style="lucidrains",
            causal=self.causal,
            shared=self.share_qk,
            membership=membership or self.membership,
            segments=segments,
            dropout_rate=rate,
            dropout_key=self.make_rng("dropout") if rate else None,
            implementation=self.implementation,
            **memories,
        )
        if train:
            tokens = normalize_tokens(tokens, "lucidrains")
            self.sow("losses", "commitment", self.commitment * commitment_loss(tokens, self.means.value))
        if learning:
            means = self.means.value
            # The style moves the means themselves and reads nothing else.
            state = Centroids(means, jnp.zeros(means.shape[:2], means.dtype), jnp.zeros_like(means))
            self.means.value = update_centroids(state, tokens, decay=self.decay, style="lucidrains").means
        return out

    def _draw(self, tokens: Float[Array, "B N H D"]) -> None:
        tokens, means, key = jax.lax.stop_gradient(tokens), self.means.value, self.make_rng("dropout")
        self.means.value = jax.lax.cond(
            self.initted.value,
            lambda: means,
            lambda: kmeans_init(key, tokens, self.clusters).astype(means.dtype),
        )
        self.initted.value = jnp.ones((), bool)

    def initial_state(self, batch: int) -> Any:
        """The state before the first token."""
        sizes = (batch, self.number, self.clusters, self.window, self.dim)
        return init_routing_state(*sizes, membership=self.decode_membership, dtype=self.dtype or self.param_dtype)

    def prefill(self, query: Float[Array, "B N H D"], value: Float[Array, "B N H D"]) -> tuple[Array, Any]:
        """The output for the first N tokens, and the state after them."""
        out = self(query, None, value, False, membership=self.decode_membership)
        how = dict(window=self.window, membership=self.decode_membership, style="lucidrains")
        return out, routing_state(query, value, self.means.value, **how)

    def step(self, query: Float[Array, "B 1 H D"], value: Float[Array, "B 1 H D"], state: Any) -> tuple[Array, Any]:
        """The output for the next token, and the state after it."""
        return routing_step(query, value, self.means.value, state, style="lucidrains")


class Attention(nn.Module):
    """Local heads, then routing heads.

    Attributes:
        width: of the result.
        local_heads, routing: how many local ones, and the routing heads, None without them.
        dim: channels of a head.
        block, look: tokens in a block of the local heads, and blocks seen on either side, if causal before only.
        causal: no token sees a later one.
        rotary: whether local heads have positions; routing heads always do.
        dropout, output_dropout: rates on the local heads' weights, and on the result.
    """

    width: int
    local_heads: int
    routing: RotaryRoutingHeads | None
    dim: int
    block: int
    look: int
    causal: bool
    rotary: bool
    dropout: float
    output_dropout: float
    implementation: str | tuple[str, ...] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def setup(self):
        like = dict(kernel_init=torch_linear_init, dtype=self.dtype, param_dtype=self.param_dtype)
        if self.local_heads:
            self.local_qkv = Linear(3 * self.local_heads * self.dim, bias_init=torch_bias_init(self.width), **like)
        if self.routing is not None:
            routed = self.routing.number * self.dim
            self.q, self.v = (Linear(routed, use_bias=False, **like) for _ in range(2))
            if not self.routing.share_qk:
                self.k = Linear(routed, use_bias=False, **like)
        self.out = Linear(self.width, use_bias=False, **like)
        self.drop = nn.Dropout(self.output_dropout)

    def __call__(
        self, x: Float[Array, "B N C"], train: bool, segments: Int[Array, "B N"] | None = None
    ) -> Float[Array, "B N C"]:
        outs, positions = [], jnp.arange(x.shape[1])
        if self.local_heads:
            outs.append(self._attend_local(*self._local(x, positions), train, segments))
        if self.routing is not None:
            outs.append(self.routing(*self._routed(x, positions), train, segments))
        return self._merge(outs, train)

    def initial_state(self, batch: int, max_length: int) -> dict[str, Any]:
        """What `step` needs before the first token."""
        self._check_decoding()
        state = {}
        if self.local_heads:
            tokens = jnp.zeros((batch, self._size(max_length), self.local_heads, self.dim))
            tokens = tokens.astype(self.dtype or self.param_dtype)
            state["local"] = {"key": tokens, "value": tokens}
        if self.routing is not None:
            state["routing"] = self.routing.initial_state(batch)
        return state

    def prefill(self, x: Float[Array, "B N C"], max_length: int) -> tuple[Float[Array, "B N C"], dict[str, Any]]:
        """The output for the first N tokens, and the state after them."""
        self._check_decoding()
        outs, state, positions = [], {}, jnp.arange(x.shape[1])
        if self.local_heads:
            query, key, value = self._local(x, positions)
            outs.append(self._attend_local(query, key, value, False))
            size = self._size(max_length)
            state["local"] = {"key": ring(key, size), "value": ring(value, size)}
        if self.routing is not None:
            query, _, value = self._routed(x, positions)
            out, state["routing"] = self.routing.prefill(query, value)
            outs.append(out)
        return self._merge(outs), state

    def step(
        self, x: Float[Array, "B C"], state: dict[str, Any], position: Int[Array, ""]
    ) -> tuple[Float[Array, "B C"], dict[str, Any]]:
        """The output for the token at `position`, and the state after it."""
        outs, state, x = [], dict(state), x[:, None]
        if self.local_heads:
            query, key, value = (part[:, 0] for part in self._local(x, position[None]))
            state["local"] = write(state["local"], position, key=key, value=value)
            scaled = query * self.dim**-0.5
            outs.append(local_step(scaled, state["local"], position, block=self.block, look=self.look)[:, None])
        if self.routing is not None:
            query, _, value = self._routed(x, position[None])
            out, state["routing"] = self.routing.step(query, value, state["routing"])
            outs.append(out)
        return self._merge(outs)[:, 0], state

    def _local(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values of the local heads."""
        query, key, value = (
            part.reshape(*x.shape[:-1], self.local_heads, self.dim) for part in jnp.split(self.local_qkv(x), 3, axis=-1)
        )
        if not self.rotary:
            return query, key, value
        # Queries are turned as if they were the last of the tokens that they see, also where later ones are seen.
        ahead = 0 if self.causal else self.look * self.block
        return rotary(query, positions + ahead), rotary(key, positions), value

    def _attend_local(self, query, key, value, train: bool, segments: Array | None = None) -> Array:
        rate = self.dropout if train else 0.0
        return local_attention(
            query,
            key,
            value,
            block=self.block,
            look_back=self.look,
            look_ahead=0 if self.causal else self.look,
            causal=self.causal,
            segments=segments,
            dropout_rate=rate,
            dropout_key=self.make_rng("dropout") if rate else None,
            implementation=self.implementation,
        )

    def _routed(self, x: Array, positions: Array) -> tuple[Array, Array | None, Array]:
        """Queries, keys if they are not the queries, and values of the routing heads."""

        def turned(projection):
            part = projection(x).reshape(*x.shape[:-1], self.routing.number, self.dim)
            return rotary(part, positions, interleaved=True)

        return turned(self.q), None if self.routing.share_qk else turned(self.k), turned(self.v)

    def _merge(self, outs: list[Array], train: bool = False) -> Array:
        out = jnp.concatenate(outs, axis=-2)
        return self.drop(self.out(out.reshape(*out.shape[:-2], -1)), deterministic=not train)

    def _size(self, max_length: int) -> int:
        return min((self.look + 1) * self.block, max_length)

    def _check_decoding(self) -> None:
        if not self.causal:
            raise ValueError("a model with causal=False reads whole rows only: it has no state and no step")
        if self.routing is not None and (self.routing.memories or not self.routing.share_qk):
            raise NotImplementedError(
                "routing heads with memories or with share_qk=False have no strictly causal membership, and so no "
                "cached step; share_qk=True and memories=0 have one"
            )
