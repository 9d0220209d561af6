"""The only file that looks at the jax version or at what this jaxlib was built with."""

import jax


def has_cudnn() -> bool:
    """Whether a program traced here may contain cuDNN calls (jax checks the library while tracing)."""
    return jax.default_backend() == "gpu" and jax.devices()[0].platform == "gpu" and not _is_rocm()


def _is_rocm() -> bool:
    return "rocm" in getattr(jax.devices()[0].client, "platform_version", "").lower()
