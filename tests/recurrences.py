"""Causal recurrences token by token in float64, and operands for them: what the chunked ones are compared with."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kernels.delta import delta_rule
from kernels.gated_linear import gated_linear_attention
from kernels.linear import LinearState, linear_attention

Arrays = dict[str, np.ndarray]


def gated_step(xp, state, token, scale):
    """One token of gated linear attention; a delta rule if there is a beta. `xp` is numpy or jax.numpy."""
    query, key, value = (token[name] for name in ("query", "key", "value"))
    if "log_decay" in token:
        kept = xp.exp(token["log_decay"])
        # (H,), (B, H) and (B, H, D) alike.
        state = state * (kept[..., None] if kept.ndim == 3 else kept[..., None, None])
    if "beta" in token:
        value = token["beta"][..., None] * (value - xp.einsum("bhd,bhde->bhe", key, state))
    state = state + key[..., None] * value[..., None, :]
    return state, scale * xp.einsum("bhd,bhde->bhe", query, state)


def normalized_step(xp, state, token, scale):
    """One token of causal linear attention with elu + 1 and an epsilon of `scale`."""
    products, keys, tokens = state
    query, key = (xp.where(x > 0, x + 1, xp.exp(xp.minimum(x, 0))) for x in (token["query"], token["key"]))
    products = products + key[..., None] * token["value"][..., None, :]
    keys, tokens = keys + key, tokens + 1
    count = tokens[:, None]
    normalizer = xp.einsum("bhd,bhd->bh", query, keys) / count + scale
    out = xp.einsum("bhd,bhde->bhe", query, products) / (count * normalizer)[..., None]
    return (products, keys, tokens), out


@dataclasses.dataclass(frozen=True)
class Op:
    """A recurrence: the function under test, one token of it by definition, and which gates it has."""

    run: Callable
    step: Callable
    decay: str | None = None
    beta: bool = False
    # The default scale, or the epsilon of what is normalised.
    scale: Callable[[int], float] = lambda channels: channels**-0.5

    def __call__(self, arrays, **options):
        return self.run(**arrays, **options)

    def operands(self, rng, tokens, channels=4, values=4, batch=2, heads=3, dtype=np.float64) -> Arrays:
        shape = (batch, tokens, heads)
        arrays = {name: rng.standard_normal((*shape, channels)) for name in ("query", "key")}
        arrays["value"] = rng.standard_normal((*shape, values))
        if self.beta:
            arrays["key"] /= np.linalg.norm(arrays["key"], axis=-1, keepdims=True)
            arrays["beta"] = rng.uniform(0, 2, shape)
        if self.decay:
            sizes = {"head": (heads,), "scalar": shape, "channel": (*shape, channels)}[self.decay]
            arrays["log_decay"] = -np.exp(rng.normal(-1, 2, sizes))
        return {name: array.astype(dtype) for name, array in arrays.items()}

    def state(self, rng, channels=4, values=4, batch=2, heads=3, dtype=np.float64):
        products = rng.standard_normal((batch, heads, channels, values)).astype(dtype)
        if self.run is not linear_attention_causal:
            return products
        keys = rng.uniform(1, 5, (batch, heads, channels)).astype(dtype)
        return LinearState(products, keys, np.arange(3.0, 3.0 + batch).astype(dtype))

    def loop(self, arrays: Arrays, state=None, segments=None):
        """Output and last state in float64 numpy, token by token."""
        arrays = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
        batch, tokens, heads, channels = arrays["key"].shape
        if state is None:
            state = self.zeros(batch, heads, channels, arrays["value"].shape[-1])
        state = jax.tree.map(lambda x: np.asarray(x, np.float64), state)
        outs, steps, kept = [], per_token(np, arrays, tokens), continues(np, segments, batch, tokens)
        for t in range(tokens):
            state = restarted(state, kept[t])
            state, out = self.step(np, state, {name: x[t] for name, x in steps.items()}, self.scale(channels))
            outs.append(out)
        return np.stack(outs, 1), state

    def plain(self, arrays, state, segments=None):
        """The same as one differentiable scan in jax, every state of which is kept."""
        batch, tokens, _, channels = arrays["key"].shape

        def step(state, x):
            kept, token = x
            return self.step(jnp, restarted(state, kept), token, self.scale(channels))

        xs = continues(jnp, segments, batch, tokens), per_token(jnp, arrays, tokens)
        state, out = jax.lax.scan(step, tuple(state) if isinstance(state, LinearState) else state, xs)
        return out.swapaxes(0, 1), state

    def zeros(self, batch, heads, channels, values):
        products = np.zeros((batch, heads, channels, values))
        if self.run is not linear_attention_causal:
            return products
        return LinearState(products, np.zeros((batch, heads, channels)), np.zeros(batch))


def per_token(xp, arrays, tokens):
    """The operands with the tokens in front."""
    return {
        name: xp.broadcast_to(array, (tokens, *array.shape)) if array.ndim == 1 else array.swapaxes(0, 1)
        for name, array in arrays.items()
    }


def continues(xp, segments, batch, tokens):
    """1 where a token goes on with the document before it, 0 where one begins, `(N, B)`."""
    if segments is None:
        return xp.ones((tokens, batch))
    return 1.0 - (xp.diff(segments, axis=1, prepend=segments[:, :1]) != 0).T


def restarted(state, kept):
    return jax.tree.map(lambda x: x * kept.reshape(-1, *[1] * (x.ndim - 1)), state)


def linear_attention_causal(query, key, value, **options):
    return linear_attention(query, key, value, causal=True, epsilon=EPSILON, **options)


EPSILON = 0.1
OPS = {
    "no decay": Op(gated_linear_attention, gated_step),
    "decay per head": Op(gated_linear_attention, gated_step, decay="head"),
    "decay per token": Op(gated_linear_attention, gated_step, decay="scalar"),
    "decay per channel": Op(gated_linear_attention, gated_step, decay="channel"),
    "delta": Op(delta_rule, gated_step, beta=True),
    "gated delta": Op(delta_rule, gated_step, beta=True, decay="scalar"),
    "normalised": Op(linear_attention_causal, normalized_step, scale=lambda channels: EPSILON),
}
