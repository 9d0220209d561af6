"""The kernels of recurrences for GPUs: they lower for cuda, what they are told to cost, sizes that are filled up."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from kernels import compat
from kernels.cost import cost
from kernels.delta import delta_rule
from kernels.gated_linear import gated_linear_attention
from kernels.pallas_gpu.tiles import CHUNK
from kernels.scan_plan import forward_flops
from tests.recurrences import OPS
from tests.test_linear_recurrences import assert_close
from tests.test_pallas_scan import DISTINCT, KINDS, in_float64, jitted, operands
from tests.triton_kernels import hopper

FORWARD = {
    "decay per token": ["scan_states", "scan_outputs"],
    "decay per channel": ["scan_channel_weights", "scan_channel_states", "scan_channel_outputs"],
    "gated delta": ["scan_delta_inverse", "scan_delta_states", "scan_delta_outputs"],
}
BACKWARD = {
    "decay per token": ["scan_d_states", "scan_gradients"],
    "decay per channel": [
        "scan_channel_weights",
        "scan_channel_d_states",
        "scan_channel_d_values",
        "scan_channel_gradients",
    ],
    "gated delta": ["scan_delta_inverse", "scan_delta_written", "scan_delta_d_states", "scan_delta_gradients"],
}


def lowered(function, *arrays):
    """Names of the kernels in a program lowered for an H100; jax has one that runs twice once or twice."""
    with hopper(), compat.lowering_triton():
        text = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r'name = "(scan_\w+)"', text)


def gradient(op, arrays, state, directions):
    results, pull = jax.vjp(lambda arrays, state: op(arrays, initial_state=state, return_state=True), arrays, state)
    return results, pull(directions)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, jnp.bfloat16) for kind in DISTINCT),
        *(pytest.param(kind, jnp.float32, marks=pytest.mark.slow) for kind in DISTINCT),
    ],
)
def test_a_gpu_gets_the_kernels_unasked(kind, dtype):
    arrays, state, directions = operands(kind, 130, 128, 128, heads=2, dtype=dtype)
    found = lowered(functools.partial(gradient, OPS[kind]), arrays, state, directions)
    assert set(found) == {*FORWARD[kind], *BACKWARD[kind]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("channels", "values"), [(16, 64), (64, 32), (48, 96)])
def test_every_size_lowers(kind, channels, values):
    arrays, state, directions = operands(kind, 70, channels, values, dtype=jnp.bfloat16)
    assert lowered(functools.partial(gradient, OPS[kind]), arrays, state, directions)


@pytest.mark.parametrize("kind", ["gated delta", *(pytest.param(k, marks=pytest.mark.slow) for k in DISTINCT[:2])])
def test_sizes_that_are_no_powers_of_two_are_filled_up(kind):
    arrays, state, directions = operands(kind, 70, 24, 40)
    found = jitted(kind, "pallas_triton", True)(arrays, state, None, directions)
    assert_close(found, in_float64(kind, None, True)(arrays, state, None, directions), 3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DISTINCT)
def test_heads_as_wide_as_can_be_go_through_in_blocks(kind):
    arrays, state, directions = operands(kind, 70, 128, 128)
    found = jitted(kind, "pallas_triton", True)(arrays, state, None, directions)
    assert_close(found, in_float64(kind, None, True)(arrays, state, None, directions), 3e-6)


@pytest.mark.parametrize("sizes", [(129, 16), (16, 129), (7, 16)])
def test_other_heads_are_refused(sizes):
    arrays, state, _ = operands("gated delta", 20, *sizes)
    with pytest.raises(NotImplementedError, match="a head has [DE] = (129|7) channels; the kernel takes 8 to 128"):
        delta_rule(**arrays, initial_state=state, implementation="pallas_triton")


def test_the_cost_is_that_of_the_products():
    """Of two chunks of two heads; that of the states, and with it of the weights and the outputs."""
    array = jax.ShapeDtypeStruct((1, 2 * CHUNK, 2, 32), jnp.bfloat16)
    run = functools.partial(gated_linear_attention, implementation="pallas_triton")
    counted = cost(run, array, array, array, platform="cuda").by_primitive["pallas_call"]
    assert counted.flops == 4 * forward_flops("scalar", CHUNK, 32, 32)
    assert counted.transcendentals == 0
    # The states are written, with the last one in float32, and read; keys and values are read twice.
    assert counted.bytes == 6 * 2 * array.size + 2 * (4 * 2 * 32 * 32) + 4 * 2 * 32 * 32
