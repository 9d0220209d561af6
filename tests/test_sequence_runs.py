"""Runs of sequence models: they learn, go on bit for bit, are scored, compared, and refuse what does not fit."""

import json
import shutil

import chex
import jax
import numpy as np
import pytest

from train import compare, evaluate, loop
from train import config as config_lib
from train.checkpoint import read_state

COMMON = dict(
    total_steps=6,
    log_every=1,
    eval_every=3,
    checkpoint__every_steps=3,
    checkpoint__keep=5,
    optim__warmup_steps=1,
    data__batch_size=8,
    data__eval_batch_size=8,
)
TINY = dict(model__overrides__width=16, model__overrides__depth=2, model__overrides__mlp_hidden=16)
MEMORY = dict(TINY, model__overrides__memory_chunk=4)
RECALL = dict(data__length=16, data__options__num_kv_pairs=2, data__options__num_tokens=18, data__eval_examples=24)
# Config -> what makes it small.
RUNS = {
    "configs/recall.py:mqar,moneta": {**MEMORY, **RECALL, "model__overrides__depth": 1},
    "configs/text.py:yaad_h_nano": {**MEMORY, "data__length": 32, "data__name": "files"},
    "configs/raster.py:routing_transformer_image_nano": {"model__overrides__depth": 1},
    "configs/recall.py:copy,routing_transformer_seq2seq": {
        **dict(model__overrides__depth=1, model__overrides__encoder_depth=1),
        **dict(data__length=16, data__options__symbols=4, data__eval_examples=24),
    },
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A few short documents."""
    directory = tmp_path_factory.mktemp("corpus")
    for split, count in (("train", 12), ("test", 3)):
        (directory / split).mkdir()
        for i in range(count):
            (directory / split / f"{i}.txt").write_text(f"document {i}: " + "ab" * (3 * i + 1) + "\n")
    return directory


def flags(values):
    return [f"--config.{key.replace('__', '.')}={value}" for key, value in values.items()]


def words(name, corpus, **values):
    values = COMMON | RUNS[name] | values
    if values.get("data__name") == "files":
        values["data__path"] = corpus
    return flags(values)


def train(name, corpus, workdir, **values):
    return loop.train(loop.prepare(config_lib.load(name, words(name, corpus, **values)), str(workdir)))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_going_on_is_bit_equal(name, corpus, tmp_path, capsys):
    """Parameters, optimizer, centroids and the order of the data; the metrics are those of an unbroken run."""
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    result = train(name, corpus, straight)
    assert np.isfinite(result["test_loss"]) and 0 <= result["test_accuracy"] <= 1
    assert ("test_bits_per_byte" in result) == ("text" in name)
    shutil.copytree(straight, cut)
    shutil.rmtree(cut / "checkpoints" / "6")
    again = train(name, corpus, cut)
    assert "going on from step 3 of 6" in capsys.readouterr().err
    found, expected = (read_state(directory / "checkpoints", 6)[1] for directory in (cut, straight))
    chex.assert_trees_all_equal(*(jax.tree.map(np.asarray, state) for state in (found, expected)))
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in result.items() if k != "seconds"}
    if "routing" in name:
        before = read_state(straight / "checkpoints", 3)[1]["model_state"]["centroids"]
        after = expected["model_state"]["centroids"]
        moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), before, after)
        assert min(jax.tree.leaves(moved)) > 0
    scored = evaluate.score_run(straight)
    assert scored["test_loss"] == pytest.approx(result["test_loss"], rel=1e-6)


# Two blocks of two heads, six convolutions of three taps behind, the position. Linear attention has a matrix of 8 x 8 a
# head, Moneta an MLP of 8 -> 32 -> 8, twice (anchor and running), and the place in the chunk.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixer", "sizes", "state"),
    [
        ("linear_attention", TINY, 2 * (2 * 8 * 8 + 3 * 3 * 16) + 1),
        ("moneta", MEMORY, 2 * (2 * 2 * (2 * 8 * 32) + 3 * 3 * 16 + 1) + 1),
    ],
)
def test_a_table_is_trained_once(tmp_path, capsys, mixer, sizes, state):
    arguments = ["--config", "configs/recall.py:mqar", "--workdir", str(tmp_path), "--only", f"mqar,{mixer}"]
    arguments += flags(COMMON | RECALL | sizes)
    assert compare.main(arguments) == 0
    first = capsys.readouterr()
    *lines, last = first.out.splitlines()
    (row,) = json.loads(last).values()
    assert row["tokens"] == 6 * 8 * 16 and row["model"] == f"{mixer}_nano" and row["step"] == 6
    assert row["state"] == state
    head, line = lines
    assert line.split()[0] == f"mqar,{mixer}" and head.split()[:4] == ["parameters", "state", "tokens", "seconds"]
    assert compare.main(arguments) == 0
    second = capsys.readouterr()
    assert second.out == first.out and "step" not in second.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config", "configs/recall.py:mqarr"], "names no table; did you mean 'mqar'"),
        (["--config", "configs/imagenet.py:all"], "has no TABLES"),
        (["--config", "configs/recall.py:mqar", "--only", "mqar,monet"], "did you mean 'mqar,moneta'"),
    ],
)
def test_tables_that_are_not_there(tmp_path, capsys, arguments, message):
    assert compare.main([*arguments, "--workdir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, values, message",
    [
        ("configs/text.py:yaad_h_nano", dict(data__align=2), "at multiples of 4 tokens; set config.data.align"),
        ("configs/text.py:yaad_h_nano", dict(data__length=None), "config.data.length, the tokens in a row, is not set"),
        ("configs/text.py:yaad_h_nano", dict(data__tokenizer="nothing.json"), "nothing.json"),
        ("configs/text.py:yaad_h_nano", dict(model__name="davit_nano"), "'davit_nano' takes images"),
        ("configs/recall.py:mqar,moneta", dict(data__path="/tmp"), "'mqar' is generated"),
        ("configs/recall.py:mqar,moneta", dict(data__options__pairs=3), "has no option 'pairs'"),
        ("configs/recall.py:mqar,moneta", dict(distill__teacher="davit_tiny"), "teaches classes"),
        ("configs/digits.py:davit_nano", dict(model__name="yaad_nano"), "'yaad_nano' takes tokens"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, corpus, name, values, message):
    given = (
        words(name, corpus, **values)
        if name in RUNS
        else [f"--config.{k.replace('__', '.')}={v}" for k, v in values.items()]
    )
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        loop.prepare(config_lib.load(name, given), str(tmp_path))
