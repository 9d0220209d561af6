"""Attention within clusters for TPUs, in Mosaic.

A program has one cluster whole in fast memory and goes through its tiles; the gradients of its keys are summed there.
Relative positions are a product with the vectors of all distances of a tile, twice as wide as the tile, whose rows are
then rolled against each other. The other way, for products of weights with vectors, queries are taken in reverse, as
rows are rolled in one direction only. The gradients of the vectors are summed over the clusters, which come one after
another: in two halves where they are even in number, as some chips have two cores.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import compat, tuning
from kernels.cluster_plan import Backend, Plan
from kernels.pallas_tpu.scan_parts import NT, TN, Products, places

# Of the 64 to 128 MiB that a core has; the compiler needs some for what it spills.
VMEM_BYTES = 40 * 2**20


def _tiles(plan: Plan, dtype) -> tuple[int, int]:
    """Multiples of the 128 lanes that places and logits have."""

    def tile(tokens):
        return 128 if tokens <= 128 else 256

    default = dict(queries=tile(plan.queries), keys=tile(plan.keys))
    found = tuning.blocks("cluster", "tpu", default, **plan.bucket, dtype=str(dtype))
    return found["queries"], found["keys"]


def _unsupported(plan: Plan, clusters: int, dtype) -> str | None:
    need = _vmem(plan, dtype)
    if need > VMEM_BYTES:
        return (
            f"a cluster of {plan.queries} queries and {plan.keys} keys takes {need / 2**20:.0f} MiB of fast memory, of "
            f"{VMEM_BYTES >> 20}; a smaller window would do"
        )
    return None


def _vmem(plan: Plan, dtype) -> int:
    """Bytes that the gradient, which takes more than the result, has in fast memory."""
    queries, keys = plan.query_tiles * plan.query_tile, plan.key_tiles * plan.key_tile
    wide = 128
    # Queries, outputs and their gradients, keys and values with theirs, all twice; sums of the keys' gradients.
    rows = 2 * (4 * queries + 4 * keys) * wide * dtype.itemsize + 2 * keys * wide * 4
    if plan.relative:
        rows += 2 * 2 * (queries + keys) * wide * (dtype.itemsize + 4)
    return rows + 12 * plan.query_tile * (plan.query_tile + plan.key_tile) * 4


def _at(tile, size: int):
    return pl.ds(pl.multiple_of(tile * size, size), size)


def _columns(rows):
    """Rows `(r, T)`, up to eight, as columns `(T, 1)` each."""
    filler = jnp.zeros((8 - len(rows), rows.shape[1]), jnp.float32)
    turned = jnp.concatenate([rows, filler]).T
    return [turned[:, i : i + 1] for i in range(len(rows))]


def _row(column):
    """A column `(T, 1)` as a row."""
    return jnp.broadcast_to(column, (column.shape[0], 128)).T[:1]


def _to_keys(by_distance, plan: Plan):
    """What belongs to distances, `(queries, queries + keys)`, where the keys of these distances are."""
    return compat.tpu_roll_rows(by_distance, plan.key_tile)[:, : plan.key_tile]


def _to_distances(by_key, plan: Plan):
    """What belongs to keys, the queries in reverse, where their distances are: rolls have no negative stride."""
    filler = jnp.zeros((plan.query_tile, plan.query_tile), by_key.dtype)
    return compat.tpu_roll_rows(jnp.concatenate([by_key, filler], axis=1), 1)


def _reversal(size: int):
    """The matrix that reverses rows."""
    rows, columns = places(size, size)
    return (rows + columns == size - 1).astype(jnp.float32)


class _Tiles:
    """The operands of a cluster in tiles, and what a pair of tiles has in common."""

    def __init__(self, refs, plan: Plan):
        self.refs, self.plan = refs, plan
        self.product = Products(refs["query"].dtype == jnp.bfloat16)

    def of_query(self, name, tile):
        return self.refs[name][0, _at(tile, self.plan.query_tile)]

    def of_key(self, name, tile):
        return self.refs[name][0, _at(tile, self.plan.key_tile)]

    def vectors(self, i, j):
        """Which rows of a table two tiles have, the queries' last one coming first."""
        plan = self.plan
        start = (plan.query_tiles - 1 - i) * plan.query_tile + j * plan.key_tile
        return pl.ds(pl.multiple_of(start, 128), plan.query_tile + plan.key_tile)

    def query_places(self, tile):
        return _columns(self.refs["query_places"][0, :, _at(tile, self.plan.query_tile)])

    def logits(self, query, places, i, j):
        """Logits, which are seen, and which may not be differentiated, or None."""
        plan = self.plan
        logits = self.product(query, self.of_key("key", j), NT)
        if "key_table" in self.refs:
            logits += _to_keys(self.product(query, self.refs["key_table"][self.vectors(i, j)], NT), plan)
        rows = self.refs["key_places"][0, :, _at(j, plan.key_tile)]
        seen, own = plan.seen(places, (rows[:1], rows[1:]))
        logits = logits * plan.scale
        return logits if own is None else jnp.where(own, plan.self_logit, logits), seen, own


def _forward_body(refs, plan: Plan):
    tiles = _Tiles(refs, plan)
    product, reversal = tiles.product, _reversal(plan.query_tile)

    def queries(i, _):
        query, at = tiles.of_query("query", i), tiles.query_places(i)

        def keys(j, carry):
            total, peak, acc = carry
            logits, seen, _ = tiles.logits(query, at, i, j)
            new = jnp.maximum(peak, jnp.max(jnp.where(seen, logits, -jnp.inf), axis=1, keepdims=True))
            # Nothing seen so far: any finite number will do.
            safe = jnp.where(new == -jnp.inf, 0.0, new)
            p = jnp.where(seen, jnp.exp(logits - safe), 0.0)
            shrink = jnp.exp(peak - safe)
            change = product(p, tiles.of_key("value", j))
            if "value_table" in refs:
                by_distance = _to_distances(product(reversal, p), plan)
                change += product.precise(reversal, product(by_distance, refs["value_table"][tiles.vectors(i, j)]))
            return total * shrink + jnp.sum(p, axis=1, keepdims=True), new, acc * shrink + change

        column = (plan.query_tile, 1)
        carry = jnp.zeros(column, jnp.float32), jnp.full(column, -jnp.inf, jnp.float32)
        carry = *carry, jnp.zeros((plan.query_tile, plan.value_dim), jnp.float32)
        total, peak, acc = jax.lax.fori_loop(*plan.tiles_of_keys(i), keys, carry)
        some = total != 0
        divisor = jnp.where(some, total, 1.0)
        refs["out"][0, _at(i, plan.query_tile)] = (acc / divisor).astype(refs["out"].dtype)
        log = jnp.where(some, peak + jnp.log(divisor), 0.0)
        refs["logs"][0, :, _at(i, plan.query_tile)] = _row(log)
        return 0

    jax.lax.fori_loop(0, plan.query_tiles, queries, 0)


def _backward_body(refs, plan: Plan):
    tiles = _Tiles(refs, plan)
    product, reversal = tiles.product, _reversal(plan.query_tile)
    key_sum, value_sum = refs["key_sum"], refs["value_sum"]
    key_sum[...] = jnp.zeros(key_sum.shape, jnp.float32)
    value_sum[...] = jnp.zeros(value_sum.shape, jnp.float32)

    @pl.when(pl.program_id(1) == 0)
    def _():
        for name in ("d_key_table", "d_value_table"):
            if name in refs:
                refs[name][...] = jnp.zeros(refs[name].shape, jnp.float32)

    def add_to_table(name, at, change):
        refs[name][0, at] = refs[name][0, at] + change

    def queries(i, _):
        query, at = tiles.of_query("query", i), tiles.query_places(i)
        d_out = tiles.of_query("d_out", i)
        (log,) = _columns(refs["logs"][0, :, _at(i, plan.query_tile)])
        mean = jnp.sum(d_out.astype(jnp.float32) * tiles.of_query("out", i).astype(jnp.float32), axis=1, keepdims=True)
        query_reversed = product(reversal, query) if "key_table" in refs else None
        d_out_reversed = product(reversal, d_out) if "value_table" in refs else None

        def keys(j, carry):
            d_query, d_query_reversed = carry
            own_keys, vectors = _at(j, plan.key_tile), tiles.vectors(i, j)
            logits, seen, own = tiles.logits(query, at, i, j)
            p = jnp.where(seen, jnp.exp(logits - log), 0.0)
            dp = product(d_out, tiles.of_key("value", j), NT)
            if "value_table" in refs:
                dp += _to_keys(product(d_out, refs["value_table"][vectors], NT), plan)
                by_distance = _to_distances(product(reversal, p), plan)
                add_to_table("d_value_table", vectors, product(by_distance, d_out_reversed, TN))
            differs = seen if own is None else seen & jnp.logical_not(own)
            ds = jnp.where(differs, p * (dp - mean), 0.0) * plan.scale
            value_sum[own_keys] = value_sum[own_keys] + product(p, d_out, TN)
            key_sum[own_keys] = key_sum[own_keys] + product(ds, query, TN)
            d_query += product(ds, tiles.of_key("key", j))
            if "key_table" in refs:
                by_distance = _to_distances(product(reversal, ds), plan)
                d_query_reversed += product(by_distance, refs["key_table"][vectors])
                add_to_table("d_key_table", vectors, product(by_distance, query_reversed, TN))
            return d_query, d_query_reversed

        zeros = jnp.zeros((plan.query_tile, plan.dim), jnp.float32)
        carry = zeros, (zeros if "key_table" in refs else None)
        d_query, d_query_reversed = jax.lax.fori_loop(*plan.tiles_of_keys(i), keys, carry)
        if "key_table" in refs:
            d_query += product.precise(reversal, d_query_reversed)
        refs["d_query"][0, _at(i, plan.query_tile)] = d_query.astype(refs["d_query"].dtype)
        return 0

    jax.lax.fori_loop(0, plan.query_tiles, queries, 0)
    refs["d_key"][0] = key_sum[...].astype(refs["d_key"].dtype)
    refs["d_value"][0] = value_sum[...].astype(refs["d_value"].dtype)


def _call(body, name: str, plan: Plan, operands, results, scratch, cost):
    """Runs a body over the clusters; operands that are None are left out, as are such results."""
    operands = {key: x for key, x in operands.items() if x is not None}
    arrays = list(operands.values())
    clusters = arrays[0].shape[0]
    halves = 2 - clusters % 2

    def spec(key, shape):
        if key.startswith("d_") and key.endswith("table"):
            return pl.BlockSpec((1, *shape[1:]), lambda half, g: (half, 0, 0))
        if key.endswith("table"):
            return pl.BlockSpec(shape, lambda half, g: (0, 0))
        return pl.BlockSpec((1, *shape[1:]), lambda half, g: (half * (clusters // halves) + g, 0, 0))

    def named(*refs):
        body(dict(zip((*operands, *results, *scratch), refs)), plan)

    outs = [compat.shape_like(x.shape, x.dtype, *arrays) for x in results.values()]
    found = compat.pallas_call(
        named,
        name=f"cluster_{name}",
        grid=(halves, clusters // halves),
        in_specs=[spec(key, x.shape) for key, x in operands.items()],
        out_specs=[spec(key, x.shape) for key, x in results.items()],
        out_shape=outs,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        compiler_params=compat.tpu_params(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES + VMEM_BYTES // 4
        ),
        cost_estimate=cost(arrays, outs),
    )(*arrays)
    return dict(zip(results, found))


def _of(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


NAMES = ("query", "key", "value", "query_places", "key_places", "key_table", "value_table")


def _cost(plan, clusters, by_dim, by_value_dim, tables):
    """See `Plan.cost`; so many products for each of the tables that there are."""
    (key_table, of_key), (value_table, of_value) = tables
    by_dim += 0 if key_table is None else of_key
    by_value_dim += 0 if value_table is None else of_value
    return lambda operands, results: plan.cost(clusters, by_dim, by_value_dim, (operands, results))


def _forward(plan: Plan, *operands):
    query, value = operands[0], operands[2]
    *_, key_table, value_table = operands
    clusters, tokens, _ = query.shape
    results = dict(out=_of((clusters, tokens, plan.value_dim), value.dtype), logs=_of((clusters, 1, tokens)))
    cost = _cost(plan, clusters, 1, 1, ((key_table, 1), (value_table, 1)))
    found = _call(_forward_body, "forward", plan, dict(zip(NAMES, operands)), results, {}, cost)
    return found["out"], found["logs"]


def _backward(plan: Plan, *saved):
    operands = dict(zip((*NAMES, "out", "logs", "d_out"), saved))
    clusters = operands["query"].shape[0]
    results = {f"d_{name}": _of(operands[name].shape, operands[name].dtype) for name in ("query", "key", "value")}
    tables = {name: operands[name] for name in ("key_table", "value_table")}
    for name, table in tables.items():
        if table is not None:
            results[f"d_{name}"] = _of((2 - clusters % 2, *table.shape))
    scratch = {f"{name}_sum": operands[name].shape[1:] for name in ("key", "value")}
    cost = _cost(plan, clusters, 3, 2, ((tables["key_table"], 3), (tables["value_table"], 2)))
    found = _call(_backward_body, "gradient", plan, operands, results, scratch, cost)
    of_tables = (
        None if table is None else found[f"d_{name}"].sum(0).astype(table.dtype) for name, table in tables.items()
    )
    return found["d_query"], found["d_key"], found["d_value"], *of_tables


BACKEND = Backend("pallas_tpu", ("tpu",), _forward, _backward, _tiles, _unsupported)
