"""Set before jax is imported: the tests run on the CPU with eight pretended devices."""

import os
from importlib import metadata

os.environ["JAX_PLATFORMS"] = "cpu"
# Most programs here run once: without LLVM's optimizations they compile in half the time, and without the fusion
# emitters that jax 0.10 has in three fifths of that. With XLA_FLAGS set, also to nothing, they compile as users do.
os.environ["XLA_FLAGS"] = os.environ.get(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_use_fusion_emitters=false" * metadata.version("jaxlib").startswith("0.10."),
)
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"

import pytest
from jaxtyping import install_import_hook

install_import_hook(("kernels", "zoo", "train"), "beartype.beartype")

pytest_plugins = ("tests.toy_family",)


@pytest.fixture
def float64():
    """64-bit numbers, in the test and in what it compiles."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A checkpoint directory with two good steps, not to be changed."""
    from tests.checkpoints import save_steps, small_state

    directory = tmp_path_factory.mktemp("pristine") / "run"
    save_steps(directory, (1, 2), small_state)
    return directory


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """A program is compiled once for all workers and their children; that saves a sixth of the time."""
    import jax

    from train import host

    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent
    directory = str(directory / "compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", directory)
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setattr(host, "keep_freed_memory", lambda: True)
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        yield
