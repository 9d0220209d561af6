"""Distillation: a trained model teaches another one."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

Kind = Literal["hard", "soft"]
KINDS = ("hard", "soft")


def distillation_loss(
    outputs: Float[Array, "B K"] | tuple[Float[Array, "B K"], Float[Array, "B K"]],
    targets: Float[Array, "B K"],
    teacher_logits: Float[Array, "B K"],
    *,
    kind: Kind = "hard",
    alpha: float = 0.5,
    temperature: float = 1.0,
) -> Float[Array, ""]:
    """`(1 - alpha) * cross-entropy with the targets + alpha * what the teacher asks for`, a mean over the batch.

    Args:
        outputs: logits, or those of two heads: the first learns from the targets, the second from the teacher.
        targets: probabilities of the classes, after smoothing and mixing.
        teacher_logits: of the same images; no gradient flows into them.
        kind: `"hard"`, cross-entropy with the class that the teacher finds most likely; `"soft"`, the
            Kullback-Leibler divergence from the teacher's probabilities, both at `temperature`, times its square.
        alpha: share of the teacher.
        temperature: divides logits, for `"soft"` only.

    Returns:
        A float32 scalar (float64 for float64 logits).

    Raises:
        ValueError: for an unknown kind.

    Source: Touvron et al. (DeiT), arXiv:2012.12877, section 3; Hinton et al., arXiv:1503.02531.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be 'hard' or 'soft', got {kind!r}")
    logits, taught = outputs if isinstance(outputs, tuple) else (outputs, outputs)
    own = optax.softmax_cross_entropy(logits, targets).mean()
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    if kind == "hard":
        asked = optax.softmax_cross_entropy_with_integer_labels(taught, teacher_logits.argmax(-1)).mean()
    else:
        wanted = jax.nn.log_softmax(teacher_logits / temperature)
        found = jax.nn.log_softmax(taught / temperature)
        asked = jnp.square(temperature) * (jnp.exp(wanted) * (wanted - found)).sum(-1).mean()
    return (1 - alpha) * own + alpha * asked
