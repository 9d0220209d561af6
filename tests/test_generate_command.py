"""Language models loaded from runs, what is written of their tokens, and the command that generates."""

import json

import jax
import numpy as np
import pytest

import zoo
from tests.language_models import SOURCE, TINY, encoder_decoder, random_variables, streamed
from train import config as config_lib
from train import schema
from zoo import __main__ as cli
from zoo.formats.orbax_writer import write_checkpoint
from zoo.sequence.generation import load_language_model
from zoo.sequence.tokenizers import open_tokenizer
from zoo.sequence.writing import END, SPECIAL, NumberWriter, PixelWriter, TextWriter


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


@pytest.mark.slow
def test_vocabularies_are_those_of_the_weights(tmp_path):
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
    fields, model, variables = encoder_decoder()
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
def test_the_command_writes_numbers(tmp_path, capsys):
    fields, model, variables = encoder_decoder()
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
