"""The counter of FLOPs and bytes: loops, branches, recomputation, shards and kernels, counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from kernels.cost import cost
from tests.closed_forms import dense, f32, products


def test_scan_counts_its_length_times():
    x, w = f32(4, 8), f32(8, 8)
    once = products(4, 8, 8)

    def scanned(x, w):
        return jax.lax.scan(lambda x, _: (dense(x, w), None), x, length=5)[0]

    def nested(x, w):
        return jax.lax.scan(lambda x, _: (scanned(x, w), None), x, length=3)[0]

    counted = cost(scanned, x, w)
    assert (counted.flops, counted.transcendentals) == (5 * once, 5 * 4 * 8)
    assert counted.matmul_flops == 5 * once
    assert cost(nested, x, w).flops == 15 * once
    # Two products for each of the forward pass's, no matter that the loop runs backwards.
    gradient = cost(jax.grad(lambda x, w: scanned(x, w).sum(), (0, 1)), x, w)
    assert gradient.matmul_flops == 3 * 5 * once


@pytest.mark.parametrize(("bounds", "rounds"), [((0, 6), 6), ((2, 9), 7), ((5, 5), 0), ((7, 3), 0)], ids=str)
def test_fori_loop_with_constant_bounds(bounds, rounds):
    def run(x, w):
        return jax.lax.fori_loop(*bounds, lambda _, x: dense(x, w), x)

    assert cost(run, f32(4, 8), f32(8, 8)).matmul_flops == rounds * products(4, 8, 8)
    # As an argument of a jitted function the bound is a constant all the same.
    jitted = jax.jit(lambda low, high, x, w: jax.lax.fori_loop(low, high, lambda _, x: dense(x, w), x))
    assert cost(lambda x, w: jitted(*bounds, x, w), f32(4, 8), f32(8, 8)).matmul_flops == rounds * products(4, 8, 8)


@pytest.mark.parametrize(
    ("start", "goes_on", "step", "rounds"),
    [
        (0, lambda i: i < 10, 3, 4),
        (0, lambda i: i <= 9, 3, 4),
        (10, lambda i: i > 0, -4, 3),
        (10, lambda i: 0 <= i, -5, 3),
    ],
)
def test_while_loop_that_counts(start, goes_on, step, rounds):
    def run(x):
        return jax.lax.while_loop(lambda c: goes_on(c[0]), lambda c: (c[0] + step, jnp.exp(c[1])), (start, x))[1]

    counted = cost(run, f32(7))
    assert counted.transcendentals == 7 * rounds
    assert counted.by_primitive["add"].flops == rounds


def test_while_loop_of_unknown_length():
    def run(x, n):
        return jax.lax.fori_loop(0, n, lambda _, x: jnp.exp(x), x)

    def until_small(x):
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: jnp.exp(x), x)

    shapes = f32(7), jax.ShapeDtypeStruct((), jnp.int32)
    with pytest.raises(ValueError, match=r"rounds of the while_loop over \(.*float32\[7\].*pass while_trips="):
        cost(run, *shapes)
    assert cost(run, *shapes, while_trips=11).transcendentals == 77
    counted = cost(until_small, f32(7), while_trips=4)
    # The condition is looked at once more than the body: six sums and a comparison.
    assert (counted.transcendentals, counted.flops) == (28, 5 * 7)


def test_conditional_is_its_most_expensive_branch():
    def cheap(x, w):
        return x

    def run(i, x, w):
        return jax.lax.switch(i, [cheap, lambda x, w: dense(dense(x, w), w), dense], x, w)

    index = jax.ShapeDtypeStruct((), jnp.int32)
    counted = cost(run, index, f32(4, 8), f32(8, 8))
    assert counted.matmul_flops == 2 * products(4, 8, 8)
    assert counted.transcendentals == 2 * 32
    truth = jax.ShapeDtypeStruct((), bool)
    plain = cost(lambda p, x, w: jax.lax.cond(p, dense, cheap, x, w), truth, f32(4, 8), f32(8, 8))
    assert plain.matmul_flops == products(4, 8, 8)


def test_platform_dependent_is_the_branch_of_the_platform():
    def run(x):
        return jax.lax.platform_dependent(x, cpu=jnp.exp, tpu=lambda x: x @ x, default=jnp.negative)

    x = f32(6, 6)
    assert cost(run, x).transcendentals == 36
    assert cost(run, x, platform="tpu").flops == products(6, 6, 6)
    assert cost(run, x, platform="gpu").flops == cost(run, x, platform="rocm").flops == 36
    with pytest.raises(ValueError, match="unknown platform 'cpuu'; did you mean 'cpu'"):
        cost(run, x, platform="cpuu")
    with pytest.raises(ValueError, match="no branch for 'rocm', only for cpu, tpu"):
        cost(lambda x: jax.lax.platform_dependent(x, cpu=jnp.exp, tpu=jnp.exp), x, platform="rocm")


def test_custom_derivatives():
    @jax.custom_vjp
    def function(x, w):
        return x @ w

    function.defvjp(
        lambda x, w: (x @ w, (x, w)),
        lambda kept, g: (g @ kept[1] @ kept[1] @ kept[1], jnp.zeros_like(kept[1])),
    )
    x, w, once = f32(4, 8), f32(8, 8), products(4, 8, 8)
    assert cost(function, x, w).flops == once
    # The forward pass is needed for nothing here, so that XLA drops it, and neither is it counted.
    assert cost(jax.grad(lambda x, w: function(x, w).sum()), x, w).matmul_flops == 3 * once
    assert cost(jax.value_and_grad(lambda x, w: function(x, w).sum()), x, w).matmul_flops == 4 * once

    @jax.custom_jvp
    def sine(x):
        return jnp.sin(x)

    sine.defjvp(lambda primals, tangents: (jnp.sin(*primals), tangents[0] * jnp.cos(*primals)))
    assert cost(sine, f32(5)).transcendentals == 5


def test_what_is_computed_again_is_counted_again():
    def block(x, w):
        return jnp.tanh(jnp.tanh(x @ w[0]) @ w[1])

    x, w, once = f32(4, 8), f32(2, 8, 8), products(4, 8, 8)
    plain, kept = jax.value_and_grad(lambda x, w: block(x, w).sum(), (0, 1)), jax.checkpoint_policies.dots_saveable

    def again(policy):
        return jax.value_and_grad(lambda x, w: jax.checkpoint(block, policy=policy)(x, w).sum(), (0, 1))

    assert cost(plain, x, w).matmul_flops == 6 * once
    assert cost(again(None), x, w).matmul_flops == 8 * once
    assert cost(again(kept), x, w).matmul_flops == 6 * once
    assert cost(again(kept), x, w).transcendentals == cost(plain, x, w).transcendentals + 2 * 32


def test_shard_map_is_the_total_over_the_shards():
    mesh = AbstractMesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def local(x, w):
        return jax.lax.psum(x @ w, "tensor")

    specs = PartitionSpec("data", "tensor"), PartitionSpec("tensor", None)
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data", None))
    counted = cost(run, f32(16, 8), f32(8, 6))
    assert counted.matmul_flops == products(16, 8, 6)
    # Every shard adds up its part of the result.
    assert counted.flops == counted.matmul_flops + 8 * (16 // 4) * 6


def doubled(x, estimate):
    def kernel(x_ref, y_ref):
        y_ref[...] = 2 * x_ref[...]

    return pl.pallas_call(kernel, out_shape=f32(*x.shape), cost_estimate=estimate, name="doubled")(x)


def test_pallas_kernel_counts_as_it_declares():
    estimate = pl.CostEstimate(flops=123, transcendentals=45, bytes_accessed=678)
    counted = cost(lambda x: doubled(x, estimate), f32(8, 128), platform="tpu")
    assert (counted.flops, counted.transcendentals, counted.bytes) == (123, 45, 678)
    assert counted.matmul_flops == 123
    looped = cost(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: doubled(x, estimate), x), f32(8, 128))
    assert looped.by_primitive["pallas_call"].flops == 3 * 123
    with pytest.raises(ValueError, match="Pallas kernel 'doubled' declares no cost_estimate"):
        cost(lambda x: doubled(x, None), f32(8, 128))
