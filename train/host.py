"""Settings of the process that trains."""

import ctypes
import os
import pathlib
import sys

import jax
from etils import epath

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Lets malloc keep what is freed instead of giving it back to the system.

    XLA allocates a program's temporaries anew at every call. glibc maps each large one, and the system clears
    its pages when they are first touched: on two cores that was half of a small model's step. What is freed
    is now used again, at the price of a process that stays as large as it once was. To be called before JAX's
    backend starts its threads, which would have arenas of their own by then.

    Returns:
        Whether the C library took the settings; only glibc knows them.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # One arena: those of other threads map what is over 64 MB whatever the settings. -1 is "never" to glibc.
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1))
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in settings)


def memory() -> dict[str, int]:
    """Bytes that this process and the fullest of its devices hold, as far as the system and the devices tell.

    `memory/host` is the resident set (Linux), `memory/device` what is allocated now, `memory/device_peak` the most
    since the start.
    """
    found = {}
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        found["memory/host"] = pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        pass
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    for name, key in (("device", "bytes_in_use"), ("device_peak", "peak_bytes_in_use")):
        if held := [each[key] for each in stats if key in each]:
            found[f"memory/{name}"] = max(held)
    return found


def cache_compiled_programs() -> None:
    """Keeps compiled programs in `~/.cache/attention-zoo`, unless `JAX_COMPILATION_CACHE_DIR` says where."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(epath.Path("~/.cache/attention-zoo").expanduser()))
