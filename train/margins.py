"""Classification losses with a margin, for embeddings that are compared by their cosine.

All of them change the logit of the true class alone and leave the rest to softmax cross-entropy: `margin_loss`. What
they work on are cosines between embeddings and one weight per class. Everything is float32, float64 for float64.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from kernels.dense import accumulator_dtype
from train.generated import need
from zoo.layers import unit

# Squares of sines below this, the rounding of a cosine at 1, count as this: their roots have gradients without bound.
LEAST_SQUARED_SINE = float(jnp.finfo(jnp.float32).eps)

# Of a quality that is estimated by norms, see `adaface_logits`.
NORM_RANGE = (1e-3, 100.0)


def class_cosines(embeddings: Float[Array, "B E"], weights: Float[Array, "E K"]) -> Float[Array, "B K"]:
    """Cosines between embeddings and the weights of classes, float32 (float64 for float64 embeddings)."""
    acc = accumulator_dtype(embeddings.dtype)
    rows, columns = unit(embeddings.astype(acc)), unit(weights.astype(acc), axis=0)
    return jnp.dot(rows, columns, precision=jax.lax.Precision.HIGHEST)


def arcface_logits(
    cosines: Float[Array, "B K"],
    labels: Int[Array, " B"],
    *,
    scale: float = 64.0,
    margin: float = 0.5,
    easy_margin: bool = False,
) -> Float[Array, "B K"]:
    """An angle added to that between an embedding and its class: s cos(theta + m).

    Beyond theta = pi - m, where cos(theta + m) would rise again, the logit goes on falling as
    s (cos(theta) - m sin(m)), as in the authors' code. With `margin=0` these are the logits of a scaled cosine
    softmax.

    Args:
        cosines: cos(theta); rounding may carry them beyond -1 and 1. Gradients are finite everywhere.
        labels: the true classes.
        scale: s. margin: m in radians. 64 and 0.5 are what the face recognition of the source uses; the paper on twins
            that this package follows does not give its own.
        easy_margin: the easy-margin rule of the authors' code: the margin applies where cos(theta) > 0 only, and what
            is farther than a right angle from its class keeps s cos(theta).

    Returns:
        Logits, float32 (float64 for float64 cosines).

    Raises:
        ValueError: for a margin that is not in [0, pi / 2].

    Source: Deng et al., "ArcFace", arXiv:1801.07698, equation 3.
    """
    need(0 <= margin <= math.pi / 2, f"margin={margin}", "from 0 to pi / 2")
    cosines = cosines.astype(accumulator_dtype(cosines.dtype))
    own = _own(cosines, labels)
    sine = jnp.sqrt(jnp.maximum(1 - own * own, LEAST_SQUARED_SINE))
    moved = own * math.cos(margin) - sine * math.sin(margin) if margin else own
    if easy_margin:
        changed = jnp.where(own > 0, moved, own)
    else:
        changed = jnp.where(own > math.cos(math.pi - margin), moved, own - margin * math.sin(margin))
    return scale * _with_own(cosines, labels, changed)


def cosface_logits(
    cosines: Float[Array, "B K"], labels: Int[Array, " B"], *, scale: float = 64.0, margin: float = 0.35
) -> Float[Array, "B K"]:
    """A number taken from the cosine of an embedding and its class: s (cos(theta) - m).

    Args:
        cosines: cos(theta).
        labels: the true classes.
        scale: s. margin: m.

    Returns:
        Logits, float32 (float64 for float64 cosines).

    Raises:
        ValueError: for a margin that is not in [0, 2].

    Source: Wang et al., "CosFace", arXiv:1801.09414, equation 4.
    """
    need(0 <= margin <= 2, f"margin={margin}", "from 0 to 2")
    cosines = cosines.astype(accumulator_dtype(cosines.dtype))
    return scale * _with_own(cosines, labels, _own(cosines, labels) - margin)


def adaface_logits(
    cosines: Float[Array, "B K"],
    labels: Int[Array, " B"],
    norms: Float[Array, " B"],
    statistics: dict[str, Float[Array, ""]],
    *,
    scale: float = 64.0,
    margin: float = 0.4,
    concentration: float = 0.333,
) -> Float[Array, "B K"]:
    """A margin that follows the quality of the image, of which the embedding's norm is taken for a measure.

    With q = clip(h (norm - mean) / std, -1, 1) the logit of the true class is
    s (cos(theta - m q) - m (1 + q)), where theta - m q is kept in [0, pi]: an angular margin for poor images (q = -1),
    CosFace's with 2 m for good ones.

    Args:
        cosines: cos(theta); gradients are finite for all of them.
        labels: the true classes.
        norms: of the embeddings; no gradient goes through them.
        statistics: mean and standard deviation of norms, see `update_norm_statistics`.
        scale: s. margin: m. concentration: h.

    Returns:
        Logits, float32 (float64 for float64 cosines).

    Raises:
        ValueError: for a margin that is not in [0, 1] or a concentration below 0.

    Source: Kim, Jain and Liu, "AdaFace", arXiv:2204.00964, section 3.3. Norms are clipped to [0.001, 100] and
    0.001 is added to std, as in the authors' code.
    """
    need(0 <= margin <= 1, f"margin={margin}", "from 0 to 1")
    need(concentration >= 0, f"concentration={concentration}", "at least 0")
    cosines = cosines.astype(accumulator_dtype(cosines.dtype))
    norms = jnp.clip(jax.lax.stop_gradient(norms).astype(jnp.float32), *NORM_RANGE)
    quality = jnp.clip(concentration * (norms - statistics["mean"]) / (statistics["std"] + 1e-3), -1, 1)
    own = jnp.clip(_own(cosines, labels), -1, 1)
    # cos(theta + angle) by its addition theorem, whose ends are those of theta + angle at 0 and pi.
    angle = -margin * quality
    sine = jnp.sqrt(jnp.maximum(1 - own * own, LEAST_SQUARED_SINE))
    moved = own * jnp.cos(angle) - sine * jnp.sin(angle)
    below, beyond = own > jnp.cos(jnp.minimum(angle, 0)), own < -jnp.cos(jnp.maximum(angle, 0))
    moved = jnp.where(below, 1.0, jnp.where(beyond, -1.0, moved))
    return scale * _with_own(cosines, labels, moved - margin * (1 + quality))


def first_norm_statistics() -> dict[str, Float[Array, ""]]:
    """Mean and standard deviation of norms before the first batch, those of the authors' code."""
    return {"mean": jnp.float32(20), "std": jnp.float32(100)}


def update_norm_statistics(
    statistics: dict[str, Float[Array, ""]], norms: Float[Array, " B"], momentum: float = 0.99
) -> dict[str, Float[Array, ""]]:
    """Running mean and (unbiased) standard deviation of the norms of embeddings, without gradients.

    Args:
        statistics: "mean" and "std" so far.
        norms: of a batch of at least 2.
        momentum: what is kept of the old values; source: arXiv:2204.00964, section 3.3.
    """
    norms = jnp.clip(jax.lax.stop_gradient(norms).astype(jnp.float32), *NORM_RANGE)
    found = {"mean": norms.mean(), "std": norms.std(ddof=1)}
    return {name: momentum * statistics[name] + (1 - momentum) * value for name, value in found.items()}


def margin_loss(logits: Float[Array, "B K"], labels: Int[Array, " B"]) -> Float[Array, ""]:
    """Mean softmax cross-entropy."""
    logits = logits.astype(accumulator_dtype(logits.dtype))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _own(cosines: Float[Array, "B K"], labels: Int[Array, " B"]) -> Float[Array, " B"]:
    return jnp.take_along_axis(cosines, labels[:, None], axis=1)[:, 0]


def _with_own(cosines: Float[Array, "B K"], labels: Int[Array, " B"], own: Float[Array, " B"]) -> Float[Array, "B K"]:
    true = labels[:, None] == jnp.arange(cosines.shape[1])
    return jnp.where(true, own[:, None], cosines)
