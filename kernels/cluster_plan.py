"""What kernels of attention within clusters share: calls served, operands in tiles, gradients, costs.

Every cluster is a batch element of its own: its queries attend to its keys, of which data say who sees whom. After the
gather that puts a cluster's tokens side by side nothing depends on where they came from. The floor of the attention is
`2 * (D + E)` operations a pair that is seen, forward, and `2 * (3 D + 2 E)` backward, as much again for relative
positions; its bytes are queries, keys, values and results once, which is what a gather moves too: of 512 tokens of 128
channels half of what their logits would be, written once.

A layer of `routing_transformer_enwik8_8k` (4 rows of 8,192 tokens, 4 heads of 128 channels, 16 clusters of 512, Shaw's
positions, bfloat16) compiled for a TPU v5e moves 2.0 GB for its output where XLA's form moves 8.1, and 3.5 with the
gradients where that moves 14.7, by the compiler's count; 172 MB of it are held, not 948. The kernels' own part of the
first is 0.16 GB: what is left is the choice of the members, the gather and the sums over clusters.

A backend is functions of a module, described by `Backend`:

    forward(plan, query, key, value, query_places, key_places, key_table, value_table)
        -> out (G, n, E), logs (G, 1, n) float32
    backward(plan, query, key, value, query_places, key_places, key_table, value_table, out, logs, d_out)
        -> d_query, d_key, d_value, d_key_table or None, d_value_table or None

`query` is `(G, n, D)`, `key` `(G, m, D)` and `value` `(G, m, E)`, n and m being multiples of the plan's tiles, all
bfloat16 or all float32; places are `(G, 2, tokens)` float32, which has whole numbers up to 2 ** 24: positions, and
groups. `logs` are the logarithms of the softmaxes' sums, 0 for a query that sees nothing. Tables are `(n + m, D)` and
`(n + m, E)`, of the operands' dtype or None: row r is the vector of a key `r - n - offset` ranks after the query.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels import compat, tuning
from kernels.cost import tree_bytes

DTYPES = ("bfloat16", "float32")
# Heads wider than this would not leave a GPU enough registers.
MAX_WIDTH = 128
MAX_TOKENS = 2**24
# Groups of what fills a tile, which see nothing and are not seen, and of keys that all see.
NO_QUERY, NO_KEY, COMMON = -2, -1, -3


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is computed, but for the arrays.

    A query sees the keys of its group, and those of `COMMON` if there are any. Query i has the rank `offset + i` among
    the keys.

    Attributes:
        queries, keys: tokens of a cluster, before they are filled up to whole tiles.
        dim, value_dim: their widths.
        scale: factor on the logits.
        causal: keys of later positions are hidden.
        ordered: keys of a higher rank than the query are not seen, as data say: no work is done for them.
        offset: rank of the first query.
        window: of a query's keys only those of the last `window` positions are seen, and ranks; None for all.
        self_logit: what a query's logit for the key of its own position is, None for the product.
        common: there are keys that all see.
        relative: there is a table.
        query_tile, key_tile: tokens that are computed at once.
    """

    queries: int
    keys: int
    dim: int
    value_dim: int
    scale: float
    causal: bool
    ordered: bool
    offset: int = 0
    window: int | None = None
    self_logit: float | None = None
    common: bool = False
    relative: bool = False
    query_tile: int = 0
    key_tile: int = 0

    @property
    def bucket(self) -> dict[str, Any]:
        """What an entry of `kernels.tuning` is for, but for the dtype."""
        sizes = dict(queries=self.queries, keys=self.keys, dim=max(self.dim, self.value_dim))
        return {name: tuning.bucket(size) for name, size in sizes.items()} | dict(relative=self.relative)

    @property
    def query_tiles(self) -> int:
        return -(-self.queries // self.query_tile)

    @property
    def key_tiles(self) -> int:
        return -(-self.keys // self.key_tile)

    def tiles_of_keys(self, tile):
        """The first tile of keys that a tile of queries sees, and the one after the last; int32 scalars."""
        if not self.ordered:
            return 0, self.key_tiles
        start = tile * self.query_tile + self.offset
        first = 0 if self.window is None else _quotient(start - self.window + 1, self.key_tile)
        return first, jnp.minimum(_quotient(start + self.query_tile + self.key_tile - 1, self.key_tile), self.key_tiles)

    def tiles_of_queries(self, tile):
        """The first tile of queries that sees a tile of keys, and the one after the last."""
        if not self.ordered:
            return 0, self.query_tiles
        start, last = tile * self.key_tile - self.offset, self.query_tiles
        if self.window is not None:
            end = start + self.key_tile + self.window - 1
            last = jnp.minimum(_quotient(end + self.query_tile - 1, self.query_tile), last)
        return _quotient(start, self.query_tile), last

    def seen(self, query_places, key_places):
        """Which keys are seen, and which are the queries' own tokens, or None if that does not matter.

        Args:
            query_places, key_places: pairs of positions and groups, `(queries, 1)` and `(1, keys)`, or the other way.
        """
        (at, group), (of, key_group) = query_places, key_places
        seen = group == key_group
        if self.common:
            seen = seen | ((key_group == COMMON) & (group != NO_QUERY))
        if self.causal:
            seen = seen & (of <= at)
        if self.window is not None:
            seen = seen & (at - of < self.window)
        return seen, None if self.self_logit is None else at == of

    @property
    def pairs(self) -> int:
        """Of queries and keys of a cluster, without those whose ranks say that they are not seen."""
        if not self.ordered:
            return self.queries * self.keys
        last = np.minimum(np.arange(self.queries) + self.offset + 1, self.keys)
        first = 0 if self.window is None else np.maximum(np.arange(self.queries) + self.offset + 1 - self.window, 0)
        return int(np.maximum(last - first, 0).sum())

    def cost(self, clusters: int, by_dim: int, by_value_dim: int, moved: Any) -> pl.CostEstimate:
        """Of a kernel with so many products over the width of keys and of values, every array of `moved` once."""
        pairs = clusters * self.pairs
        return pl.CostEstimate(
            flops=2 * pairs * (by_dim * self.dim + by_value_dim * self.value_dim),
            transcendentals=pairs,
            bytes_accessed=tree_bytes(moved),
        )


def _quotient(x, divisor: int):
    """`x // divisor`, 0 for a negative one, without the steps that correct the sign."""
    x = jnp.maximum(x, 0)
    return jax.lax.div(x, jnp.full_like(x, divisor))


@dataclasses.dataclass(frozen=True)
class Backend:
    """What computes attention within clusters on one kind of device.

    Attributes:
        name, platforms: as in `kernels.dispatch.Implementation`.
        forward, backward: see above.
        tiles: `tiles(plan, dtype)`, the tokens of a tile of queries and of one of keys.
        unsupported: `unsupported(plan, clusters, dtype)` says why a call cannot be served, or None; the plan has its
            tiles.
    """

    name: str
    platforms: tuple[str, ...]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    tiles: Callable[..., tuple[int, int]]
    unsupported: Callable[..., str | None]

    def tiled(self, plan: Plan, dtype) -> Plan:
        """The plan with the tiles of this backend."""
        query_tile, key_tile = self.tiles(plan, jnp.dtype(dtype))
        return dataclasses.replace(plan, query_tile=query_tile, key_tile=key_tile)

    def refusal(self, plan: Plan, clusters: int, dtypes: set[str], tokens: int) -> str | None:
        """Why no such call can be served, or None.

        Args:
            plan: without tiles.
            clusters: of all heads and the whole batch.
            dtypes: names of those of queries, keys and values.
            tokens: of a sequence, which positions count.
        """
        if len(dtypes) > 1 or not dtypes <= set(DTYPES):
            return f"operands are {' and '.join(sorted(dtypes))}; all bfloat16 or all float32 would do"
        if 0 in (clusters, plan.queries, plan.keys, plan.dim, plan.value_dim):
            return "there is nothing to compute: a size is zero"
        width = max(plan.dim, plan.value_dim)
        if width > MAX_WIDTH:
            return f"a head is {width} channels wide; up to {MAX_WIDTH} would do"
        if tokens >= MAX_TOKENS:
            return f"there are {tokens} tokens; fewer than {MAX_TOKENS} would do"
        dtype = jnp.dtype(*dtypes)
        return self.unsupported(self.tiled(plan, dtype), clusters, dtype)


def attend(backend: Backend, plan: Plan, query, key, value, query_places, key_places, key_table, value_table):
    """Attention within clusters, by a backend's kernels.

    Args:
        plan: without tiles.
        query, key, value: `(*clusters, n, D)`, `(*clusters, m, D)` and `(*clusters, m, E)`.
        query_places, key_places: positions and groups, `(*clusters, n)` and `(*clusters, m)` each.
        key_table, value_table: `(2 R + 1, D)` and `(2 R + 1, E)`, vectors for every distance of ranks, or None.

    Returns:
        `(*clusters, n, E)` in the dtype of the operands.
    """
    relative = not (key_table is None and value_table is None)
    plan = backend.tiled(dataclasses.replace(plan, relative=relative), query.dtype)

    def filled(x, tile):
        """`(*clusters, tokens, channels)` as `(G, whole tiles, channels)`."""
        x = x.reshape(-1, *x.shape[-2:])
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile), (0, 0)))

    def placed(places, tile, nobody):
        rows = [x.reshape(-1, x.shape[-1]).astype(jnp.float32) for x in places]
        filler = ((0, 0), (0, -rows[0].shape[1] % tile))
        return jnp.stack([jnp.pad(x, filler, constant_values=nobody) for x in rows], 1)

    rows = plan.query_tiles * plan.query_tile
    distances = np.arange(rows + plan.key_tiles * plan.key_tile) - rows - plan.offset

    def by_distance(table):
        if table is None:
            return None
        reach = table.shape[0] // 2
        return table[np.clip(distances, -reach, reach) + reach].astype(query.dtype)

    operands = (
        filled(query, plan.query_tile),
        filled(key, plan.key_tile),
        filled(value, plan.key_tile),
        placed(query_places, plan.query_tile, NO_QUERY),
        placed(key_places, plan.key_tile, NO_KEY),
        by_distance(key_table),
        by_distance(value_table),
    )
    out = _attend(backend, plan, *compat.match_varying(*operands))
    return out[:, : plan.queries].reshape(*query.shape[:-1], plan.value_dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(backend, plan, *operands):
    return compat.traced_once(_results, dict(backend=backend, plan=plan), *operands)[0]


def _attend_forward(backend, plan, *operands):
    out, logs = compat.traced_once(_results, dict(backend=backend, plan=plan), *operands)
    return out, (*operands, out, logs)


def _attend_backward(backend, plan, saved, d_out):
    *wide, d_key_table, d_value_table = compat.traced_once(_gradients, dict(backend=backend, plan=plan), *saved, d_out)
    return *wide, None, None, d_key_table, d_value_table


def _results(*operands, backend, plan):
    return backend.forward(plan, *operands)


def _gradients(*saved, backend, plan):
    return backend.backward(plan, *saved)


_attend.defvjp(_attend_forward, _attend_backward)
