"""Blocks of the Routing Transformer: self-attention, attention to a source, feed-forward, each followed by a norm."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from zoo.layers import Dtype, Linear, tanh_gelu
from zoo.routing_transformer.attention import Attention
from zoo.routing_transformer.cross import CrossAttention
from zoo.routing_transformer.heads import Heads, unit_scaling_init

Kind = Literal["geglu", "relu"]


class Norm(nn.LayerNorm):
    """Layer norm with the official code's epsilon, statistics in float32 (float64 for float64 parameters)."""

    epsilon: float = 1e-6
    # flax's default, E[x^2] - E[x]^2, cancels where the mean is large.
    use_fast_variance: bool = False

    def __post_init__(self):
        if self.param_dtype == jnp.float64:
            self.force_float32_reductions = False
        super().__post_init__()


class FeedForward(nn.Module):
    """GEGLU of three matrices without bias, or ReLU between two with bias.

    Attributes:
        hidden: inner width.
        kind: `"geglu"`, (gelu(x W1) * x W2) W3 with the tanh form of GELU (Shazeer, arXiv:2002.05202), or `"relu"`.
        dropout: rate before the last matrix.
    """

    hidden: int
    kind: Kind = "geglu"
    dropout: float = 0.0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch C"], train: bool) -> Float[Array, "*batch C"]:
        gated = self.kind == "geglu"
        like = dict(use_bias=not gated, kernel_init=unit_scaling_init, dtype=self.dtype, param_dtype=self.param_dtype)
        hidden = Linear(self.hidden, name="fc1", **like)(x)
        if gated:
            hidden = tanh_gelu(hidden) * Linear(self.hidden, name="gate", **like)(x)
        else:
            hidden = jax.nn.relu(hidden)
        hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        return Linear(x.shape[-1], name="fc2", **like)(hidden)


class Block(nn.Module):
    """A layer of the stack, post-norm: x <- norm(x + dropout(f(x))) for attention, then for the feed-forward.

    With `source_heads` an attention to an encoder's output stands between the two.

    Attributes:
        heads: of the self-attention.
        source_heads: of the attention to the source, None without one; source_block: see `CrossAttention`.
        hidden, feed_forward, hidden_dropout: of the feed-forward.
        dropout: of what every sublayer adds.
    """

    heads: Heads
    source_heads: Heads | None = None
    source_block: int = 256
    hidden: int = 2048
    feed_forward: Kind = "geglu"
    hidden_dropout: float = 0.0
    dropout: float = 0.1
    implementation: str | tuple[str, ...] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def setup(self):
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.attention = Attention(self.heads, implementation=self.implementation, **like)
        self.norm1 = Norm(**like)
        if self.source_heads is not None:
            self.source_attention = CrossAttention(
                self.source_heads, source_block=self.source_block, implementation=self.implementation, **like
            )
            self.source_norm = Norm(**like)
        self.feed = FeedForward(self.hidden, self.feed_forward, self.hidden_dropout, **like)
        self.norm2 = Norm(**like)
        self.drop = nn.Dropout(self.dropout)

    def _add(self, norm: Norm, x: Array, branch: Array, train: bool) -> Array:
        return norm(x + self.drop(branch, deterministic=not train))

    def __call__(
        self,
        x: Float[Array, "B N C"],
        train: bool = False,
        mask: Bool[Array, "B N"] | None = None,
        segments: Int[Array, "B N"] | None = None,
        source: Float[Array, "B M C"] | None = None,
        source_mask: Bool[Array, "B M"] | None = None,
    ) -> Float[Array, "B N C"]:
        x = self._add(self.norm1, x, self.attention(x, train, mask, segments), train)
        if self.source_heads is not None:
            x = self._add(self.source_norm, x, self.source_attention(x, source, source_mask, train), train)
        return self._add(self.norm2, x, self.feed(x, train), train)

    def initial_state(
        self,
        batch: int,
        max_length: int,
        source: Float[Array, "B M C"] | None = None,
        source_mask: Bool[Array, "B M"] | None = None,
    ) -> dict[str, Any]:
        """What `step` needs before the first token."""
        state = {"self": self.attention.initial_state(batch, max_length)}
        if self.source_heads is not None:
            state["source"] = self.source_attention.initial_state(source, source_mask, max_length)
        return state

    def prefill(
        self, x: Float[Array, "B N C"], state: dict[str, Any], max_length: int
    ) -> tuple[Float[Array, "B N C"], dict[str, Any]]:
        """The output for the first N tokens and the state after them; `state` is the initial one."""
        attended, own = self.attention.prefill(x, max_length)
        x = self._add(self.norm1, x, attended, False)
        state = {**state, "self": own}
        if self.source_heads is not None:
            attended, state["source"] = self.source_attention.prefill(x, state["source"])
            x = self._add(self.source_norm, x, attended, False)
        return self._add(self.norm2, x, self.feed(x, False), False), state

    def step(
        self, x: Float[Array, "B C"], state: dict[str, Any], position: Int[Array, ""]
    ) -> tuple[Float[Array, "B C"], dict[str, Any]]:
        """The output for the token at `position`, and the state after it."""
        attended, own = self.attention.step(x, state["self"], position)
        x = self._add(self.norm1, x, attended, False)
        state = {**state, "self": own}
        if self.source_heads is not None:
            attended, state["source"] = self.source_attention.step(x, state["source"], position)
            x = self._add(self.source_norm, x, attended, False)
        return self._add(self.norm2, x, self.feed(x, False), False), state
