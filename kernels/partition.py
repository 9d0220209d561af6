"""How a kernel is divided over a mesh: along the batch, by `shard_map`.

XLA partitions its own operations, but it cannot look into a kernel: Mosaic refuses to be partitioned, and a Triton
call would have its operands gathered whole onto every device. So a kernel that is traced while a mesh is in effect
(`jax.set_mesh`, `jax.sharding.use_abstract_mesh`) runs on each device for that device's part of the batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from kernels import compat

# The axes of a mesh that divide batches, and the one that divides tokens.
BATCH_AXES = ("data", "fsdp")
SEQUENCE_AXIS = "sequence"


def automatic_axes():
    """The axes of the mesh in effect that XLA would partition over, with their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    return {n: mesh.shape[n] for n, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto}


def refusal(batch: int) -> str | None:
    """Why a kernel cannot be divided as the mesh in effect asks, or None where it can."""
    axes = automatic_axes()
    ways = math.prod(axes.get(name, 1) for name in BATCH_AXES)
    if batch % ways:
        return f"a batch of {batch} does not divide over the {ways} devices of the mesh's {' and '.join(BATCH_AXES)}"
    if axes.get(SEQUENCE_AXIS, 1) > 1:
        return f"the mesh's axis {SEQUENCE_AXIS} divides the tokens over {axes[SEQUENCE_AXIS]} devices"
    return None


def unknown_mesh(platforms: Sequence[str]) -> str | None:
    """Why it is not known over which devices the program will be divided, or None where it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if "tpu" in platforms and mesh.empty and jax.default_backend() == "tpu" and jax.device_count() > 1:
        return f"there are {jax.device_count()} TPUs and no mesh in effect; call it under jax.set_mesh(mesh)"
    return None


def along_batch(run: Callable[..., Any], batched: Sequence[bool], arrays: Sequence[Any]) -> Any:
    """`run(*arrays)` on every device for its part of the batch.

    Args:
        run: a function of arrays whose results all have the batch first.
        batched: for each array whether the batch is its first axis; one with a first axis of size 1 in a larger
            batch is the same for all of it.
        arrays: operands, or None; the first of them has the batch.
    """
    axes = automatic_axes()
    if math.prod(axes.values()) == 1:
        return run(*arrays)
    batch = arrays[0].shape[0]
    rows = PartitionSpec(tuple(name for name in BATCH_AXES if name in axes))

    def spec(array, is_batched):
        shared = batch > 1 and any(leaf.shape[0] == 1 for leaf in jax.tree.leaves(array) if is_batched)
        return rows if is_batched and not shared else PartitionSpec()

    # Over every axis, so that inside nothing is left for XLA to partition. Interpreted, a kernel does not say over
    # which axes its values vary.
    return jax.shard_map(
        run,
        in_specs=tuple(map(spec, arrays, batched)),
        out_specs=rows,
        axis_names=set(axes),
        check_vma=not compat.interpreting(),
    )(*arrays)
