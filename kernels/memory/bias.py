"""Attentional biases: the losses by which a memory learns that a key stands for a value.

Each is a loss of the residual r = M(k) - v, given here by its gradient in the memory's output, the error that the
memory's weights then see. Source: Miras (arXiv:2504.13173), section 5.1. `|x|` and `sign(x)` are smoothed as in its
Remark 5 (`epsilon` = 1e-6), in one of two ways:

- `smooth="root"`: |x| becomes (x^2 + epsilon)^(1/2) in the loss, whose exact gradient is taken: sign(x) |x|^(p-1)
  becomes x (x^2 + epsilon)^(p/2 - 1).
- `smooth="tanh"`: the paper's letter, sign(x) becoming tanh(nu x) and |x| in the gradient (x^2 + epsilon)^(1/2). The
  paper gives no nu; at 10 the product is ten times too small at |x| = 0.01.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from kernels.memory.options import check_name, check_positive


def _bounded(x, limit):
    """x, scaled down to an l2 norm of `limit` along the last axis where it is longer."""
    square = jnp.square(x).sum(-1, keepdims=True)
    within = square <= jnp.square(limit)
    # The root of what is not used would have an infinite slope at 0.
    return jnp.where(within, 1, limit * jax.lax.rsqrt(jnp.where(within, 1, square))) * x


@dataclasses.dataclass(frozen=True)
class DotProduct:
    """-<M(k), v>: Hebbian, the bias of linear attention."""

    threshold: ClassVar[str | None] = None

    def error(self, output: jax.Array, value: jax.Array, threshold: jax.Array | None) -> jax.Array:
        return -value


@dataclasses.dataclass(frozen=True)
class SquaredError:
    """||r||^2 / 2, the bias of the delta rule. The paper leaves the factor open; the step absorbs it."""

    threshold: ClassVar[str | None] = None

    def error(self, output: jax.Array, value: jax.Array, threshold: jax.Array | None) -> jax.Array:
        return output - value


@dataclasses.dataclass(frozen=True)
class LpError:
    """||r||_p^p (equations 10 and 11), with the factor p in its gradient; p = 1 is the "value-less" l1 (equation 12).

    Attributes:
        p: at least 1. The paper's ablation has its best at 3.
        smooth, nu, epsilon: see the module.
        max_norm: what a token's error is scaled down to where its l2 norm is larger; None: never, as in the paper. For
            p > 2 the inner step is otherwise without bound, and the backward pass through many of them may explode.
    """

    p: float = 3.0
    smooth: str = "root"
    nu: float = 10.0
    epsilon: float = 1e-6
    max_norm: float | None = None

    threshold: ClassVar[str | None] = None

    def __post_init__(self):
        check_name("smooth", self.smooth, ("root", "tanh"))
        check_positive(nu=self.nu, epsilon=self.epsilon)
        if not self.p >= 1:
            raise ValueError(f"p must be at least 1, got {self.p}")
        if self.max_norm is not None:
            check_positive(max_norm=self.max_norm)

    def error(self, output: jax.Array, value: jax.Array, threshold: jax.Array | None) -> jax.Array:
        residual = output - value
        error = self.p * _signed_power(residual, self.p - 1, self.smooth, self.nu, self.epsilon)
        return error if self.max_norm is None else _bounded(error, self.max_norm)


@dataclasses.dataclass(frozen=True)
class Huber:
    """l2 near 0 and l1 far from it, told apart by the threshold delta of each token.

    Attributes:
        form: `"norm"`: H_delta(||r||), error r min(1, delta / ||r||) (equation 15). `"coord"`: sum_j H_delta(r_j),
            error clip(r, -delta, delta) (equation 14), where delta may differ between channels. `"switch"`: error r
            if ||r|| <= delta, else delta sign(r) (equation 16, Yaad to the letter), whose norm jumps from delta to
            delta sqrt(D) at the threshold. The gradient in delta comes from the outliers alone.
        smooth, nu, epsilon: of the sign in `"switch"`; see the module.
    """

    form: str = "norm"
    smooth: str = "root"
    nu: float = 10.0
    epsilon: float = 1e-6

    def __post_init__(self):
        check_name("form", self.form, ("norm", "coord", "switch"))
        check_name("smooth", self.smooth, ("root", "tanh"))
        check_positive(nu=self.nu, epsilon=self.epsilon)

    @property
    def threshold(self) -> str:
        return "channel" if self.form == "coord" else "token"

    def error(self, output: jax.Array, value: jax.Array, threshold: jax.Array | None) -> jax.Array:
        residual = output - value
        if self.form == "coord":
            return jnp.clip(residual, -threshold, threshold)
        if self.form == "norm":
            return _bounded(residual, threshold)
        inlier = jnp.square(residual).sum(-1, keepdims=True) <= jnp.square(threshold)
        sign = _signed_power(residual, 0.0, self.smooth, self.nu, self.epsilon)
        return jnp.where(inlier, residual, threshold * sign)


@dataclasses.dataclass(frozen=True)
class ShiftRobust:
    """max over ||shift|| <= Delta of ||r - shift||^2 / 2: robust to values that are off by Delta (equation 17).

    Error r + Delta r / (||r||^2 + epsilon)^(1/2); the op's `threshold` is Delta.
    """

    epsilon: float = 1e-6

    threshold: ClassVar[str | None] = "token"

    def __post_init__(self):
        check_positive(epsilon=self.epsilon)

    def error(self, output: jax.Array, value: jax.Array, threshold: jax.Array | None) -> jax.Array:
        residual = output - value
        return residual * (1 + threshold * jax.lax.rsqrt(jnp.square(residual).sum(-1, keepdims=True) + self.epsilon))


BIASES = {
    "dot": DotProduct,
    "l2": SquaredError,
    "lp": LpError,
    "l1": lambda: LpError(p=1.0),
    "huber_norm": lambda: Huber("norm"),
    "huber_coord": lambda: Huber("coord"),
    "huber_switch": lambda: Huber("switch"),
    "shift_robust": ShiftRobust,
}


def _signed_power(x: jax.Array, power: float, smooth: str, nu: float, epsilon: float) -> jax.Array:
    """sign(x) |x|^power, smoothed."""
    square = jnp.square(x) + epsilon
    if smooth == "tanh":
        return jnp.tanh(nu * x) * square ** (power / 2)
    return x if power == 1 else x * square ** ((power - 1) / 2)
