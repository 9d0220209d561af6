"""A run that saves every step, to be killed: `python -m tests.checkpoint_child DIRECTORY [--no-rename]`.

Or one of the processes of a distributed run: `... DIRECTORY --process I --coordinator ADDRESS`.
"""

import argparse
import itertools
import os
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from train.checkpoint import Checkpoints

SHAPE = (256, 1024)


def make_arrays(step):
    """The state of a step as numpy: random bits, NaNs with payloads among them."""
    random = np.random.Generator(np.random.Philox(step))
    return {
        "params": {
            "float": random.integers(0, 2**32, SHAPE, dtype=np.uint32).view(np.float32),
            "bfloat": random.integers(0, 2**16, SHAPE, dtype=np.uint16).view(ml_dtypes.bfloat16),
        },
        "count": np.array(step, np.int32),
    }


def same_bits(tree, expected):
    """Whether two trees have the same structure, shapes, dtypes and bits."""
    if jax.tree.structure(tree) != jax.tree.structure(expected):
        return False
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected))]
    return all(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)


def forbid_rename():
    """Makes the disk behave as a file system that cannot rename."""

    def refuse(*args, **kwargs):
        raise OSError("no rename here")

    os.rename = os.replace = refuse


def save_until_killed(directory):
    checkpoints = Checkpoints(directory, every_steps=1, keep=2)
    leftovers = [path.name for path in pathlib.Path(directory).iterdir() if not path.name.isdecimal()]
    restored = checkpoints.restore(jax.tree.map(jnp.asarray, make_arrays(0)))
    first = 0 if restored is None else restored.step
    assert restored is None or same_bits(restored.state, make_arrays(first))
    assert restored is None or restored.data == {"example": first}
    print("restored", first, "leftovers", len(leftovers), flush=True)
    for step in itertools.count(first + 1):
        state = jax.tree.map(jnp.asarray, make_arrays(step))
        checkpoints.save(step, state, data={"example": step}, config={})
        print("started", step, flush=True)


def save_together(directory, process, coordinator):
    jax.distributed.initialize(coordinator, 2, process)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def place(array):
        sharding = rows if array.ndim else whole
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    with Checkpoints(directory, every_steps=1, keep=2) as checkpoints:
        restored = checkpoints.restore(jax.tree.map(place, make_arrays(0)))
        first = 0 if restored is None else restored.step
        if restored is not None:
            for array, expected in zip(jax.tree.leaves(restored.state), jax.tree.leaves(make_arrays(first))):
                for shard in array.addressable_shards:
                    assert np.asarray(shard.data).tobytes() == expected[shard.index].tobytes()
        for step in (first + 1, first + 2):
            checkpoints.save(step, jax.tree.map(place, make_arrays(step)), data={}, config={})
    print("restored", first, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--no-rename", action="store_true")
    parser.add_argument("--process", type=int)
    parser.add_argument("--coordinator")
    given = parser.parse_args()
    if given.no_rename:
        forbid_rename()
    if given.process is None:
        save_until_killed(given.directory)
    else:
        save_together(given.directory, given.process, given.coordinator)
