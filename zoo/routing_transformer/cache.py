"""States of fixed size from which the Routing Transformer's heads decode one token at a time."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernels.dense import accumulator_dtype
from kernels.masking import masked_softmax


def ring(x: Float[Array, "B N H D"], size: int) -> Float[Array, "B size H D"]:
    """The last `size` tokens, that of position p in place p modulo `size`; zeros where there is none yet."""
    n = x.shape[1]
    last = np.arange(max(0, n - size), n)
    return jnp.zeros((x.shape[0], size, *x.shape[2:]), x.dtype).at[:, last % size].set(x[:, last])


def ring_positions(size: int, position: Int[Array, ""]) -> Int[Array, " size"]:
    """Which position every place of a ring holds once `position` has been written; negative for none."""
    return position - (position - jnp.arange(size)) % size


def attend_cached(
    query: Float[Array, "B H D"],
    key: Float[Array, "B S H D"],
    value: Float[Array, "B S H E"],
    mask: Bool[Array, " S"] | Bool[Array, "B S"],
    relative_key: Float[Array, "S D"] | None = None,
    relative_value: Float[Array, "S E"] | None = None,
) -> Float[Array, "B H E"]:
    """One query of every head over S cached tokens, softmax in float32 (float64 for float64); no scale.

    Args:
        query, key, value: the query is scaled already.
        mask: the tokens that it sees.
        relative_key, relative_value: what is added to every token's key and value, shared by the heads.
    """
    acc = accumulator_dtype(query.dtype)
    logits = jnp.einsum("bhd,bshd->bhs", query, key, preferred_element_type=acc)
    if relative_key is not None:
        logits = logits + jnp.einsum("bhd,sd->bhs", query, relative_key, preferred_element_type=acc)
    mask = mask[None, None] if mask.ndim == 1 else mask[:, None]
    weights = masked_softmax(logits, mask).astype(value.dtype)
    out = jnp.einsum("bhs,bshe->bhe", weights, value)
    return out if relative_value is None else out + jnp.einsum("bhs,se->bhe", weights, relative_value)


def local_step(
    query: Float[Array, "B H D"],
    state: dict[str, Float[Array, "B S H D"]],
    position: Int[Array, ""],
    *,
    block: int,
    look: int,
    relative_key: Float[Array, "R D"] | None = None,
    relative_value: Float[Array, "R D"] | None = None,
) -> Float[Array, "B H D"]:
    """Causal local attention of the token at `position`, which the rings of keys and values hold already.

    Args:
        query: `(B, H, D)`, scaled already.
        state: rings `"key"` and `"value"` of at least the tokens seen.
        block, look: tokens in a block, and earlier blocks that are seen.
        relative_key, relative_value: as in `kernels.local.local_attention`.
    """
    positions = ring_positions(state["key"].shape[1], position)
    first = (position // block - look) * block
    tables = {"relative_key": relative_key, "relative_value": relative_value}
    for name, table in tables.items():
        if table is not None:
            reach = table.shape[0] // 2
            tables[name] = table[jnp.clip(positions - position, -reach, 0) + reach]
    return attend_cached(query, state["key"], state["value"], positions >= jnp.maximum(first, 0), **tables)


def write(state: dict[str, Array], position: Int[Array, ""], **new: Float[Array, "B H D"]) -> dict[str, Array]:
    """Rings of which that called `name` takes `new[name]` in the place of `position`."""
    return {name: ring.at[:, position % ring.shape[1]].set(new[name]) for name, ring in state.items()}
