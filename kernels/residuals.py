"""What reverse-mode differentiation keeps between the forward and the backward pass."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal

from kernels.cost import tree_bytes


def residual_bytes(fn: Callable[..., Any], *args: Any) -> int:
    """Bytes that `jax.vjp(fn, *args)` keeps for the backward pass, found by tracing: nothing is compiled or run.

    An array that is needed in several places counts once, arguments and closed-over constants among them.
    What the backward pass computes anew under `jax.checkpoint` does not count: this is what has to live from the
    forward to the backward pass, not the peak of either.

    Args:
        fn: a function of arrays that returns arrays, jitted or plain.
        *args: its arguments, differentiated with respect to wherever they are floating-point; arrays, or
            `jax.ShapeDtypeStruct`s in their place.
    """

    def kept(*args):
        return jax.tree.leaves(jax.vjp(fn, *args)[1])

    outputs = jax.make_jaxpr(kept)(*args).jaxpr.outvars
    avals = {id(v): v.aval for v in outputs if not isinstance(v, Literal)}.values()
    return tree_bytes(list(avals))
