"""Set before jax is imported: the tests run on the CPU with eight pretended devices."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")

from jaxtyping import install_import_hook

install_import_hook(("kernels", "zoo", "train"), "beartype.beartype")
