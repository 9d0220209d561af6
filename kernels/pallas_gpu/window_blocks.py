"""The gradient of attention in large windows on NVIDIA GPUs: queries and keys in blocks.

Three kernels: of every query the logarithm of its softmax's sum and the mean change of its weights; of every block of
tokens the gradients of its queries, and of its keys and values; of every block of the bias its gradient.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels import compat, window_plan
from kernels.pallas_gpu.tiles import dot
from kernels.pallas_gpu.window_tiles import Layout, Reader, weigh, whole

# Programs that share the sum of one block of the bias's gradient.
BIAS_PROGRAMS = 8


def _rows_body(x, gradient, *refs, at: Layout, has_bias: bool, has_pad: bool):
    """Logarithms of sums, base 2, and mean changes: `(windows * heads, 2, rows)`."""
    bias, pad, (out,) = window_plan.optional(refs, has_bias, has_pad)
    reader = Reader(at, pad)
    i, h, window = reader.program(at.blocks)
    place = reader.place(window)
    queries = place.tokens(i)
    q, dout = reader.load(x, queries, h, 0), reader.load(gradient, queries, h, 0, filled=False)

    def keys(b, carry):
        top, total, mean = carry
        tokens = place.tokens(b)
        k, v = reader.load(x, tokens, h, 1), reader.load(x, tokens, h, 2)
        logits = reader.logits(q, k, bias, h, i, b, tokens)
        new, weights, shrunk = weigh(logits, top)
        mean = mean * shrunk + (weights * dot(dout, v, trans_b=True)).sum(1)
        return new, total * shrunk + weights.sum(1), mean

    top = jnp.full((at.block,), -jnp.inf, jnp.float32)
    top, total, mean = lax.fori_loop(0, at.blocks, keys, (top, jnp.zeros_like(top), jnp.zeros_like(top)))
    rows = pl.ds(i * at.block, at.block)
    out[window * at.g.heads + h, 0, rows] = top + jnp.log2(total)
    out[window * at.g.heads + h, 1, rows] = mean / total


def _changes(reader: Reader, q, k, v, dout, bias, rows, h, window, i, j, keys):
    """Weights and gradients of the logits for a block `i` of queries and a block `j` of keys."""
    at = reader.at
    inside, program = pl.ds(i * at.block, at.block), window * at.g.heads + h
    weights = jnp.exp2(reader.logits(q, k, bias, h, i, j, keys) - rows[program, 0, inside][:, None])
    return weights, weights * (dot(dout, v, trans_b=True) - rows[program, 1, inside][:, None])


def _tokens_body(x, gradient, rows, *refs, at: Layout, has_bias: bool, has_pad: bool):
    bias, pad, (dx, *dpad) = window_plan.optional(refs, has_bias, has_pad)
    reader = Reader(at, pad)
    i, h, window = reader.program(at.blocks)
    place = reader.place(window)
    own = place.tokens(i)
    q, k, v = (reader.load(x, own, h, part) for part in range(3))
    dout = reader.load(gradient, own, h, 0, filled=False)

    def of_queries(b, dq):
        tokens = place.tokens(b)
        other_k, other_v = reader.load(x, tokens, h, 1), reader.load(x, tokens, h, 2)
        _, dlogits = _changes(reader, q, other_k, other_v, dout, bias, rows, h, window, i, b, tokens)
        return dq + dot((dlogits * at.g.scale).astype(q.dtype), other_k)

    def of_keys(b, carry):
        dk, dv = carry
        tokens = place.tokens(b)
        other_q, other = reader.load(x, tokens, h, 0), reader.load(gradient, tokens, h, 0, filled=False)
        weights, dlogits = _changes(reader, other_q, k, v, other, bias, rows, h, window, b, i, own)
        dk = dk + dot((dlogits * at.g.scale).astype(q.dtype), other_q, trans_a=True)
        return dk, dv + dot(weights.astype(q.dtype), other, trans_a=True)

    zero = jnp.zeros((at.block, at.wide), jnp.float32)
    dq = lax.fori_loop(0, at.blocks, of_queries, zero)
    results = (dq, *lax.fori_loop(0, at.blocks, of_keys, (zero, zero)))
    for part, result in enumerate(results):
        reader.store(dx, own, h, part, result)
        if has_pad:
            dpad[0][part, :] = reader.filled(own, result)


def _bias_body(x, gradient, rows, *refs, at: Layout, has_bias: bool, has_pad: bool):
    bias, pad, (dbias,) = window_plan.optional(refs, has_bias, has_pad)
    reader = Reader(at, pad)
    program = pl.program_id(0)
    i, j, h = program // at.blocks % at.blocks, program % at.blocks, program // at.blocks**2 % at.g.heads
    group = program // (at.blocks**2 * at.g.heads)

    def window(w, total):
        # Past the last window nothing is read, so that nothing is added.
        place = reader.place(group * at.together + w)
        queries, keys = place.tokens(i), place.tokens(j)
        q, k, v = reader.load(x, queries, h, 0), reader.load(x, keys, h, 1), reader.load(x, keys, h, 2)
        dout = reader.load(gradient, queries, h, 0, filled=False)
        inside = jnp.minimum(place.index, at.windows - 1)
        _, dlogits = _changes(reader, q, k, v, dout, bias, rows, h, inside, i, j, keys)
        return total + jnp.where(place.index < at.windows, dlogits, 0.0)

    dbias[...] = lax.fori_loop(0, at.together, window, jnp.zeros((at.block, at.block), jnp.float32))


def _call(body, name, arrays, has, shapes, specs, programs, at: Layout, products: int, maps: int):
    """A kernel that takes `products` products for every pair of queries and keys and moves `maps` maps of channels."""
    return compat.pallas_call(
        functools.partial(body, at=at, has_bias=has[0], has_pad=has[1]),
        name=name,
        out_shape=[compat.shape_like(shape, dtype, *arrays) for shape, dtype in shapes],
        grid=(programs,),
        in_specs=[whole(array) for array in arrays],
        out_specs=specs,
        cost_estimate=window_plan.estimate(at.g, arrays[0].dtype.itemsize, products=products, maps=maps),
        compiler_params=compat.triton_params(at.warps, at.stages),
    )(*arrays)


def backward(qkv, bias, pad, gradient, *, at: Layout):
    """The gradients of qkv, bias and pad, as those of a `window_plan.Backend`."""
    g, has = at.g, (bias is not None, pad is not None)
    maps = [x.reshape(-1, x.shape[-1]) for x in (qkv, gradient)]
    small = at.small(bias, pad)
    problems, name = at.windows * g.heads, "window_attention_gradient"
    rows_shape = (problems, 2, at.rows)
    (rows,) = _call(
        _rows_body,
        f"{name}_rows",
        [*maps, *small],
        has,
        [(rows_shape, jnp.float32)],
        [pl.BlockSpec(rows_shape, lambda i: (0, 0, 0))],
        problems * at.blocks,
        at,
        products=2,
        maps=4,
    )
    arrays = [*maps, rows, *small]
    shapes, specs = [(maps[0].shape, qkv.dtype)], [whole(maps[0])]
    if pad is not None:
        shapes.append(((problems * at.blocks, 3, at.wide), jnp.float32))
        specs.append(pl.BlockSpec((None, 3, at.wide), lambda i: (i, 0, 0)))
    dqkv, *pads = _call(
        _tokens_body, f"{name}_tokens", arrays, has, shapes, specs, problems * at.blocks, at, products=7, maps=7
    )
    dbias = dpad = None
    if pad is not None:
        partial = pads[0].reshape(at.windows, g.heads, at.blocks, 3, at.wide).sum(2)
        dpad = at.pad_gradient(partial)
    if bias is not None:
        shared = at.sharing(-(-at.windows // min(at.windows, BIAS_PROGRAMS)))
        shape = (shared.groups * g.heads * at.blocks**2, at.block, at.block)
        spec = pl.BlockSpec((None, at.block, at.block), lambda i: (i, 0, 0))
        (partial,) = _call(
            _bias_body,
            f"{name}_bias",
            arrays,
            has,
            [(shape, jnp.float32)],
            [spec],
            shape[0],
            shared,
            products=2,
            maps=4,
        )
        partial = partial.reshape(shared.groups, g.heads, at.blocks, at.blocks, at.block, at.block).sum(0)
        dbias = partial.swapaxes(2, 3).reshape(g.heads, at.rows, at.rows)[:, : g.tokens, : g.tokens]
    return dqkv.reshape(qkv.shape), dbias, dpad
