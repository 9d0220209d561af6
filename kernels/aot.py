"""Programs for devices that are not there: compiled for TPUs by libtpu (the extra `plan`), lowered for GPUs."""

import contextlib
import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice


def tpu_devices(topology: str) -> list[Any]:
    """The devices of a TPU slice, to compile for: `jit(...).lower(...).compile()` with shardings over them.

    Args:
        topology: generation and shape, such as `"v5e:2x2"`, `"v6e:16x16"` or `"v5p:4x4x4"`, or that of several slices
            with their number before it, `"2*v5e:16x16"`.

    Raises:
        ValueError: for a topology that libtpu does not know.
        RuntimeError: if libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError("compiling for a TPU needs libtpu: pip install 'attention-zoo[plan]'")
    jax.devices()
    count, star, name = topology.rpartition("*")
    if star and not (count.isdecimal() and int(count) > 1):
        raise ValueError(f"topology {topology!r}: the number of slices goes before the star, as in 2*v5e:16x16")
    slices = {"num_slices": int(count)} if star else {}
    # Without a host's name and kind libtpu complains at length on stderr; it makes the topology that is asked for.
    host = dict(TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-4")
    host = {name: os.environ.get(name, value) for name, value in host.items()}
    # Only one process may use a TPU; to compile for one there may be as many as one likes.
    with _environment(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", XLA_FLAGS=None, **host):
        try:
            return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **slices).devices)
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(f"topology {topology!r}: {error}; such as v5e:2x2 or v6e:4x4 it knows") from error


# Name in a topology -> `jax.Device.device_kind`, streaming multiprocessors.
GPUS = {
    "a100": ("NVIDIA A100-SXM4-80GB", 108),
    "a100-40gb": ("NVIDIA A100-SXM4-40GB", 108),
    "h100": ("NVIDIA H100 80GB HBM3", 132),
    "h200": ("NVIDIA H200", 132),
    "l4": ("NVIDIA L4", 58),
}


def gpu_devices(topology: str) -> tuple[AbstractDevice, int]:
    """What GPUs of a kind look like while tracing, and how many: to lower for, as nothing compiles without one.

    Args:
        topology: one of `GPUS` and a number, such as `"h100:8"`.

    Raises:
        ValueError: for another one.
    """
    name, _, count = topology.partition(":")
    if name.lower() not in GPUS or not count.isdecimal() or int(count) < 1:
        raise ValueError(f"topology {topology!r}: a kind of GPU and how many, such as h100:8; kinds: {', '.join(GPUS)}")
    kind, cores = GPUS[name.lower()]
    return AbstractDevice(device_kind=kind, num_cores=cores, platform="gpu"), int(count)


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
