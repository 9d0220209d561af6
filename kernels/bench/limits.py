"""What the device can do at most: as its maker states it, or as a copy and a matrix product find it."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.bench.timing import Timed, percentiles
from kernels.devices import peak

DATA_SHEET = "data sheet"
MEASURED = "copy and matrix product measured in this run"


@dataclasses.dataclass(frozen=True)
class Limits:
    """Rates that no program exceeds, so that what it must do and move takes at least the `floor`.

    Attributes:
        flops: operations per second, by dtype.
        bandwidth: bytes per second.
        source: where they are from.
    """

    flops: dict[str, float]
    bandwidth: float
    source: str

    def floor(self, flops: int, moved: int, dtype: str) -> tuple[float, str]:
        """Seconds, and `"memory"` or `"compute"`, whichever takes longer."""
        memory, compute = moved / self.bandwidth, flops / self.flops[dtype]
        return max(memory, compute), "memory" if memory >= compute else "compute"


def limits(device: Any, dtypes: Sequence[str]) -> Limits:
    """The limits of a device. A data sheet's rate of matrix products is that of bfloat16, also for float32."""
    stated = peak(device.device_kind)
    if stated is not None:
        return Limits(dict.fromkeys(dtypes, stated.flops), stated.bandwidth, DATA_SHEET)
    return measured(dtypes)


def measured(dtypes: Sequence[str], copied: int = 1 << 24, side: int = 1024) -> Limits:
    """Limits of the default device.

    Args:
        dtypes: of the matrix products.
        copied: float32 numbers in the array that is copied, 64 MiB.
        side: of the square matrices.
    """
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(copied, np.float32))
    bandwidth = 2 * x.nbytes / _seconds(jax.jit(lambda x: x * 0.5).lower(x).compile(), x)
    rates = {}
    for dtype in dtypes:
        a = jnp.asarray(rng.standard_normal((side, side), np.float32), dtype)
        product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest")).lower(a).compile()
        rates[dtype] = 2 * side**3 / _seconds(product, a)
    return Limits(rates, bandwidth, MEASURED)


def _seconds(program, x) -> float:
    """The fastest fifth: a limit is what the machine can do, not what it did."""
    timed = Timed(lambda i: program(x), 1)
    timed.warm_up(0.05)
    for _ in range(7):
        timed.sample()
    return percentiles(timed.seconds)[0] / 1e3


def free_bytes(device: Any) -> int | None:
    """Memory that a program may still take, or None if that is not known."""
    stats = device.memory_stats() if hasattr(device, "memory_stats") else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.platform != "cpu" or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return None
    try:
        with open("/proc/meminfo") as file:
            found = dict(line.split(":", 1) for line in file)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
