"""Kernels of recurrences compiled for TPUs that are not there, what they cost, how much they keep."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import scan_plan
from kernels.cost import cost
from kernels.pallas_tpu.scan import BACKEND
from tests.recurrences import OPS
from tests.tpu_child import in_tpu_process

GENERATIONS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}
KINDS = ("no decay", "decay per token", "decay per channel", "delta", "gated delta")
# Batch, tokens, heads, D, E; the odd one has a single short chunk.
SHAPES = [(4, 1024, 16, 128, 128), (2, 384, 4, 64, 32)]
ODD = (1, 40, 3, 48, 16), "float32"


def structs(kind, shape, dtype="bfloat16", make=jax.ShapeDtypeStruct):
    batch, tokens, heads, channels, values = shape
    op, wide = OPS[kind], (batch, tokens, heads)
    arrays = {name: make((*wide, channels), jnp.dtype(dtype)) for name in ("query", "key")}
    arrays["value"] = make((*wide, values), jnp.dtype(dtype))
    if op.beta:
        arrays["beta"] = make(wide, jnp.float32)
    if op.decay:
        arrays["log_decay"] = make((*wide, channels) if op.decay == "channel" else wide, jnp.float32)
    return arrays


def both(kind):
    """A function to output and gradients."""

    def run(arrays):
        out, pull = jax.vjp(lambda arrays: OPS[kind](arrays, implementation="pallas_tpu"), arrays)
        return out, pull(out)

    return run


def compiled(generation, kind, shape, dtype):
    """In a process of its own: custom calls of the program, and its copies."""
    from kernels import aot

    devices = aot.tpu_devices(GENERATIONS[generation])[:1]
    place = jax.sharding.NamedSharding(jax.sharding.Mesh(devices, ("x",)), jax.sharding.PartitionSpec())
    make = functools.partial(jax.ShapeDtypeStruct, sharding=place)
    if kind == "layer":
        batch, tokens, heads, channels, _ = shape
        width = heads * channels
        run, arguments = layer(heads), (make((batch, tokens, width), dtype), make((4, width, width), dtype))
    else:
        run, arguments = both(kind), (structs(kind, shape, dtype, make),)
    text = jax.jit(run).lower(*arguments).compile().as_text()
    copies = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose)\(", text)
    sizes = [math.prod(map(int, found.split(","))) for found in copies]
    return text.count('custom_call_target="tpu_custom_call"'), max(sizes, default=0)


def layer(heads):
    """A mixer's projections, activations, recurrence and norm, and their gradients."""

    def mixed(x, weights):
        wide = (jax.nn.silu((x @ w).reshape(*x.shape[:2], heads, -1)) for w in weights[:3])
        out = OPS["no decay"](dict(zip(("query", "key", "value"), wide)), implementation="pallas_tpu")
        return out.reshape(x.shape) @ weights[3]

    def run(x, weights):
        out, pull = jax.vjp(mixed, x, weights)
        return out, pull(out)

    return run


def compile_all(cases):
    return [compiled(*case) for case in cases]


@pytest.mark.slow
def test_one_compiles():
    ((calls, _),) = in_tpu_process(compile_all, [("v5e", "decay per token", SHAPES[1], "bfloat16")])
    assert calls == 2


@pytest.mark.slow
def test_all_compile_for_all_generations():
    cases = [(g, kind, SHAPES[1], "bfloat16") for g in GENERATIONS for kind in KINDS]
    cases += [("v5e", kind, shape, dtype) for kind in KINDS for shape, dtype in ((SHAPES[0], "bfloat16"), ODD)]
    *results, (_, largest) = in_tpu_process(compile_all, [*cases, ("v5e", "layer", SHAPES[0], "bfloat16")])
    assert [calls for calls, _ in results] == [2] * len(cases)
    # Between projections and kernels nothing is laid out anew.
    assert largest < math.prod(SHAPES[0][:4])


def closed_form(kind, shape):
    """Flops, transcendentals and bytes of both kernels of a call in bfloat16, from the sizes alone."""
    batch, tokens, heads, channels, values = shape
    op, chunk = OPS[kind], min(128, max(16, 1 << (tokens - 1).bit_length()))
    chunks = -(-tokens // chunk)
    name = {True: "delta", False: "channel" if op.decay == "channel" else "scalar"}[op.beta]
    sizes = name, chunk, channels, values
    programs = batch * heads * chunks
    flops = programs * (scan_plan.forward_flops(*sizes) + scan_plan.backward_flops(*sizes))
    exponentials = 2 * programs * scan_plan.transcendentals(name, chunk, channels, op.decay is not None)
    rows = programs * chunk
    wide, state = 2 * rows * (2 * channels + values), 4 * batch * heads * channels * values
    # Operands and output; those, their gradients and the output's.
    moved = wide + 2 * rows * values + 2 * wide + 2 * rows * values
    # The chunks' states, written and read; the last state, its gradient, the first one's.
    moved += 2 * 2 * programs * channels * values + 3 * state
    if name == "channel":
        moved += 3 * 4 * rows * channels
    else:
        # Decay and beta, twice, and their gradients.
        moved += 4 * rows * 3 * ((op.decay is not None) + op.beta)
    return flops, exponentials, moved


@pytest.mark.parametrize("kind", KINDS)
def test_costs_are_the_closed_form(kind):
    shape = SHAPES[1]
    counted = cost(both(kind), structs(kind, shape), platform="tpu").by_primitive["pallas_call"]
    assert (counted.flops, counted.transcendentals, counted.bytes) == closed_form(kind, shape)


def test_flops_are_what_the_products_need():
    """Counted on one chunk written out, triangles as halves."""
    chunk, channels, values = 32, 16, 64
    ones = np.tril(np.ones((chunk, chunk)))
    pairs = int(ones.sum() * 2) - chunk
    assert pairs == chunk * chunk
    products = pairs * channels + pairs * values + 2 * (2 * chunk * channels * values)
    assert scan_plan.forward_flops("scalar", chunk, channels, values) == products


def test_memory_kept_for_the_gradient():
    """The operands, and a state a chunk in the operands' dtype."""
    from kernels.residuals import residual_bytes

    shape = (2, 512, 4, 64, 64)
    arrays = structs("no decay", shape)
    call = scan_plan.Call(BACKEND, "scalar", 128, 1.0)
    kept = residual_bytes(
        lambda q, k, v: scan_plan.recurrence(call, q, k, v, None, None, None),
        *(arrays[name] for name in ("query", "key", "value")),
    )
    assert kept == 2 * (3 * math.prod(shape[:4]) + 2 * 4 * 4 * 64 * 64)
