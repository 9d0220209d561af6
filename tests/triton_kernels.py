"""Triton kernels compiled without a GPU: by Triton's own compiler and NVIDIA's assembler, which its wheel brings."""

import dataclasses
import os
import pathlib
import re
import subprocess
import tempfile

import jax
import numpy as np
from jax._src.interpreters import mlir
from jax._src.lib import triton as jaxlib_triton
from jax.sharding import AbstractDevice, AbstractMesh
from jaxlib.mlir import ir

from kernels import compat

# Ampere's data centre chip; Ampere and Ada with less shared memory; Hopper.
ARCHITECTURES = {80: "sm_80", 86: "sm_86", 89: "sm_89", 90: "sm_90a"}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One kernel as it would run: what a program of it takes of a multiprocessor.

    Attributes:
        name: the kernel's.
        architecture: a key of `ARCHITECTURES`.
        shared: bytes of shared memory.
        registers: per thread, of 255 at most.
        spilled: bytes per thread that did not fit in registers, written and read again.
    """

    name: str
    architecture: int
    shared: int
    registers: int
    spilled: int


def hopper():
    """A context in which programs can be lowered for CUDA on a machine without a GPU."""
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def lowered_for_cuda(function, *arrays):
    with hopper(), compat.lowering_triton():
        return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",))


def assert_model_has_its_kernels(model, x, kernel: str) -> None:
    """A model's gradient lowered for a platform holds its kernels, and interpreted they give what XLA gives.

    Args:
        kernel: the name of one, on GPUs.
    """
    variables = jax.jit(model.init)(jax.random.key(0), x)

    def loss(params):
        return model.apply(variables | {"params": params}, x).sum()

    program = jax.jit(jax.value_and_grad(loss))
    texts = {}
    for platform in ("tpu", "cuda", "cpu"):
        with compat.lowering_triton(), hopper():
            texts[platform] = program.trace(variables["params"]).lower(lowering_platforms=(platform,)).as_text()
    assert "tpu_custom_call" in texts["tpu"] and kernel in texts["cuda"]
    assert "custom_call @tpu" not in texts["cpu"] and "triton" not in texts["cpu"]
    expected = np.asarray(model.apply(variables, x), np.float64)
    for implementation in ("pallas_tpu", "pallas_triton"):
        with compat.interpret():
            found = jax.jit(model.clone(implementation=(implementation, "xla")).apply)(variables, x)
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=1e-5, rtol=1e-5)


def compiled_by_triton(function, *arrays, architectures=tuple(ARCHITECTURES)) -> list[Compiled]:
    """All Triton kernels of a function, compiled for each of the architectures."""
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TRITON_CACHE_DIR"] = scratch
        for i, call in enumerate(_calls(lowered_for_cuda(function, *arrays).compiler_ir().operation)):
            file = pathlib.Path(scratch) / f"{i}.ttir"
            file.write_text(_text(call["ir"].value_bytes))
            options = {name: call[name].value for name in ("num_warps", "num_stages")}
            found += [_compiled(call["name"].value, file, number, options) for number in architectures]
    return found


def _calls(operation):
    """The settings of every Triton call inside an operation, each kernel once."""
    seen = set()
    for call in _all_calls(operation):
        key = str(call)
        if key not in seen:
            seen.add(key)
            yield call


def _all_calls(operation):
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                if inner.operation.name == "stablehlo.custom_call" and "triton" in str(
                    inner.attributes["call_target_name"]
                ):
                    yield inner.attributes["mhlo.backend_config"]
                yield from _all_calls(inner.operation)


def _text(bytecode: bytes) -> str:
    """The kernel as text: the two libraries' MLIR differ, so that one cannot read the other's bytecode."""
    with mlir.make_ir_context() as context:
        jaxlib_triton.dialect.register_dialect(context, load=True)
        return ir.Module.parse(bytecode).operation.get_asm(enable_debug_info=False)


def _compiled(name: str, file: pathlib.Path, architecture: int, options: dict[str, int]) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = triton.compile(str(file), target=GPUTarget("cuda", architecture, 32), options=options)
    assembly = file.with_suffix(f".{architecture}.ptx")
    assembly.write_text(kernel.asm["ptx"])
    assembler = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas-blackwell"
    command = [str(assembler), "-v", f"--gpu-name={ARCHITECTURES[architecture]}", str(assembly), "-o", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", said)
    (spilled,) = re.findall(r"(\d+) bytes spill stores", said)
    return Compiled(name, architecture, kernel.metadata.shared, int(registers), int(spilled))
