"""Who is whose positive, negative and twin in a batch of faces, and the triplet loss on the hardest of them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.dense import accumulator_dtype
from zoo.layers import unit
from zoo.registry import nearest

NEGATIVES = ("hardest", "twin")


def twin_rows(labels: Int[Array, " B"], twins: Int[Array, " B"]) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """For every row of a batch a row that shows the twin.

    The first image of a person is given the first of the twin, the second the second and so on, from the start again
    where the twin has fewer.

    Args:
        labels: identities.
        twins: the identity of each row's twin, -1 where there is none.

    Returns:
        `index`: the twin's row, the row itself where the twin is not in the batch; `present`: whether it is.
    """
    rows = jnp.arange(len(labels))
    same = labels[:, None] == labels
    place = (same & (rows < rows[:, None])).sum(1)
    is_twin = twins[:, None] == labels
    count = is_twin.sum(1)
    chosen = is_twin & (place == (place % jnp.maximum(count, 1))[:, None])
    return jnp.where(count > 0, chosen.argmax(1), rows), count > 0


def triplet_masks(
    labels: Int[Array, " B"], twins: Int[Array, " B"], negative: str = "hardest"
) -> tuple[Bool[Array, "B B"], Bool[Array, "B B"]]:
    """The rows that may be an anchor's positive, and those that may be its negative.

    Args:
        labels: identities.
        twins: the identity of each row's twin, -1 where there is none.
        negative: "hardest": every other person, the twin among them; "twin": the twin alone where it is in the batch,
            else every other person. Summaries of the paper say "the twin or the hardest non-twin": both of them are.

    Returns:
        `positives`: the anchor's other images; `negatives`. Both (anchor, other).

    Raises:
        ValueError: for an unknown `negative`.
    """
    if negative not in NEGATIVES:
        raise ValueError(f"unknown negative {negative!r}{nearest(negative, NEGATIVES)}")
    same = labels[:, None] == labels
    negatives = ~same
    if negative == "twin":
        is_twin = twins[:, None] == labels
        negatives = jnp.where(is_twin.any(1, keepdims=True), is_twin, negatives)
    return same & ~jnp.eye(len(labels), dtype=bool), negatives


def batch_hard_triplet(
    embeddings: Float[Array, "B E"],
    positives: Bool[Array, "B B"],
    negatives: Bool[Array, "B B"],
    *,
    margin: float = 0.5,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """max(0, d(a, p) - d(a, n) + margin) with every anchor's farthest positive and nearest negative.

    d = 1 - cos. The mean is over the anchors that have both a positive and a negative, 0 where none has.

    Args:
        embeddings: of any length.
        positives, negatives: (anchor, other) masks, see `triplet_masks`.
        margin: 0.5 is that of the paper on twins, in cosine distance.

    Returns:
        The loss, float32 (float64 for float64 embeddings), and the share of anchors that add to it.

    Source: Hermans, Beyer and Leibe, "In Defense of the Triplet Loss", arXiv:1703.07737, equation 5.
    """
    units = unit(embeddings.astype(accumulator_dtype(embeddings.dtype)))
    distances = 1 - jnp.dot(units, units.T, precision=jax.lax.Precision.HIGHEST)
    farthest = jnp.where(positives, distances, -jnp.inf).max(1)
    closest = jnp.where(negatives, distances, jnp.inf).min(1)
    counted = positives.any(1) & negatives.any(1)
    # Infinities go before they meet, lest their gradient be NaN.
    losses = jnp.maximum(jnp.where(counted, farthest, 0) - jnp.where(counted, closest, 0) + margin, 0)
    losses = jnp.where(counted, losses, 0)
    count = jnp.maximum(counted.sum(), 1)
    return losses.sum() / count, (losses > 0).sum() / count
