"""Window attention on a TPU: a program reads whole maps, or whole rows of windows, with all their channels.

What it reads lies together in memory. Windows are cut out of it in VMEM, where a load of 32-bit rows of 128 lanes may
begin anywhere and have a stride: so it is held in float32, as `(lane tiles, tokens, 128)`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import compat, window_plan
from kernels.pallas_tpu import window_tiles as tiles
from kernels.pallas_tpu.window_tiles import CHUNK, Blocks
from kernels.window_plan import Geometry


def unsupported(qkv, bias, pad, **options: Any) -> str | None:
    reason = window_plan.refusal(qkv, bias, pad, **options)
    if reason is not None:
        return reason
    return tiles.refusal(window_plan.geometry(qkv, options), qkv.dtype.itemsize, bias is not None)


def _dot(a, b, contract, dtype):
    """A product accumulated in float32; of float32 operands without rounding them."""
    exact = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    dimensions = ((contract[0],), (contract[1],)), ((), ())
    return lax.dot_general(
        a.astype(dtype), b.astype(dtype), dimensions, precision=exact, preferred_element_type=jnp.float32
    )


def _weights(g: Geometry, q, k, bias, keys, dtype):
    """Exponentials of the logits, and by what they are divided to be the weights."""
    logits = _dot(q, k, (1, 1), dtype) * g.scale
    if bias is not None:
        logits += bias
    logits = jnp.where(keys, logits, -jnp.inf)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    return weights, weights.sum(-1, keepdims=True)


def _forward_body(x, *refs, blocks: Blocks, dtype, has_bias: bool, has_pad: bool):
    bias, pad, (out, run, tile, result) = window_plan.optional(refs, has_bias, has_pad)
    g = blocks.g
    tiles.load_run(blocks, x, run)
    tile[...] = jnp.zeros_like(tile)

    def group(places):
        for slot, place in enumerate(places):
            tiles.cut(blocks, run, tile.at[slot], place, pad)
        keys = [tiles.keys(blocks, place) for place in places]

        def head(h, chunk, lanes):
            for slot in range(len(places)):
                part = tile.at[slot]
                q, k, v = lanes.load(part, 0, chunk), lanes.load(part, 1), lanes.load(part, 2)
                weights, total = _weights(g, q, k, bias[h, chunk, :] if has_bias else None, keys[slot], dtype)
                lanes.store(result.at[slot], 0, chunk, _dot(weights, v, (1, 0), dtype) / total)

        tiles.each_head(g, head)
        for slot, place in enumerate(places):
            tiles.paste(blocks, run, result.at[slot], place)

    tiles.each_group(blocks, group)
    tiles.store_run(blocks, run, out)


def _backward_body(x, gradient, *refs, blocks: Blocks, dtype, has_bias: bool, has_pad: bool):
    bias, pad, (dx, *rest) = window_plan.optional(refs, has_bias, has_pad)
    dbias, dpad, scratch = window_plan.optional(rest, has_bias, has_pad)
    run, gradient_run, tile, gradient_tile, result = scratch
    g, chunked = blocks.g, tiles.rows(blocks.g) > CHUNK
    tiles.load_run(blocks, x, run)
    tiles.load_run(blocks, gradient, gradient_run)
    tile[...], gradient_tile[...] = jnp.zeros_like(tile), jnp.zeros_like(gradient_tile)

    @pl.when(pl.program_id(0) == 0)
    def _():
        for total in (dbias, dpad):
            if total is not None:
                total[...] = jnp.zeros_like(total)

    def group(places):
        for slot, place in enumerate(places):
            tiles.cut(blocks, run, tile.at[slot], place, pad)
            tiles.cut(blocks, gradient_run, gradient_tile.at[slot], place, None)
        keys = [tiles.keys(blocks, place) for place in places]
        if chunked:
            result[...] = jnp.zeros_like(result)

        def head(h, chunk, lanes):
            for slot, place in enumerate(places):
                part, own = tile.at[slot], result.at[slot]
                q, k, v = lanes.load(part, 0, chunk), lanes.load(part, 1), lanes.load(part, 2)
                dout = lanes.load(gradient_tile.at[slot], 0, chunk)
                weights, total = _weights(g, q, k, bias[h, chunk, :] if has_bias else None, keys[slot], dtype)
                weights = weights / total
                dweights = _dot(dout, v, (1, 1), dtype)
                dlogits = weights * (dweights - (weights * dweights).sum(-1, keepdims=True))
                if has_bias:
                    dbias[h, chunk, :] += jnp.where(place.new, dlogits, 0.0)
                dlogits *= g.scale
                lanes.store(own, 0, chunk, _dot(dlogits, k, (1, 0), dtype))
                dk, dv = _dot(dlogits, q, (0, 0), dtype), _dot(weights, dout, (0, 0), dtype)
                if chunked:
                    dk, dv = dk + lanes.load(own, 1), dv + lanes.load(own, 2)
                lanes.store(own, 1, slice(None), dk)
                lanes.store(own, 2, slice(None), dv)

        tiles.each_head(g, head)
        for slot, place in enumerate(places):
            tiles.paste(blocks, run, result.at[slot], place)
            if has_pad:
                tiles.add_filled(blocks, result.at[slot], place, dpad)

    tiles.each_group(blocks, group)
    tiles.store_run(blocks, run, dx)


def _call(body, operands, channels, scratch, g: Geometry, bias, pad, name):
    """A `pallas_call` over blocks of maps.

    Args:
        body: of the kernel.
        operands: the maps, `(B, H, W, channels)`.
        channels: of the map that results.
        scratch: channels of the runs and of the tiles that are held.
        g: the geometry of the operands.
        bias, pad: as a `window_plan.Backend` has them. With two operands there are results for both, their gradients.
        name: of the kernel.
    """
    backward = len(operands) > 1
    dtype = operands[0].dtype
    blocks = tiles.blocks(g, dtype.itemsize, bias is not None, backward=backward)
    small = []
    if bias is not None:
        fill = tiles.rows(g) - g.tokens
        small.append(jnp.pad(bias, ((0, 0), (0, fill), (0, fill))))
    if pad is not None:
        lanes = tiles.lane_tiles(pad.size)
        small.append(jnp.pad(pad, (0, lanes * 128 - pad.size)).reshape(lanes, 1, 128))
    everything = [*map(blocks.view, operands), *small]

    def whole(shape):
        return pl.BlockSpec(shape, lambda i: (0,) * len(shape))

    viewed = blocks.view(jax.ShapeDtypeStruct((*operands[0].shape[:3], channels), dtype))
    shapes, specs = [compat.shape_like(viewed.shape, dtype, *everything)], [blocks.spec(channels)]
    if backward:
        sums = [array.shape[:1] + (array.shape[1] + -array.shape[1] % 8, array.shape[2]) for array in small]
        shapes += [compat.shape_like(shape, jnp.float32, *everything) for shape in sums]
        specs += [whole(shape) for shape in sums]
    out, *sums = compat.pallas_call(
        functools.partial(body, blocks=blocks, dtype=dtype, has_bias=bias is not None, has_pad=pad is not None),
        name=name,
        out_shape=shapes,
        grid=(blocks.programs,),
        in_specs=[*(blocks.spec(x.shape[-1]) for x in operands), *(whole(array.shape) for array in small)],
        out_specs=specs,
        scratch_shapes=[
            *(pltpu.VMEM((tiles.lane_tiles(c), blocks.held, 128), jnp.float32) for c in scratch[0]),
            *(pltpu.VMEM((blocks.together, tiles.lane_tiles(c), tiles.rows(g), 128), jnp.float32) for c in scratch[1]),
        ],
        cost_estimate=window_plan.cost(g, dtype.itemsize, bias is not None, pad is not None, backward=backward),
        # One after the other, as they add to the same sums.
        compiler_params=compat.tpu_params(
            dimension_semantics=("arbitrary" if backward else "parallel",), vmem_limit_bytes=blocks.vmem_limit
        ),
    )(*everything)
    return out.reshape(*operands[0].shape[:3], channels), sums


def forward(qkv, bias, pad, *, g: Geometry):
    c = g.channels
    return _call(_forward_body, [qkv], c, ([3 * c], [3 * c, c]), g, bias, pad, "window_attention")[0]


def backward(qkv, bias, pad, gradient, *, g: Geometry):
    c = g.channels
    scratch = [3 * c, c], [3 * c, c, 3 * c]
    name = "window_attention_gradient"
    dqkv, sums = _call(_backward_body, [qkv, gradient], 3 * c, scratch, g, bias, pad, name)
    dbias = None if bias is None else sums.pop(0)[:, : g.tokens, : g.tokens]
    dpad = None if pad is None else sums.pop(0)[:, 0].reshape(-1)[: pad.size]
    return dqkv, dbias, dpad


BACKEND = window_plan.Backend(forward, backward)
