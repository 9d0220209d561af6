"""The device mesh, and where parameters, optimizer state and batches lie on it."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from kernels.dispatch import only_for
from kernels.partition import BATCH_AXES, SEQUENCE_AXIS

AXES = ("data", "fsdp", "tensor", "sequence")
Rules = Sequence[tuple[str, tuple[str | None, ...]]]


def mesh_shape(sizes: dict[str, int], devices: int) -> tuple[int, ...]:
    """Devices along each of `AXES`.

    Args:
        sizes: by axis; one of them may be -1 and takes what is left.
        devices: how many there are.

    Raises:
        ValueError: if the sizes do not multiply to the number of devices.
    """
    shape = [sizes[axis] for axis in AXES]
    rest = math.prod(n for n in shape if n != -1)
    if shape.count(-1) > 1 or rest < 1 or min(shape) < -1:
        raise ValueError(f"mesh sizes are positive, and at most one is -1 (the rest); got {dict(zip(AXES, shape))}")
    if -1 in shape and devices % rest == 0:
        shape[shape.index(-1)] = devices // rest
    if math.prod(shape) != devices:
        raise ValueError(
            f"mesh {dict(zip(AXES, shape))} takes {abs(math.prod(shape))} devices, there are {devices}; "
            "set one of config.mesh.{data,fsdp,tensor,sequence} to -1 to take what is left" + _would_do(shape, devices)
        )
    return tuple(shape)


def _would_do(shape: Sequence[int], devices: int) -> str:
    """Which size of one axis would make the mesh take all devices."""
    others = [math.prod(abs(n) for n in shape) // abs(n) for n in shape]
    known = [f"{axis}={devices // n}" for axis, n in zip(AXES, others) if devices % n == 0]
    return f"; with the others as they are, {' or '.join(known)} would do" if known else ""


def make_mesh(sizes: dict[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `data`, `fsdp`, `tensor` and `sequence`.

    Of devices in several slices, which a slower network joins, `data` goes across slices first, then `fsdp`; what lies
    along `tensor` and `sequence` is within one.

    Args:
        sizes: as of `mesh_shape`.
        devices: None means all of them.

    Raises:
        ValueError: as `mesh_shape` does, and if `data` and `fsdp` do not divide over the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape, types = mesh_shape(sizes, len(devices)), (AxisType.Auto,) * len(AXES)
    count = len({getattr(device, "slice_index", 0) for device in devices})
    if count > 1:
        across = _across(shape, count)
        within = [size // ways for size, ways in zip(shape, across)]
        placed = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
        return Mesh(placed, AXES, axis_types=types)
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError:
        # No product of the torus' own axes gives these sizes, so that one of its axes has to be cut in two.
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(placed, AXES, axis_types=types)


def _across(shape: Sequence[int], count: int) -> tuple[int, ...]:
    """Into how many slices each of `AXES` is cut, if there are `count` of them."""
    data = math.gcd(shape[0], count)
    if shape[1] % (count // data):
        raise ValueError(
            f"mesh {dict(zip(AXES, shape))} does not divide over {count} slices: config.mesh.data (or data times fsdp) "
            f"must be a multiple of {count}"
        )
    return (data, count // data, 1, 1)


def on_mesh(mesh: Mesh | AbstractMesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, traced for the mesh: each device's kernels for its part, and of its platform alone."""
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else mesh.abstract_device

    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), only_for(device.platform):
            return function(*args)

    return traced


def path_of(key_path) -> str:
    """A pytree key path as names joined by slashes."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key_path)


def param_spec(path: str, shape: tuple[int, ...], rules: Rules, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The partition of one leaf: the first rule whose regex matches its whole path.

    A dimension that its mesh axis does not divide stays whole.

    Raises:
        ValueError: if no rule matches, or the rule has another number of dimensions.
    """
    pattern, axes = next((rule for rule in rules if re.fullmatch(rule[0], path)), (None, None))
    if axes is None:
        raise ValueError(f"no sharding rule matches {path} {shape}; add one to the family's sharding_rules")
    if len(axes) != len(shape):
        raise ValueError(f"sharding rule {pattern!r} has {len(axes)} axes, but {path} has shape {shape}")
    fits = [axis if axis is None or size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape)]
    return PartitionSpec(*fits)


def state_shardings(state: Any, rules: Rules, mesh: Mesh | AbstractMesh) -> Any:
    """Shardings for a whole train state, as `jax.eval_shape` gives it.

    Leaves under `params` and `model_state` follow the rules. Everything shaped like a parameter and ending in
    its path (moments, averages) lies where the parameter lies; all else is replicated.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path({"params": state.params, **state.model_state})
    specs = {path_of(p): (leaf.shape, param_spec(path_of(p), leaf.shape, rules, mesh)) for p, leaf in flat}
    by_tail = {path.removeprefix("params/"): found for path, found in specs.items()}

    def place(key_path, leaf):
        parts = path_of(key_path).split("/")
        for start in range(len(parts)):
            tail = "/".join(parts[start:])
            shape, spec = specs.get(tail) or by_tail.get(tail) or (None, None)
            if shape == leaf.shape:
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, state)


def gathered(params: dict[str, Any], places: dict[str, Any]) -> dict[str, Any]:
    """The parameters as they are used: whole along `fsdp`.

    Left to itself XLA's partitioner (jax 0.10.2) moves activations wherever those are smaller than a kernel. On 256
    chips libtpu takes minutes for the routes of one such all-to-all. And with batches along `data` and `fsdp`, kernels
    along `fsdp` and `tensor` and all three axes larger than 1 the products of some linear layers came out wrong.

    By `train.compile --effort O0`, temporaries, bytes of collectives and traffic of a chip are, without this and with
    it, for davit_tiny on v5e:2x2 (fsdp 4, batch 64) 1233 and 1215 MiB, 504 and 170 MiB, 14.5 and 9.2 GiB; for
    biformer_tiny on v5e:4x4 (data 2, fsdp 4, tensor 2, batch 256) 1420 and 1408 MiB, 3787 and 638 MiB, 19.7 and 12.3.

    Args:
        params: parameters by name.
        places: shardings of these parameters, perhaps of others too.
    """
    places = {name: places[name] for name in params}
    if jax.tree.leaves(places)[0].mesh.shape["fsdp"] == 1:
        return params

    def used(place):
        return NamedSharding(place.mesh, PartitionSpec(*(None if axis == "fsdp" else axis for axis in place.spec)))

    return jax.lax.with_sharding_constraint(params, jax.tree.map(used, places))


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Batches are split along their first axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch(name: str, batch_size: int, mesh: Mesh | AbstractMesh, parts: int = 1) -> None:
    """Raises `ValueError` if a global batch does not split over the mesh (in `parts` accumulation steps)."""
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES) * parts
    if batch_size % ways:
        lower, upper = batch_size // ways * ways, -(-batch_size // ways) * ways
        near = f"{upper}" if lower == 0 else f"{lower} or {upper}"
        raise ValueError(
            f"{name} = {batch_size} does not divide over {ways // parts} devices of the batch axes"
            + (f" times accum_steps = {parts}" if parts > 1 else "")
            + f"; the nearest that does: {near}"
        )


def check_tokens(name: str, length: int | None, mesh: Mesh | AbstractMesh) -> None:
    """Raises `ValueError` if rows of so many tokens (None: of no tokens at all) do not split along `sequence`."""
    ways = mesh.shape[SEQUENCE_AXIS]
    if ways > 1 and length is None:
        raise ValueError(
            f"config.mesh.sequence = {ways} divides the tokens of a row, and {name} has no such rows; set it to 1 and "
            "let config.mesh.data, fsdp or tensor take the devices"
        )
    if ways > 1 and length % ways:
        near = " or ".join(str(n * ways) for n in (length // ways, length // ways + 1) if n)
        raise ValueError(
            f"{length} {name} do not divide over config.mesh.sequence = {ways} devices; the nearest that do: {near}"
        )


@functools.lru_cache
def batch_slices(sharding: NamedSharding, process: int | None = None) -> tuple[tuple[int, ...], int]:
    """Which of the slices of a global batch, one for every place along `data` and `fsdp`, lie on a process's devices.

    Processes whose devices differ along `tensor` and `sequence` alone have the same slices.

    Args:
        sharding: of batches, `batch_sharding`.
        process: its index; None means this one.

    Returns:
        Their numbers, ascending, and how many slices there are.
    """
    devices, process = sharding.mesh.devices, jax.process_index() if process is None else process
    split = devices.reshape(devices.shape[0] * devices.shape[1], -1)
    here = (number for number, row in enumerate(split) if any(device.process_index == process for device in row))
    return tuple(here), len(split)


def place_batch(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Rows of a global batch, of `batch_slices`, on this process's devices; tokens are also split along `sequence`.

    The targets of a row are its tokens shifted by one: they come so from the data, and none is missing at a split.
    """
    here, count = batch_slices(sharding)
    # Images are not: a mesh with such an axis is for sequences, see `check_tokens`.
    tokens = sharding
    if sharding.mesh.shape[SEQUENCE_AXIS] > 1:
        tokens = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec, SEQUENCE_AXIS))
    # With several processes jax takes this for an implicit transfer.
    with jax.transfer_guard("allow"):
        return {
            name: jax.make_array_from_process_local_data(
                tokens if rows.ndim > 1 else sharding, rows, (len(rows) // len(here) * count, *rows.shape[1:])
            )
            for name, rows in batch.items()
        }
