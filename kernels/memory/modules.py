"""Architectures of a memory: maps with fast weights, which the inner loop moves and every token writes to and reads."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from kernels.memory.options import check_name

# linear(name, x): the map of the fast weights `name` at x. `balanced` says that all rows of w1 have the same sum.
Linear = Callable[[str, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Vector:
    """M(x) = w * x with `{"w": (H, D)}`: a diagonal matrix, the state of element-wise recurrences."""

    sides: ClassVar[dict[str, str]] = {"w": "diagonal"}

    def shapes(self, heads: int, d: int, e: int) -> dict[str, tuple]:
        return {"w": (heads, d)}

    def read(self, linear: Linear, x: jax.Array, balanced: bool) -> jax.Array:
        return linear("w", x)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """M(x) = w x with `{"w": (H, E, D)}`: plain, without residual and norm, so that l2 gives the delta rules."""

    sides: ClassVar[dict[str, str]] = {"w": "in"}

    def shapes(self, heads: int, d: int, e: int) -> dict[str, tuple]:
        return {"w": (heads, e, d)}

    def read(self, linear: Linear, x: jax.Array, balanced: bool) -> jax.Array:
        return linear("w", x)


@dataclasses.dataclass(frozen=True)
class MLP:
    """M(x) = x + LN(w1 gelu(w2 x)) with `{"w1": (H, D, F), "w2": (H, F, D)}`; F = 4 D in the paper.

    The norm has neither gain nor bias: the paper names w1 and w2 as all that the inner loop moves. A slow gain would
    be the caller's.

    Attributes:
        gelu: `"tanh"` (the paper does not say which) or `"erf"`.
        epsilon: added to the variance in the norm.
    """

    gelu: str = "tanh"
    epsilon: float = 1e-6

    sides: ClassVar[dict[str, str]] = {"w1": "out", "w2": "in"}

    def __post_init__(self):
        check_name("gelu", self.gelu, ("tanh", "erf"))

    def shapes(self, heads: int, d: int, e: int) -> dict[str, tuple]:
        return {"w1": (heads, d, "F"), "w2": (heads, "F", d)}

    def read(self, linear: Linear, x: jax.Array, balanced: bool) -> jax.Array:
        hidden = jax.nn.gelu(linear("w2", x), approximate=self.gelu == "tanh")
        if balanced:
            # Then the mean of the hidden units reaches all outputs alike, from which the norm would take it away again,
            # and with it, where the rows of w1 are near each other, most digits.
            hidden = hidden - hidden.mean(-1, keepdims=True)
        out = linear("w1", hidden)
        out = out - out.mean(-1, keepdims=True)
        return x + out * jax.lax.rsqrt(jnp.square(out).mean(-1, keepdims=True) + self.epsilon)


MEMORIES = {"vector": Vector, "matrix": Matrix, "mlp": MLP}
