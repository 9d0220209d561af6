"""The distribution that the next token is drawn from: temperature, top-k, top-p."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn; the fields of that name of `filter_logits`, and whether its probability is wanted."""

    temperature: float | int = 1.0
    top_k: int | None = None
    top_p: float | int | None = None
    log_probs: bool = False

    def check(self, vocab_size: int) -> None:
        """Raises `ValueError` for a setting that is out of range."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if self.top_k is not None and not 1 <= self.top_k <= vocab_size:
            raise ValueError(f"top_k must be from 1 to the {vocab_size} tokens there are, or None; got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, or None; got {self.top_p}")


def filter_logits(
    logits: Float[Array, "*batch V"],
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
) -> Float[Array, "*batch V"]:
    """Logits of the distribution that is drawn from: first the temperature, then top-k, then top-p of what is left.

    Args:
        logits: of every token; a constant may be added to them.
        temperature: divides the logits. 0 leaves the most probable token alone, of equal ones that of the lowest id.
        top_k: how many of the most probable tokens remain, of equal ones those of the lowest ids; None: all.
        top_p: the fewest most probable tokens remain that together have at least this probability, one in any case,
            and of equal ones those of the lowest ids; None or 1: all.

    Returns:
        Logits of which the largest is 0; `-inf` for tokens that do not remain.

    Raises:
        ValueError: for a temperature below 0, or top_k or top_p out of range.

    Source: top-k of Fan et al. (arXiv:1805.04833, section 5), top-p of Holtzman et al. (arXiv:1904.09751, section
    3.1).
    """
    Sampling(temperature, top_k, top_p).check(logits.shape[-1])
    logits = logits - logits.max(-1, keepdims=True)
    if temperature == 0:
        best = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=bool)
        return jnp.where(best, 0, -jnp.inf).astype(logits.dtype)
    logits = logits / temperature
    nucleus = top_p is not None and top_p < 1
    if top_k is None and not nucleus:
        return logits
    # The most probable first, of equal ones that of the lowest id.
    values, ids = jax.lax.top_k(logits, top_k or logits.shape[-1])
    if nucleus:
        sums = jnp.cumsum(jax.nn.softmax(values, -1), -1)
        before = jnp.pad(sums[..., :-1], [(0, 0)] * (sums.ndim - 1) + [(1, 0)])
        values = jnp.where(before < top_p, values, -jnp.inf)
    return jnp.put_along_axis(jnp.full_like(logits, -jnp.inf), ids, values, axis=-1, inplace=False)
