"""Filters against numpy, draws against their probabilities, cached steps against whole rows, loading, the command."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from kernels.cost import cost
from train import config as config_lib
from train import schema
from zoo import __main__ as cli
from zoo.formats.orbax_writer import write_checkpoint
from zoo.keymap import flatten, unflatten
from zoo.pretrained import abstract_variables
from zoo.sequence.generation import generate, load_language_model, stream
from zoo.sequence.language_model import LanguageModel
from zoo.sequence.miras import MirasModel
from zoo.sequence.sampling import filter_logits
from zoo.sequence.tokenizers import open_tokenizer
from zoo.sequence.writing import END, SPECIAL, NumberWriter, PixelWriter, TextWriter

VOCABULARY, LENGTH = 17, 23
TINY = dict(width=32, depth=2, num_heads=2, mlp_hidden=32)
# No length here is a multiple of another, and rows are longer than the window.
# With tied embeddings and random weights every token would be followed by itself.
SMALL = dict(TINY, vocab_size=VOCABULARY, length=LENGTH, chunk_size=4, window=6, tie_embeddings=False)
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
# Dtype, tolerance, pattern, and how much of a row is read at once; one of each kind reads a single token.
CACHED = [
    *(
        pytest.param(
            *("float64", 1e-10, pattern, (0, 1, 13) if pattern in "AWLGY" else (13,)),
            marks=() if pattern in ("A", "W", "G", "Y", "E") else pytest.mark.slow,
        )
        for pattern in PATTERNS
    ),
    *(
        pytest.param("float32", 1e-4, pattern, (0,), marks=() if pattern in "AY" else pytest.mark.slow)
        for pattern in "AGYEWNRTLHDM"
    ),
]


def small(pattern, **fields):
    kind = MirasModel if set(pattern) & set("MYE") else LanguageModel
    model = kind(
        **{**SMALL, "mixers": pattern, **(MEMORY if kind is MirasModel else {}), **PATTERNS.get(pattern, {}), **fields}
    )
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


def streamed(model, variables, prompt, **settings):
    """The tokens of one row, as a list."""
    pieces = stream(model, variables, np.array([prompt], np.int32), **settings).pieces
    return np.concatenate(list(pieces), axis=1)[0].tolist()


@functools.partial(jax.jit, static_argnums=0)
def forward(model, variables, tokens, inputs={}):  # noqa: B006
    return model.apply(variables, tokens, **inputs)


# Filters


def filtered_by_hand(logits, temperature, top_k, top_p):
    """Probabilities of one row, float64."""
    logits = np.asarray(logits, np.float64)
    # Sorted by falling logit, then by rising id.
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if temperature == 0:
        return np.eye(len(logits))[order[0]]
    weights = np.exp((logits - logits.max()) / temperature)
    kept = order[: top_k or len(order)]
    if top_p is not None:
        total, nucleus = sum(weights[i] for i in kept), []
        while sum(weights[i] for i in nucleus) / total < top_p and len(nucleus) < len(kept):
            nucleus.append(kept[len(nucleus)])
        kept = nucleus
    found = np.zeros(len(logits))
    found[kept] = weights[kept]
    return found / found.sum()


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [
        (0, None, None),
        (0, 3, 0.8),
        (0.3, None, None),
        (1, None, None),
        (1.0, 1, None),
        (0.7, 3, None),
        (1.3, VOCABULARY, 1.0),
        (1.0, None, 1e-6),
        (2.5, None, 0.35),
        (1.0, None, 0.8),
        (0.5, 5, 0.8),
        (2.5, 2, 0.35),
        (3.0, 12, 0.95),
    ],
)
def test_filters_by_hand(temperature, top_k, top_p):
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(4, 3, VOCABULARY)).astype(np.float32) * 2
    # Equal ones in the second half.
    logits[2:] = np.round(logits[2:])
    with jax.enable_x64(True):
        found = filter_logits(jnp.asarray(logits, jnp.float64), temperature, top_k, top_p)
        assert found.shape == logits.shape and (found.max(-1) == 0).all()
        shares = np.asarray(jax.nn.softmax(found, -1))
    expected = np.apply_along_axis(filtered_by_hand, -1, logits, temperature, top_k, top_p)
    np.testing.assert_array_equal(shares > 0, expected > 0)
    np.testing.assert_allclose(shares, expected, rtol=1e-9)


def test_filters_of_known_probabilities():
    probabilities = jnp.asarray([0.1, 0.4, 0.05, 0.25, 0.2])
    logits = jnp.log(probabilities)

    def kept(**settings):
        shares = np.asarray(jax.nn.softmax(filter_logits(logits, **settings)))
        return {int(i): round(float(shares[i]), 4) for i in np.flatnonzero(shares)}

    assert kept(temperature=0) == {1: 1.0}
    assert kept(top_k=2) == {1: 0.6154, 3: 0.3846}
    assert kept(top_p=0.5) == {1: 0.6154, 3: 0.3846}
    assert kept(top_p=0.3) == {1: 1.0}
    # The nucleus is one of what top-k has left, where the first has 40 of 85 parts and the first two 65.
    assert kept(top_k=3, top_p=0.7) == {1: 0.6154, 3: 0.3846}
    assert kept(top_p=0.7) == {1: 0.4706, 3: 0.2941, 4: 0.2353}
    # And one of the distribution at that temperature, whose squares are 16 : 6.25 : 4 : 1 : 0.25.
    assert kept(temperature=0.5, top_p=0.58) == {1: 1.0}
    assert set(kept(temperature=0.5, top_p=0.59)) == {1, 3}
    # Small temperatures do not overflow; what is far behind has no probability then.
    assert kept(temperature=1e-30) == {1: 1.0}
    assert filter_logits(logits, 1e-30).dtype == jnp.float32


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(temperature=-0.1), "temperature must be at least 0 and finite, got -0.1"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(temperature=float("inf")), "temperature"),
        (dict(top_k=0), "top_k must be from 1 to the 17 tokens there are, or None; got 0"),
        (dict(top_k=18), "top_k"),
        (dict(top_p=0.0), "top_p must be above 0 and at most 1, or None; got 0.0"),
        (dict(top_p=1.1), "top_p"),
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(max_length=6), "max_length must be at least 7, to read 3 tokens and go on by 5"),
        (dict(prompt=np.zeros((1, 0), np.int32)), r"at least one row of at least one token, got \(1, 0\)"),
        (dict(prompt=np.array([[3, 17]])), "prompt must hold tokens from 0 to 16, it has 17"),
        (dict(prompt=np.array([[-1, 17]])), "it has -1"),
        (dict(piece=0), "piece must be at least 1 token, got 0"),
    ],
)
def test_settings_out_of_range(settings, message):
    model = small("A")
    options = dict(prompt=np.zeros((1, 3), np.int32), steps=5, key=jax.random.key(0)) | settings
    with pytest.raises(ValueError, match=message):
        stream(model, {}, **options)
    if "piece" not in settings:
        with pytest.raises(ValueError, match=message):
            generate(model, {}, **options)
    if {"temperature", "top_k", "top_p"} & settings.keys():
        with pytest.raises(ValueError, match=message):
            filter_logits(jnp.zeros(17), **settings)


# Cached steps


@pytest.mark.parametrize("dtype, tolerance, pattern, reads", CACHED)
def test_cached_steps_equal_whole_rows(dtype, tolerance, pattern, reads):
    """Of a row of which so much is read at once, and the rest one by one."""
    with jax.enable_x64(dtype == "float64"):
        model = small(pattern, param_dtype=jnp.dtype(dtype))
        variables = random_variables(model, dtype)
        tokens = rows()
        whole = np.asarray(forward(model, variables, tokens))
        assert whole.dtype == dtype and whole.std() > 0.3
        step = jax.jit(functools.partial(model.apply, method="step"))
        shapes = None
        for read in reads:
            if read:
                prefill = jax.jit(functools.partial(model.apply, max_length=LENGTH, method="prefill"))
                logits, state = prefill(variables, tokens[:, :read])
            else:
                state = model.apply(variables, len(tokens), LENGTH, method="initial_state")
                logits = jnp.zeros((2, 0, VOCABULARY))
            parts = [np.asarray(logits)]
            for token in tokens[:, read:].T:
                logits, state = step(variables, token, state)
                parts.append(np.asarray(logits)[:, None])
            np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=tolerance, err_msg=f"{read} read")
            assert shapes in (None, jax.tree.map(jnp.shape, state))
            shapes = jax.tree.map(jnp.shape, state)
        # One program for all positions, whatever was read at once.
        assert step._cache_size() == 1


def state_of(model, room):
    variables = unflatten(shapes_of(model))
    return variables, jax.eval_shape(lambda v: model.apply(v, 2, room, method="initial_state"), variables)


@pytest.mark.parametrize("pattern", [*RECURRENT, "W", "YW"])
def test_a_step_is_the_same_however_far_it_may_go(pattern):
    model = small(pattern)
    (_, near), (_, far) = state_of(model, 64), state_of(model, 100_000)
    assert jax.tree.leaves(near) and near == far


def test_a_step_of_softmax_attention_costs_what_there_is_to_see():
    model, token = small("A"), jax.ShapeDtypeStruct((2,), jnp.int32)

    def flops_and_size(room):
        variables, state = state_of(model, room)
        counted = cost(functools.partial(model.apply, method="step"), variables, token, state)
        return counted.flops, sum(leaf.size for leaf in jax.tree.leaves(state))

    (flops, size), (more_flops, more) = flops_and_size(64), flops_and_size(128)
    # Keys and values of 64 more tokens in 2 rows of 32 channels; a multiply-add for each of them.
    assert more - size == 2 * 64 * 2 * 32 and more_flops - flops >= 2 * (more - size)


# Generation


@pytest.fixture(scope="module")
def causal():
    """A model, and its variables."""
    model = small("A")
    return model, random_variables(model)


@pytest.mark.parametrize("pattern", ["A", pytest.param("RW", marks=pytest.mark.slow), "Y"])
def test_greedy_is_the_argmax_of_whole_rows(pattern):
    model = small(pattern)
    variables, prompt = random_variables(model), rows(length=7)
    found = np.asarray(generate(model, variables, prompt, steps=LENGTH - 7, key=jax.random.key(0), temperature=0))
    assert found.shape == (2, LENGTH - 7) and found.dtype == np.int32
    row = prompt
    for number in range(LENGTH - 7):
        # Padded to one length, which the past does not see.
        padded = np.pad(row, [(0, 0), (0, LENGTH - row.shape[1])])
        best = np.asarray(forward(model, variables, padded))[:, row.shape[1] - 1].argmax(-1)
        np.testing.assert_array_equal(found[:, number], best)
        row = np.concatenate([row, found[:, number : number + 1]], axis=1)


def test_streams_and_fewer_steps_give_the_same(causal):
    model, variables = causal
    settings = dict(key=jax.random.key(3), temperature=1.3, top_k=9, top_p=0.9)
    prompt = rows(length=7)
    found, log_probs = generate(model, variables, prompt, steps=14, return_log_probs=True, **settings)
    assert len(np.unique(found)) > 4 and (found[0] != found[1]).any()
    row = jnp.concatenate([prompt, found], axis=1)
    shares = jax.nn.log_softmax(forward(model, variables, row), -1)[:, 6:-1]
    np.testing.assert_allclose(log_probs, jnp.take_along_axis(shares, found[..., None], -1)[..., 0], atol=1e-4)
    np.testing.assert_array_equal(generate(model, variables, prompt, steps=1, **settings), found[:, :1])
    streamed = stream(model, variables, prompt, steps=14, piece=5, max_length=50, **settings)
    assert streamed.compile_seconds > 0 and streamed.prompt_seconds > 0
    pieces = list(streamed.pieces)
    assert [one.shape for one in pieces] == [(2, size) for size in (1, 5, 5, 3)]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), found)
    other = generate(model, variables, prompt, steps=14, **{**settings, "key": jax.random.key(4)})
    assert (np.asarray(other) != found).any()


@pytest.mark.slow
def test_rooms_do_not_show(causal):
    model, variables = causal
    settings = dict(steps=9, key=jax.random.key(3))
    expected = generate(model, variables, rows(length=7), **settings)
    np.testing.assert_array_equal(generate(model, variables, rows(length=7), max_length=99, **settings), expected)
    # As wide integers, and under a trace.
    wide = rows(length=7).astype(np.int64)
    np.testing.assert_array_equal(generate(model, variables, wide, **settings), expected)
    assert jax.eval_shape(lambda prompt: generate(model, variables, prompt, **settings), wide).shape == (2, 9)


@pytest.mark.parametrize("settings", [{}, dict(temperature=0.6, top_k=9, top_p=0.95)], ids=str)
def test_draws_follow_the_probabilities(causal, settings):
    """Pearson's statistic of first and second tokens over many rows of one prompt."""
    model, variables = causal
    many = 20_000
    prompt = np.repeat(rows(batch=1, length=2), many, axis=0)
    found = np.asarray(generate(model, variables, prompt, steps=2, key=jax.random.key(5), **settings))
    seconds = np.array([[*prompt[0], token] for token in range(VOCABULARY)], np.int32)
    logits = np.asarray(forward(model, variables, seconds))
    by_hand = functools.partial(filtered_by_hand, **{**dict(temperature=1, top_k=None, top_p=None), **settings})
    of_first = by_hand(logits[0, 1])
    common = int(of_first.argmax())
    of_second = by_hand(logits[common, 2])
    for tokens, shares in ((found[:, 0], of_first), (found[found[:, 0] == common, 1], of_second)):
        counts = np.bincount(tokens, minlength=VOCABULARY)
        assert not counts[shares == 0].any()
        expected = len(tokens) * shares[shares > 0]
        statistic = ((counts[shares > 0] - expected) ** 2 / expected).sum()
        freedom = max(len(expected) - 1, 1)
        # Mean and four standard deviations of the chi-square distribution.
        assert statistic < freedom + 4 * (2 * freedom) ** 0.5


@pytest.fixture(scope="module")
def pair():
    """An encoder-decoder, and its variables."""
    fields = dict(TINY, mlp_hidden=None) | dict(vocab_size=12, source_vocab_size=12, length=8, source_length=8)
    del fields["mlp_hidden"], fields["num_heads"]
    fields |= dict(hidden=32, depth=1, encoder_depth=1, local_heads=1, routing_heads=1, block=4, clusters=2, window=3)
    model = zoo.create_model("routing_transformer_seq2seq_nano", **fields)
    return fields, model, random_variables(model)


SOURCE = np.array([[6, 4, 11, END, 0, 0, 0, 0]], np.int32)


@pytest.mark.slow
def test_what_else_a_model_takes(pair):
    _, model, variables = pair
    inputs = dict(source=SOURCE, source_mask=SOURCE > 0)
    found = streamed(model, variables, [1], steps=8, key=jax.random.key(0), temperature=0, **inputs)
    row = np.array([[1, *found[:-1]]])
    assert found == forward(model, variables, row, inputs)[0].argmax(-1).tolist()
    hidden = dict(inputs, source_mask=np.ones((1, 8), bool))
    assert (forward(model, variables, row, hidden) != forward(model, variables, row, inputs)).any()
    with pytest.raises(TypeError, match="source"):
        generate(model, variables, row, steps=1, key=jax.random.key(0))


# Loading


def save_run(directory, model, variables, overrides, **data):
    """What a run leaves that was configured so."""
    config = schema.default()
    config.model.update(name=model, overrides=overrides)
    config.data.update(data)
    config.task = "next_token"
    write_checkpoint(directory / "checkpoints", variables, config_lib.plain(config))
    return directory


OVERRIDES = dict(TINY, chunk_size=8, tie_embeddings=False)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """A run on text, as bytes."""
    model = zoo.create_model("gated_deltanet_nano", **OVERRIDES)
    variables = random_variables(model)
    directory = tmp_path_factory.mktemp("text")
    data = dict(name="stdlib", length=48)
    return save_run(directory, "gated_deltanet_nano", variables, OVERRIDES, **data), model, variables


def same(variables, others):
    jax.tree.map(np.testing.assert_array_equal, variables, others)


def test_loading_of_a_run(text_run):
    directory, model, variables = text_run
    found = load_language_model("gated_deltanet_nano", directory)
    assert found.model == model.clone(length=48) and found.tokenizer == open_tokenizer("bytes")
    assert found.config["data"]["name"] == found.data == "stdlib" and found.report.format == "orbax"
    same(found.variables, variables)
    assert load_language_model("gated_deltanet_nano", directory, chunk_size=4).model.chunk_size == 4
    with pytest.raises(ValueError, match="holds weights of gated_deltanet_nano, not of retnet_nano"):
        load_language_model("retnet_nano", directory)
    with pytest.raises(ValueError, match="davit_nano takes pictures, not tokens; zoo.load_classifier loads it"):
        load_language_model("davit_nano", directory)
    with pytest.raises(ValueError, match="gated_deltanet_nano takes tokens, not pictures; zoo.load_language_model"):
        zoo.load_classifier("gated_deltanet_nano", directory)
    with pytest.raises(ValueError, match="unknown tokenizer 'byte'; did you mean 'bytes'"):
        load_language_model("gated_deltanet_nano", directory, tokenizer="byte")
    with pytest.raises(zoo.WeightsError, match="no moving average"):
        load_language_model("gated_deltanet_nano", directory, weights="ema")


def test_averages_are_taken_where_they_are_kept(text_run, tmp_path):
    _, model, variables = text_run
    averages = jax.tree.map(lambda leaf: leaf + 1, variables)
    source = {"state_dict": variables, "ema": averages}
    found = load_language_model("gated_deltanet_nano", source, **OVERRIDES)
    same(found.variables, averages)
    raw = load_language_model("gated_deltanet_nano", source, **OVERRIDES, weights="raw")
    same(raw.variables, variables)
    assert (found.report.weights, raw.report.weights) == ("ema", "raw")


def test_vocabularies_are_those_of_the_weights(pair, tmp_path):
    model = zoo.create_model("retnet_nano", **OVERRIDES, vocab_size=31)
    variables = random_variables(model)
    path = tmp_path / "weights.safetensors"
    zoo.save_pretrained(model, variables, path)
    found = load_language_model("retnet_nano", path, **OVERRIDES)
    assert found.model.vocab_size == 31 and found.tokenizer is None and found.config == {} and found.data == ""
    same(found.variables, variables)
    with pytest.raises(ValueError, match="the tokenizer has 257 tokens, .* as loaded has 31"):
        load_language_model("retnet_nano", path, tokenizer="bytes", **OVERRIDES)
    with pytest.raises(zoo.WeightsError, match="misshapen"):
        load_language_model("retnet_nano", path, vocab_size=257, **OVERRIDES)
    fields, model, variables = pair
    fields = {name: value for name, value in fields.items() if "vocab_size" not in name}
    directory = save_run(tmp_path, "routing_transformer_seq2seq_nano", variables, fields, name="sort", length=8)
    found = load_language_model("routing_transformer_seq2seq_nano", directory)
    assert found.model == model and found.tokenizer is None
    with pytest.raises(ValueError, match="tokenizer 'bytes' was given, but .* was trained on 'sort', no text"):
        load_language_model("routing_transformer_seq2seq_nano", directory, tokenizer="bytes")


# The command


def test_text_comes_as_soon_as_it_is_whole():
    tokenizer = open_tokenizer("bytes")
    prompt = tokenizer.encode("schö".encode())
    writer = TextWriter(tokenizer, [tokenizer.begin, *prompt.tolist()])
    octets = "n €🙂!".encode() + b"\xff\xe2\x82"
    shown = [writer.add([octet]) for octet in octets]
    assert shown == ["n", " ", "", "", "€", "", "", "", "🙂", "!", "", "", ""]
    assert writer.end() == "\N{REPLACEMENT CHARACTER}" * 2 and writer.end() == ""
    assert writer.found() == {"text": octets.decode(errors="replace")}


def test_pixels_and_numbers():
    writer = PixelWriter(4, 17, [0, 16])
    shown = [writer.add(tokens) for tokens in ([0], [16, 17], [8] * 7, [1])]
    assert shown == ["", "  @@  @@", "\n??======\n========", ""] and writer.end() == ""
    assert writer.found() == {"pixels": [[0, 16, 0, 16], [17, 8, 8, 8], [8, 8, 8, 8], [1]]}
    writer = NumberWriter()
    assert [writer.add([token]) for token in (SPECIAL, SPECIAL + 12, 0, END, SPECIAL)] == ["0", " 12", " ?", "", ""]
    assert writer.found() == {"numbers": [0, 12, None], "ended": True}


def run(capsys, *words):
    """Exit code, stdout and stderr of `generate`."""
    try:
        code = cli.main(["generate", *map(str, words)])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def test_the_command_goes_on_with_text(text_run, tmp_path, capsys):
    directory, model, variables = text_run
    words = ("gated_deltanet_nano", directory, "--tokens", 40, "--seed", 3, "--top-k", 50)
    code, out, err = run(capsys, *words, "--prompt", "def f(")
    settings = dict(steps=40, key=jax.random.key(3), temperature=0.8, top_k=50)
    tokens = streamed(model.clone(length=48), variables, [256, *b"def f("], **settings)
    text = open_tokenizer("bytes").decode(tokens).decode(errors="replace")
    assert (code, out) == (0, f"def f({text}\n")
    assert "compiled in " in err and "7 tokens of prompt in " in err and "39 tokens more in " in err
    assert "made for" not in err
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"def f(")
    code, out, err = run(capsys, *words, "--prompt-file", path, "--json")
    assert code == 0 and json.loads(out) == {"prompt": "def f(", "text": text, "tokens": tokens}
    code, out, err = run(capsys, *words, "--samples", 2, "--tokens", 60)
    assert out.startswith("--- 1 of 2\n") and out.count("\n--- 2 of 2\n") == 1
    assert "61 tokens are more than the 48 that the model is made for" in err


@pytest.mark.slow
def test_the_command_draws_digits(tmp_path, capsys):
    model = zoo.create_model("retnet_nano", **OVERRIDES, vocab_size=18)
    variables = random_variables(model)
    directory = save_run(tmp_path, "retnet_nano", variables, OVERRIDES, name="raster:digits")
    code, out, _ = run(capsys, "retnet_nano", directory, "--prompt", "0 0 16", "--json")
    found = json.loads(out)
    settings = dict(steps=61, key=jax.random.key(0), temperature=0.8)
    tokens = streamed(model, variables, [17, 0, 0, 16], **settings)
    assert code == 0 and found["tokens"] == tokens and found["prompt"] == [0, 0, 16]
    assert np.ravel(found["pixels"]).tolist() == [0, 0, 16, *tokens] and np.shape(found["pixels"]) == (8, 8)
    code, out, _ = run(capsys, "retnet_nano", directory, "--prompt", "0,0,16")
    assert [len(line) for line in out.splitlines()] == [16] * 8 and out.startswith("    @@")
    for words, message in (
        (("--prompt", "0 17"), "--prompt must be numbers from 0 to 16"),
        (("--prompt", "0 a"), "got 'a'"),
        (("--prompt", "0 " * 64), "--prompt has 64 pixels; an image has 64"),
        (("--prompt", "0 " * 60, "--tokens", 5), "--tokens must be at most 4"),
        (("--source", "1"), "--source is what an encoder reads, and retnet_nano has none"),
    ):
        code, out, err = run(capsys, "retnet_nano", directory, *words)
        assert (code, out) == (2, "") and err.startswith("error: ") and message in err


@pytest.mark.slow
def test_the_command_writes_numbers(pair, tmp_path, capsys):
    fields, model, variables = pair
    name = "routing_transformer_seq2seq_nano"
    directory = save_run(tmp_path, name, variables, fields, name="sort", length=8)
    code, out, _ = run(capsys, name, directory, "--source", "3 1 8", "--json")
    inputs = dict(source=SOURCE, source_mask=SOURCE > 0)
    settings = dict(steps=8, key=jax.random.key(0), temperature=0)
    tokens = streamed(model, variables, [1], **settings, **inputs)
    found = json.loads(out)
    assert code == 0 and found["source"] == [3, 1, 8] and found["tokens"] == tokens
    told = tokens[: tokens.index(END)] if END in tokens else tokens
    assert found["numbers"] == [token - SPECIAL if token >= SPECIAL else None for token in told]
    shown = " ".join("?" if number is None else str(number) for number in found["numbers"])
    assert run(capsys, name, directory, "--source", "3,1,8")[:2] == (0, f"{shown}\n")
    for words, message in (
        ((), f"{name} was trained on 'sort': give it --source"),
        (("--source", ""), "--source must have from 1 to 7 numbers, got 0"),
        (("--source", "1 " * 8), "got 8"),
        (("--source", "9"), "--source must be numbers from 0 to 8"),
        (("--prompt", "1"), "it takes --source, and no prompt"),
    ):
        code, out, err = run(capsys, name, directory, *words)
        assert (code, out) == (2, "") and err.startswith("error: ") and message in err


def test_arguments_that_are_wrong(text_run, tmp_path, capsys):
    directory, model, _ = text_run
    name = "gated_deltanet_nano"
    mqar = save_run(tmp_path, name, random_variables(model), OVERRIDES, name="mqar", length=64)
    for words, message in (
        ((name, directory, "--prompt", "a", "--prompt-file", "b"), "not allowed with argument"),
        ((name, directory, "--token", 3), "unrecognized arguments"),
        ((name, directory, "--tokens", 0), "must be at least 1"),
        ((name, directory, "--temperature", "warm"), "invalid float value: 'warm'"),
        ((name, directory, "--temperature", -1), "temperature must be at least 0"),
        ((name, directory, "--top-k", 258), "top_k must be from 1 to the 257 tokens"),
        ((name, directory, "--top-p", 0), "top_p must be above 0"),
        ((name, directory, "--seed", -1), "no natural number"),
        ((name, directory, "--prompt-file", tmp_path / "absent"), "absent"),
        ((name, directory, "--tokenizer", tmp_path / "absent.json"), "does not exist"),
        ((name, directory, "--source", "1"), "has none; give a --prompt"),
        ((name, tmp_path / "absent"), "no such file"),
        (("gated_deltanet_nan", directory), "did you mean 'gated_deltanet_nano'"),
        (("davit_nano", directory), "zoo.load_classifier loads it"),
        (("retnet_nano", directory), "holds weights of gated_deltanet_nano"),
        ((name, mqar), "was trained on 'mqar'; text is generated by models of text"),
    ):
        code, out, err = run(capsys, *words)
        assert (code, out) == (2, "") and message in err, words
