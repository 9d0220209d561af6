"""Estimates for TPUs that are not here: compiled for them, by libtpu, but not run."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels import aot, compat, tuning
from kernels.bench.case import DIRECTIONS, Case
from kernels.bench.limits import DATA_SHEET, Limits
from kernels.bench.measure import blank
from kernels.bench.programs import first_line, is_out_of_memory, peak_bytes, precision
from kernels.bench.rows import Row
from kernels.cost import cost
from kernels.devices import peak

REASON = "compiled for a device that is not here; nothing has run"


def estimate(
    cases: Iterable[Case], dtypes: Sequence[str], topology: str, tell: Callable[[str], None] = lambda line: None
) -> tuple[Any, Limits, list[Row]]:
    """For every case whether it fits one device of a TPU slice, and what a roofline makes of it.

    The estimate is the larger of two times at the maker's rates: the program's FLOPs, those computed twice among
    them, and the bytes that XLA counts. XLA counts a loop's body once, so that at least operands and results are
    taken.

    Returns:
        The device, its limits, and the rows, of status `"estimate"` where the program fits.

    Raises:
        ValueError: for a topology that libtpu does not know, or a generation whose rates are not known.
        RuntimeError: without libtpu.
    """
    device = aot.tpu_devices(topology)[0]
    stated = peak(device.device_kind)
    if stated is None:
        raise ValueError(f"topology {topology!r}: the rates of a {device.device_kind} are not in kernels.devices")
    bounds = Limits(dict.fromkeys(dtypes, stated.flops), stated.bandwidth, DATA_SHEET)
    mesh = Mesh(np.array([device]), ("data",))
    rows = []
    for case in cases:
        for dtype in dtypes:
            tell(f"{case.label}, {case.shape}, {dtype}")
            for direction in DIRECTIONS:
                for implementation in case.table:
                    row = blank(case, dtype, direction, implementation.name, device, bounds)
                    rows.append(row)
                    if "tpu" in implementation.platforms:
                        _compile(case, row, mesh, bounds)
                    else:
                        row.status = "not measured"
                        row.reason = f"runs on {' and '.join(implementation.platforms)}"
    return device, bounds, rows


def _compile(case: Case, row: Row, mesh: Mesh, bounds: Limits) -> None:
    operands = [case.abstract(row.dtype)] + [case.outputs(row.dtype)] * (row.direction != "forward")
    sharding = NamedSharding(mesh, PartitionSpec())
    operands = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), operands)
    function = case.function(row.direction, row.implementation)
    compat.forget_traced()
    try:
        with precision(row.dtype), jax.set_mesh(mesh), tuning.record_blocks() as uses:
            compiled = jax.jit(function).lower(*operands).compile()
        with precision(row.dtype):
            flops = cost(function, *operands, platform="tpu").flops
    except NotImplementedError as error:
        row.status, row.reason = "not supported", first_line(error)
        return
    # Whatever the compiler raises is a result here.
    except Exception as error:
        row.status = "out of memory" if is_out_of_memory(error) else "failed"
        row.reason = f"{type(error).__name__}: {first_line(error)}"
        return
    moved = (compiled.cost_analysis() or {}).get("bytes accessed", math.nan)
    row.status, row.reason, row.method = "estimate", REASON, "roofline of the compiled program"
    row.peak_bytes = peak_bytes(compiled)
    row.estimate_ms = bounds.floor(flops, max(row.bytes, moved), row.dtype)[0] * 1e3
    row.times_floor = row.estimate_ms / row.floor_ms
    if uses:
        row.blocks, row.tuned = {use.op: use.blocks for use in uses}, any(use.tuned for use in uses)
