"""Set before jax is imported: the tests run on the CPU with eight pretended devices."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")

import pytest
from jaxtyping import install_import_hook

install_import_hook(("kernels", "zoo", "train"), "beartype.beartype")


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A checkpoint directory with two good steps, not to be changed."""
    from tests.checkpoints import save_steps, small_state

    directory = tmp_path_factory.mktemp("pristine") / "run"
    save_steps(directory, (1, 2), small_state)
    return directory
