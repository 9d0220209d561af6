"""Settings of the process that trains."""

import ctypes
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


def cache_compiled_programs() -> None:
    """Keeps compiled programs in `~/.cache/attention-zoo`, unless `JAX_COMPILATION_CACHE_DIR` says where."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(epath.Path("~/.cache/attention-zoo").expanduser()))
