"""Retention gates with a proximal step: general f-divergences on the simplex, and the elastic net in both forms."""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from kernels.memory.options import check_name, check_positive
from kernels.memory.retention import SLICES, Retention, slice_axes, slice_total

# Of each convex f the inverse of its derivative, infinite above the values that the derivative takes, and f'(1).
DIVERGENCES: dict[str, tuple[Callable, float]] = {
    "kl": (lambda u: jnp.exp(u - 1), 1.0),  # f = t log t
    "reverse_kl": (lambda u: jnp.where(u < 0, -1 / jnp.where(u < 0, u, -1), jnp.inf), -1.0),  # f = -log t
    "hellinger": (lambda u: jnp.where(u < 1, 1 / jnp.square(jnp.where(u < 1, 1 - u, 1)), jnp.inf), 0.0),
    "chi2": (lambda u: jnp.maximum(1 + u / 2, 0), 0.0),  # f = (t - 1)^2; what falls to 0 stays there
}
# Halvings of a bracket: more than the digits of float64.
HALVINGS = 60


@dataclasses.dataclass(frozen=True)
class FDivergence(Retention):
    """An f-divergence to the previous weights on the scaled simplex (equation 18).

    W_t = W_{t-1} * g_f(-zeta_t - eta_t gradient), g_f = (f')^-1 and zeta_t one number for each slice, found by
    bisection, so that slices keep their sum. The learned initial weights are logits, made weights by a softmax.

    Attributes:
        divergence: `"kl"`, `"reverse_kl"`, `"hellinger"`, `"chi2"`, or a pair of g_f, elementwise and infinite above
            its domain, and f'(1).
        slices, total: as in `Entropy`.
    """

    divergence: str | tuple[Callable, float] = "kl"
    slices: str = "fan_in"
    total: float | None = None

    decays: ClassVar[str] = "refused"
    additive: ClassVar[bool] = False

    def __post_init__(self):
        if not isinstance(self.divergence, tuple):
            check_name("divergence", self.divergence, DIVERGENCES)
        check_name("slices", self.slices, SLICES)
        if self.total is not None:
            check_positive(total=self.total)

    @property
    def balanced(self) -> bool:
        return self.slices != "matrix"

    def start(self, weights: jax.Array, side: str) -> jax.Array:
        axes = slice_axes(self.slices, side)
        return slice_total(weights, axes, self.total) * jax.nn.softmax(weights, axis=axes)

    def frozen(self, anchor: jax.Array, side: str, chunk_size: int) -> jax.Array | float | None:
        return None

    def move(self, state: jax.Array, step: jax.Array, gradient: jax.Array, side: str) -> jax.Array:
        """The state after one step."""
        axes = slice_axes(self.slices, side)
        total = slice_total(state, axes, self.total)
        pair = self.divergence if isinstance(self.divergence, tuple) else DIVERGENCES[self.divergence]
        return _balanced(state, step * gradient, *pair, total, axes)


@dataclasses.dataclass(frozen=True)
class ElasticNet(Retention):
    """||W - W_{t-1}||^2 / (2 eta) + l2 ||W||^2 / 2 + l1 ||W||_1, a local and two global terms (equation 22).

    W_t = S_gamma(lambda W_{t-1} - zeta gradient), lambda = 1 / (1 + eta l2), zeta = eta lambda, gamma = zeta l1; the
    paper's alpha and beta are 1 / l1 and 1 / l2.

    Attributes:
        l1, l2: at least 0.
        soft: `"hard"`, S_gamma(z) = sign(z) max(|z| - gamma, 0), or the paper's smooth `"arctan"`,
            |z| arctan(z / gamma) / (pi / 2), which at z = 2 gamma gives 1.41 gamma in place of gamma.
    """

    l1: float = 1e-3
    l2: float = 1e-2
    soft: str = "hard"

    decays: ClassVar[str] = "refused"
    additive: ClassVar[bool] = False

    def __post_init__(self):
        check_name("soft", self.soft, ("hard", "arctan"))
        for name in ("l1", "l2"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    def frozen(self, anchor: jax.Array, side: str, chunk_size: int) -> jax.Array | float | None:
        return None

    def move(self, state: jax.Array, step: jax.Array, gradient: jax.Array, side: str) -> jax.Array:
        """The state after one step."""
        keep = 1 / (1 + step * self.l2)
        return _shrink(keep * (state - step * gradient), step * keep * self.l1, self.soft)


@dataclasses.dataclass(frozen=True)
class ElasticNetFTRL(Retention):
    """The elastic net as regulariser of follow-the-regularised-leader (equation 23): W_t = S_gamma(A_t).

    A_t = alpha_t A_{t-1} - eta_t gradient; the paper has no alpha here, which `log_retention=None` leaves out, and
    its gamma is eta / alpha with constants.

    Attributes:
        gamma: the threshold.
        soft: as in `ElasticNet`.
    """

    gamma: float = 1e-3
    soft: str = "hard"

    def __post_init__(self):
        check_name("soft", self.soft, ("hard", "arctan"))
        check_positive(gamma=self.gamma)

    def link(self, state: jax.Array, side: str) -> jax.Array:
        return _shrink(state, self.gamma, self.soft)

    def frozen(self, anchor: jax.Array, side: str, chunk_size: int) -> jax.Array | float | None:
        return None


def _shrink(x, gamma, soft):
    if soft == "hard":
        return jnp.sign(x) * jnp.maximum(jnp.abs(x) - gamma, 0)
    # A step of 0 has a gamma of 0, by which 0 cannot be divided.
    return jnp.abs(x) * jnp.arctan(x / jnp.maximum(gamma, 1e-12)) * (2 / math.pi)


def _balanced(weights, tilt, inverse, at_one, total, axes):
    """weights * inverse(shift - tilt), with the shift of each slice for which it sums to `total`."""

    def excess(shift, weights, tilt):
        # A weight of 0 has no part in the sum, even where the inverse is infinite.
        terms = jnp.where(weights > 0, weights * inverse(shift - tilt), 0)
        return terms.sum(axes, keepdims=True) - total

    fixed_weights, fixed_tilt = jax.lax.stop_gradient((weights, tilt))

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        above = excess(middle, fixed_weights, fixed_tilt) > 0
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    # At the ends every entry is scaled by at most, or at least, inverse(at_one) = 1.
    ends = (fixed_tilt.min(axes, keepdims=True) + at_one, fixed_tilt.max(axes, keepdims=True) + at_one)
    root, _ = jax.lax.fori_loop(0, HALVINGS, halve, ends)
    _, slope = jax.jvp(lambda shift: excess(shift, fixed_weights, fixed_tilt), (root,), (jnp.ones_like(root),))
    # One step of Newton from the root: it carries the gradient of the root as an implicit function.
    shift = root - excess(root, weights, tilt) / slope
    return weights * inverse(shift - tilt)
