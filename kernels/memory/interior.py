"""Inside a block: how much of each token's gradient, and of the block's start, is in the state at every read.

With gradients that are known beforehand an additive update is linear, so that the state of token t is

    state_t = base_t start + velocity_t (momentum at the start) - sum_{i <= t} kernel_ti step_i gradient_i

and, gradients being outer products, a read needs the products of tokens with tokens only, never state_t itself (the
dual form). Miras (arXiv:2504.13173), equation 28; exponents are differences, masked before they are taken.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Dense(NamedTuple):
    """A kernel `(G, b, b, c)` written down."""

    kernel: jax.Array


class Tiled(NamedTuple):
    """A kernel of channel-wise decay, `kernel_tic = exp(rows_tc - columns_ic)` where `mask_ti`, by tiles of rows.

    Between tiles it is the product of two factors, neither above 1, so that sums over it are matrix products; only
    inside the tiles on the diagonal is it written down.

    Attributes:
        rows: `(G, tiles, s, c)`, from the end of the tile before to each row.
        columns: `(G, tiles, b, c)`, from each column to the end of the tile before the rows; 0 from there on.
        diagonal: `(G, tiles, s, s, c)`.
        mask: `(G or 1, b, b)`.
    """

    rows: jax.Array
    columns: jax.Array
    diagonal: jax.Array
    mask: jax.Array


class Interior(NamedTuple):
    """Coefficients, with c channels, 1 or D.

    Attributes:
        base, velocity: `(G, b, c)`, of the state and of the momentum at the block's start; velocity is None without
            momentum.
        kernel: of step_i gradient_i in what token t reads.
        last_base, last_velocity, last_kernel: the same for the state after the block, `(G, 1, c)` and `(G, b, c)`.
        momentum_base, momentum_kernel: the same for the momentum after the block, or None.
    """

    base: jax.Array
    velocity: jax.Array | None
    kernel: Dense | Tiled
    last_base: jax.Array
    last_velocity: jax.Array | None
    last_kernel: jax.Array
    momentum_base: jax.Array | None
    momentum_kernel: jax.Array | None


def interior(log_retention, log_momentum, live, starts, before: bool) -> Interior:
    """The coefficients of a block.

    Args:
        log_retention: `(G, b, c)`.
        log_momentum: the same, or None for no momentum.
        live: `(G, b)`; where False the momentum does not reach the state.
        starts: `(G, b)`, True where a document begins, whose tokens see nothing before it in the block but the start,
            or None.
        before: reads come before the token's own write.
    """
    tokens = log_retention.shape[1]
    causal = jnp.tril(jnp.ones((1, tokens, tokens), bool))
    reads = jnp.tril(causal, -1) if before else causal
    if starts is not None:
        document = jnp.cumsum(starts, axis=1)
        same = document[:, :, None] == document[:, None, :]
        causal, reads = causal & same, reads & same
    total = jnp.cumsum(log_retention, axis=1)
    base = _since_start(total, starts)
    if log_momentum is not None:
        return _with_momentum(total, base, log_momentum, live, starts, causal, reads, before)
    last_kernel = jnp.where(causal[:, -1, :, None], jnp.exp(total[:, -1:] - total), 0)
    seen = _delayed(base, 1, starts) if before else base
    rows = _delayed(total, 0) if before else total
    by_tiles = total.shape[-1] > 1 and tokens > 4
    kernel = _tiled(rows, total, reads) if by_tiles else Dense(_between(rows, total, reads))
    return Interior(seen, None, kernel, base[:, -1:], None, last_kernel, None, None)


def _with_momentum(total, base, log_momentum, live, starts, causal, reads, before):
    sums = jnp.cumsum(log_momentum, axis=1)
    momentum_base, momentum_kernel = _since_start(sums, starts), _between(sums, sums, causal)
    # What a token adds to the momentum reaches the state with every later token's.
    arriving = jnp.where(live[:, None, :, None], _between(total, total, causal), 0)
    velocity = jnp.einsum("gtjc,gjc->gtc", *_broadcast(arriving, momentum_base))
    kernel = jnp.einsum("gtjc,gjic->gtic", *_broadcast(arriving, momentum_kernel))
    last = dict(
        last_base=base[:, -1:],
        last_velocity=velocity[:, -1:],
        last_kernel=kernel[:, -1],
        momentum_base=momentum_base[:, -1:],
        momentum_kernel=momentum_kernel[:, -1],
    )
    if before:
        base, velocity = _delayed(base, 1, starts), _delayed(velocity, 0, starts)
        kernel = jnp.where(reads[..., None], _delayed(kernel, 0), 0)
    return Interior(base, velocity, Dense(kernel), **last)


def by_inputs(kernel: Dense | Tiled, x: jax.Array, y: jax.Array) -> jax.Array:
    """sum_c kernel_tic x_tc y_ic, `(G, b, b)`."""
    if isinstance(kernel, Dense) and kernel.kernel.shape[-1] == 1:
        return jnp.matmul(x, y.swapaxes(-1, -2)) * kernel.kernel[..., 0]
    # An einsum, since a product that is summed up over its last axis takes a CPU three times as long.
    if isinstance(kernel, Dense):
        return jnp.einsum("gtc,gtic->gti", x, kernel.kernel * y[:, None])
    tokens, side = y.shape[1], kernel.rows.shape[2]
    x, inside = _tiles(x, side), _tiles(y, side)
    across = jnp.matmul(x * kernel.rows, (y[:, None] * kernel.columns).swapaxes(-1, -2))
    inside = jnp.einsum("gstc,gstic->gsti", x, kernel.diagonal * inside[:, :, None])
    tiles = jnp.eye(inside.shape[1], dtype=bool)[:, None, :, None]
    rows = inside.shape[1] * side
    inside = jnp.where(tiles, inside[:, :, :, None], 0).reshape(len(y), rows, rows)
    out = _joined(across, tokens) + inside[:, :tokens, :tokens]
    return jnp.where(kernel.mask, out, 0)


def by_outputs(kernel: Dense | Tiled, products: jax.Array, y: jax.Array) -> jax.Array:
    """sum_i kernel_tic products_ti y_ic, `(G, b, c)`."""
    if isinstance(kernel, Dense) and kernel.kernel.shape[-1] == 1:
        return jnp.matmul(products * kernel.kernel[..., 0], y)
    if isinstance(kernel, Dense):
        return jnp.einsum("gti,gtic->gtc", products, kernel.kernel * y[:, None])
    tokens, side = y.shape[1], kernel.rows.shape[2]
    products = _tiles(jnp.where(kernel.mask, products, 0), side)
    across = jnp.matmul(products, y[:, None] * kernel.columns) * kernel.rows
    tiles = products.shape[1]
    products = jnp.pad(products, [(0, 0)] * 3 + [(0, tiles * side - tokens)])
    products = products.reshape(*products.shape[:3], tiles, side)
    products = jnp.where(jnp.eye(tiles, dtype=bool)[:, None, :, None], products, 0).sum(3)
    inside = jnp.einsum("gsti,gstic->gstc", products, kernel.diagonal * _tiles(y, side)[:, :, None])
    return _joined(across + inside, tokens)


def _tiled(rows, columns, mask):
    """The kernel exp(rows_t - columns_i) where the mask, causal, holds."""
    tokens = columns.shape[1]
    side = round(math.sqrt(tokens))
    ends = jnp.concatenate([jnp.zeros_like(columns[:, :1]), columns[:, side - 1 : tokens - 1 : side]], axis=1)
    position = jnp.arange(tokens)
    earlier = position < jnp.arange(ends.shape[1])[:, None] * side
    columns_in, rows_in = _tiles(columns, side, "edge"), _tiles(rows, side, "edge")
    difference = jnp.where(earlier[..., None], ends[:, :, None] - columns[:, None], 0)
    # Fillers come last, where rows are no higher than any column before them.
    lower = jnp.tril(jnp.ones((side, side), bool), 0 if rows is columns else -1)[..., None]
    inside = jnp.where(lower, rows_in[:, :, :, None] - columns_in[:, :, None], 0)
    return Tiled(
        rows=jnp.exp(rows_in - ends[:, :, None]),
        columns=jnp.where(earlier[..., None], jnp.exp(difference), 0),
        diagonal=jnp.where(lower, jnp.exp(inside), 0),
        mask=mask,
    )


def _tiles(x, side, mode="constant"):
    """`(G, b, ...)` as `(G, tiles, side, ...)`, filled up."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % side), *[(0, 0)] * (x.ndim - 2)], mode=mode)
    return x.reshape(len(x), x.shape[1] // side, side, *x.shape[2:])


def _joined(x, tokens):
    """The inverse of `_tiles`."""
    return x.reshape(len(x), x.shape[1] * x.shape[2], *x.shape[3:])[:, :tokens]


def _between(rows, columns, mask):
    """exp(rows_t - columns_i) where the mask holds."""
    difference = jnp.where(mask[..., None], rows[:, :, None] - columns[:, None], 0)
    return jnp.where(mask[..., None], jnp.exp(difference), 0)


def _since_start(total, starts):
    """exp of the sum since the block's start, or the document's."""
    if starts is not None:
        # Sums only fall, so that the lowest of those before each document is that before the last one.
        total = total - jax.lax.cummin(jnp.where(starts[..., None], _delayed(total, 0), 0), axis=1)
    return jnp.exp(total)


def _delayed(x, first, starts=None):
    """`x` one token later, with `first` in the place that gets free and at the start of every document."""
    x = jnp.concatenate([jnp.full_like(x[:, :1], first), x[:, :-1]], axis=1)
    return x if starts is None else jnp.where(starts[..., None], first, x)


def _broadcast(x, y):
    channels = max(x.shape[-1], y.shape[-1])
    return (jnp.broadcast_to(a, (*a.shape[:-1], channels)) for a in (x, y))
