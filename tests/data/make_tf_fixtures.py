"""Writes the checkpoints in `tf/` with TensorFlow (2.21 was used), and what it reads from them as `tf/*.npz`.

    python tests/data/make_tf_fixtures.py

Of the checkpoints, `saver` is one of TensorFlow 1, `objects` one of TensorFlow 2, and `sharded` one that three hosts
wrote together. numpy stores bfloat16 as two bytes of unknown type.
"""

from pathlib import Path

import numpy as np

DIRECTORY = Path(__file__).parent / "tf"


def wave(*shape: int) -> np.ndarray:
    return np.sin(np.arange(np.prod(shape), dtype=np.float64)).reshape(shape)


def part(shape: list[int], dtype: object, partition_info: object) -> np.ndarray:
    """Initialises one part of a partitioned variable."""
    whole = np.round(100 * wave(*partition_info.full_shape)).astype(np.int8)
    return whole[tuple(slice(start, start + n) for start, n in zip(partition_info.var_offset, shape))]


def saver(directory: Path) -> str:
    import tensorflow as tf

    v1 = tf.compat.v1
    arrays = {
        "global_step": np.array(7, np.int64),
        "maxvit/block_00_00/attention/q/weight": wave(8, 2, 4).astype(np.float32),
        "maxvit/block_00_00/attention/q/weight/ExponentialMovingAverage": wave(8, 2, 4).astype(np.float32) / 2,
        "maxvit/block_00_00/attention/relative_bias": wave(2, 3, 3),
        "maxvit/block_00_00/mbconv/pre_norm/moving_mean": wave(8).astype(np.float32),
        "maxvit/block_00_00/mbconv/pre_norm/moving_variance": wave(8).astype(np.float16),
        "types/int32": np.arange(-3, 3, dtype=np.int32),
        "types/int16": np.arange(-3, 3, dtype=np.int16),
        "types/int8": np.arange(-3, 3, dtype=np.int8),
        "types/uint8": np.arange(250, 256, dtype=np.uint8),
        "types/bool": np.array([[True, False, True]]),
        "types/complex64": wave(3).astype(np.complex64) * 1j,
        "types/empty": np.zeros((0, 3), np.float32),
        "types/scalar": np.array(-2.5, np.float32),
    }
    with tf.Graph().as_default(), v1.Session() as session:
        for name, value in arrays.items():
            v1.get_variable(name, initializer=value, use_resource=True)
        v1.get_variable("types/bfloat16", initializer=tf.cast(wave(5), tf.bfloat16))
        v1.get_variable("types/string", initializer=np.array([b"not", b"numbers"]), use_resource=False)
        # Starts and lengths take one, two and three bytes in the keys of slices.
        for name, shape, parts in (("rows", (100, 2), 3), ("long", (9000,), 12), ("columns", (3, 70), 2)):
            v1.get_variable(
                f"parts/{name}",
                shape,
                tf.int8,
                initializer=part,
                partitioner=v1.fixed_size_partitioner(parts, axis=int(name == "columns")),
            )
        session.run(v1.global_variables_initializer())
        writer = v1.train.Saver(save_relative_paths=True)
        return writer.save(session, str(directory / "model.ckpt"), global_step=7, write_meta_graph=False)


def objects(directory: Path) -> str:
    import tensorflow as tf

    layer = tf.Module()
    layer.kernel = tf.Variable(wave(3, 4).astype(np.float32))
    layer.bias = tf.Variable(tf.cast(wave(4), tf.bfloat16))
    model = tf.train.Checkpoint(layer=layer, blocks=[tf.Variable(wave(2)), tf.Variable([True, False])])
    manager = tf.train.CheckpointManager(model, str(directory), max_to_keep=1)
    return manager.save()


def sharded(directory: Path) -> str:
    import tensorflow as tf

    whole = wave(6, 5).astype(np.float32)
    hosts = (
        {"a/kernel": ("", wave(4, 4).astype(np.float32)), "table": ("6 5 0,2:-", whole[:2])},
        {"b/kernel": ("", wave(2, 3)), "table": ("6 5 2,4:0,3", whole[2:, :3])},
        {"b/step": ("", np.array(3, np.int64)), "table": ("6 5 2,4:3,2", whole[2:, 3:])},
    )
    shards = []
    for number, tensors in enumerate(hosts):
        shard = tf.raw_ops.ShardedFilename(basename=str(directory / "part"), shard=number, num_shards=len(hosts))
        slices, values = zip(*tensors.values())
        tf.raw_ops.SaveV2(prefix=shard, tensor_names=list(tensors), shape_and_slices=list(slices), tensors=list(values))
        shards.append(shard)
    prefix = str(directory / "model.ckpt")
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=tf.stack(shards), destination_prefix=prefix)
    return prefix


def main() -> None:
    import tensorflow as tf

    for write in (saver, objects, sharded):
        directory = DIRECTORY / write.__name__
        directory.mkdir(parents=True, exist_ok=True)
        reader = tf.train.load_checkpoint(write(directory))
        read = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
        numbers = {name: np.asarray(value) for name, value in sorted(read.items()) if not is_string(value)}
        np.savez_compressed(DIRECTORY / f"{write.__name__}.npz", **numbers)


def is_string(value: object) -> bool:
    return isinstance(value, bytes) or np.asarray(value).dtype.kind in "OS"


if __name__ == "__main__":
    main()
