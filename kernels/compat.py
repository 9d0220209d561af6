"""The only file that looks at the jax version or at what this jaxlib was built with."""

import jax


def has_cudnn() -> bool:
    """Whether a program traced here may contain cuDNN calls (jax checks the library while tracing)."""
    return jax.default_backend() == "gpu" and jax.devices()[0].platform == "gpu" and not _is_rocm()


def _is_rocm() -> bool:
    return "rocm" in getattr(jax.devices()[0].client, "platform_version", "").lower()


def match_varying(*arrays):
    """The arrays with the same varying manual axes: what a `custom_vjp` inside `shard_map` needs.

    jax does this by itself for the operands of its own primitives, and sums the gradient of the broadcast
    operand over the axes that were added; for a function with a gradient of its own it only raises.
    """
    varying = [jax.typeof(a).mat.varying for a in arrays]
    union = frozenset().union(*varying)
    return tuple(
        jax.lax.pcast(a, tuple(union - axes), to="varying") if union - axes else a for a, axes in zip(arrays, varying)
    )
