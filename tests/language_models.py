"""Small language models of every mixer, an encoder-decoder, and variables of theirs."""

import functools

import jax.numpy as jnp
import numpy as np

import zoo
from zoo.keymap import flatten, unflatten
from zoo.pretrained import abstract_variables
from zoo.sequence.generation import stream
from zoo.sequence.language_model import LanguageModel
from zoo.sequence.miras import MirasModel
from zoo.sequence.writing import END

VOCABULARY, LENGTH = 17, 23
TINY = dict(width=32, depth=2, num_heads=2, mlp_hidden=32)
# No length here is a multiple of another, and rows are longer than the window.
# With tied embeddings and random weights every token would be followed by itself.
SMALL = dict(TINY, vocab_size=VOCABULARY, length=LENGTH, chunk_size=4, window=6, tie_embeddings=False)
SOURCE = np.array([[6, 4, 11, END, 0, 0, 0, 0]], np.int32)
MEMORY = dict(memory_chunk=5, expansion=2, gate_rank=4)
RECURRENT = ("N", "R", "T", "L", "H", "D", "G", "M", "Y", "E")
PATTERNS = {
    # The first block of Lightning and of HGRN-2 is not like the others.
    **{letter: dict(depth=2 if letter in "TH" else 1) for letter in ("A", "W", *RECURRENT)},
    "GGGA": dict(depth=4),
    "RW": dict(window=LENGTH + 9),
    "AW": dict(conv_width=3),
    "NY": dict(clear_every=10),
}


def small(pattern, **fields):
    kind, own = (MirasModel, MEMORY) if set(pattern) & set("MYE") else (LanguageModel, {})
    model = kind(**{**SMALL, "mixers": pattern, **own, **PATTERNS.get(pattern, {}), **fields})
    model.check()
    return model


# What the gates of memories begin at. Far from it, those forget so fast that they magnify any rounding.
BEGINS = {"retention_up/bias": 4.0, "step_up/bias": -2.0, "threshold_up/bias": 2.7, "scale": 1.0}


@functools.cache
def shapes_of(model):
    return flatten(abstract_variables(model))


def random_variables(model, dtype=np.float32):
    """Variables of a model without compiling its initialisation, with logits that are far apart."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if found := [value for name, value in BEGINS.items() if path.endswith(name)]:
            return jnp.full(leaf.shape, found[0], dtype)
        scale = leaf.shape[-2] ** -0.5 if path.endswith("kernel") or "memory_w" in path else 0.3
        # Memora's memory is a softmax of what is drawn.
        scale = 1.0 if "memory_w" in path and "E" in model.mixers else scale
        return jnp.asarray(scale * rng.standard_normal(leaf.shape), dtype)

    return unflatten({path: draw(path, leaf) for path, leaf in shapes_of(model.clone(param_dtype=jnp.float32)).items()})


def rows(batch=2, length=LENGTH, vocabulary=VOCABULARY):
    return np.random.default_rng(1).integers(vocabulary, size=(batch, length), dtype=np.int32)


@functools.cache
def encoder_decoder():
    """Fields of an encoder-decoder, the model, and variables."""
    fields = dict(vocab_size=12, source_vocab_size=12, length=8, source_length=8, width=32, hidden=32)
    fields |= dict(depth=1, encoder_depth=1, local_heads=1, routing_heads=1, block=4, clusters=2, window=3)
    model = zoo.create_model("routing_transformer_seq2seq_nano", **fields)
    return fields, model, random_variables(model)


def streamed(model, variables, prompt, **settings):
    """The tokens of one row, as a list."""
    pieces = stream(model, variables, np.array([prompt], np.int32), **settings).pieces
    return np.concatenate(list(pieces), axis=1)[0].tolist()
