"""Scoring: exact over ragged batches, the same for every batch size, and clear about what is wrong."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import zoo
from tests import runs
from train import config as config_lib
from train import evaluate, loop, sources, tasks
from zoo import preprocess

TINY = dict(depths=(1,), dims=(8,), num_heads=(2,), in_chans=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of a few steps and what it said at its end."""
    workdir = tmp_path_factory.mktemp("evaluate") / "run"
    return workdir, loop.train(loop.prepare(config_lib.load(runs.CONFIG, runs.overrides()), str(workdir)))


@pytest.fixture
def model():
    model = zoo.create_model("davit_nano", **TINY)
    return model, jax.jit(model.init)(jax.random.key(3), jnp.zeros((1, 8, 8, 1)))


def result_of(capsys, *argv):
    assert evaluate.main([str(word) for word in argv]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_scores_as_it_did_itself(finished, capsys):
    workdir, said = finished
    found = result_of(capsys, "--workdir", workdir)
    assert found["step"] == 12 and found["examples"] == 360 + 84
    for name in said.keys() - {"step", "seconds"}:
        assert found[name] == pytest.approx(said[name], rel=1e-6), name


def test_an_older_step_and_the_plain_parameters(finished, capsys):
    workdir, _ = finished
    found = [
        result_of(capsys, "--workdir", workdir, "--split", "test_last360", "--batch-size", 8, *words)
        for words in ((), ("--raw",), ("--step", 9), ("--step", 9, "--raw"))
    ]
    assert [result["step"] for result in found] == [12, 12, 9, 9]
    assert len({result["test_last360_loss"] for result in found}) == 4


@pytest.mark.parametrize("batch_size", [8, 56, 88])
def test_score_against_a_plain_loop(model, batch_size):
    """84 examples: batches that leave 4, 28 and 84 over."""
    module, variables = model
    dataset = sources.open_source("digits", split="test_last360")
    found = evaluate.score(
        tasks.Classify(10, (0.5,), (0.25,)),
        module,
        variables,
        dataset,
        transform=preprocess.eval_transform(8, 1.0, mean=(0.5,)),
        batch_size=batch_size,
    )
    images = np.stack([dataset.source[i]["image"] for i in range(84)]).astype(np.float64)
    labels = np.asarray([dataset.source[i]["label"] for i in range(84)])
    logits = np.asarray(
        jax.jit(module.apply)(variables, jnp.asarray((images / 255 - 0.5) / 0.25, jnp.float32)), np.float64
    )
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(84), labels]
    order = np.argsort(-logits, axis=-1)
    assert found["accuracy"] == (order[:, 0] == labels).mean()
    assert found["accuracy_top5"] == (order[:, :5] == labels[:, None]).any(-1).mean()
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-6)


@pytest.fixture
def published(monkeypatch, tmp_path, model):
    """A tag with weights of its own: what the published ones look like to the command."""
    family = zoo.registry.family_of("davit_nano")
    monkeypatch.setitem(family.variants, "davit_test", {**TINY, "stem_kernel": 3, "stem_strides": 1, "in_chans": 3})
    monkeypatch.setitem(zoo.registry._FAMILY_OF, "davit_test", family)
    module = zoo.create_model("davit_test", num_classes=2)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    weights = tmp_path / "weights.safetensors"
    zoo.save_pretrained(module, variables, weights)
    cfg = zoo.registry.PretrainedCfg(
        tag="davit_test.ours", image_size=16, num_classes=2, naming="timm", license="none", source="here", crop_pct=0.8
    )
    monkeypatch.setitem(family.pretrained, cfg.tag, cfg)
    root = tmp_path / "images"
    for number in range(11):
        place = root / "val" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (21, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number:02}.png")
    return cfg, module, variables, weights, root


def test_published_weights_with_their_preprocessing(published, capsys):
    cfg, module, variables, weights, root = published
    words = ("--model", cfg.tag, "--weights", weights, "--data", "folder", "--path", root, "--split", "val")
    found = result_of(capsys, *words, "--batch-size", 8)
    dataset = sources.open_source("folder", split="val", path=root)
    pixels = [Image.open(root / "val" / f"class{n % 2}" / f"{n:02}.png") for n in range(11)]
    # The shorter side to 16 / 0.8 = 20 pixels, bicubic, then the centre.
    sized = [image.resize((int(20 * 30 / 21), 20), Image.Resampling.BICUBIC) for image in pixels]
    crops = [image.crop((left := round((image.width - 16) / 2), 2, left + 16, 18)) for image in sized]
    images = (np.stack([np.asarray(crop) for crop in crops]) / 255 - cfg.mean) / cfg.std
    logits = np.asarray(jax.jit(module.apply)(variables, jnp.asarray(images, jnp.float32)), np.float64)
    labels = np.arange(11) % 2
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(11), labels]
    assert found["examples"] == len(dataset) == 11
    assert found["val_accuracy"] == (logits.argmax(-1) == labels).mean()
    assert found["val_loss"] == pytest.approx(losses.mean(), rel=1e-5)


def test_errors_of_weights(published, tmp_path, capsys):
    cfg, _, _, weights, root = published

    def error(*words):
        assert evaluate.main([str(word) for word in words]) == 2
        out, err = capsys.readouterr()
        assert out == "" and "Traceback" not in err
        return err

    data = ("--data", "folder", "--path", root, "--split", "val")
    assert "did you mean 'davit_nano'" in error("--model", "davit_nanno", *data)
    assert "davit_tiny.msft_in1k" in error("--model", "davit_tiny.msft_in2k", *data)
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(weights.read_bytes()[:-100])
    assert "truncated.safetensors" in error("--model", cfg.tag, "--weights", truncated, *data)
    assert "no-such-file" in error("--model", cfg.tag, "--weights", tmp_path / "no-such-file", *data)
    message = error("--model", cfg.tag, "--weights", weights, "--data", "digits", "--split", "test")
    assert re.search("2 classes, digits test has 10", message)
    message = error("--model", cfg.tag, "--weights", weights, *data, "--batch-size", "12")
    assert re.search("batch size = 12 does not divide over 8 devices .* 8 or 16", message)
    assert "unknown split 'train'" in error("--model", cfg.tag, "--weights", weights, *data[:-1], "train")


def test_errors_of_runs(finished, tmp_path, capsys):
    workdir, _ = finished

    def error(*words):
        assert evaluate.main([str(word) for word in words]) == 2
        return capsys.readouterr().err

    assert re.search(r"no checkpoint of step 4 .*\[3, 6, 9, 12\]", error("--workdir", workdir, "--step", 4))
    assert "no checkpoints in" in error("--workdir", tmp_path / "nothing")
    (tmp_path / "images" / "val" / "one").mkdir(parents=True)
    (tmp_path / "images" / "val" / "two").mkdir(parents=True)
    for name in ("one", "two"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "images" / "val" / name / "a.png")
    words = ("--data", "folder", "--path", tmp_path / "images", "--split", "val", "--batch-size", 8)
    assert "differ in size; give --image-size" in error("--workdir", workdir, *words)
    assert "for the 2 classes of" in error("--workdir", workdir, *words, "--image-size", 8)


def test_arguments_that_do_not_go_together(capsys):
    for words, message in (
        (["--model", "x", "--data", "digits"], "needs --data and --split"),
        (["--workdir", "x", "--weights", "y"], "--weights does not go with --workdir"),
        (["--model", "x", "--step", "3", "--data", "digits", "--split", "test"], "--step does not go with --model"),
        (["--workdir", "x", "--model", "y"], "not allowed with"),
    ):
        with pytest.raises(SystemExit) as end:
            evaluate.main(words)
        assert end.value.code == 2 and message in capsys.readouterr().err
