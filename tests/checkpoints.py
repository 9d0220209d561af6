"""States to save, and short ways to save and restore them."""

import pathlib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax

from train.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parent.parent


@flax.struct.dataclass
class State:
    params: Any
    opt_state: Any
    step: Any
    key: Any
    raw_key: Any
    ema: Any = None


def small_state(step: int) -> State:
    """Random bits, NaNs with payloads among them, in every dtype that a state may hold."""
    rng = np.random.default_rng(step)

    def bits(shape, dtype):
        dtype = np.dtype(dtype)
        return jnp.asarray(np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape))

    params = {
        "dense": {"kernel": bits((8, 16), np.float32), "bias": bits((8,), ml_dtypes.bfloat16)},
        "blocks": [bits((16,), np.int8), bits((8, 3), np.uint32)],
        "empty": {},
    }
    return State(
        params=params,
        opt_state=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init({"w": jnp.ones((8, 2))}),
        step=jnp.int32(step),
        key=jax.random.split(jax.random.key(step), 3),
        raw_key=jax.random.PRNGKey(step),
    )


def tiny(step: int) -> dict[str, jax.Array]:
    return {"w": jnp.full((3,), step, jnp.float32)}


def plain(tree):
    """Key arrays as their data, so that bits can be compared."""

    def convert(leaf):
        return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    return jax.tree.map(convert, tree)


def open_checkpoints(directory, keep=9, **options) -> Checkpoints:
    return Checkpoints(directory, every_steps=1, keep=keep, **options)


def save_steps(directory, steps, make=tiny, keep=9):
    with open_checkpoints(directory, keep) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, make(step), data={"example": step}, config={"seed": 1})


def restore(directory, like=None, step=None):
    with open_checkpoints(directory) as checkpoints:
        return checkpoints.restore(tiny(0) if like is None else like, step)


def names_in(directory) -> list[str]:
    return sorted(path.name for path in pathlib.Path(directory).iterdir())


def files_in(directory) -> list[pathlib.Path]:
    return sorted(path for path in pathlib.Path(directory).rglob("*") if path.is_file())
