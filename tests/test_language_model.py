"""Language models of every mixer: what they may see, documents kept apart, memories cleared, fields that do not fit."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from kernels.memory import miras
from zoo.counts import counts_of
from zoo.pretrained import abstract_variables
from zoo.sequence.language_model import MIXERS, NANO, LanguageModel, layers_of
from zoo.sequence.linear_mixers import forget_bounds
from zoo.sequence.miras import MirasModel
from zoo.sequence.mixers import unit_norm
from zoo.sequence.sequence_model import check_tokens, positions_of


def slow_but(few, patterns):
    """Cases of which only a few are run by the quick suite."""
    return [p if p in few else pytest.param(p, marks=pytest.mark.slow) for p in patterns]


PATTERNS = slow_but(("A", "W", "H", "Y"), [*MIXERS, "GA", "YW"])
WITH_MEMORY = [letter for letter in MIXERS if letter not in "AW"]
FIELDS = dict(vocab_size=11, length=16, width=16, depth=2, num_heads=2, window=5, chunk_size=4, mlp_hidden=16)


@functools.cache
def made(pattern, **fields):
    """A model with four tokens to a chunk of memory, and its variables."""
    model = MirasModel(**{**FIELDS, "mixers": pattern, "memory_chunk": 4, "step_limit": 0.5, **fields})
    model.check()
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16), jnp.int32))


def logits(model, variables, *arguments):
    return np.asarray(jax.jit(model.apply)(variables, *arguments))


def tokens(rows=1, length=16, seed=1):
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, 11)


def test_scaled_embeddings_are_embeddings_times_the_root_of_the_width():
    model, variables = made("A", tie_embeddings=False)
    scaled = model.clone(scale_embeddings=True)
    embedding = variables["params"]["embed"]["embedding"]
    smaller = {"params": {**variables["params"], "embed": {"embedding": embedding / 16**0.5}}}
    np.testing.assert_allclose(
        logits(scaled, smaller, tokens()), logits(model, variables, tokens()), rtol=1e-5, atol=1e-6
    )
    wide = scaled.clone(vocab_size=4096)
    begin = jax.jit(wide.init)(jax.random.key(0), tokens())["params"]["embed"]["embedding"]
    np.testing.assert_allclose(np.linalg.norm(begin, axis=1).mean(), 1, rtol=0.05)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_nothing_comes_from_the_future_and_documents_stay_apart(pattern):
    """A row, one that differs from token 8 on, the row as two documents of 8 tokens, and the second of these alone."""
    model, variables = made(pattern)
    row = tokens()
    changed = row.at[:, 8:].set((row[:, 8:] + 1) % 11)
    rows = jnp.concatenate([row, changed, row, jnp.roll(row, 8, axis=1)])
    one, two = jnp.ones(16, jnp.int32), jnp.where(jnp.arange(16) < 8, 3, 7)
    whole, other, packed, alone = logits(model, variables, rows, jnp.stack([one, one, two, two]))
    np.testing.assert_array_equal(whole[:8], other[:8])
    assert np.abs(whole[8:] - other[8:]).max() > 1e-3
    np.testing.assert_allclose(packed, np.concatenate([whole[:8], alone[:8]]), rtol=0, atol=2e-5)
    assert np.abs(packed - whole)[8:].max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("pattern", WITH_MEMORY)
def test_a_cleared_memory_knows_one_token(pattern):
    """Without convolutions what a block says of a token is then what it says of the token alone at its place."""
    fields = dict(conv_width=0, memory_chunk=4)
    model, variables = made(pattern, clear_every=1, **fields)
    row = tokens()
    cleared = logits(model, variables, row)
    changed = logits(model, variables, row.at[:, 3].set((row[:, 3] + 1) % 11))
    others = np.arange(16) != 3
    np.testing.assert_array_equal(cleared[:, others], changed[:, others])
    kept, _ = made(pattern, **fields)
    assert np.abs(logits(kept, variables, row) - cleared)[:, 1:].max() > 1e-3
    # Moneta divides by the norm at the start of a chunk, and these chunks are shorter.
    tolerance = 0.02 if pattern == "M" else 2e-5
    np.testing.assert_allclose(logits(kept, variables, row)[:, 0], cleared[:, 0], rtol=0, atol=tolerance)


def test_memories_are_cleared_after_so_many_tokens():
    model, variables = made("Y", clear_every=8, conv_width=0, memory_rope=False)
    kept, _ = made("Y", conv_width=0, memory_rope=False)
    row = tokens()
    cleared = logits(model, variables, row)
    halves = logits(kept, variables, row.reshape(2, 8)).reshape(1, 16, -1)
    np.testing.assert_allclose(cleared, halves, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "pattern, fields", [("Y", {}), pytest.param("M", {"link": "identity"}, marks=pytest.mark.slow)]
)
def test_a_memory_that_was_taught_nothing_says_nothing(pattern, fields):
    """What comes out is the query, but for some percent of what the norm could add; recall is not learned otherwise."""
    model, variables = made(pattern, **fields)
    mixer, params = model.mixer(0), variables["params"]["blocks_0"]["mixer"]
    query = unit_norm(jax.random.normal(jax.random.key(0), (1, 8, mixer.num_heads, mixer.head_dim)))
    none = jnp.zeros((1, 8, mixer.num_heads))
    out = miras(
        *(query, query, query, {name: params[f"memory_{name}"] for name in ("w1", "w2")}),
        rule=mixer.rule,
        step=none,
        log_retention=none,
        threshold=none + 1 if mixer.rule.bias.threshold else None,
    )
    assert 0 < float(jnp.sqrt(jnp.square(out - query).mean())) < 0.1


def test_a_hybrid_takes_turns():
    model = LanguageModel(**{**FIELDS, "depth": 8, "mixers": "GGGA"})
    names = [type(model.mixer(i)).__name__ for i in range(8)]
    assert names == ["GatedDeltaNet"] * 3 + ["SoftmaxAttention"] + ["GatedDeltaNet"] * 3 + ["SoftmaxAttention"]
    params = abstract_variables(model)["params"]
    assert "strength" in params["blocks_2"]["mixer"] and "strength" not in params["blocks_3"]["mixer"]


def test_nano_models_have_as_many_parameters():
    """A comparison at equal parameters: within a hundredth of their mean."""
    names = [name for name in zoo.list_models("*_nano") if type(zoo.create_model(name)) in (LanguageModel, MirasModel)]
    counts = {name: counts_of(name)[0] for name in names}
    mean = np.mean(list(counts.values()))
    assert len(counts) == 17 and max(abs(count / mean - 1) for count in counts.values()) < 0.01, counts
    assert all(zoo.create_model(name).length == NANO["length"] for name in names)


def test_paper_sizes():
    """Appendix C of Miras: blocks, width, heads; the numbers of parameters about the labels."""
    for size, depth, width, parameters in (
        ("170m", 12, 768, 121757184),
        ("340m", 24, 1024, 378420096),
        ("780m", 24, 1536, 820068480),
        ("1b3", 24, 2048, 1434731904),
    ):
        model = zoo.create_model(f"yaad_{size}")
        assert (model.depth, model.width, model.num_heads, model.length) == (depth, width, 16, 4096)
        assert counts_of(f"yaad_{size}")[0] == parameters
    assert zoo.create_model("yaad_h_340m").mixers == "YW" and zoo.create_model("yaad_h_340m").window == 2048


def test_forget_bounds_grow_with_depth():
    bounds = forget_bounds(jax.random.normal(jax.random.key(0), (4, 3)))
    assert (bounds[0] == 0).all() and (jnp.diff(bounds, axis=0) > 0).all() and (bounds < 1).all()


def test_positions_begin_anew_with_every_document():
    segments = jnp.asarray([[1, 1, 2, 2, 2, 0], [5, 6, 6, 6, 6, 6]])
    found = positions_of(segments, 6)
    np.testing.assert_array_equal(found, [[0, 1, 0, 1, 2, 0], [0, 0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(positions_of(None, 3), [0, 1, 2])


def test_layers_for_their_learning_rates():
    layer_of, last = layers_of(zoo.create_model("yaad_nano"))
    paths = ("embed/embedding", "blocks_0/norm1/scale", "blocks_3/mlp/up/kernel", "norm/scale")
    assert [layer_of(path) for path in paths] == [0, 1, 4, 5] and last == 5


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(mixers="GX"), r"no mixer is called 'X'; there are A \(softmax attention\)"),
        (dict(mixers="GGA"), "number divides the depth, 2"),
        (dict(mixers=""), "one letter or more"),
        (dict(num_heads=3), "num_heads 3 must divide width 16"),
        (dict(mixers="G", value_ratio=0.55), "value_ratio 0.55 of width 16 is 9 channels"),
        (dict(mixers="W", window=0), "window must be at least 1, got 0"),
        (dict(mixers="G", conv_width=-1), "conv_width must be at least 0"),
        (dict(mixers="G", chunk_size=0), "chunk_size must be at least 1"),
        (dict(mixers="Y", memory="vector"), "memory must be 'mlp' or 'matrix', got 'vector'"),
        (dict(mixers="Y", memory_chunk=0), "memory_chunk must be at least 1"),
        (dict(mixers="Y", memory_epsilon=0.0), "memory_epsilon must be positive"),
        (dict(mixers="M", max_error=-1.0), "max_norm must be positive"),
        (dict(mixers="Y", step_limit=0.0), "step_limit must be positive"),
        (dict(mixers="Y", huber="hard"), "hard"),
        (dict(mixers="M", link="none"), "none"),
        (dict(vocab_size=1), "vocab_size must be at least 2"),
        (dict(mixers="AW", clear_every=1), "clear_every 1 needs a mixer with a memory; 'AW' has none"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        MirasModel(**{**FIELDS, **fields}).check()


def test_arguments_that_do_not_fit():
    model, variables = made("A")
    with pytest.raises(ValueError, match="segments must be shaped like tokens"):
        check_tokens(tokens(), jnp.zeros((1, 8), jnp.int32))
    with pytest.raises(ValueError, match="max_length 4 is less than the 16 tokens"):
        model.apply(variables, tokens(), 4, method="prefill")


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_recomputing_changes_no_gradient(remat, float64):
    model, variables = made("YW", dtype=jnp.float64, param_dtype=jnp.float64)
    row = tokens()

    def gradients(model):
        return jax.jit(jax.grad(lambda v: model.apply(v, row, None, True).std()))(variables)

    chex.assert_trees_all_close(gradients(model), gradients(model.clone(remat=remat)), rtol=0, atol=1e-12)
