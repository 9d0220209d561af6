"""What all sequence models share: their fields, and how tokens go in, one row at a time or one token at a time."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from zoo.layers import Dtype, Remat

Tokens = Int[Array, "B N"]
Logits = Float[Array, "B N V"]


class SequenceModel(nn.Module):
    """A model that says of every position of a row of tokens what comes next.

    `logits[:, t]` is about the token after position t, given the tokens up to t. What a row begins with (a token that
    stands for its start) is the data's business. Four methods, all called with `model.apply`:

        logits = model.apply(variables, tokens)                             # (B, N, vocab_size) float32
        state = model.apply(variables, batch, max_length, method="initial_state")
        logits, state = model.apply(variables, tokens, max_length, method="prefill")
        logits, state = model.apply(variables, token, state, method="step")   # token (B,), logits (B, vocab_size)

    A state is a pytree of arrays of one shape for all positions, so that `step` is compiled once; what it costs does
    not grow with the position. `prefill` followed by steps gives what the whole row gives.

    In training (`train=True`) dropout draws from the rng stream `"dropout"`; what a model learns without a gradient
    is in collections of its own, which are updated if they are mutable; losses beside that of the tokens are sown
    as scalars into the collection `"losses"`.

    Attributes:
        vocab_size: how many tokens there are; also the width of the logits.
        length: tokens in a row that the model is made for; unless its family says so, it takes any number.
        remat: what the backward pass recomputes, see `zoo.layers.rematerialize`.
        implementation: of the attention primitives, see `kernels.dispatch`.
        dtype: of the computation, None for that of the parameters; param_dtype: of the parameters.
    """

    vocab_size: int = 257
    length: int = 1024
    remat: Remat = "none"
    implementation: str | tuple[str, ...] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @property
    def segment_multiple(self) -> int:
        """Where a packed row may begin another document: at multiples of this many tokens."""
        return 1

    def check(self) -> None:
        """Raises `ValueError` for fields that do not fit one another."""
        if self.vocab_size < 2 or self.length < 1:
            raise ValueError(
                f"vocab_size must be at least 2 and length at least 1, got {self.vocab_size} and {self.length}"
            )

    def example_inputs(self, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Arguments of a call by name, as shapes and dtypes, of the length that the model is made for."""
        return {"tokens": jax.ShapeDtypeStruct((batch, self.length), jnp.int32)}

    def __call__(self, tokens: Tokens, segments: Tokens | None = None, train: bool = False) -> Logits:
        """Logits `(B, N, vocab_size)`, float32 (float64 for float64 parameters).

        Args:
            tokens: `(B, N)`, each in [0, vocab_size).
            segments: `(B, N)`, a number per document packed into the row: nothing passes from one run of equal
                numbers to the next. None: every row is one document.
            train: whether the model is in training.
        """
        raise NotImplementedError

    def initial_state(self, batch: int, max_length: int) -> Any:
        """The state before the first token of `batch` rows of at most `max_length` tokens."""
        raise NotImplementedError

    def prefill(self, tokens: Tokens, max_length: int) -> tuple[Logits, Any]:
        """Logits of all positions, and the state after the last token, with room for `max_length` in all."""
        raise NotImplementedError

    def step(self, token: Int[Array, " B"], state: Any) -> tuple[Float[Array, "B V"], Any]:
        """Takes one more token of every row: the logits of what follows it, and the state after it."""
        raise NotImplementedError


def check_tokens(tokens: Tokens, segments: Int[Array, "..."] | None = None) -> None:
    """Raises `ValueError` unless tokens are `(B, N)` integers and segments, if given, are shaped like them."""
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be (batch, length) integers, got {tokens.dtype} {tokens.shape}")
    if segments is not None and segments.shape != tokens.shape:
        raise ValueError(f"segments must be shaped like tokens, {tokens.shape}; got {segments.shape}")


def positions_of(segments: Tokens | None, length: int) -> Int[Array, "N"] | Tokens:
    """The place of every token in its own document, counted from 0: `(N,)`, or `(B, N)` with segments."""
    places = jnp.arange(length)
    if segments is None:
        return places
    begins = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return places - jax.lax.cummax(jnp.where(begins, places, 0), axis=1)


def causal_mask(segments: Tokens | None, length: int) -> Bool[Array, "N N"] | Bool[Array, "B 1 N N"]:
    """Which keys a query may see: those of its own document up to itself."""
    mask = jnp.tri(length, dtype=bool)
    if segments is None:
        return mask
    runs = jnp.cumsum(positions_of(segments, length) == 0, axis=1)
    return (mask & (runs[:, :, None] == runs[:, None, :]))[:, None]
