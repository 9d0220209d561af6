"""What a result needs to be believed: where, when, with what, and how."""

import datetime
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax

from kernels.bench import errors, peers
from kernels.bench.limits import Limits
from kernels.bench.rows import Row
from kernels.bench.text import amount


def meta(device: Any, limits: Limits, suite: str, size: str, repeats: int, rows: Sequence[Row]) -> dict[str, Any]:
    """Versions, device, commit, date and method of a run."""
    methods = dict.fromkeys(row.method for row in rows if row.method)
    rates = ", ".join(f"{amount(rate, 'FLOP/s')} {dtype}" for dtype, rate in limits.flops.items())
    bounds = {row.dtype: (row.error_bound, row.gradient_bound) for row in rows if row.error_bound is not None}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": " ".join(sys.argv),
        "suite": suite,
        "size": size,
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "host": host(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "jax": metadata.version("jax"),
        "jaxlib": metadata.version("jaxlib"),
        "numpy": metadata.version("numpy"),
        "peers": peers.versions(),
        "repeats": repeats,
        "method": " or ".join(methods) or "nothing was timed",
        "limits": f"{amount(limits.bandwidth, 'B/s')}, {rates} ({limits.source})",
        "bandwidth": limits.bandwidth,
        "rates": limits.flops,
        "error_bounds": "; ".join(
            f"{dtype}: {out:g} in outputs, {gradient:g} in gradients"
            for dtype, (out, gradient) in (bounds or errors.BOUNDS).items()
        ),
        "float32_products": "of full precision",
        "compilation_cache": jax.config.jax_compilation_cache_dir,
    }


def host() -> str:
    """The processor's name."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit that this file is of, `+` if files have changed since; None outside a repository."""
    here = pathlib.Path(__file__).parent

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(("git", *command), cwd=here, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    return head + "+" if git("status", "--porcelain", "--untracked-files=no") else head
