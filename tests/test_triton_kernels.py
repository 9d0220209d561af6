"""The Triton kernels at the models' shapes, compiled for Ampere, Ada and Hopper: they fit, and keep to registers."""

import functools

import jax
import jax.numpy as jnp
import pytest

from kernels import bilevel_attention, delta_rule, gated_linear_attention, window_attention
from kernels.cluster import routing_attention
from tests.triton_kernels import compiled_by_triton

# Bytes of shared memory that a program may have, by compute capability (CUDA's programming guide, technical
# specifications per compute capability).
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
# Bytes of a thread that may go to memory and back: a register or two, not a tile.
SPILLED = 64


def window(size, channels, heads, dtype, *, partition="block", biased=False):
    bias = jax.ShapeDtypeStruct((heads, 49, 49), jnp.float32) if biased else None

    def op(qkv, bias):
        options = dict(num_heads=heads, window=(7, 7), partition=partition, implementation="pallas_triton")
        return window_attention(qkv, bias=bias, **options)

    return op, (jax.ShapeDtypeStruct((128, size, size, 3 * channels), dtype), bias)


def routed(size, channels, heads, region, k, dtype):
    def op(qkv, indices):
        return bilevel_attention(qkv, indices, num_heads=heads, region=(region, region), implementation="pallas_triton")

    indices = jax.ShapeDtypeStruct((128, 49, k), jnp.int32)
    return op, (jax.ShapeDtypeStruct((128, size, size, 3 * channels), dtype), indices)


def clustered(tokens, channels, window, dtype, *, ranks=False):
    def op(query, value, means, table):
        options = dict(window=window, relative_key=table, relative_value=table, implementation="pallas_triton")
        return routing_attention(query, None, value, means, **options)

    rows = jax.ShapeDtypeStruct((4, tokens, 4, channels), dtype)
    means = jax.ShapeDtypeStruct((4, tokens // window, channels), jnp.float32)
    return op, (rows, rows, means, jax.ShapeDtypeStruct((2 * window + 1, channels), dtype) if ranks else None)


def recurrence(kind, dtype):
    shape = (4, 8192, 16)
    rows = [jax.ShapeDtypeStruct((*shape, 128), dtype)] * 3
    gate = jax.ShapeDtypeStruct(shape, jnp.float32)
    if kind in ("delta", "gated delta"):
        op = functools.partial(delta_rule, implementation="pallas_triton")
        return op, (*rows, gate, *[gate] * (kind == "gated delta"))
    op = functools.partial(gated_linear_attention, implementation="pallas_triton")
    decays = {"retention": shape[2:], "per token": shape, "per channel": (*shape, 128)}
    return op, (*rows, *([jax.ShapeDtypeStruct(decays[kind], jnp.float32)] if kind in decays else []))


CASES = {
    "davit_tiny, stage 1": lambda dtype: window(56, 96, 3, dtype),
    "davit_tiny, stage 4": lambda dtype: window(7, 768, 24, dtype),
    "maxvit_tiny, stage 1, block": lambda dtype: window(56, 64, 2, dtype, biased=True),
    "maxvit_tiny, stage 3, grid": lambda dtype: window(14, 256, 8, dtype, partition="grid", biased=True),
    "biformer_tiny, stage 1": lambda dtype: routed(56, 64, 2, 8, 1, dtype),
    "biformer_tiny, stage 2": lambda dtype: routed(28, 128, 4, 4, 4, dtype),
    "biformer_tiny, stage 3": lambda dtype: routed(14, 256, 8, 2, 16, dtype),
    "routing_transformer_enwik8_8k, clusters": lambda dtype: clustered(8192, 128, 512, dtype, ranks=True),
    "routing_transformer_imagenet64, clusters": lambda dtype: clustered(12288, 64, 2048, dtype),
    "linear": lambda dtype: recurrence("linear", dtype),
    "retention": lambda dtype: recurrence("retention", dtype),
    "decay per token": lambda dtype: recurrence("per token", dtype),
    "decay per channel": lambda dtype: recurrence("per channel", dtype),
    "delta rule": lambda dtype: recurrence("delta", dtype),
    "gated delta rule": lambda dtype: recurrence("gated delta", dtype),
}
# Of recurrences in float32 Triton's compiler takes minutes, as it writes every product out.
BY_TILE = [case for case in CASES if "stage" in case or "clusters" in case]


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, case", [("bfloat16", case) for case in CASES] + [("float32", case) for case in BY_TILE]
)
def test_kernels_fit_and_keep_to_registers(case, dtype):
    op, arrays = CASES[case](jnp.dtype(dtype))
    differentiated = [i for i, x in enumerate(arrays) if x is not None and jnp.issubdtype(x.dtype, jnp.floating)]

    def gradient(*arrays):
        return jax.value_and_grad(lambda *arrays: op(*arrays).astype(jnp.float32).sum(), differentiated)(*arrays)

    found = compiled_by_triton(gradient, *arrays, architectures=(86, 90))
    assert len({kernel.name for kernel in found}) >= 2
    assert [kernel for kernel in found if kernel.shared > SHARED[kernel.architecture]] == []
    assert [kernel for kernel in found if kernel.spilled > SPILLED] == []
