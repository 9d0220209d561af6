"""Compilation for TPUs that are not there: libtpu (the extra `plan`) needs no TPU for it."""

import contextlib
import fcntl
import importlib.util
import os
import pathlib
import tempfile
from typing import Any

import jax
from jax.experimental import topologies

# libtpu serves one process at a time and ends a second one with an error; held until this process ends.
_LOCK = pathlib.Path(tempfile.gettempdir()) / f"attention-zoo-libtpu-{os.getuid()}.lock"
_held: list[Any] = []


def tpu_devices(topology: str) -> list[Any]:
    """The devices of a TPU slice, to compile for: `jit(...).lower(...).compile()` with shardings over them.

    The first call waits until no other process of this user compiles for TPUs, and keeps them waiting until this
    process ends.

    Args:
        topology: generation and shape, such as `"v5e:2x2"`, `"v6e:16x16"` or `"v5p:4x4x4"`.

    Raises:
        ValueError: for a topology that libtpu does not know.
        RuntimeError: if libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError("compiling for a TPU needs libtpu: pip install 'attention-zoo[plan]'")
    jax.devices()
    if not _held:
        lock = open(_LOCK, "w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        _held.append(lock)
    with _environment(TPU_SKIP_MDS_QUERY="1", XLA_FLAGS=None):
        try:
            return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(f"topology {topology!r}: {error}; such as v5e:2x2 or v6e:4x4 it knows") from error


@contextlib.contextmanager
def _environment(**values: str | None):
    """Environment variables for the block; None unsets one. libtpu ends a process for flags that it does not know."""
    before = {name: os.environ.get(name) for name in values}
    try:
        _set(values)
        yield
    finally:
        _set(before)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
