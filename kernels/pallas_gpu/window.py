"""Window attention on NVIDIA GPUs: a program takes a head of a few windows, or a block of its queries.

Windows are cut out by the addresses of the loads. Up to 64 tokens a window's queries, keys and values are read once
and stay in registers; the queries and keys of larger ones are taken in blocks.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels import compat, window_plan
from kernels.pallas_gpu import window_blocks
from kernels.pallas_gpu.tiles import dot
from kernels.pallas_gpu.window_tiles import Layout, Reader, layout, softmax, weigh, whole
from kernels.window_plan import Geometry


def unsupported(qkv, bias, pad, **options: Any) -> str | None:
    return window_plan.refusal(qkv, bias, pad, **options)


def _forward_body(x, *refs, at: Layout, has_bias: bool, has_pad: bool):
    bias, pad, (out,) = window_plan.optional(refs, has_bias, has_pad)
    reader = Reader(at, pad)
    i, h, group = reader.program(at.blocks)

    def window(j, _):
        place = reader.place(group * at.together + j)
        queries = place.tokens(i)
        q = reader.load(x, queries, h, 0)

        def keys(b, carry):
            top, total, acc = carry
            tokens = queries if at.blocks == 1 else place.tokens(b)
            k, v = reader.load(x, tokens, h, 1), reader.load(x, tokens, h, 2)
            logits = reader.logits(q, k, bias, h, i, b, tokens)
            new, weights, shrunk = weigh(logits, top)
            acc = acc * shrunk[:, None] + dot(weights.astype(v.dtype), v)
            return new, total * shrunk + weights.sum(1), acc

        top = jnp.full((at.block,), -jnp.inf, jnp.float32)
        carry = top, jnp.zeros_like(top), jnp.zeros((at.block, at.wide), jnp.float32)
        carry = keys(0, carry) if at.blocks == 1 else lax.fori_loop(0, at.blocks, keys, carry)
        reader.store(out, queries, h, 0, carry[2] * (1 / carry[1])[:, None])

    _each(at.together, window)


def _each(count: int, visit):
    if count == 1:
        visit(0, None)
    else:
        lax.fori_loop(0, count, visit, None)


def _backward_body(x, gradient, *refs, at: Layout, has_bias: bool, has_pad: bool):
    bias, pad, (dx, *sums_of) = window_plan.optional(refs, has_bias, has_pad)
    dbias, dpad, _ = window_plan.optional(sums_of, has_bias, has_pad)
    reader = Reader(at, pad)
    _, h, group = reader.program(1)

    def window(j, sums):
        bias_sum, pad_sums = sums
        tokens = reader.place(group * at.together + j).tokens(0)
        q, k, v = (reader.load(x, tokens, h, part) for part in range(3))
        dout = reader.load(gradient, tokens, h, 0, filled=False)
        weights = softmax(reader.logits(q, k, bias, h, 0, 0, tokens))
        dweights = dot(dout, v, trans_b=True)
        dlogits = weights * (dweights - (weights * dweights).sum(1)[:, None])
        if has_bias:
            bias_sum = bias_sum + dlogits
        dlogits = (dlogits * at.g.scale).astype(q.dtype)
        results = (
            dot(dlogits, k),
            dot(dlogits, q, trans_a=True),
            dot(weights.astype(q.dtype), dout, trans_a=True),
        )
        for part, result in enumerate(results):
            reader.store(dx, tokens, h, part, result)
        if has_pad:
            pad_sums = tuple(s + reader.filled(tokens, r) for s, r in zip(pad_sums, results))
        return bias_sum, pad_sums

    bias_sum = jnp.zeros((at.block, at.block), jnp.float32) if has_bias else 0
    pad_sums = (jnp.zeros((at.wide,), jnp.float32),) * 3 if has_pad else ()
    sums = bias_sum, pad_sums
    sums = window(0, sums) if at.together == 1 else lax.fori_loop(0, at.together, window, sums)
    if has_bias:
        dbias[...] = sums[0]
    if has_pad:
        for part in range(3):
            dpad[part, :] = sums[1][part]


def forward(qkv, bias, pad, *, g: Geometry):
    at = layout(g, qkv.dtype, bias is not None, backward=False)
    everything = [qkv.reshape(-1, 3 * g.channels), *at.small(bias, pad)]
    shape = (everything[0].shape[0], g.channels)
    out = compat.pallas_call(
        functools.partial(_forward_body, at=at, has_bias=bias is not None, has_pad=pad is not None),
        name="window_attention",
        out_shape=compat.shape_like(shape, qkv.dtype, *everything),
        grid=(at.groups * g.heads * at.blocks,),
        in_specs=[whole(array) for array in everything],
        out_specs=pl.BlockSpec(shape, lambda i: (0, 0)),
        cost_estimate=window_plan.cost(g, qkv.dtype.itemsize, bias is not None, pad is not None, backward=False),
        compiler_params=compat.triton_params(at.warps, at.stages),
    )(*everything)
    return out.reshape(*qkv.shape[:3], g.channels)


def backward(qkv, bias, pad, gradient, *, g: Geometry):
    at = layout(g, qkv.dtype, bias is not None, backward=True)
    if at.blocks > 1:
        return window_blocks.backward(qkv, bias, pad, gradient, at=at)
    maps = [x.reshape(-1, x.shape[-1]) for x in (qkv, gradient)]
    everything = [*maps, *at.small(bias, pad)]
    shapes = [compat.shape_like(maps[0].shape, qkv.dtype, *everything)]
    specs = [whole(maps[0])]
    heads, programs = g.heads, at.groups * g.heads
    if bias is not None:
        shapes.append(compat.shape_like((programs, at.block, at.block), jnp.float32, *everything))
        specs.append(pl.BlockSpec((None, at.block, at.block), lambda i: (i, 0, 0)))
    if pad is not None:
        shapes.append(compat.shape_like((programs, 3, at.wide), jnp.float32, *everything))
        specs.append(pl.BlockSpec((None, 3, at.wide), lambda i: (i, 0, 0)))
    dqkv, *sums = compat.pallas_call(
        functools.partial(_backward_body, at=at, has_bias=bias is not None, has_pad=pad is not None),
        name="window_attention_gradient",
        out_shape=shapes,
        grid=(programs,),
        in_specs=[whole(array) for array in everything],
        out_specs=specs,
        cost_estimate=window_plan.cost(g, qkv.dtype.itemsize, bias is not None, pad is not None, backward=True),
        compiler_params=compat.triton_params(at.warps, at.stages),
    )(*everything)
    dbias = dpad = None
    if bias is not None:
        partial = sums.pop(0).reshape(at.groups, heads, at.block, at.block)
        dbias = partial.sum(0)[:, : g.tokens, : g.tokens]
    if pad is not None:
        dpad = at.pad_gradient(sums.pop(0).reshape(at.groups, heads, 3, at.wide))
    return dqkv.reshape(qkv.shape), dbias, dpad


BACKEND = window_plan.Backend(forward, backward)
