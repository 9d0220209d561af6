"""One thing to be timed: an op, its operands, and in closed form what it costs at least."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.cost import tree_bytes
from kernels.dispatch import Implementation

# How a term of a matrix product counts.
MULTIPLY_ADD = 2
DIRECTIONS = ("forward", "forward+backward")


@dataclasses.dataclass(frozen=True)
class Operand:
    """One array of a call.

    Attributes:
        shape: of the array.
        kind: how it is drawn. `"normal"`; `"unit"`, normal vectors of length 1; `"initial"`, normal of variance
            1 / fan-in; `"decay"`, the logarithm of what a token leaves, about -0.1; `"slow"`, the same, about -1 over
            all tokens; `"share"`, uniform in 0 to 1; `"step"`, uniform in 0 to 0.001 (a memory whose steps are long
            or that forgets all is ill-conditioned); `"choice"`, of `of` numbers as many different ones as the last
            axis has.
        batched: whether the batch comes first; else the operand is the same for all of the batch.
        wide: float32 whatever the dtype of the call.
        of: for `"choice"`.
    """

    shape: tuple[int, ...]
    kind: str = "normal"
    batched: bool = True
    wide: bool = False
    of: int = 0

    @property
    def differentiable(self) -> bool:
        return self.kind != "choice"

    def dtype(self, dtype) -> Any:
        return jnp.dtype(jnp.int32) if self.kind == "choice" else jnp.dtype(jnp.float32 if self.wide else dtype)

    def draw(self, rng: np.random.Generator, dtype) -> jax.Array:
        return jnp.asarray(_draw(self, rng), self.dtype(dtype))

    def abstract(self, dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype(dtype))


def _draw(operand: Operand, rng: np.random.Generator) -> np.ndarray:
    shape, kind = operand.shape, operand.kind
    if kind == "choice":
        return rng.permuted(np.broadcast_to(np.arange(operand.of), (*shape[:-1], operand.of)), axis=-1)[
            ..., : shape[-1]
        ]
    if kind in ("share", "step"):
        return rng.uniform(0, 1 if kind == "share" else 0.001, shape)
    drawn = rng.standard_normal(shape, np.float32)
    if kind == "unit":
        drawn /= np.linalg.norm(drawn, axis=-1, keepdims=True)
    if kind == "decay":
        drawn = -np.exp(drawn - 2)
    if kind == "slow":
        drawn = -np.abs(drawn) / shape[1]
    if kind == "initial":
        drawn /= shape[-2] ** 0.5
    return drawn


@dataclasses.dataclass(frozen=True)
class Case:
    """An op at one shape.

    Attributes:
        op: the public function's name.
        variant: what it is called in tables.
        family: under which heading: `"window"`, `"gather"`, `"scan"` and the like.
        shape: the sizes, for a person.
        pattern: `"self"` or `"cross"`, then `"causal"` or `"noncausal"`.
        operands: by name.
        run: `run(implementation, **arrays)`.
        table: the implementations that there are.
        flops: multiply-adds of the forward pass's products, as two each: what the mathematics needs, nothing masked,
            nothing computed twice.
        passes: how often these are taken for the outputs and the gradients together: for a product of two matrices
            there are two more.
        length: tokens of a sequence that the length is varied of, else None.
        state: what a decoder carries after these tokens, from the arrays; None where there is no decoder.
    """

    op: str
    variant: str
    family: str
    shape: str
    pattern: str
    operands: Mapping[str, Operand]
    run: Callable[..., Any]
    table: tuple[Implementation, ...]
    flops: int
    passes: int = 3
    length: int | None = None
    state: Callable[..., Any] | None = None

    @property
    def label(self) -> str:
        """The variant, and how it attends where that is not plain."""
        source, order = self.pattern.split()
        return ", ".join([self.variant, *["cross"] * (source == "cross"), *["causal"] * (order == "causal")])

    def inputs(self, dtype, seed: int = 0) -> dict[str, jax.Array]:
        """Operands drawn anew for every seed."""
        return {
            name: operand.draw(np.random.default_rng([seed, position]), dtype)
            for position, (name, operand) in enumerate(self.operands.items())
        }

    def abstract(self, dtype) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: operand.abstract(dtype) for name, operand in self.operands.items()}

    def outputs(self, dtype) -> Any:
        """Shapes and dtypes of what the op returns."""
        return jax.eval_shape(lambda arrays: self.run("xla", **arrays), self.abstract(dtype))

    def cotangent(self, dtype, seed: int = 0) -> Any:
        """A gradient of the outputs, for the backward pass."""
        leaves, tree = jax.tree.flatten(self.outputs(dtype))
        drawn = (
            np.random.default_rng([seed, 1000, i]).standard_normal(x.shape, np.float32) for i, x in enumerate(leaves)
        )
        return tree.unflatten([jnp.asarray(x, leaf.dtype) for x, leaf in zip(drawn, leaves)])

    def function(self, direction: str, implementation: str) -> Callable[..., Any]:
        """`f(arrays)`, or `f(arrays, cotangent)` that gives the outputs and the gradients by operand."""

        def forward(arrays):
            return self.run(implementation, **arrays)

        def both(arrays, cotangent):
            fixed = {n: x for n, x in arrays.items() if not self.operands[n].differentiable}
            moving = {n: x for n, x in arrays.items() if n not in fixed}
            out, pull = jax.vjp(lambda moving: forward(moving | fixed), moving)
            return out, pull(cotangent)[0]

        return forward if direction == "forward" else both

    def useful_flops(self, direction: str) -> int:
        return self.flops * (1 if direction == "forward" else self.passes)

    def bytes(self, direction: str, dtype) -> int:
        """Operands and results, each moved once; the gradient's too where there is a backward pass."""
        operands, outputs = self.abstract(dtype), self.outputs(dtype)
        moved = [operands, outputs]
        if direction != "forward":
            moved += [outputs, {n: x for n, x in operands.items() if self.operands[n].differentiable}]
        return tree_bytes(moved)

    def state_bytes(self, dtype) -> int | None:
        if self.state is None:
            return None
        return tree_bytes(jax.eval_shape(lambda arrays: self.state(**arrays), self.abstract(dtype)))


# Of ops that XLA computes and nothing else here does.
ONLY_XLA = (Implementation("xla", lambda *arrays, **options: None),)


def part(op: str, variant: str, shape: str, pattern: str, run: Callable[..., Any], **fields: Any) -> Case:
    """What mixers have besides attention: `run(**arrays)`, by XLA; `fields` are the others of `Case`."""
    return Case(
        op=op,
        variant=variant,
        family="part",
        shape=shape,
        pattern=pattern,
        run=lambda implementation, **arrays: run(**arrays),
        table=ONLY_XLA,
        **fields,
    )


def table_of(function: Callable[..., Any]) -> tuple[Implementation, ...]:
    """The implementations of a public op: the `TABLE` of the file that it stands in."""
    return sys.modules[function.__module__].TABLE
