"""The leaves of a state by name: what a checkpoint can hold, and whether one fits the state that asks for it."""

from typing import Any

import jax


def check_storable(state: Any) -> None:
    """Checks that a checkpoint can hold `state`.

    Raises:
        TypeError: a leaf is not a jax array.
        ValueError: a leaf has no elements.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not isinstance(leaf, jax.Array):
            raise TypeError(
                f"state must hold jax arrays only, but {_name(path)} is a {type(leaf).__name__}; "
                f"convert it with jnp.asarray"
            )
        if leaf.size == 0:
            raise ValueError(f"state must hold arrays with elements, but {_name(path)} has shape {leaf.shape}")


def abstract(tree: Any) -> Any:
    """Returns `tree` as `jax.ShapeDtypeStruct` with a sharding each; the default device's where a leaf has none.

    Raises:
        TypeError: a leaf has no shape and dtype.
    """

    def convert(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(
                f"abstract_state must hold jax.ShapeDtypeStruct or arrays, but {_name(path)} is a {type(leaf).__name__}"
            )
        sharding = getattr(leaf, "sharding", None)
        if sharding is None:
            sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(convert, tree)


def describe(tree: Any) -> dict[str, str]:
    """Returns dtype and shape by path, such as `{"params/head/bias": "float32[10]"}`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def differences(saved: dict[str, str], expected: dict[str, str]) -> str:
    """Returns in words how two results of `describe` differ, empty if they do not."""
    groups = {
        "only in the checkpoint": sorted(saved.keys() - expected.keys()),
        "not in the checkpoint": sorted(expected.keys() - saved.keys()),
        "different": [
            f"{name} (saved {saved[name]}, expected {expected[name]})"
            for name in sorted(expected.keys() & saved.keys())
            if expected[name] != saved[name]
        ],
    }
    return "; ".join(f"{title}: {_shorten(names)}" for title, names in groups.items() if names)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _shorten(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
