"""Relative positions after Shaw et al.: learned vectors for every clipped distance, added to keys and to values.

Between consecutive queries and consecutive keys the distance is constant along diagonals. A product with the vector
of every distance, its rows then shifted against each other, gives each query's term for each key by matmuls alone,
with neither a vector per pair nor a gather.
"""

import jax.numpy as jnp
import numpy as np

from kernels.dense import accumulator_dtype


def _distances(rows: int, columns: int, offset: int, causal: bool) -> np.ndarray:
    """All distances `key - query`, ascending, of queries `offset + (0 .. rows)` and keys `(0 .. columns)`."""
    first = -(offset + rows - 1)
    # At least one per column, or rows would not shift into each other.
    last = max(0 if causal else columns - 1 - offset, first + columns - 1)
    return np.arange(first, last + 1)


def _vectors(table, distances: np.ndarray):
    reach = (table.shape[0] - 1) // 2
    return table[np.clip(distances, -reach, reach) + reach]


def relative_logits(query, table, columns: int, *, offset: int = 0, causal: bool = False):
    """What the vectors of the distances add to the logits.

    Args:
        query: `(..., rows, D)`; row i is at position `offset + i` among the keys.
        table: `(2 R + 1, D)`, row `clip(key - query, -R, R) + R` for every distance.
        columns: number of keys.
        offset: position of the first query.
        causal: entries with the key after the query may be anything finite, for a mask comes over them.

    Returns:
        `(..., rows, columns)`, float32 (float64 for float64 queries).
    """
    rows, distances = query.shape[-2], _distances(query.shape[-2], columns, offset, causal)
    vectors = _vectors(table, distances).astype(query.dtype)
    logits = jnp.einsum("...id,rd->...ir", query, vectors, preferred_element_type=accumulator_dtype(query.dtype))
    length = len(distances)
    flat = jnp.pad(logits, [(0, 0)] * (query.ndim - 1) + [(0, 1)]).reshape(*query.shape[:-2], -1)
    flat = flat[..., rows - 1 : rows - 1 + rows * length]
    return flat.reshape(*query.shape[:-1], length)[..., :columns]


def relative_values(weights, table, *, offset: int = 0, causal: bool = False):
    """What the vectors of the distances add to the output.

    Args:
        weights: `(..., rows, columns)`; zero where the key comes after the query if `causal`.
        table: `(2 R + 1, E)`, as in `relative_logits`.
        offset, causal: as in `relative_logits`.

    Returns:
        `(..., rows, E)` in the dtype of `weights`.
    """
    *batch, rows, columns = weights.shape
    distances = _distances(rows, columns, offset, causal)
    length, none = len(distances), [(0, 0)] * len(batch)
    flat = jnp.pad(weights, [*none, (0, 0), (0, length - columns)]).reshape(*batch, -1)
    flat = jnp.pad(flat, [*none, (rows - 1, 1)])
    by_distance = flat.reshape(*batch, rows, length + 1)[..., :length]
    return jnp.einsum("...ir,re->...ie", by_distance, _vectors(table, distances).astype(weights.dtype))


def check_tables(query_dim: int, value_dim: int, relative_key, relative_value):
    """Raises ValueError unless both tables have an odd number of rows and the channels of keys and values."""
    for name, table, dim in (("key", relative_key, query_dim), ("value", relative_value, value_dim)):
        if table is not None and (table.ndim != 2 or table.shape[0] % 2 == 0 or table.shape[1] != dim):
            raise ValueError(
                f"relative_{name} must be (2 R + 1, {dim}), one row for each distance from -R to R; got {table.shape}"
            )
