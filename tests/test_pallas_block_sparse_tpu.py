"""Block-sparse attention compiled for TPUs, at the shapes of BiFormer at 224 pixels."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels import aot, bilevel_attention
from tests.tpu_child import in_tpu_process

# Side of the map and of a region, regions that are listed, heads of 32 channels: the last stage has all its tokens.
STAGES = ((56, 8, 1, 2), (28, 4, 4, 4), (14, 2, 16, 8), (7, 1, 49, 16))


def compiled(sharding, stage, batch, dtype, soft):
    """Which kernels a program calls, the bytes that it moves, and those of its operands and results."""
    side, region, k, heads = stage
    options = dict(num_heads=heads, region=(region, region), implementation="pallas_tpu")

    def of(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=sharding)

    def run(qkv, indices, factors, cotangent):
        def attend(qkv, factors):
            return bilevel_attention(qkv, indices, route_weights=factors if soft else None, **options)

        out, back = jax.vjp(attend, qkv, factors)
        return out, back(cotangent)

    regions = (side // region) ** 2
    qkv, out = of(side, side, 96 * heads), of(side, side, 32 * heads)
    lists, factors = of(regions, k, dtype=jnp.int32), of(regions, k, dtype=jnp.float32)
    program = jax.jit(run).lower(qkv, lists, factors, out).compile()
    text = program.as_text()
    kernels = [name for name in ("forward", "gradient") if f"block_sparse_{name}" in text]
    edges = 2 * (qkv.size + out.size) * qkv.dtype.itemsize
    return kernels, program.cost_analysis()["bytes accessed"], edges


def compile_bilevel(topologies, stages, batch, dtypes, soft):
    found = []
    for topology in topologies:
        sharding = NamedSharding(Mesh(aot.tpu_devices(topology)[:1], ("x",)), PartitionSpec())
        found += [compiled(sharding, stage, batch, dtype, soft) for stage in stages for dtype in dtypes]
    return found


def check(found, soft=False):
    for kernels, moved, edges in found:
        assert kernels == ["forward", "gradient"]
        # Operands are read twice, and at the edge of the program XLA copies each into the layout of the kernels and
        # back, which makes about four times the edges; with route weights it has been up to eleven times.
        assert moved < (12 if soft else 8) * edges


@pytest.mark.slow
def test_a_small_map_compiles_for_a_tpu():
    check(in_tpu_process(compile_bilevel, ["v5e:2x2"], [[8, 2, 4, 1]], 8, ["bfloat16"], False))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("soft", [False, True])
def test_models_compile_for_every_tpu(soft):
    topologies = ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"]
    found = in_tpu_process(compile_bilevel, topologies, STAGES, 16, ["bfloat16", "float32"], soft, seconds=550)
    assert len(found) == 24
    check(found, soft)
