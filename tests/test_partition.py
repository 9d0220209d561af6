"""Kernels over a mesh, and how they are traced: with a kernel so small that the answer is known."""

import functools
import types
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from kernels import compat
from kernels.dispatch import Implementation, dispatch, only_for, record_choices
from tests.triton_kernels import hopper


def scaled(x, y, *, factor, params=None):
    """`factor * x * y` as a kernel with a gradient of its own."""

    def body(x, y, out):
        out[...] = factor * x[...] * y[...]

    def kernel(x, y):
        call = compat.pallas_call(
            body,
            name="scaled",
            out_shape=compat.shape_like(x.shape, x.dtype, x, y),
            cost_estimate=pl.CostEstimate(flops=2 * x.size, transcendentals=0, bytes_accessed=8 * x.size),
            compiler_params=params,
        )
        return call(x, y)

    @jax.custom_vjp
    def product(x, y):
        return kernel(x, y)

    def backward(kept, cotangent):
        x, y = kept
        return factor * cotangent * y, (factor * cotangent * x).sum(0, keepdims=True)

    product.defvjp(lambda x, y: (kernel(x, y), (x, y)), backward)
    return product(*compat.match_varying(x, y))


TRITON = functools.partial(scaled, params=compat.triton_params(1, 1))
TABLE = (
    Implementation("pallas_tpu", scaled, platforms=("tpu",), batched=(True, False)),
    Implementation("pallas_triton", TRITON, platforms=("cuda",), batched=(True, False)),
    Implementation("xla", lambda x, y, *, factor: factor * x * y),
)
X = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
Y = np.random.default_rng(1).standard_normal((1, 16)).astype(np.float32)


def op(x, y, implementation=None):
    return dispatch("scaled", TABLE, implementation, (x, y), dict(factor=3.0))


def mesh_of(data=1, fsdp=1, tensor=1):
    devices = jax.devices()[: data * fsdp * tensor]
    return jax.make_mesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=devices)


def loss(x, y):
    return (jnp.sin(op(x, y, "pallas_tpu")) * jnp.arange(16)).sum()


@pytest.mark.parametrize(
    "sizes", [dict(data=2), dict(data=2, fsdp=2), dict(fsdp=2, tensor=2), dict(tensor=4), {}], ids=str
)
def test_each_device_computes_its_part_of_the_batch(sizes):
    expected = jax.value_and_grad(lambda x, y: (jnp.sin(3 * x * y) * jnp.arange(16)).sum(), (0, 1))(X, Y)
    mesh = mesh_of(**sizes)
    placed = jax.device_put(X, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    with jax.set_mesh(mesh), compat.interpret():
        found = jax.jit(jax.value_and_grad(loss, (0, 1)))(placed, Y)
        out = jax.jit(lambda x: op(x, Y, "pallas_tpu"))(placed)
    chex.assert_trees_all_close(jax.device_get(found), expected, rtol=1e-5, atol=1e-5)
    assert out.sharding.is_equivalent_to(placed.sharding, 2)


def test_what_is_lowered_for_a_mesh_holds_kernels_of_the_parts():
    mesh = AbstractMesh((4, 1, 1), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    with jax.sharding.use_abstract_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec("data"))
        lowered = jax.jit(jax.grad(loss), in_shardings=(rows, None)).trace(X, Y).lower(lowering_platforms=("tpu",))
    text = lowered.as_text()
    assert text.count("tpu_custom_call") == 1 and "tensor<2x16xf32>" in text


def test_a_batch_that_does_not_divide_is_left_to_xla():
    with jax.set_mesh(mesh_of(data=4)), record_choices() as choices:
        found = op(X[:6], Y)
    chex.assert_trees_all_close(found, 3 * X[:6] * Y, rtol=1e-6)
    assert {choice.implementation for choice in choices} == {"xla"}
    assert "a batch of 6 does not divide over the 4 devices" in choices[0].refused[0]
    with jax.set_mesh(mesh_of(data=4)), pytest.raises(NotImplementedError, match="batch of 6 does not divide"):
        op(X[:6], Y, "pallas_tpu")


def test_several_tpus_without_a_mesh_are_left_to_xla(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with record_choices() as choices:
        jax.eval_shape(op, X, Y)
    by_platform = {choice.platform: choice.implementation for choice in choices}
    assert by_platform == {"cpu": "xla", "tpu": "xla", "cuda": "pallas_triton", "rocm": "xla"}
    assert "there are 8 TPUs and no mesh in effect" in choices[0].refused[0]


@pytest.mark.parametrize("capability, served", [("7.0", False), ("7.5", False), ("8.0", True), ("10.0", True)])
def test_gpus_before_ampere_are_left_to_xla(monkeypatch, capability, served):
    gpu = types.SimpleNamespace(
        compute_capability=capability, device_kind="Tesla", platform="gpu", client=types.SimpleNamespace()
    )
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    with record_choices() as choices:
        jax.eval_shape(lambda x: op(x, Y), X)
    by_platform = {choice.platform: choice.implementation for choice in choices}
    assert by_platform["cuda"] == ("pallas_triton" if served else "xla")
    assert served or "Triton takes 8.0 (Ampere) and up" in " ".join(choices[0].refused)


def test_each_platform_gets_its_kernel():
    lowered = {}
    with compat.lowering_triton(), hopper():
        for platform in ("tpu", "cuda", "rocm", "cpu"):
            lowered[platform] = jax.jit(op).trace(X, Y).lower(lowering_platforms=(platform,)).as_text()
    assert "tpu_custom_call" in lowered["tpu"] and "xla.gpu.triton" in lowered["cuda"]
    assert "custom_call" not in lowered["rocm"] + lowered["cpu"]


@pytest.mark.parametrize("platform, kernel", [("tpu", "pallas_tpu"), ("gpu", "pallas_triton"), ("cpu", None)])
def test_only_kernels_of_the_platforms_in_question_are_traced(platform, kernel):
    with only_for(platform), record_choices() as choices:
        jaxpr = str(jax.make_jaxpr(op)(X, Y))
    chosen = {choice.implementation for choice in choices}
    assert chosen == ({kernel} if platform == "tpu" else {kernel, "xla"} - {None})
    assert jaxpr.count("pallas_call") == (kernel is not None)


def test_a_jitted_function_has_a_trace_for_each_way_of_running():
    function = jax.jit(lambda x: op(x, Y))
    with only_for("tpu"):
        assert str(jax.make_jaxpr(function)(X)).count("pallas_call") == 1
    chex.assert_trees_all_close(function(X), 3 * X * Y, rtol=1e-6)
    forced = jax.jit(lambda x: op(x, Y, "pallas_tpu"))
    with pytest.raises(ValueError, match="(?i)interpret"):
        forced(X)
    with compat.interpret():
        chex.assert_trees_all_close(forced(X), 3 * X * Y, rtol=1e-6)


def traced(x, *, log):
    log.append(x.shape)
    return x + 1


class Log(list):
    """A list that can be a static argument."""

    __hash__ = object.__hash__


def test_a_kernel_is_traced_once_for_a_shape():
    log = Log()
    for x in (X, X + 1, Y, Y):
        chex.assert_trees_all_close(compat.traced_once(traced, dict(log=log), x), x + 1)
    assert log == [X.shape, Y.shape]
    with compat.interpret():
        compat.traced_once(traced, dict(log=log), X)
    assert len(log) == 3
    compat.forget_traced()
    compat.traced_once(traced, dict(log=log), X)
    assert len(log) == 4


def test_the_one_warning_that_is_not_an_error():
    """What `lowering_triton` silences is said by every jax after 0.10; once none says it, it is to be removed."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with hopper():
            jax.jit(lambda x: op(x, Y, "pallas_triton")).trace(X).lower(lowering_platforms=("cuda",))
    texts = [str(warning.message) for warning in said]
    assert all(text.startswith(compat.TRITON_DEPRECATION.replace("\\.", ".")) for text in texts)
    assert len(texts) == compat.triton_is_deprecated()
