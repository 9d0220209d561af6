"""Running sums along the tokens of a row that start again with every document."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import sequence_parallel
from kernels.chunks import document_starts


def running(
    x: Float[Array, "B N H"],
    before: Float[Array, "B H"] | None = None,
    segments: Int[Array, "B N"] | None = None,
    *,
    combine: Callable = jnp.add,
) -> Float[Array, "B N H"]:
    """What `combine` makes of the tokens up to each one, itself included, in time and memory linear in N.

    Args:
        x: `(B, N, H)`, with at least one token.
        before: what came before the row, which the first document goes on from; None means nothing.
        segments: ids of the documents packed into a row, `(B, N)`: runs of equal ids.
        combine: an associative function of two arrays, `jnp.add` or `jnp.logaddexp`.

    Returns:
        `(B, N, H)` in the dtype of `x`.
    """
    if sequence_parallel.ranks(x.shape[1]) > 1:
        return sequence_parallel.running(running, x, before, segments, combine)
    if before is not None:
        x = x.at[:, 0].set(combine(before, x[:, 0]))
    starts = document_starts(segments)
    if starts is None:
        return jax.lax.associative_scan(combine, x, axis=1)

    def within_documents(earlier, later):
        starts, sums = later
        return earlier[0] | starts, jnp.where(starts, sums, combine(earlier[1], sums))

    starts = jnp.broadcast_to(starts[..., 0], x.shape)
    return jax.lax.associative_scan(within_documents, (starts, x), axis=1)[1]
