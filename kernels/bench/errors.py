"""How far a program is from float64, and whether it gives the same bits every time."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.bench.case import Case
from kernels.cost import tree_bytes

# The largest difference from float64 that may be, by the largest value: outputs, gradients. A wrong mask, a wrong
# scale or a lost block of keys is a tenth and more; what rounding does is a tenth of these and less.
BOUNDS = {"float32": (1e-4, 3e-4), "bfloat16": (3e-2, 6e-2)}
RUNS = 5
# Operands that are computed in float64 at once.
BATCH_BYTES = 1 << 28

Tree = Any


class Reference:
    """Outputs and gradients of a case in float64: the XLA form, operands cast up, a part of the batch at a time."""

    def __init__(self, case: Case, gradients: bool):
        self.case, self.gradients = case, gradients
        with jax.enable_x64(True):
            self.program = jax.jit(case.function("forward+backward" if gradients else "forward", "xla"))

    def __call__(self, arrays: Mapping[str, jax.Array], cotangent: Tree) -> tuple[Tree, dict[str, np.ndarray]]:
        operands = self.case.operands
        batch = next(operands[n].shape[0] for n in arrays if operands[n].batched)
        pieces = min(batch, max(1, 2 * tree_bytes(dict(arrays)) // BATCH_BYTES))
        found = []
        for rows in np.array_split(np.arange(batch), pieces):
            part = slice(rows[0], rows[-1] + 1)
            taken = {n: _wide(x[part] if operands[n].batched else x) for n, x in arrays.items()}
            with jax.enable_x64(True):
                if self.gradients:
                    coming = [_wide(x[part]) for x in jax.tree.leaves(cotangent)]
                    out = self.program(taken, jax.tree.unflatten(jax.tree.structure(cotangent), coming))
                else:
                    out = self.program(taken), {}
                found.append(jax.tree.map(np.asarray, out))
        outputs = jax.tree.map(lambda *parts: np.concatenate(parts), *(out for out, _ in found))
        gradients = {
            n: np.concatenate([g[n] for _, g in found]) if operands[n].batched else sum(g[n] for _, g in found)
            for n in found[0][1]
        }
        return outputs, gradients


def _wide(x) -> jax.Array | np.ndarray:
    x = np.asarray(x)
    return x if np.issubdtype(x.dtype, np.integer) else x.astype(np.float64)


def difference(found: Tree, wanted: Tree) -> tuple[float, float]:
    """The largest difference, and the same by the largest value wanted; nan where anything is nan."""
    worst = largest = 0.0
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        if b.size:
            worst = np.maximum(worst, np.max(np.abs(np.asarray(a).astype(np.float64) - b)))
            largest = max(largest, float(np.max(np.abs(b))))
    return float(worst), float(worst) / largest if largest else float(worst)


@functools.cache
def _same():
    @jax.jit
    def same(first, second):
        def bits(x):
            return (
                jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
                if jnp.issubdtype(x.dtype, jnp.floating)
                else x
            )

        equal = jax.tree.map(lambda a, b: (bits(a) == bits(b)).all(), first, second)
        return jnp.stack(jax.tree.leaves(equal)).all()

    return same


def bit_equal(call, runs: int = RUNS) -> bool:
    """Whether so many runs of `call()` give the same bits, nan for nan."""
    first = call()
    return all(bool(_same()(first, call())) for _ in range(runs - 1))
