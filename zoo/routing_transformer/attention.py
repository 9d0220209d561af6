"""Self-attention of the Routing Transformer: routing heads, strided ones and local ones side by side."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.local import local_attention
from zoo.layers import Dtype, Linear
from zoo.routing_transformer.cache import attend_cached, local_step, ring, write
from zoo.routing_transformer.heads import Heads, RelativeTables, RoutingHeads, unit_scaling_init


class LocalHeads(nn.Module):
    """Heads that attend to their block and its neighbours. Queries are scaled already."""

    heads: Heads
    implementation: str | tuple[str, ...] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def setup(self):
        heads = self.heads
        if heads.local_relative:
            self.relative = RelativeTables(
                heads.max_relative, heads.dim, dtype=self.dtype, param_dtype=self.param_dtype
            )

    def __call__(
        self,
        query: Float[Array, "B N H D"],
        key: Float[Array, "B N H D"],
        value: Float[Array, "B N H D"],
        train: bool,
        mask: Bool[Array, "B N"] | None = None,
        segments: Int[Array, "B N"] | None = None,
    ) -> Float[Array, "B N H D"]:
        heads = self.heads
        rate = heads.dropout if train else 0.0
        return local_attention(
            query,
            key,
            value,
            block=heads.block,
            look_back=heads.look,
            look_ahead=0 if heads.causal else heads.look,
            causal=heads.causal,
            key_mask=mask,
            segments=segments,
            scale=1.0,
            dropout_rate=rate,
            dropout_key=self.make_rng("dropout") if rate else None,
            implementation=self.implementation,
            **self._tables(),
        )

    def _tables(self) -> dict[str, Float[Array, "R D"]]:
        heads = self.heads
        if not heads.local_relative:
            return {}
        tables = self.relative()
        if heads.causal or not heads.look:
            return tables
        # The official code takes a block's queries to stand at the end of the keys that they see. That is so if
        # causal; else it moves every distance by as many tokens as the block looks ahead.
        span = (2 * heads.look + 1) * heads.block
        distance = jnp.arange(-span, span + 1) - heads.look * heads.block
        rows = jnp.clip(distance, -heads.max_relative, heads.max_relative) + heads.max_relative
        return {name: table[rows] for name, table in tables.items()}

    def size(self, max_length: int) -> int:
        """How many tokens a state holds."""
        return min((self.heads.look + 1) * self.heads.block, max_length)

    def step(
        self, query: Float[Array, "B H D"], state: dict[str, Array], position: Int[Array, ""]
    ) -> Float[Array, "B H D"]:
        """The output for the token at `position`, which the ring `state` holds already."""
        return local_step(query, state, position, block=self.heads.block, look=self.heads.look, **self._tables())


def strided_attention(
    query: Float[Array, "B N H D"],
    key: Float[Array, "B N H D"],
    value: Float[Array, "B N H D"],
    mask: Bool[Array, "B N"] | None,
    segments: Int[Array, "B N"] | None,
    *,
    block: int,
    **options: Any,
) -> Float[Array, "B N H D"]:
    """Every token attends to those at its place in all blocks, if causal in its own and earlier ones.

    Args:
        query, key, value: `(B, N, H, D)`.
        mask, segments: as `key_mask` and `segments` of `kernels.local.local_attention`.
        block: tokens in a block.
        **options: of `kernels.local.local_attention`, such as `causal`.
    """
    n = query.shape[1]
    blocks = -(-n // block)

    def by_place(x):
        """`(B, N, ...)` to `(B * block, blocks, ...)`."""
        x = jnp.pad(x, [(0, 0), (0, blocks * block - n)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(x.shape[0], blocks, block, *x.shape[2:]).swapaxes(1, 2)
        return x.reshape(-1, blocks, *x.shape[3:])

    mask = jnp.ones(query.shape[:2], bool) if mask is None else mask
    segments = None if segments is None else by_place(segments)
    out = local_attention(
        *map(by_place, (query, key, value)),
        **dict(block=blocks, look_back=0, key_mask=by_place(mask), segments=segments, **options),
    )
    out = out.reshape(-1, block, blocks, *out.shape[2:]).swapaxes(1, 2)
    return out.reshape(out.shape[0], blocks * block, *out.shape[3:])[:, :n]


class MultiHead(nn.Module):
    """The matrices around heads that differ in what they see.

    After the heads comes one more matrix, `head_map`, from a head's channels to as many, the same for all heads. The
    official code seems to mean it to mix heads, but drops what would; its checkpoints are trained with it.

    Attributes:
        heads: which there are.
    """

    heads: Heads
    implementation: str | tuple[str, ...] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def setup(self):
        dense = dict(use_bias=False, kernel_init=unit_scaling_init, dtype=self.dtype, param_dtype=self.param_dtype)
        width = self.heads.total * self.heads.dim
        self.q, self.k, self.v = (Linear(width, **dense) for _ in range(3))
        self.head_map = Linear(self.heads.dim, **dense)
        self.out = Linear(width, **dense)

    def like(self) -> dict[str, Any]:
        """The fields that the heads have as well."""
        return dict(implementation=self.implementation, dtype=self.dtype, param_dtype=self.param_dtype)

    def queries(self, x: Float[Array, "*batch C"]) -> tuple[Array, ...]:
        """Queries of each kind of heads, `(*batch, heads, dim)`, scaled."""
        return self._split(self.q(x) * self.heads.dim**-0.5)

    def keys_values(self, x: Float[Array, "*batch C"]) -> list[tuple[Array, Array]]:
        """Keys and values of each kind of heads."""
        return list(zip(self._split(self.k(x)), self._split(self.v(x))))

    def merge(self, outs: list[Array]) -> Array:
        """From the outputs of each kind of heads to `(*batch, C)`."""
        out = self.head_map(jnp.concatenate(outs, axis=-2))
        return self.out(out.reshape(*out.shape[:-2], -1))

    def _split(self, x: Array) -> tuple[Array, ...]:
        return self.heads.split(x.reshape(*x.shape[:-1], self.heads.total, self.heads.dim), -2)


class Attention(MultiHead):
    """Multi-head self-attention, of whole rows or of one token at a time."""

    def setup(self):
        super().setup()
        heads, like = self.heads, self.like()
        if heads.routing:
            self.routing = RoutingHeads(heads, heads.routing, **like)
        if heads.cluster_strided:
            self.cluster_strided = RoutingHeads(heads, heads.cluster_strided, strided=True, **like)
        if heads.local:
            self.local = LocalHeads(heads, **like)

    def _project(self, x: Float[Array, "*batch C"]) -> list[tuple[Array, Array, Array]]:
        return [(query, *pair) for query, pair in zip(self.queries(x), self.keys_values(x))]

    def __call__(
        self,
        x: Float[Array, "B N C"],
        train: bool,
        mask: Bool[Array, "B N"] | None = None,
        segments: Int[Array, "B N"] | None = None,
    ) -> Float[Array, "B N C"]:
        heads, outs = self.heads, []
        routing, cluster_strided, strided, local = self._project(x)
        if heads.routing:
            outs.append(self.routing(*routing, train, mask, segments))
        if heads.cluster_strided:
            outs.append(self.cluster_strided(*cluster_strided, train, mask, segments, membership="sequence"))
        if heads.strided:
            rate = heads.dropout if train else 0.0
            dropout_key = self.make_rng("dropout") if rate else None
            how = dict(dropout_rate=rate, dropout_key=dropout_key, implementation=self.implementation)
            options = dict(block=heads.block, causal=heads.causal, scale=1.0, **how)
            outs.append(strided_attention(*strided, mask, segments, **options))
        if heads.local:
            outs.append(self.local(*local, train, mask, segments))
        return self.merge(outs)

    def initial_state(self, batch: int, max_length: int) -> dict[str, Any]:
        """What `step` needs before the first token."""
        self._check_decoding()
        heads = self.heads
        state = {"routing": self.routing.initial_state(batch)} if heads.routing else {}
        dtype = self.dtype or self.param_dtype
        for name, number, tokens in self._caches(max_length):
            empty = jnp.zeros((batch, tokens, number, heads.dim), dtype)
            state[name] = {"key": empty, "value": empty}
        return state

    def prefill(self, x: Float[Array, "B N C"], max_length: int) -> tuple[Float[Array, "B N C"], dict[str, Any]]:
        """The output for the first N tokens and the state after them."""
        self._check_decoding()
        heads, outs, state = self.heads, [], {}
        routing, _, strided, local = self._project(x)
        if heads.routing:
            out, state["routing"] = self.routing.prefill(*routing)
            outs.append(out)
        if heads.strided:
            options = dict(block=heads.block, causal=True, scale=1.0, implementation=self.implementation)
            outs.append(strided_attention(*strided, None, None, **options))
        if heads.local:
            outs.append(self.local(*local, False))
        for name, _, tokens in self._caches(max_length):
            _, key, value = strided if name == "strided" else local
            state[name] = {"key": ring(key, tokens), "value": ring(value, tokens)}
        return self.merge(outs), state

    def step(
        self, x: Float[Array, "B C"], state: dict[str, Any], position: Int[Array, ""]
    ) -> tuple[Float[Array, "B C"], dict[str, Any]]:
        """The output for the token at `position`, and the state after it."""
        heads, outs, state = self.heads, [], dict(state)
        routing, _, strided, local = self._project(x)
        if heads.routing:
            query, _, value = routing
            out, state["routing"] = self.routing.step(query, value, state["routing"])
            outs.append(out)
        for name, (query, key, value) in (("strided", strided), ("local", local)):
            if name not in state:
                continue
            state[name] = write(state[name], position, key=key, value=value)
            attend = self._strided_step if name == "strided" else self.local.step
            outs.append(attend(query, state[name], position))
        return self.merge(outs), state

    def _strided_step(self, query: Array, state: dict[str, Array], position: Int[Array, ""]) -> Array:
        block = self.heads.block

        def at_place(x):
            x = x.reshape(x.shape[0], -1, block, *x.shape[2:])
            return jax.lax.dynamic_index_in_dim(x, position % block, axis=2, keepdims=False)

        key, value = at_place(state["key"]), at_place(state["value"])
        return attend_cached(query, key, value, jnp.arange(key.shape[1]) <= position // block)

    def _caches(self, max_length: int) -> list[tuple[str, int, int]]:
        """Name, heads and tokens of the states that hold keys and values as they are."""
        heads, caches = self.heads, []
        if heads.strided:
            caches.append(("strided", heads.strided, -(-max_length // heads.block) * heads.block))
        if heads.local:
            caches.append(("local", heads.local, self.local.size(max_length)))
        return caches

    def _check_decoding(self) -> None:
        heads = self.heads
        if heads.cluster_strided:
            raise NotImplementedError(
                "cluster_strided_heads rank all tokens of a row anew for every one that comes: there is no cached "
                "step; a model with cluster_strided_heads=0 has one"
            )
        if heads.routing and not heads.share_qk:
            raise NotImplementedError(
                "routing heads with share_qk=False have no strictly causal membership, and so no cached step; "
                "share_qk=True has one"
            )
