"""Attention within clusters for NVIDIA GPUs from Ampere on, in Triton.

A program takes a tile of a cluster's queries and goes through its keys; for the gradient of keys another goes through
the queries that see them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import compat, tuning
from kernels.cluster_plan import Backend, Plan
from kernels.pallas_gpu.tiles import dot, side

INT32 = 2**31


def _blocks(plan: Plan, dtype) -> dict[str, int]:
    def tile(tokens):
        return min(side(tokens), 64 if dtype == jnp.bfloat16 else 32)

    narrow = max(plan.dim, plan.value_dim) <= 64
    default = dict(queries=tile(plan.queries), keys=tile(plan.keys), warps=4 if narrow else 8, stages=2)
    bucket = dict(queries=tuning.bucket(plan.queries), keys=tuning.bucket(plan.keys), dim=tuning.bucket(plan.dim))
    return tuning.blocks("cluster", "gpu", default, **bucket, dtype=str(dtype))


def _tiles(plan: Plan, dtype) -> tuple[int, int]:
    blocks = _blocks(plan, dtype)
    return blocks["queries"], blocks["keys"]


def _unsupported(plan: Plan, clusters: int, dtype, relative: bool) -> str | None:
    if relative:
        return "relative_key and relative_value: not written for GPUs; None would do"
    width = side(max(plan.dim, plan.value_dim))
    size = clusters * width * max(plan.query_tiles * plan.query_tile, plan.key_tiles * plan.key_tile)
    if size >= INT32:
        return f"all clusters have {size} elements, which 32 bits cannot count; a smaller batch would do"
    return None


def _rows(ref, tile, size: int):
    return ref[pl.ds(tile * size, size), :]


def _places(ref, tile, size: int):
    """Positions and groups, `(size,)` each."""
    at = pl.ds(tile * size, size)
    return ref[0, at], ref[1, at]


def _row(places):
    return tuple(x[None, :] for x in places)


def _column(places):
    return tuple(x[:, None] for x in places)


def _forward_body(query, key, value, query_places, key_places, out, logs, *, plan: Plan):
    q = query[...]
    places = _column((query_places[0, :], query_places[1, :]))

    def step(j, carry):
        acc, peak, total = carry
        seen, own = plan.seen(places, _row(_places(key_places, j, plan.key_tile)))
        logits = dot(q, _rows(key, j, plan.key_tile), trans_b=True) * plan.scale
        if own is not None:
            logits = jnp.where(own, plan.self_logit, logits)
        logits = jnp.where(seen, logits, -jnp.inf)
        new = jnp.maximum(peak, jnp.max(logits, axis=1))
        # Nothing seen so far: any finite number will do.
        safe = jnp.where(new == -jnp.inf, 0.0, new)
        p = jnp.where(seen, jnp.exp(logits - safe[:, None]), 0.0)
        shrink = jnp.exp(peak - safe)
        acc = acc * shrink[:, None] + dot(p.astype(value.dtype), _rows(value, j, plan.key_tile))
        return acc, new, total * shrink + jnp.sum(p, axis=1)

    carry = (
        jnp.zeros(out.shape, jnp.float32),
        jnp.full((plan.query_tile,), -jnp.inf, jnp.float32),
        jnp.zeros((plan.query_tile,), jnp.float32),
    )
    acc, peak, total = jax.lax.fori_loop(*plan.tiles_of_keys(pl.program_id(0)), step, carry)
    some = total != 0
    divisor = jnp.where(some, total, 1.0)
    out[...] = (acc / divisor[:, None]).astype(out.dtype)
    logs[0, :] = jnp.where(some, peak + jnp.log(divisor), 0.0)


def _query_body(query, key, value, query_places, key_places, out, logs, d_out, d_query, means, *, plan: Plan):
    """Gradients of queries, and what that of keys needs: the weighted means of the gradient."""
    q, do = query[...], d_out[...]
    places, log = _column((query_places[0, :], query_places[1, :])), logs[0, :]
    mean = jnp.sum(do.astype(jnp.float32) * out[...].astype(jnp.float32), axis=1)
    means[0, :] = mean

    def step(j, acc):
        seen, own = plan.seen(places, _row(_places(key_places, j, plan.key_tile)))
        k = _rows(key, j, plan.key_tile)
        logits = dot(q, k, trans_b=True) * plan.scale
        if own is not None:
            logits = jnp.where(own, plan.self_logit, logits)
        p = jnp.where(seen, jnp.exp(logits - log[:, None]), 0.0)
        moved = dot(do, _rows(value, j, plan.key_tile), trans_b=True)
        differs = seen if own is None else seen & jnp.logical_not(own)
        ds = jnp.where(differs, p * (moved - mean[:, None]), 0.0)
        return acc + dot(ds.astype(k.dtype), k)

    acc = jnp.zeros(d_query.shape, jnp.float32)
    acc = jax.lax.fori_loop(*plan.tiles_of_keys(pl.program_id(0)), step, acc)
    d_query[...] = (acc * plan.scale).astype(d_query.dtype)


def _key_body(query, key, value, query_places, key_places, logs, means, d_out, d_key, d_value, *, plan: Plan):
    """Gradients of keys and values."""
    k, v = key[...], value[...]
    places = _column((key_places[0, :], key_places[1, :]))

    def step(i, carry):
        key_acc, value_acc = carry
        at = pl.ds(i * plan.query_tile, plan.query_tile)
        q, do = _rows(query, i, plan.query_tile), _rows(d_out, i, plan.query_tile)
        seen, own = plan.seen(_row(_places(query_places, i, plan.query_tile)), places)
        logits = dot(k, q, trans_b=True) * plan.scale
        if own is not None:
            logits = jnp.where(own, plan.self_logit, logits)
        p = jnp.where(seen, jnp.exp(logits - logs[0, at][None, :]), 0.0)
        moved = dot(v, do, trans_b=True)
        differs = seen if own is None else seen & jnp.logical_not(own)
        ds = jnp.where(differs, p * (moved - means[0, at][None, :]), 0.0)
        return key_acc + dot(ds.astype(q.dtype), q), value_acc + dot(p.astype(do.dtype), do)

    carry = jnp.zeros(d_key.shape, jnp.float32), jnp.zeros(d_value.shape, jnp.float32)
    key_acc, value_acc = jax.lax.fori_loop(*plan.tiles_of_queries(pl.program_id(0)), step, carry)
    d_key[...] = (key_acc * plan.scale).astype(d_key.dtype)
    d_value[...] = value_acc.astype(d_value.dtype)


def _call(body, name: str, plan: Plan, tiles: int, operands, results, by_dim: int, by_value_dim: int):
    """Runs a body for each tile of each cluster.

    Args:
        operands: pairs of an array and the size of its tiles, or None where a program has all of a cluster.
        results: pairs of a shape and dtype and the size of its tiles.
    """
    blocks = _blocks(plan, operands[0][0].dtype)
    arrays = [x for x, _ in operands]
    clusters = arrays[0].shape[0]

    def spec(x, tile):
        axis = 1 if x.shape[1] > 2 else 2
        if tile is None:
            return pl.BlockSpec((None, *x.shape[1:]), lambda i, g: (g, 0, 0))
        if axis == 2:
            return pl.BlockSpec((None, x.shape[1], tile), lambda i, g: (g, 0, i))
        return pl.BlockSpec((None, tile, x.shape[2]), lambda i, g: (g, i, 0))

    outs = [compat.shape_like(x.shape, x.dtype, *arrays) for x, _ in results]
    return compat.pallas_call(
        functools.partial(body, plan=plan),
        name=f"cluster_{name}",
        grid=(tiles, clusters),
        in_specs=[spec(*pair) for pair in operands],
        out_specs=[spec(*pair) for pair in results],
        out_shape=outs,
        compiler_params=compat.triton_params(blocks["warps"], blocks["stages"]),
        cost_estimate=plan.cost(clusters, by_dim, by_value_dim, (arrays, outs)),
    )(*arrays)


def _widened(x):
    """Channels filled up to a power of two."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, side(x.shape[-1]) - x.shape[-1])))


def _of(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def _forward(plan: Plan, query, key, value, query_places, key_places, *_):
    query, key, value = map(_widened, (query, key, value))
    clusters, tokens, _ = query.shape
    tile = plan.query_tile
    operands = [(query, tile), (key, None), (value, None), (query_places, tile), (key_places, None)]
    results = [(_of((clusters, tokens, value.shape[2]), value.dtype), tile), (_of((clusters, 1, tokens)), tile)]
    out, logs = _call(_forward_body, "forward", plan, plan.query_tiles, operands, results, 1, 1)
    return out[..., : plan.value_dim], logs


def _backward(plan: Plan, query, key, value, query_places, key_places, key_table, value_table, out, logs, d_out):
    query, key, value, out, d_out = map(_widened, (query, key, value, out, d_out))
    tile = plan.query_tile
    operands = [(query, tile), (key, None), (value, None), (query_places, tile), (key_places, None)]
    operands += [(out, tile), (logs, tile), (d_out, tile)]
    results = [(_of(query.shape, query.dtype), tile), (_of(logs.shape), tile)]
    d_query, means = _call(_query_body, "query_gradient", plan, plan.query_tiles, operands, results, 2, 1)
    tile = plan.key_tile
    operands = [(query, None), (key, tile), (value, tile), (query_places, None), (key_places, tile)]
    operands += [(logs, None), (means, None), (d_out, None)]
    results = [(_of(x.shape, x.dtype), tile) for x in (key, value)]
    d_key, d_value = _call(_key_body, "key_gradient", plan, plan.key_tiles, operands, results, 2, 2)
    return d_query[..., : plan.dim], d_key[..., : plan.dim], d_value[..., : plan.value_dim], None, None


BACKEND = Backend("pallas_triton", ("cuda",), _forward, _backward, _tiles, _unsupported)
