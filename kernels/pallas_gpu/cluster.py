"""Attention within clusters for NVIDIA GPUs from Ampere on, in Triton.

A program takes a tile of a cluster's queries and goes through its keys; for the gradient of keys another goes through
the queries that see them. Tiles cannot be sheared there, but loaded so: what relative positions add to the logits is
a product of XLA's by distance, of which a tile is read along its diagonals; and the weights, and the gradients of the
logits, are written so for the products with the vectors. These are the only numbers per pair that memory holds.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import tuning
from kernels.cluster_plan import Backend, Plan
from kernels.pallas_gpu.tiles import dot, gather, launch, put, side, softmax_step, widened, zeros

INT32 = 2**31


def _blocks(plan: Plan, dtype) -> dict[str, int]:
    def tile(tokens):
        return min(side(tokens), 64 if dtype == jnp.bfloat16 else 32)

    narrow = max(plan.dim, plan.value_dim) <= 64
    default = dict(queries=tile(plan.queries), keys=tile(plan.keys), warps=4 if narrow else 8, stages=2)
    if plan.relative:
        # Every number that is read or written along a diagonal has an address of its own.
        default["keys"] = min(default["keys"], 32)
    return tuning.blocks("cluster", "gpu", default, **plan.bucket, dtype=str(dtype))


def _tiles(plan: Plan, dtype) -> tuple[int, int]:
    blocks = _blocks(plan, dtype)
    return blocks["queries"], blocks["keys"]


def _unsupported(plan: Plan, clusters: int, dtype) -> str | None:
    width = max(side(max(plan.dim, plan.value_dim)), _distances(plan) if plan.relative else 0)
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


def _row(pair):
    return tuple(x[None, :] for x in pair)


def _column(pair):
    return tuple(x[:, None] for x in pair)


def _index(plan: Plan, i, j, transposed: bool, whole: bool):
    """Where a pair of tiles lies in what is kept by distance: rows of queries, and distances.

    Args:
        i, j: tiles of queries and of keys.
        transposed: keys are rows.
        whole: the array has all of the cluster's queries, not one tile of them.
    """
    queries, keys = (jnp.arange(size, dtype=jnp.int32) for size in (plan.query_tile, plan.key_tile))
    shape = (plan.key_tile, plan.query_tile) if transposed else (plan.query_tile, plan.key_tile)
    queries = queries[None, :] if transposed else queries[:, None]
    keys = keys[:, None] if transposed else keys[None, :]
    first = plan.query_tiles * plan.query_tile + j * plan.key_tile - i * plan.query_tile
    rows = queries + i * plan.query_tile if whole else queries
    return jnp.broadcast_to(rows, shape), keys - queries + first


def _weights(refs, plan: Plan, query, key, places, key_places, log, index, transposed=False):
    """Softmax weights, or logits if `log` is None, and which of them are seen and depend on the product."""
    seen, own = plan.seen(places, key_places)
    logits = dot(key, query, trans_b=True) if transposed else dot(query, key, trans_b=True)
    if refs.terms is not None:
        logits = logits + gather(refs.terms, *index, mask=seen, other=0.0)
    logits = logits * plan.scale
    if own is not None:
        logits = jnp.where(own, plan.self_logit, logits)
    differs = seen if own is None else seen & jnp.logical_not(own)
    if log is None:
        return logits, seen, differs
    return jnp.where(seen, jnp.exp(logits - log), 0.0), seen, differs


def _forward_body(refs, *, plan: Plan):
    i, query = pl.program_id(0), refs.query[...]
    places = _column((refs.query_places[0, :], refs.query_places[1, :]))

    def weights(j, log):
        key_places = _row(_places(refs.key_places, j, plan.key_tile))
        index = _index(plan, i, j, transposed=False, whole=False)
        key = _rows(refs.key, j, plan.key_tile)
        return *_weights(refs, plan, query, key, places, key_places, log, index), index

    def step(j, carry):
        acc, peak, total = carry
        logits, seen, _, _ = weights(j, None)
        p, shrink, peak, total = softmax_step(logits, seen, peak, total)
        acc = acc * shrink[:, None] + dot(p.astype(refs.value.dtype), _rows(refs.value, j, plan.key_tile))
        return acc, peak, total

    tiles = plan.tiles_of_keys(i)
    carry = (
        zeros(*refs.out.shape),
        jnp.full((plan.query_tile,), -jnp.inf, jnp.float32),
        zeros(plan.query_tile),
    )
    acc, peak, total = jax.lax.fori_loop(*tiles, step, carry)
    some = total != 0
    divisor = jnp.where(some, total, 1.0)
    log = jnp.where(some, peak + jnp.log(divisor), 0.0)
    refs.out[...] = (acc / divisor[:, None]).astype(refs.out.dtype)
    refs.logs[0, :] = log
    if hasattr(refs, "shares"):

        def share(j, carry):
            p, seen, _, index = weights(j, log[:, None])
            put(refs.shares, *index, value=p.astype(refs.shares.dtype), mask=seen)
            return carry

        jax.lax.fori_loop(*tiles, share, 0)


def _query_body(refs, *, plan: Plan):
    """Gradients of queries, and what that of keys needs: the weighted means of the gradient."""
    i, query, d_out = pl.program_id(0), refs.query[...], refs.d_out[...]
    places, log = _column((refs.query_places[0, :], refs.query_places[1, :])), refs.logs[0, :]
    mean = jnp.sum(d_out.astype(jnp.float32) * refs.out[...].astype(jnp.float32), axis=1)
    refs.means[0, :] = mean

    def step(j, acc):
        key, key_places = _rows(refs.key, j, plan.key_tile), _row(_places(refs.key_places, j, plan.key_tile))
        index = _index(plan, i, j, transposed=False, whole=False)
        p, seen, differs = _weights(refs, plan, query, key, places, key_places, log[:, None], index)
        moved = dot(d_out, _rows(refs.value, j, plan.key_tile), trans_b=True)
        if refs.d_shares is not None:
            moved = moved + gather(refs.d_shares, *index, mask=seen, other=0.0)
            put(refs.shares, *index, value=p.astype(refs.shares.dtype), mask=seen)
        ds = jnp.where(differs, p * (moved - mean[:, None]), 0.0) * plan.scale
        ds = ds.astype(key.dtype)
        if refs.terms is not None:
            put(refs.d_terms, *index, value=ds, mask=seen)
        return acc + dot(ds, key)

    acc = jax.lax.fori_loop(*plan.tiles_of_keys(i), step, zeros(*refs.d_query.shape))
    refs.d_query[...] = acc.astype(refs.d_query.dtype)


def _key_body(refs, *, plan: Plan):
    """Gradients of keys and values."""
    j, key, value = pl.program_id(0), refs.key[...], refs.value[...]
    key_places = _column((refs.key_places[0, :], refs.key_places[1, :]))

    def step(i, carry):
        d_key, d_value = carry
        at = pl.ds(i * plan.query_tile, plan.query_tile)
        query, d_out = _rows(refs.query, i, plan.query_tile), _rows(refs.d_out, i, plan.query_tile)
        places = _row(_places(refs.query_places, i, plan.query_tile))
        index = _index(plan, i, j, transposed=True, whole=True)
        log = refs.logs[0, at][None, :]
        p, seen, differs = _weights(refs, plan, query, key, places, key_places, log, index, transposed=True)
        moved = dot(value, d_out, trans_b=True)
        if refs.d_shares is not None:
            moved = moved + gather(refs.d_shares, *index, mask=seen, other=0.0)
        ds = jnp.where(differs, p * (moved - refs.means[0, at][None, :]), 0.0) * plan.scale
        return d_key + dot(ds.astype(query.dtype), query), d_value + dot(p.astype(d_out.dtype), d_out)

    carry = zeros(*refs.d_key.shape), zeros(*refs.d_value.shape)
    d_key, d_value = jax.lax.fori_loop(*plan.tiles_of_queries(j), step, carry)
    refs.d_key[...] = d_key.astype(refs.d_key.dtype)
    refs.d_value[...] = d_value.astype(refs.d_value.dtype)


def _call(body, name: str, plan: Plan, own: str, operands, results, by_dim: int, by_value_dim: int, zeroed=()):
    """Runs a body for each tile of each cluster.

    Args:
        own: `"query"` or `"key"`, whose tiles these are; of what belongs to the other a program has all.
        operands: by name.
        results: by name shapes and dtypes.
    """
    sizes = _blocks(plan, operands["query"].dtype)
    of_keys = {"key", "value", "key_places", "d_key", "d_value"}
    tile, tiles = (plan.key_tile, plan.key_tiles) if own == "key" else (plan.query_tile, plan.query_tiles)

    def spec(key, x):
        if (key in of_keys) != (own == "key"):
            return pl.BlockSpec((None, *x.shape[1:]), lambda i, g: (g, 0, 0))
        if key in ("query_places", "key_places", "logs", "means"):
            return pl.BlockSpec((None, x.shape[1], tile), lambda i, g: (g, 0, i))
        return pl.BlockSpec((None, tile, x.shape[2]), lambda i, g: (g, i, 0))

    cost = plan.cost(len(operands["query"]), by_dim, by_value_dim, ())
    found = launch(
        functools.partial(body, plan=plan),
        f"cluster_{name}",
        (tiles, len(operands["query"])),
        {key: (x, None if x is None else spec(key, x)) for key, x in operands.items()},
        {key: (x.shape, x.dtype, spec(key, x)) for key, x in results.items()},
        flops=cost.flops,
        transcendentals=cost.transcendentals,
        warps=sizes["warps"],
        stages=sizes["stages"],
        zeroed=zeroed,
    )
    return dict(zip(results, found))


def _of(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def _distances(plan: Plan) -> int:
    """Rows of a table that any pair has: of ranks after the query there are none if none is seen."""
    rows = plan.query_tiles * plan.query_tile
    return rows + (plan.offset + 1 if plan.ordered else plan.key_tiles * plan.key_tile)


def _product(formula: str, *operands):
    """In float32, at the precision of the operands."""
    precision = jax.lax.Precision.HIGHEST if operands[0].dtype == jnp.float32 else None
    return jnp.einsum(formula, *operands, precision=precision, preferred_element_type=jnp.float32)


def _by_distance(rows, table, plan: Plan):
    """Products of rows `(G, n, channels)` with a table's vectors, `(G, n, distances)` float32, or None."""
    return None if table is None else _product("gnd,rd->gnr", rows, table[: _distances(plan)])


def _forward(plan: Plan, query, key, value, query_places, key_places, key_table, value_table):
    clusters, tokens, _ = query.shape
    places = dict(query_places=query_places, key_places=key_places)
    operands = {name: widened(x, -1) for name, x in dict(query=query, key=key, value=value).items()}
    operands |= places | dict(terms=_by_distance(query, key_table, plan))
    out = _of((clusters, tokens, operands["value"].shape[2]), value.dtype)
    results = dict(out=out, logs=_of((clusters, 1, tokens)))
    if value_table is not None:
        results["shares"] = _of((clusters, tokens, _distances(plan)), value.dtype)
    zeroed = tuple(name for name in results if name == "shares")
    found = _call(_forward_body, "forward", plan, "query", operands, results, 1, 1, zeroed)
    out = found["out"][..., : plan.value_dim]
    if value_table is not None:
        out = (out + _product("gnr,re->gne", found["shares"], value_table[: _distances(plan)])).astype(out.dtype)
    return out, found["logs"]


def _backward(plan: Plan, query, key, value, query_places, key_places, key_table, value_table, out, logs, d_out):
    clusters, tokens, _ = query.shape
    operands = {name: widened(x, -1) for name, x in dict(query=query, key=key, value=value, d_out=d_out).items()}
    operands |= dict(query_places=query_places, key_places=key_places, logs=logs)
    operands |= dict(terms=_by_distance(query, key_table, plan), d_shares=_by_distance(d_out, value_table, plan))
    results = dict(d_query=_of(operands["query"].shape, query.dtype), means=_of(logs.shape))
    tables = dict(d_terms=key_table, shares=value_table)
    zeroed = tuple(name for name, table in tables.items() if table is not None)
    results |= {name: _of((clusters, tokens, _distances(plan)), query.dtype) for name in zeroed}
    of_queries = operands | dict(out=widened(out, -1))
    found = _call(_query_body, "query_gradient", plan, "query", of_queries, results, 2, 1, zeroed)
    operands["means"] = found["means"]
    results = {f"d_{name}": _of(operands[name].shape, key.dtype) for name in ("key", "value")}
    of_keys = _call(_key_body, "key_gradient", plan, "key", operands, results, 2, 2)
    d_query = found["d_query"][..., : plan.dim]
    if key_table is not None:
        d_query = d_query + _product("gnr,rd->gnd", found["d_terms"], key_table[: _distances(plan)])

    def of_table(table, by_distance, rows):
        if table is None:
            return None
        made = _product("gnr,gnd->rd", found[by_distance], rows)
        return jnp.pad(made, ((0, len(table) - len(made)), (0, 0))).astype(table.dtype)

    return (
        d_query.astype(query.dtype),
        of_keys["d_key"][..., : plan.dim],
        of_keys["d_value"][..., : plan.value_dim],
        of_table(key_table, "d_terms", query),
        of_table(value_table, "shares", d_out),
    )


BACKEND = Backend("pallas_triton", ("cuda",), _forward, _backward, _tiles, _unsupported)
