"""Attention within clusters compiled for TPUs, at the shapes of the Routing Transformer's models."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels import aot
from kernels.cluster import routing_attention
from kernels.cluster_plan import Plan, attend
from kernels.pallas_tpu.cluster import BACKEND
from tests.tpu_child import in_tpu_process

# Tokens and channels of a cluster, distances that are told apart: of enwik8 at 8,192 tokens, of ImageNet at 64
# pixels, of MNIST. Then how often operands and results are moved: the compiler counts it again where it brings
# something nearer before; 64 channels are filled up to 128, and 112 tokens are, with a copy before each kernel.
CLUSTERS = ((512, 128, 513), (2048, 64, 0), (112, 128, 0))
MOVED = (3, 6.5, 8)


def sharding(topology):
    return NamedSharding(Mesh(aot.tpu_devices(topology)[:1], ("x",)), PartitionSpec())


def compiled(run, *arrays):
    """Which kernels a program calls, and the bytes that it moves."""
    program = jax.jit(run).lower(*arrays).compile()
    kernels = set(re.findall(r"cluster_(?:forward|gradient)", program.as_text()))
    return sorted(kernels), program.cost_analysis()["bytes accessed"]


def clusters(topology, tokens, channels, reach, dtype):
    where = sharding(topology)

    def of(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    plan = Plan(tokens, tokens, channels, channels, 1.0, causal=True, ordered=True)
    rows, places = of(64, tokens, channels), (of(64, tokens, dtype=jnp.int32),) * 2
    tables = (of(2 * reach + 1, channels),) * 2 if reach else (None, None)

    def run(query, key, value, places, tables, cotangent):
        def forward(query, key, value, tables):
            return attend(BACKEND, plan, query, key, value, places, places, *tables)

        out, back = jax.vjp(forward, query, key, value, tables)
        return out, back(cotangent)

    # Operands are read twice, and there is an output and its gradient.
    return *compiled(run, rows, rows, rows, places, tables, rows), 11 * rows.size * rows.dtype.itemsize


def compile_clusters(topologies, dtypes):
    return [clusters(topology, *case, dtype) for topology in topologies for case in CLUSTERS for dtype in dtypes]


def compile_layer(tokens, window):
    """Bytes that a layer's routing heads move, by the kernels and without."""
    where, found = sharding("v5e:2x2"), []
    rows = jax.ShapeDtypeStruct((4, tokens, 4, 128), jnp.bfloat16, sharding=where)
    means = jax.ShapeDtypeStruct((4, tokens // window, 128), jnp.float32, sharding=where)
    table = jax.ShapeDtypeStruct((2 * window + 1, 128), jnp.bfloat16, sharding=where)
    for implementation in ("pallas_tpu", "xla"):

        def run(query, value, means, table, cotangent, implementation=implementation):
            def forward(query, value, table):
                tables = dict(relative_key=table, relative_value=table)
                options = dict(window=window, implementation=implementation)
                return routing_attention(query, None, value, means, **options, **tables)

            out, back = jax.vjp(forward, query, value, table)
            return out, back(cotangent)

        found.append(compiled(run, rows, rows, means, table, rows))
    return found


@pytest.mark.slow
def test_clusters_compile_for_every_tpu():
    found = in_tpu_process(compile_clusters, ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"], ["bfloat16", "float32"])
    assert len(found) == 18
    for number, (kernels, moved, edges) in enumerate(found):
        assert kernels == ["cluster_forward", "cluster_gradient"]
        assert moved < MOVED[number // 2 % 3] * edges


@pytest.mark.slow
def test_a_layer_moves_a_third_of_what_it_moves_without_kernels():
    (kernels, moved), (none, without) = in_tpu_process(compile_layer, 1024, 512)
    assert kernels == ["cluster_forward", "cluster_gradient"] and none == []
    assert moved < without / 3
