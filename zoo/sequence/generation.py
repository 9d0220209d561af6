"""From a prompt to what follows it: tokens drawn one after the other from what a sequence model says comes next."""

import dataclasses
import functools
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt32

from zoo import registry
from zoo.keymap import flatten
from zoo.prediction import trained_as
from zoo.pretrained import abstract_variables, load_pretrained, open_weights
from zoo.report import LoadReport
from zoo.sequence.sampling import Sampling, filter_logits
from zoo.sequence.sequence_model import SequenceModel, check_tokens
from zoo.sequence.tokenizers import Tokenizer, open_tokenizer

# Tokens that a stream makes before it hands them out.
PIECE = 32
# Data sets of text, beside those called "tfds:NAME".
TEXTS = ("stdlib", "files", "tfds")
# Options of `load_pretrained` that are no fields of a model.
LOADING = ("naming", "weights", "resize", "seed")


def generate(
    model: SequenceModel,
    variables: Any,
    prompt: Int[Array, "B N"] | Int[np.ndarray, "B N"],
    *,
    steps: int,
    key: Key[Array, ""] | UInt32[Array, "2"],
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
    max_length: int | None = None,
    return_log_probs: bool = False,
    **inputs: Any,
) -> Int[Array, "B steps"] | tuple[Int[Array, "B steps"], Float[Array, "B steps"]]:
    """Goes on with rows of tokens: one program that reads the prompt and then draws token after token.

    It is compiled once for a model, the shapes, `steps`, `max_length` and the settings of the draw. Fewer steps give
    the beginning of what more steps give.

    Args:
        model: a sequence model of the zoo.
        variables: its variables.
        prompt: at least one token, such as that which rows of its data begin with.
        steps: how many tokens are to follow.
        key: of the random numbers; rows of equal prompts get different ones.
        temperature, top_k, top_p: see `filter_logits`; temperature 0 draws nothing and takes the most probable.
        max_length: tokens that the model's state has room for, at least those that it reads, N + steps - 1; None:
            that many.
        return_log_probs: also return how probable the model held the tokens.
        **inputs: what the model's `prefill` takes beside: `source` and `source_mask` of an encoder-decoder.

    Returns:
        int32 `(B, steps)`; with `return_log_probs` a pair with the natural logarithms of the tokens' probabilities,
        those of the model before temperature and filters.

    Raises:
        ValueError: for an empty prompt, tokens that the model does not have, and settings out of range.
    """
    how = Sampling(temperature, top_k, top_p, return_log_probs)
    prompt, room = _checked(model, how, prompt, steps, max_length)
    drawn = _generate(model, how, room, steps, variables, prompt, key, inputs)
    return drawn if return_log_probs else drawn[0]


@dataclasses.dataclass(frozen=True)
class Stream:
    """Tokens that come in pieces.

    Attributes:
        pieces: int32 `(B, n)`, each computed when it is asked for; the first is one token.
        compile_seconds: what compiling took.
        prompt_seconds: what reading the prompt took, and drawing the first token.
    """

    pieces: Iterator[np.ndarray]
    compile_seconds: float
    prompt_seconds: float


def stream(
    model: SequenceModel,
    variables: Any,
    prompt: Int[Array, "B N"] | Int[np.ndarray, "B N"],
    *,
    steps: int,
    key: Key[Array, ""] | UInt32[Array, "2"],
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
    max_length: int | None = None,
    piece: int = PIECE,
    **inputs: Any,
) -> Stream:
    """The tokens of `generate` as they come, `piece` at a time; all is compiled and the prompt read when it returns.

    Raises:
        ValueError: as `generate` does, and for a piece of less than one token.
    """
    if piece < 1:
        raise ValueError(f"piece must be at least 1 token, got {piece}")
    how = Sampling(temperature, top_k, top_p)
    prompt, room = _checked(model, how, prompt, steps, max_length)
    started = time.perf_counter()
    begin = _begin_alone.lower(model, how, room, variables, prompt, key, inputs)
    (token,), state = jax.tree.map(lambda like: jax.ShapeDtypeStruct(like.shape, like.dtype), begin.out_info)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    go_on = _go_on_alone.lower(model, how, piece, variables, token, state, key, number, number).compile()
    begin = begin.compile()
    compiled = time.perf_counter()
    (token,), state = jax.block_until_ready(begin(variables, prompt, key, inputs))
    read = time.perf_counter()

    def pieces() -> Iterator[np.ndarray]:
        last, after = token, state
        yield np.asarray(last)[:, None]
        for first in range(1, steps, piece):
            count = min(piece, steps - first)
            numbers = np.asarray([first, count], np.int32)
            (tokens,), last, after = go_on(variables, last, after, key, *numbers)
            yield np.asarray(tokens)[:, :count]

    return Stream(pieces(), compiled - started, read - compiled)


def _checked(
    model: SequenceModel, how: Sampling, prompt: Any, steps: int, max_length: int | None
) -> tuple[Int[Array, "B N"], int]:
    """The prompt as int32, and how many tokens the state must have room for."""
    if not isinstance(model, SequenceModel):
        raise ValueError(f"model must be a sequence model, got {type(model).__name__}")
    how.check(model.vocab_size)
    check_tokens(jnp.asarray(prompt))
    batch, length = prompt.shape
    if not batch or not length:
        raise ValueError(f"prompt must have at least one row of at least one token, got {prompt.shape}")
    if not isinstance(prompt, jax.core.Tracer):
        lowest, highest = int(prompt.min()), int(prompt.max())
        if lowest < 0 or highest >= model.vocab_size:
            raise ValueError(
                f"prompt must hold tokens from 0 to {model.vocab_size - 1}, it has {lowest if lowest < 0 else highest}"
            )
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    room = length + steps - 1
    if max_length is not None and max_length < room:
        raise ValueError(f"max_length must be at least {room}, to read {length} tokens and go on by {steps}")
    return jnp.asarray(prompt, jnp.int32), max_length or room


def _draw(how: Sampling, key: Any, index: Any, logits: Array) -> tuple[Array, ...]:
    """The token of this number of every row; with `how.log_probs` also the logarithm of its probability."""
    kept = filter_logits(logits, how.temperature, how.top_k, how.top_p)
    token = jax.random.categorical(jax.random.fold_in(key, index), kept).astype(jnp.int32)
    if not how.log_probs:
        return (token,)
    shares = jax.nn.log_softmax(logits, -1)
    return token, jnp.take_along_axis(shares, token[:, None], axis=-1)[:, 0]


def _begin(model: SequenceModel, how: Sampling, room: int, variables: Any, prompt: Array, key: Any, inputs: Any):
    """What is drawn first, and the state after the prompt."""
    logits, state = model.apply(variables, prompt, room, **inputs, method="prefill")
    return _draw(how, key, 0, logits[:, -1]), state


def _go_on(
    model: SequenceModel,
    how: Sampling,
    size: int,
    variables: Any,
    token: Array,
    state: Any,
    key: Any,
    first: Any,
    count: Any,
):
    """What is drawn in the next `count` steps, filled up to `(B, size)`, the last token, and the state before it."""

    def body(i, carry):
        drawn, token, state = carry
        logits, state = model.apply(variables, token, state, method="step")
        new = _draw(how, key, first + i, logits)
        return tuple(row.at[:, i].set(one) for row, one in zip(drawn, new, strict=True)), new[0], state

    like = jax.eval_shape(lambda: _draw(how, key, 0, model.apply(variables, token, state, method="step")[0]))
    drawn = tuple(jnp.zeros((one.shape[0], size), one.dtype) for one in like)
    return jax.lax.fori_loop(0, count, body, (drawn, token, state))


_begin_alone = jax.jit(_begin, static_argnums=(0, 1, 2))
_go_on_alone = jax.jit(_go_on, static_argnums=(0, 1, 2), donate_argnames="state")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(
    model: SequenceModel,
    how: Sampling,
    room: int,
    steps: int,
    variables: Any,
    prompt: Array,
    key: Any,
    inputs: Any,
) -> tuple[Array, ...]:
    begun, state = _begin(model, how, room, variables, prompt, key, inputs)
    begun = tuple(one[:, None] for one in begun)
    if steps == 1:
        return begun
    drawn, *_ = _go_on(model, how, steps - 1, variables, begun[0][:, 0], state, key, 1, steps - 1)
    return tuple(jnp.concatenate(parts, axis=1) for parts in zip(begun, drawn, strict=True))


@dataclasses.dataclass(frozen=True)
class TrainedLanguageModel:
    """A sequence model with its weights and all that reading and writing with it needs.

    Attributes:
        model, variables, report: as of `zoo.load_pretrained`.
        tokenizer: between text and tokens; None where the weights are a run's on something else than text, or none
            is known.
        config: of the run that they are of, empty where they are of none.
    """

    model: SequenceModel
    variables: Any
    report: LoadReport
    tokenizer: Tokenizer | None
    config: dict[str, Any]

    @property
    def data(self) -> str:
        """What the run was trained on, as its config names it; empty if that is not known."""
        return self.config.get("data", {}).get("name", "")


def load_language_model(
    name: str,
    source: str | os.PathLike | Mapping[str, Any] | None = None,
    *,
    tokenizer: str | os.PathLike | Tokenizer | None = None,
    **options: Any,
) -> TrainedLanguageModel:
    """A sequence model with weights, made as the run was whose they are, and the tokenizer of its text.

    The fields of the model, the length of its rows and the tokenizer are those of the config that a run of the train
    loop keeps beside its checkpoints; averaged weights are taken where there are any. The vocabulary has the size
    that the weights have, if they are under our own names.

    Args:
        name: model, or full tag.
        source: of the weights, as in `zoo.load_pretrained`.
        tokenizer: `"bytes"`, a file, or a tokenizer, see `zoo.sequence.tokenizers.open_tokenizer`; None: the
            run's, and where there is no run bytes, if the model has as many tokens.
        **options: more of `zoo.load_pretrained`.

    Raises:
        ValueError: for a model of images; if the weights are a run's that trained another model; for a tokenizer
            where the run was not on text, or with more tokens than the model has; and as `zoo.load_pretrained` does.
    """
    model_name, _ = registry.split_tag(name)
    module = registry.family_of(name).module
    if not issubclass(module, SequenceModel):
        raise ValueError(f"{model_name} takes pictures, not tokens; zoo.load_classifier loads it")
    config, overrides = trained_as(name, source)
    data = config.get("data", {})
    is_text = not data or data["name"] in TEXTS or data["name"].startswith("tfds:")
    if tokenizer is not None and not is_text:
        raise ValueError(f"tokenizer {tokenizer!r} was given, but {source} was trained on {data['name']!r}, no text")
    is_named = tokenizer is not None or "tokenizer" in data
    if is_text and not isinstance(tokenizer, Tokenizer):
        tokenizer = open_tokenizer(tokenizer or data.get("tokenizer", "bytes"))
    if data.get("length"):
        lengths = {"length", "source_length"} & {field.name for field in dataclasses.fields(module)}
        overrides = dict.fromkeys(lengths, data["length"]) | overrides
    overrides |= options
    opened = open_weights(name, source, options.get("weights"))
    fields = {field: value for field, value in overrides.items() if field not in LOADING}
    overrides |= _vocabularies(model_name, fields, opened.arrays)
    model, variables, report = load_pretrained(name, opened, **overrides)
    fits = tokenizer is None or tokenizer.vocab_size <= model.vocab_size
    if is_named and not fits:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, that which begins a text among them, and {model_name} "
            f"as loaded has {model.vocab_size}; name the tokenizer that it was trained with"
        )
    return TrainedLanguageModel(model, variables, report, tokenizer if fits else None, config)


def _vocabularies(name: str, fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The sizes of vocabularies in which arrays under our own names differ from the model with these fields."""
    model = registry.create_model(name, **fields)
    leaves = flatten(abstract_variables(model))
    other = [path for path, leaf in leaves.items() if path in arrays and arrays[path].shape != leaf.shape]
    found = {}
    for field in {"vocab_size", "source_vocab_size"} - fields.keys() if other else ():
        if hasattr(model, field):
            larger = flatten(abstract_variables(model.clone(**{field: getattr(model, field) + 1})))
            for path in other:
                for ours, one_more, given in zip(leaves[path].shape, larger[path].shape, arrays[path].shape):
                    if ours != one_more:
                        found[field] = given
    return found
