"""Retention gates: how a memory moves from one state to the next, and what its weights are in a state.

A gate keeps a *state* per weight, in which the update is simple, and a link from the state to the weights that are
read. For most gates the update is linear in the state ("additive"),

    state_t = alpha_t state_{t-1} - step_t gradient_t,        weights_t = link(state_t)

and two others, in `kernels.memory.proximal`, are proximal steps of their own (`move`). Gradients are in the weights
(mirror descent), never in the state. Source: Miras (arXiv:2504.13173), section 5.2.

In this file a state of a weight of the memory is `(..., R, C)`, read as `state @ x` with x of C channels, or `(..., D)`
for the vector memory; its `side` says which axis has the D channels that gates act on: `"in"` the last, `"out"` the
one before, `"diagonal"` the only one.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from kernels.memory.options import check_name, check_positive

SLICES = ("fan_in", "channel", "matrix")


def gated_axis(side: str) -> int:
    """The axis of a state on which the gates' channels lie."""
    return -2 if side == "out" else -1


def slice_axes(slices: str, side: str) -> tuple[int, ...]:
    """The axes of a state along which one simplex lies; for `slices` see `Entropy`."""
    if side == "diagonal" or slices == "fan_in":
        return (-1,)
    return (-2, -1) if slices == "matrix" else (-3 - gated_axis(side),)


def slice_total(state: jax.Array, axes: tuple[int, ...], total: float | None) -> float | int:
    """What a simplex sums to: `total`, or the number of its entries."""
    return math.prod(state.shape[axis] for axis in axes) if total is None else total


@dataclasses.dataclass(frozen=True)
class Retention:
    """What the gates share; a gate says otherwise where it differs.

    Attributes:
        decays: `log_retention` is `"refused"`, `"optional"` or `"required"`.
        additive: the update is linear in the state, so that momentum may act and chunks may be summed up.
        lags: the first token of a chunk takes a step of its own (`lag`).
        balanced: the weights of an MLP's w1 have the same sum in every row.
    """

    decays: ClassVar[str] = "optional"
    additive: ClassVar[bool] = True
    lags: ClassVar[bool] = False
    balanced: ClassVar[bool] = False

    def start(self, weights: jax.Array, side: str) -> jax.Array:
        """The state of a learned initial memory; for most gates what is learned is the state itself."""
        return weights

    def link(self, state: jax.Array, side: str) -> jax.Array:
        """The weights in a state."""
        return state

    def frozen(self, anchor: jax.Array, side: str, chunk_size: int) -> jax.Array | float | None:
        """The factor from state to weights all through a chunk that started at `anchor`, if it is only a factor."""
        return 1.0

    def channels(self, log_retention: jax.Array, side: str) -> jax.Array:
        """What of `log_retention (..., 1 or D)` this gate can take, `(..., 1)` or as it is."""
        return log_retention


@dataclasses.dataclass(frozen=True)
class NoRetention(Retention):
    """||W - W_{t-1}||^2 / (2 eta) alone: plain gradient descent, which forgets only by overwriting."""

    decays: ClassVar[str] = "refused"


@dataclasses.dataclass(frozen=True)
class Decay(Retention):
    """The l2 gate, local and global: W_t = alpha_t W_{t-1} - eta_t gradient, alpha and eta decoupled.

    Attributes:
        first: the gradient of a token is taken at alpha_t W in place of W, as in the gated delta rule; the default
            takes it at W, as Titans does. Inside a chunk it is the token's own alpha that acts on the chunk's start.
    """

    first: bool = False

    decays: ClassVar[str] = "required"


@dataclasses.dataclass(frozen=True)
class Entropy(Retention):
    """Kullback-Leibler divergence and Shannon entropy on the scaled simplex (equation 21; Memora, equation 27).

    W_t = total softmax(alpha_t log W_{t-1} - eta_t gradient) on every slice. The state is the logits Z, with
    Z_t = alpha_t Z_{t-1} - eta_t gradient, which is the same (softmax ignores the normaliser that the logarithm
    would bring back) as long as alpha is constant along a slice, and needs neither logarithm nor clamp. Where the
    slice runs along the gated axis, alpha is therefore the mean over the channels; the step is not bound by this.

    Attributes:
        slices: what sums to `total`. `"fan_in"`: the inputs of each output unit. `"channel"`: one slice for each of
            the D gated channels, so that w2 has its slices along its outputs and alpha keeps its channels throughout.
            `"matrix"`: a whole matrix.
        total: the sum of a slice; None for the number of its entries, so that weights are 1 in the mean.
        interior: `"dual"`: inside a chunk every token reads the softmax of its own logits. `"linear"`: the paper's
            way, faster: the first token of a chunk takes the exact step ("lag token", equation 30), the others, with
            gradients there, move the weights themselves linearly (equations 31 and 32), whose logarithm at the next
            chunk's start is of max(W, floor), as W may have become negative. The state is then W.
        floor: for `interior="linear"`, relative to the mean weight.
    """

    slices: str = "fan_in"
    total: float | None = None
    interior: str = "dual"
    floor: float = 1e-6

    def __post_init__(self):
        check_name("slices", self.slices, SLICES)
        check_name("interior", self.interior, ("dual", "linear"))
        check_positive(floor=self.floor)
        if self.total is not None:
            check_positive(total=self.total)

    @property
    def lags(self) -> bool:
        return self.interior == "linear"

    @property
    def balanced(self) -> bool:
        return self.slices != "matrix" and not self.lags

    def _softmax(self, logits, side):
        axes = slice_axes(self.slices, side)
        return slice_total(logits, axes, self.total) * jax.nn.softmax(logits, axis=axes)

    def start(self, weights: jax.Array, side: str) -> jax.Array:
        return self._softmax(weights, side) if self.lags else weights

    def link(self, state: jax.Array, side: str) -> jax.Array:
        return state if self.lags else self._softmax(state, side)

    def frozen(self, anchor: jax.Array, side: str, chunk_size: int) -> jax.Array | float | None:
        return 1.0 if self.lags else None

    def channels(self, log_retention: jax.Array, side: str) -> jax.Array:
        if log_retention.shape[-1] == 1 or gated_axis(side) not in slice_axes(self.slices, side):
            return log_retention
        # The logarithm of the mean, in operations that a kernel has, too.
        most = jax.lax.stop_gradient(log_retention.max(-1, keepdims=True))
        return most + jnp.log(jnp.exp(log_retention - most).mean(-1, keepdims=True))

    def lag(self, state: jax.Array, log_retention: jax.Array, change: jax.Array, side: str) -> jax.Array:
        """Weights after the first token of a chunk, from those before it and step times gradient."""
        axes = slice_axes(self.slices, side)
        mean = slice_total(state, axes, self.total) / slice_total(state, axes, None)
        logits = jnp.log(jnp.maximum(state, self.floor * mean))
        return self._softmax(jnp.exp(log_retention) * logits - change, side)


@dataclasses.dataclass(frozen=True)
class LqStability(Retention):
    """||W||_q^2 as regulariser of follow-the-regularised-leader (Moneta, equation 24): W from A by a norm.

    A_t = alpha_t A_{t-1} - eta_t gradient. The norms are per weight matrix and head.

    Attributes:
        q: 4 in the paper, which in its derivation is the dual index.
        link_name: `"paper"`: W = A / ||A||_q^(q-2) as printed, of degree 3 - q in A, so that at q = 4 a larger A gives
            a smaller W. `"dual"`: the exact maximiser sign(A) |A|^(q-1) / ||A||_q^(q-2), of degree 1.
            `"identity"`: W = A.
        normalizer: with `link_name="paper"`, the norm for reads inside a chunk. `"chunk"`: that of the chunk's start,
            which the fast form needs; chunks of one token have no inside, there it is the token's own. `"token"`:
            the token's own always.
        floor: the least norm that is divided by.
    """

    q: float = 4.0
    link_name: str = "paper"
    normalizer: str = "chunk"
    floor: float = 1e-6

    def __post_init__(self):
        check_name("link_name", self.link_name, ("paper", "dual", "identity"))
        check_name("normalizer", self.normalizer, ("chunk", "token"))
        check_positive(floor=self.floor)
        if not self.q > 1:
            raise ValueError(f"q must be above 1, got {self.q}")

    def _norm(self, state, side):
        axes = -1 if side == "diagonal" else (-2, -1)
        # Of degree 1 whatever the size it is divided by, which therefore has no gradient, and cannot overflow.
        size = jax.lax.stop_gradient(jnp.abs(state).max(axes, keepdims=True))
        ratio = jnp.abs(state) / jnp.where(size > 0, size, 1)
        total = _power(ratio, self.q).sum(axes, keepdims=True)
        return jnp.maximum(size * jnp.where(total > 0, total, 1) ** (1 / self.q), self.floor)

    def link(self, state: jax.Array, side: str) -> jax.Array:
        if self.link_name == "identity" or self.q == 2:
            return state
        norm = self._norm(state, side)
        if self.link_name == "paper":
            return norm ** (2 - self.q) * state
        return norm * jnp.sign(state) * _power(jnp.abs(state) / norm, self.q - 1)

    def frozen(self, anchor: jax.Array, side: str, chunk_size: int) -> jax.Array | float | None:
        if self.link_name == "identity" or self.q == 2:
            return 1.0
        if self.link_name == "paper" and self.normalizer == "chunk" and chunk_size > 1:
            return self._norm(anchor, side) ** (2 - self.q)
        return None


@dataclasses.dataclass(frozen=True)
class Bregman(Retention):
    """The divergence of a separable F: W = (F')^-1(state), state_t = state_{t-1} - eta_t gradient.

    `log_retention`, if given, draws the weights back to (F')^-1(0); the paper has none here.

    Attributes:
        inverse: (F')^-1: `"sigmoid"` (weights in (0, 1), F' the logit), `"tanh"` (in (-1, 1)), `"exp"` (positive),
            `"identity"` (gradient descent), or an elementwise function.
    """

    inverse: str | Callable = "sigmoid"

    def __post_init__(self):
        if not callable(self.inverse):
            check_name("inverse", self.inverse, BREGMAN_INVERSES)

    def link(self, state: jax.Array, side: str) -> jax.Array:
        return (self.inverse if callable(self.inverse) else BREGMAN_INVERSES[self.inverse])(state)

    def frozen(self, anchor: jax.Array, side: str, chunk_size: int) -> jax.Array | float | None:
        return 1.0 if self.inverse == "identity" else None


BREGMAN_INVERSES: dict[str, Callable] = {
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "exp": jnp.exp,
    "identity": lambda state: state,
}


def _power(x: jax.Array, power: float) -> jax.Array:
    """x^power for x >= 0, by products where that is possible, and with a slope of 0 at 0."""
    if power == int(power):
        return x ** int(power)
    return jnp.where(x > 0, x, 1) ** power * (x > 0)
