"""Where block sizes come from."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh

from kernels import compat, delta_rule, tuning
from kernels.cluster import routing_attention
from kernels.memory import MemoryRule, miras

ENTRY = dict(
    device="nvidia h100",
    op="window",
    shape={"tokens": 64},
    blocks={"windows": 4},
    median_ms=0.1,
    default_ms=0.2,
    jax="0.10.2",
    date="2026-01-01",
)


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A way to store choices for the test."""

    def store(*changes):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        file.write_text(json.dumps([ENTRY | change for change in changes]))
        found = tuning.entries(file)
        monkeypatch.setattr(tuning, "entries", lambda: found)

    return store


def on(kind):
    """Traced as for this device."""
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def chosen(**shape):
    return tuning.blocks("window", "gpu", {"windows": 1, "warps": 4}, **shape)


def test_what_is_shipped_can_be_read():
    assert all(entry.median_ms < entry.default_ms for entry in tuning.entries())


def test_a_measured_choice_serves_its_device_and_shape(stored):
    stored({}, {"device": "nvidia h100 nvl", "blocks": {"windows": 16}})
    with on("NVIDIA H100 80GB HBM3"):
        assert chosen(tokens=64) == {"windows": 4, "warps": 4}
        assert chosen(tokens=128) == {"windows": 1, "warps": 4}
    with on("NVIDIA H100 NVL"):
        assert chosen(tokens=64) == {"windows": 16, "warps": 4}
    with on("NVIDIA A100-SXM4-80GB"):
        assert chosen(tokens=64) == {"windows": 1, "warps": 4}
    assert chosen(tokens=64) == {"windows": 1, "warps": 4}


def test_the_newest_measurement_counts(stored):
    stored({"date": "2026-03-01", "blocks": {"windows": 2}}, {"date": "2026-02-01", "blocks": {"windows": 8}})
    with on("NVIDIA H100"):
        assert chosen(tokens=64)["windows"] == 2


def test_a_block_size_that_the_kernel_does_not_take_is_an_error(stored):
    stored({"blocks": {"stages": 2}})
    with on("NVIDIA H100"), pytest.raises(ValueError, match=r"has block sizes \['stages'\], the kernel takes"):
        chosen(tokens=64)


@pytest.mark.parametrize("text", ["{", '[{"device": "x"}]', "3"])
def test_a_damaged_file_is_named(tmp_path, text):
    file = tmp_path / "tuning.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="tuning.json is not a list of block sizes"):
        tuning.entries(file)


@pytest.mark.parametrize("size, power", [(0, 1), (1, 1), (2, 2), (49, 64), (64, 64), (65, 128)])
def test_buckets(size, power):
    assert tuning.bucket(size) == power


def launched(function, *arrays):
    """Grid and parameters of every kernel of a function, by its name."""
    found = {}

    def collect(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "pallas_call":
                found[eqn.params["name"]] = eqn.params["grid_mapping"].grid, eqn.params["compiler_params"]
                continue
            for inner in jaxprs_in_params(eqn.params):
                collect(inner)

    compat.forget_traced()
    collect(jax.make_jaxpr(function)(*arrays).jaxpr)
    compat.forget_traced()
    return found


def gradient_of(op):
    def gradient(*arrays):
        return jax.grad(lambda *arrays: op(*arrays).sum(), argnums=(0, 1, 2))(*arrays)

    return gradient


def delta(implementation):
    """The gradient of the delta rule, and its operands: 4 heads of 64 and 128 channels."""
    rows, wide = (jax.ShapeDtypeStruct((1, 128, 4, size), jnp.float32) for size in (64, 128))
    op = gradient_of(functools.partial(delta_rule, implementation=implementation))
    return op, rows, rows, wide, jax.ShapeDtypeStruct((1, 128, 4), jnp.float32)


def routed(implementation):
    """The gradient of routing attention in one cluster of 512 tokens for each of 2 heads, and its operands."""
    rows = jax.ShapeDtypeStruct((1, 512, 2, 32), jnp.float32)
    options = dict(window=512, shared=False, implementation=implementation)
    op = gradient_of(functools.partial(routing_attention, **options))
    return op, rows, rows, rows, jax.ShapeDtypeStruct((2, 1, 32), jnp.float32)


SIZES = {"channels": 64, "values": 128, "dtype": "float32"}


@pytest.mark.parametrize("kernel", ["scan_delta_states", "scan_delta_d_states"])
def test_a_measured_choice_changes_the_walk_of_the_delta_rule_on_a_gpu(kernel, stored):
    op, *arrays = delta("pallas_triton")
    stored({"op": kernel, "shape": SIZES, "blocks": {"columns": 64, "warps": 2, "stages": 3}})
    with on("NVIDIA A100"):
        grid, before = launched(op, *arrays)[kernel]
    with on("NVIDIA H100"):
        changed, after = launched(op, *arrays)[kernel]
    assert grid == (128 // 16, 4, 1) and changed == (128 // 64, 4, 1)
    assert (before.num_warps, after.num_warps, after.num_stages) == (8, 2, 3)


@pytest.mark.parametrize("kernel", ["scan_delta_inverse", "scan_delta_written"])
def test_a_measured_choice_changes_what_the_delta_rule_computes_chunk_by_chunk(kernel, stored):
    op, *arrays = delta("pallas_triton")
    shape = {name: size for name, size in SIZES.items() if name != "values" or kernel == "scan_delta_written"}
    stored({"op": kernel, "shape": shape, "blocks": {"warps": 2, "stages": 3}})
    with on("NVIDIA H100"):
        _, after = launched(op, *arrays)[kernel]
    assert (after.num_warps, after.num_stages) == (2, 3)


def test_a_measured_choice_changes_the_delta_rule_on_a_tpu(stored):
    op, *arrays = delta("pallas_tpu")
    stored(
        {"device": "tpu v5", "op": "scan", "shape": {"kind": "delta", "tokens": 128} | SIZES, "blocks": {"chunk": 64}},
        {"device": "tpu v5", "op": "scan_heads", "shape": {"kind": "delta"} | SIZES, "blocks": {"heads": 2}},
    )
    for kind, grid in (("TPU v4", (1, 1, 1)), ("TPU v5 lite", (1, 2, 2))):
        with on(kind):
            kernels = launched(op, *arrays)
        assert {name: grid for name, (grid, _) in kernels.items()} == {
            "scan_delta_forward": grid,
            "scan_delta_backward": grid,
        }


def test_a_measured_choice_changes_a_memory_on_a_tpu(stored):
    rows = jax.ShapeDtypeStruct((1, 256, 4, 16), jnp.float32)
    weights = dict.fromkeys(("w1", "w2"), jnp.zeros((4, 16, 16)))
    rule = MemoryRule("mlp", "l2", "none")
    op = gradient_of(lambda *wide: miras(*wide, weights, rule=rule, step=wide[0], implementation="pallas_tpu"))
    stored(
        {"device": "tpu v5", "op": "memory", "shape": {"chunk": 16}, "blocks": {"tokens": 256}},
        {"device": "tpu v5", "op": "memory_heads", "shape": {"w1": 16, "w2": 16}, "blocks": {"heads": 4}},
    )
    for kind, grid in (("TPU v4", (1, 2, 2)), ("TPU v5 lite", (1, 1, 1))):
        with on(kind):
            kernels = launched(op, rows, rows, rows)
        assert {name: grid for name, (grid, _) in kernels.items()} == {"memory_forward": grid, "memory_backward": grid}


def test_a_measured_choice_changes_the_tiles_of_clusters(stored):
    shape = {"queries": 512, "keys": 512, "dim": 32, "relative": False, "dtype": "float32"}
    stored({"op": "cluster", "shape": shape, "blocks": {"queries": 64, "keys": 128, "warps": 8}})
    op, *arrays = routed("pallas_triton")
    with on("NVIDIA H100"):
        kernels = launched(op, *arrays)
    assert {name: grid for name, (grid, _) in kernels.items()} == {
        "cluster_forward": (8, 2),
        "cluster_query_gradient": (8, 2),
        "cluster_key_gradient": (4, 2),
    }
    assert {parameters.num_warps for _, parameters in kernels.values()} == {8}
