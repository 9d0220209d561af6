"""Token mixers: the part of a language model's block that passes information from token to token.

All take `(x, rows, state)` and return `(y, state)`; see `Mixer`. This file has what they share and softmax attention,
over all earlier tokens or those of a window.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from kernels.dense import accumulator_dtype, attention
from kernels.local import local_attention
from kernels.rotary import rotary
from kernels.short_conv import short_conv
from zoo.layers import Dtype, Initializer, Linear
from zoo.sequence.sequence_model import causal_mask

fan_in_init = initializers.variance_scaling(1.0, "fan_in", "normal")


def residual_init(depth: int) -> Initializer:
    """For the last projection of a branch: the smaller the more branches are added up (Radford et al., 2019)."""
    return initializers.variance_scaling(0.5 / depth, "fan_in", "normal")


@flax.struct.dataclass
class Rows:
    """What a mixer knows of its tokens beside their features.

    Attributes:
        positions: `(N,)` or `(B, N)`: the place of every token in its document; `(1,)` with a state.
        segments: `(B, N)`: its document, None where every row is one.
        max_length: tokens that a state has room for; None: no state is wanted.
        bounds: `(depth, C)`, what HGRN-2's forget gates stay above; None for models without it.
    """

    positions: Int[Array, "N"] | Int[Array, "B N"]
    segments: Int[Array, "B N"] | None = None
    max_length: int | None = flax.struct.field(pytree_node=False, default=None)
    bounds: Float[Array, "depth C"] | None = None


class Mixer(nn.Module):
    """A token mixer.

    `mixer(x, rows)` mixes whole rows from their beginning; where `rows.max_length` is given it also returns the state
    after their last token, else None. `mixer(x, rows, state)` with x `(B, 1, C)` takes one more token of every row.

    Attributes:
        width: channels of a token.
        num_heads: heads that share the width.
        layer, depth: which block of how many the mixer belongs to, counted from 0.
        conv_width: taps of the causal convolution behind the projections of query, key and value; 0: none, None: as
            the mixer's paper has it.
        implementation, dtype, param_dtype: as in `zoo.sequence.sequence_model.SequenceModel`.
    """

    width: int
    num_heads: int
    layer: int = 0
    depth: int = 1
    conv_width: int | None = None
    implementation: str | tuple[str, ...] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    # The convolution of the mixer's paper.
    own_conv_width = 0

    @property
    def head_dim(self) -> int:
        """Channels of a head of queries and keys."""
        return self.width // self.num_heads

    @property
    def taps(self) -> int:
        """Taps of the convolution, 0 without one."""
        return self.own_conv_width if self.conv_width is None else self.conv_width

    @property
    def state_dtype(self) -> Any:
        """The dtype of states: float32, or float64 where the model computes in it."""
        return accumulator_dtype(self.dtype or self.param_dtype)

    @property
    def segment_multiple(self) -> int:
        """Documents must begin at multiples of this many tokens of a row."""
        return 1

    def check(self) -> None:
        """Raises `ValueError` for fields that do not fit one another."""
        if self.taps < 0:
            raise ValueError(f"conv_width must be at least 0, or None for that of the paper; got {self.conv_width}")

    def linear(self, features: int, name: str, use_bias: bool = False, **options: Any) -> Linear:
        """A projection in the mixer's dtypes; that called `"out"` begins as a residual branch does."""
        init = residual_init(self.depth) if name == "out" else fan_in_init
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        return Linear(features, use_bias, name=name, **{"kernel_init": init, **like, **options})

    def conv_state(self, batch: int, channels: int) -> Float[Array, "B taps C"] | None:
        """What the convolution of `channels` channels remembers before the first token."""
        if not self.taps:
            return None
        return jnp.zeros((batch, self.taps - 1, channels), self.dtype or self.param_dtype)

    def convolve(
        self, x: Float[Array, "B N C"], name: str, rows: Rows, state: Any = None
    ) -> tuple[Float[Array, "B N C"], Any]:
        """The causal convolution and SiLU behind a projection, and what it remembers; nothing without taps."""
        if not self.taps:
            return x, None
        bound = self.taps**-0.5

        def init(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        kernel = self.param(f"{name}_conv", init, (self.taps, x.shape[-1]), self.param_dtype).astype(x.dtype)
        y, state = short_conv(x, kernel, initial_state=state, segments=rows.segments, return_state=True)
        return jax.nn.silu(y), state

    def initial_state(self, batch: int, max_length: int) -> Any:
        """The state before the first token."""
        raise NotImplementedError


def split_heads(x: Float[Array, "*batch C"], heads: int) -> Float[Array, "*batch H D"]:
    """`(..., C)` to `(..., heads, C / heads)`."""
    return x.reshape(*x.shape[:-1], heads, -1)


def unit_norm(x: Float[Array, "*batch D"], epsilon: float = 1e-6) -> Float[Array, "*batch D"]:
    """`x / sqrt(|x|^2 + epsilon)` over the last axis, in float32 (float64 for float64)."""
    wide = x.astype(accumulator_dtype(x.dtype))
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, -1, keepdims=True) + epsilon)).astype(x.dtype)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + epsilon)` over the last axis, times a gain unless `use_scale` is False; float32 inside."""

    epsilon: float = 1e-6
    use_scale: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        wide = x.astype(accumulator_dtype(x.dtype))
        y = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.epsilon)
        if self.use_scale:
            y = y * self.param("scale", initializers.ones, (x.shape[-1],), self.param_dtype)
        return y.astype(self.dtype or x.dtype)


class SoftmaxAttention(Mixer):
    """Causal softmax attention with rotary positions (Transformer++), over all earlier tokens of the document.

    Attributes:
        rope_base: of the rotary positions.
    """

    rope_base: float = 10000.0

    @property
    def reach(self) -> int | None:
        """How many tokens a query sees, itself among them; None: all."""
        return None

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], rows: Rows, state: Any = None) -> tuple[Float[Array, "B N C"], Any]:
        past = state or {}
        projected, remembered = [], {}
        for name in ("q", "k", "v"):
            y = self.linear(self.width, name)(x)
            y, remembered[f"{name}_conv"] = self.convolve(y, name, rows, past.get(f"{name}_conv"))
            projected.append(split_heads(y, self.num_heads))
        query, key, value = projected
        query, key = (rotary(y, rows.positions, base=self.rope_base) for y in (query, key))
        if state is None:
            y = self._rows(query, key, value, rows)
            cache = None if rows.max_length is None else self._cached(key, value, rows)
        else:
            cache = _written(state, key, value, rows.positions[0])
            y = self._one(query, cache, rows)
        state = None if cache is None else {**cache, **remembered}
        return self.linear(self.width, "out")(y.reshape(x.shape)), state

    def _rows(self, query, key, value, rows: Rows):
        if self.reach is not None and self.reach < query.shape[1]:
            return local_attention(
                *(query, key, value),
                block=self.reach,
                window=self.reach,
                segments=rows.segments,
                implementation=self.implementation,
            )
        if rows.segments is None:
            return attention(query, key, value, causal=True, implementation=self.implementation)
        mask = causal_mask(rows.segments, query.shape[1])
        return attention(query, key, value, mask=mask, implementation=self.implementation)

    def _slots(self, max_length: int) -> int:
        return max_length if self.reach is None else min(self.reach, max_length)

    def _cached(self, key, value, rows: Rows):
        """The cache after whole rows: token t lies in slot t modulo the number of slots."""
        slots, length = self._slots(rows.max_length), key.shape[1]
        kept = min(slots, length)
        places = jnp.arange(length - kept, length) % slots
        empty = self.initial_state(key.shape[0], rows.max_length)
        return {
            name: empty[name].at[:, places].set(new[:, length - kept :].astype(empty[name].dtype))
            for name, new in (("key", key), ("value", value))
        }

    def _one(self, query, cache, rows: Rows):
        mask = (jnp.arange(cache["key"].shape[1]) <= rows.positions)[None, None, None]
        key, value = (cache[name].astype(query.dtype) for name in ("key", "value"))
        return attention(query, key, value, mask=mask, implementation="xla")

    def initial_state(self, batch: int, max_length: int) -> dict[str, Any]:
        shape = (batch, self._slots(max_length), self.num_heads, self.head_dim)
        dtype = self.dtype or self.param_dtype
        convs = {f"{name}_conv": self.conv_state(batch, self.width) for name in ("q", "k", "v")}
        return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype), **convs}


class WindowAttention(SoftmaxAttention):
    """Softmax attention over the last tokens only (Beltagy et al., arXiv:2004.05150, section 3.1).

    Attributes:
        window: how many tokens a query sees, itself among them.
    """

    window: int = 2048

    @property
    def reach(self) -> int:
        return self.window

    def check(self) -> None:
        super().check()
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")


def _written(state, key, value, position):
    """The cache with one more token."""
    slot = position % state["key"].shape[1]
    return {
        name: jax.lax.dynamic_update_slice_in_dim(state[name], new.astype(state[name].dtype), slot, axis=1)
        for name, new in (("key", key), ("value", value))
    }
