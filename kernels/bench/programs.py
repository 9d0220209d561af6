"""A case compiled: what can be asked of the program, and why there is none."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from kernels import compat, tuning
from kernels.bench.case import Case
from kernels.bench.timing import Timed
from kernels.cost import tree_bytes
from kernels.residuals import residual_bytes


def is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "resource_exhausted" in text or "out of memory" in text


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def precision(dtype: str):
    """Products of float32 are float32: not of fewer digits, as accelerators take them if they are let."""
    return jax.default_matmul_precision("highest" if dtype == "float32" else None)


class Program:
    """One implementation of a case, compiled for the default device.

    Attributes:
        compile_s: seconds that tracing, lowering and compiling took.
        peak_bytes: operands, results and temporaries.
        residual_bytes: of `forward+backward`.
        uses: the block sizes of its kernels.
    """

    def __init__(self, case: Case, dtype: str, direction: str, function: Callable[..., Any], name: str):
        """Compiles `function(arrays)` or `function(arrays, cotangent)`, as `Case.function` makes them."""
        self.case, self.direction, self.module = case, direction, f"jit_{name}"
        operands = [case.abstract(dtype)] + [case.outputs(dtype)] * (direction != "forward")

        @functools.wraps(function)
        def named(*operands):
            return function(*operands)

        named.__name__ = name
        compat.forget_traced()
        with precision(dtype), compat.lowering_triton():
            begin = time.perf_counter()
            with tuning.record_blocks() as self.uses:
                lowered = jax.jit(named).lower(*operands)
            self.compiled = lowered.compile()
            self.compile_s = time.perf_counter() - begin
        self.peak_bytes = peak_bytes(self.compiled)
        self.residual_bytes: int | None = None

    def __call__(self, arrays: Mapping[str, jax.Array], cotangent: Any) -> tuple[Any, dict[str, jax.Array]]:
        """Outputs and gradients, of which there are none going forward."""
        if self.direction == "forward":
            return self.compiled(arrays), {}
        return self.compiled(arrays, cotangent)

    def timed(self, sets: Sequence[tuple[Mapping[str, jax.Array], Any]]) -> Timed:
        """What times are taken of, with sets of operands and cotangents."""
        if self.direction == "forward":
            return Timed(lambda i: self.compiled(sets[i][0]), len(sets), self.module)
        return Timed(lambda i: self.compiled(*sets[i]), len(sets), self.module)


def peak_bytes(compiled) -> int | None:
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def compiled_case(case: Case, dtype: str, direction: str, implementation: str, name: str) -> Program:
    """The program of one of the case's own implementations."""
    program = Program(case, dtype, direction, case.function(direction, implementation), name)
    if direction != "forward":
        with precision(dtype):
            forward = case.function("forward", implementation)
            program.residual_bytes = residual_bytes(forward, case.abstract(dtype))
    return program


def set_count(case: Case, dtype: str, cache: int, free: int | None) -> int:
    """How many sets of operands it takes that a cache does not hold, 2 to 8, in at most a quarter of the memory."""
    each = tree_bytes(case.abstract(dtype)) + tree_bytes(case.outputs(dtype))
    sets = min(8, max(2, -(-cache // each) + 1))
    return sets if free is None else max(1, min(sets, free // 4 // each))
