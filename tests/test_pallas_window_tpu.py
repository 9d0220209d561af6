"""The kernels of window attention compile for TPUs and move less than the XLA form: needs libtpu, no TPU."""

import time

import jax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels import aot, window_attention
from tests.tpu_child import in_tpu_process

TOPOLOGIES = ("v5e:2x2", "v6e:2x2", "v5p:2x2x1")
# Maps of DaViT-T, ragged at 256 pixels, and of MaxViT-T, each with its side, width and heads: bfloat16, batch 128.
SHAPES = {
    "davit 1": dict(side=56, width=96, heads=3, pad="array"),
    "davit 4": dict(side=7, width=768, heads=24, pad="array"),
    "davit ragged": dict(side=32, width=192, heads=6, pad="array"),
    "maxvit 1 block": dict(side=56, width=64, heads=2, bias=True),
    "maxvit 1 grid": dict(side=56, width=64, heads=2, bias=True, partition="grid"),
    "maxvit 3 grid": dict(side=14, width=256, heads=8, bias=True, partition="grid"),
}
# Windows, heads and maps at the ends of what is served, in float32 too; batch 8.
OTHERS = {
    "one window of 1024": dict(side=32, width=64, heads=2, window=32, pad="mask"),
    "windows of 4": dict(side=8, width=64, heads=2, window=2),
    "windows of 256": dict(side=32, width=64, heads=2, window=16, bias=True),
    "heads of 128": dict(side=14, width=256, heads=2, bias=True),
    "heads of 80": dict(side=14, width=240, heads=3, pad="mask"),
    "rows of a large map": dict(side=168, width=96, heads=3, bias=True, partition="grid"),
    "rows of a ragged map": dict(side=170, width=96, heads=3, pad="mask"),
    "float32": dict(side=14, width=96, heads=3, dtype="float32"),
}


def measure(
    topology,
    implementation,
    side,
    width,
    heads,
    batch,
    window=7,
    partition="block",
    bias=False,
    pad=None,
    dtype="bfloat16",
):
    """Bytes moved, bytes of temporary memory and seconds of compilation of the output's gradient."""
    mesh = Mesh(aot.tpu_devices(topology)[:1], ("data",))

    def of(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    arrays = (
        of(batch, side, side, 3 * width),
        of(heads, window**2, window**2, dtype="float32") if bias else None,
        of(3 * width) if pad == "array" else None,
    )

    def run(qkv, bias, value):
        return window_attention(
            qkv,
            num_heads=heads,
            window=(window, window),
            partition=partition,
            bias=bias,
            pad="mask" if pad == "mask" else value,
            implementation=implementation,
        )

    def gradient(direction, *arrays):
        out, pull = jax.vjp(run, *arrays)
        return out, pull(direction)

    began = time.monotonic()
    compiled = jax.jit(gradient).lower(of(batch, side, side, width), *arrays).compile()
    seconds = time.monotonic() - began
    return compiled.cost_analysis()["bytes accessed"], compiled.memory_analysis().temp_size_in_bytes, seconds


def compile_all():
    found = {}
    for topology in TOPOLOGIES:
        for name, shape in SHAPES.items():
            found[f"{topology} {name}"] = measure(topology, "pallas_tpu", **shape, batch=128)
        for name, shape in OTHERS.items():
            found[f"{topology} {name}"] = measure(topology, "pallas_tpu", **shape, batch=8)
    xla = {name: measure("v5e:2x2", "xla", **shape, batch=128) for name, shape in SHAPES.items()}
    return found, xla


@pytest.fixture(scope="module")
def compiled():
    return in_tpu_process(compile_all, seconds=900)


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_every_shape_compiles_for_every_generation(compiled):
    found, _ = compiled
    assert len(found) == len(TOPOLOGIES) * (len(SHAPES) + len(OTHERS))


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("name", SHAPES)
def test_less_is_moved_and_held_than_by_the_xla_form(compiled, name):
    found, xla = compiled
    moved, held, _ = found[f"v5e:2x2 {name}"]
    assert moved < 0.5 * xla[name][0] and held < 0.7 * xla[name][1]
