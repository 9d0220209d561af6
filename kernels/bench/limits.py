"""What the device can do at most: as its maker states it, or as a copy and a matrix product find it."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.bench.timing import Timed
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
    # Written where it was read: fresh memory would have the operating system's work in the time.
    held = [jnp.asarray(rng.standard_normal(copied, np.float32))]
    moved = 2 * held[0].nbytes
    flip = jax.jit(lambda x: -x, donate_argnums=0).lower(held[0]).compile()

    def copy(i: int) -> jax.Array:
        held[0] = flip(held[0])
        return held[0]

    bandwidth = moved / _seconds(copy)
    rates = {}
    for dtype in dtypes:
        a = jnp.asarray(rng.standard_normal((side, side), np.float32), dtype)
        product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest")).lower(a).compile()
        rates[dtype] = 2 * side**3 / _seconds(functools.partial(_again, product, a))
    return Limits(rates, bandwidth, MEASURED)


def _again(program: Any, x: jax.Array, place: int) -> jax.Array:
    return program(x)


def _seconds(call: Callable[[int], jax.Array]) -> float:
    """Of the fastest sample: a limit is what the machine can do, not what it mostly did."""
    timed = Timed(call, 1)
    timed.warm_up(0.05)
    for _ in range(7):
        timed.sample()
    return min(timed.seconds)


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
