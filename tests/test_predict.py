"""Predictions equal to those by hand, with the preprocessing that belongs to the weights; the command."""

import argparse
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import zoo
from tests import runs
from train import config as config_lib
from zoo import pictures
from zoo.commands import predict as command
from zoo.formats.orbax_writer import write_checkpoint
from zoo.prediction import Preprocessing, best_guesses, load_classifier, predict, read_image, run_model
from zoo.watch import DenseMap, LinearMap, RoutedMap, WindowMap, attention_maps

TINY = dict(depths=(1,), dims=(8,), num_heads=(2,))
CLASSES = 7


def random_variables(model, shape):
    """Variables of a model without compiling its initialisation."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A tag whose preprocessing is unlike any default, with a file of weights."""
    family = zoo.registry.family_of("davit_nano")
    with pytest.MonkeyPatch.context() as patch:
        fields = {**TINY, "stem_kernel": 3, "stem_strides": 1, "num_classes": CLASSES}
        patch.setitem(family.variants, "davit_test", fields)
        patch.setitem(zoo.registry._FAMILY_OF, "davit_test", family)
        cfg = zoo.registry.PretrainedCfg(
            tag="davit_test.ours",
            image_size=16,
            num_classes=CLASSES,
            naming="timm",
            license="none",
            source="here",
            crop_pct=0.8,
            mean=(0.1, 0.2, 0.3),
            std=(0.5, 0.6, 0.7),
        )
        patch.setitem(family.pretrained, cfg.tag, cfg)
        model = zoo.create_model("davit_test")
        variables = random_variables(model, (1, 16, 16, 3))
        path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
        zoo.save_pretrained(model, variables, path)
        yield cfg, model, variables, path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures that a model takes, and files that are none, by what they are."""
    root = tmp_path_factory.mktemp("photos")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 21, 30, 4), dtype=np.uint8)
    files = {
        "colour": (pixels[0, ..., :3], "RGB"),
        "grey": (pixels[1, ..., 0], "L"),
        "alpha": (pixels[2], "RGBA"),
        "sixteen": (pixels[3, ..., 0].astype(np.uint16) * 257, "I;16"),
    }
    paths = {name: root / f"{name}.png" for name in files}
    for name, (array, mode) in files.items():
        image = Image.fromarray(array)
        assert image.mode == mode
        image.save(paths[name])
    for name, content in (("empty", b""), ("text", b"no picture"), ("cut", paths["colour"].read_bytes()[:300])):
        paths[name] = root / f"{name}.png"
        paths[name].write_bytes(content)
    paths |= {"missing": root / "missing.png", "directory": root}
    return paths


@functools.partial(jax.jit, static_argnums=0)
def forward(model, variables, images):
    return model.apply(variables, images)


def by_hand(weights, path, size=16):
    """Probabilities of a picture, its shorter side resized to size / 0.8 first."""
    cfg, model, variables, _ = weights
    image = Image.open(path).convert("RGB")
    side = int(size / 0.8)
    image = image.resize((int(side * 30 / 21), side), Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((side - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float64)
    x = jnp.asarray((pixels / 255 - cfg.mean) / cfg.std, jnp.float32)[None]
    logits = np.asarray(forward(model, variables, x), np.float64)[0]
    return np.exp(logits) / np.exp(logits).sum()


def size_of(path):
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        return image.size


def run_command(*words):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


def test_predictions_by_hand(weights, photos):
    cfg, model, variables, _ = weights
    images = [photos["colour"], np.asarray(Image.open(photos["grey"])), str(photos["alpha"])]
    labels = [f"name {number}" for number in range(CLASSES)]
    found = predict(model, variables, images, cfg, top=3, labels=labels)
    assert len(found) == 3
    for one, name in zip(found, ("colour", "grey", "alpha")):
        expected = by_hand(weights, photos[name])
        order = np.argsort(-expected)[:3]
        assert one.classes == tuple(order) and one.labels == tuple(labels[number] for number in order)
        np.testing.assert_allclose(one.probabilities, expected[order], rtol=1e-4)


def test_batches_do_not_show(weights):
    _, model, variables, _ = weights
    images = np.random.default_rng(1).normal(size=(5, 16, 16, 3)).astype(np.float32)
    whole, nothing = run_model(model, variables, images, batch=5)
    parts, maps = run_model(model, variables, images, batch=2, watch=True)
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-6)
    assert nothing == {} and all(len(found.weights) == 5 for found in maps.values())
    assert [path.split("/")[1] for path in maps] == ["spatial", "channel"]


def test_best_guesses():
    logits = np.log(np.array([[0.1, 0.3, 0.3, 0.2, 0.1]], np.float32)) + 500
    (found,) = best_guesses(logits, top=4, labels=list("abcde"))
    assert found.classes == (1, 2, 3, 0) and found.labels == ("b", "c", "d", "a")
    np.testing.assert_allclose(found.probabilities, (0.3, 0.3, 0.2, 0.1), rtol=1e-4)
    assert best_guesses(logits, top=9)[0].classes == (1, 2, 3, 0, 4)
    with pytest.raises(ValueError, match="all 5 classes of the model, got 2 names"):
        best_guesses(logits, labels=["a", "b"])
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        best_guesses(logits, top=0)


def test_what_is_no_picture(photos):
    for name, message in (
        ("missing", "cannot be read: No such file"),
        ("directory", "is a directory"),
        ("empty", "is empty: 0 bytes"),
        ("text", "no format that PIL knows"),
        ("cut", "cannot be decoded"),
        ("sixteen", "more than 8 bits a channel"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            read_image(photos[name], 3)
        assert str(photos[name]) in str(error.value)


def test_the_others_are_classified_all_the_same(weights, photos, capsys):
    cfg, _, _, path = weights
    names = ("colour", "sixteen", "missing", "grey", "empty", "alpha", "directory", "text")
    assert run_command(cfg.tag, path, *(photos[name] for name in names), "--json", "--top", 2) == 1
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["image"] for line in lines] == [str(photos[name]) for name in names]
    good = {"colour", "grey", "alpha"}
    for name, line in zip(names, lines):
        assert ("predictions" in line, "error" in line) == (name in good, name not in good)
        if name in good:
            expected = by_hand(weights, photos[name])
            order = np.argsort(-expected)[:2]
            assert [guess["class"] for guess in line["predictions"]] == list(order)
            assert [guess["label"] for guess in line["predictions"]] == [None, None]
            shares = [guess["probability"] for guess in line["predictions"]]
            np.testing.assert_allclose(shares, expected[order], rtol=1e-4)
        else:
            assert line["error"] in err
    assert err.count("error: ") == 5 and "as published with davit_test.ours" in err


def test_lines_for_a_person_with_labels(weights, photos, tmp_path, capsys):
    _, _, _, path = weights
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"schön {number}\n" for number in range(CLASSES)), encoding="utf-8")
    # A bare name has the preprocessing of its only tag.
    assert run_command("davit_test", path, photos["colour"], "--labels", labels) == 0
    expected = by_hand(weights, photos["colour"])
    best = int(expected.argmax())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(photos["colour"]) and len(lines) == 6
    assert lines[1].split() == [f"{100 * expected[best]:.2f}", "%", str(best), "schön", str(best)]
    labels.write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="has 2 lines; 7 classes want one each"):
        run_command("davit_test", path, photos["colour"], "--labels", labels)
    labels.write_bytes(b"one\xff")
    with pytest.raises(ValueError, match=r"--labels .*labels.txt: no text in UTF-8, byte 3"):
        run_command("davit_test", path, photos["colour"], "--labels", labels)


def test_another_size(weights, photos, capsys):
    """Sizes are (height, width), for the preprocessing and the model."""
    cfg, model, variables, path = weights
    found = load_classifier(cfg.tag, path, image_size=(12, 20))
    assert found.model.image_size == (12, 20) and found.preprocessing.transform.size == (12, 20)
    assert found.preprocessing.transform.crop_pct == 0.8 and found.preprocessing.std == cfg.std
    assert run_command(cfg.tag, path, photos["colour"], "--image-size", "12x20") == 0
    assert "12x20 pixels" in capsys.readouterr().err


def test_weights_of_no_tag(tmp_path):
    """ImageNet's values at the model's size, and one half for the digits."""
    for channels, mean, crop in ((3, zoo.registry.IMAGENET_MEAN, 0.875), (1, (0.5,), 1.0)):
        model = zoo.create_model("davit_nano", in_chans=channels, **TINY)
        path = tmp_path / f"{channels}.safetensors"
        zoo.save_pretrained(model, random_variables(model, (1, 8, 8, channels)), path)
        found = load_classifier("davit_nano", path, **TINY)
        assert found.model.in_chans == found.preprocessing.channels == channels
        transform = found.preprocessing.transform
        assert (transform.size, transform.mean, transform.crop_pct) == ((8, 8), mean, crop)
        assert found.labels == tuple("0123456789")
        assert "davit_nano has no published weights" in str(found.preprocessing)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """What a run on the digits leaves, with random weights."""
    overrides = runs.overrides(data__mean="(0.3,)", data__std="(0.2,)", data__crop_pct=0.8)
    config = config_lib.load(runs.CONFIG, overrides)
    model = zoo.create_model("davit_nano", in_chans=1, **config.model.overrides)
    variables = random_variables(model, (1, 8, 8, 1))
    directory = tmp_path_factory.mktemp("run")
    write_checkpoint(directory / "checkpoints", variables, config_lib.plain(config))
    return directory, model, variables


def test_a_run_of_the_train_loop(workdir, photos, capsys):
    directory, model, variables = workdir
    outputs = []
    for place in (directory, directory / "checkpoints", directory / "checkpoints" / "0"):
        assert run_command("davit_nano", place, photos["grey"], "--json") == 0
        out, err = capsys.readouterr()
        outputs.append(json.loads(out))
        assert "8x8 pixels, center crop 0.8, bicubic, mean 0.3, std 0.2: as the run was evaluated" in err
    assert outputs[0] == outputs[1] == outputs[2]
    side = Image.open(photos["grey"]).resize((14, 10), Image.Resampling.BICUBIC).crop((3, 1, 11, 9))
    x = jnp.asarray((np.asarray(side, np.float64) / 255 - 0.3) / 0.2, jnp.float32)[None, ..., None]
    logits = np.asarray(forward(model, variables, x), np.float64)[0]
    first = outputs[0]["predictions"][0]
    assert first["class"] == logits.argmax() and first["label"] == str(logits.argmax())
    assert first["probability"] == pytest.approx(1 / np.exp(logits - logits.max()).sum(), rel=1e-4)


def test_a_run_of_another_model(workdir, tmp_path):
    with pytest.raises(ValueError, match="holds weights of davit_nano, not of davit_tiny"):
        load_classifier("davit_tiny", workdir[0])
    write_checkpoint(tmp_path / "converted", workdir[2], {"model": {"name": "davit_nano"}})
    found = load_classifier("davit_nano", tmp_path / "converted", **TINY)
    assert found.preprocessing.transform.mean == (0.5,)


def test_the_command_imports_no_other_framework(workdir, photos, tmp_path):
    code = (
        "import argparse, sys; from zoo.commands import predict as command; parser = argparse.ArgumentParser();"
        "command.add_arguments(parser); code = command.run(parser.parse_args(sys.argv[1:]));"
        "heavy = {'train', 'torch', 'tensorflow', 'matplotlib', 'sklearn'} & set(sys.modules);"
        "sys.exit(f'{code}, {heavy}' if code or heavy else 0)"
    )
    words = ["davit_nano", workdir[0], photos["grey"], "--attention", tmp_path / "page.png"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(photos["grey"]))
    assert size_of(tmp_path / "page.png")[0] == pictures.WIDTH


def test_attention_of_those_that_could_be_read(weights, photos, tmp_path, capsys):
    cfg, _, _, path = weights
    words = (cfg.tag, path, photos["colour"], photos["empty"], photos["grey"])
    assert run_command(*words, "--attention", tmp_path / "two.png", "--token", ".2,1") == 1
    assert run_command(*words[:3], "--attention", tmp_path / "one.png") == 0
    one, two = (size_of(tmp_path / f"{name}.png") for name in ("one", "two"))
    assert one[0] == two[0] == 1600 and 1.4 * one[1] < two[1] < 2 * one[1]
    assert "attention drawn into" in capsys.readouterr().err
    assert run_command(cfg.tag, path, photos["empty"], "--attention", tmp_path / "none.png") == 1
    assert not (tmp_path / "none.png").exists()


def test_arguments_that_are_wrong(weights, photos, tmp_path, capsys):
    cfg, _, _, path = weights
    words = (cfg.tag, path, photos["colour"])
    for more, message in (
        (("--attention", tmp_path / "page.jpg"), "must end with .png"),
        (("--attention", tmp_path / "no" / "page.png"), "there is no directory"),
        (("--token", "0,0"), "needs --attention"),
    ):
        with pytest.raises(ValueError, match=message):
            run_command(*words, *more)
    for more, message in (
        (("--token", "1.1,0"), "no ROW,COLUMN"),
        (("--token", "5"), "no ROW,COLUMN"),
        (("--top", "0"), "at least 1"),
        (("--image-size", "big"), "no size"),
    ):
        with pytest.raises(SystemExit):
            run_command(*words, *more)
        assert message in capsys.readouterr().err


def test_a_model_without_a_classifier(photos, tmp_path, capsys):
    fields = {**TINY, "num_classes": 0}
    model = zoo.create_model("davit_nano", **fields)
    config = {"model": {"name": "davit_nano", "overrides": json.loads(json.dumps(fields))}}
    write_checkpoint(tmp_path / "steps", random_variables(model, (1, 8, 8, 3)), config)
    with pytest.raises(ValueError, match="has no classifier"):
        run_command("davit_nano", tmp_path / "steps", photos["colour"])
    assert run_command("davit_nano", tmp_path / "steps", photos["colour"], "--attention", tmp_path / "page.png") == 0
    assert capsys.readouterr().out.strip() == str(photos["colour"])


@pytest.mark.parametrize(
    "name, fields, kinds",
    [
        ("maxvit_nano", dict(depths=(1, 1)), [WindowMap] * 4),
        ("biformer_nano", {}, [RoutedMap, DenseMap]),
        ("care_nano", dict(depths=(1, 1)), [LinearMap]),
    ],
)
def test_maps_of_every_family(name, fields, kinds):
    """Every token's attention sums to 1, and a page can be drawn."""
    model = zoo.create_model(name, in_chans=1, **fields)
    variables = random_variables(model, (1, 8, 8, 1))
    variables = {**variables, "batch_stats": jax.tree.map(np.abs, variables.get("batch_stats", {}))}
    x = np.random.default_rng(0).normal(size=(1, 8, 8, 1)).astype(np.float32)
    maps = jax.device_get(attention_maps(model, variables, jnp.asarray(x)))
    assert [type(found) for found in maps.values()] == kinds
    for found in maps.values():
        heat = np.stack([found.heat(token) for token in np.ndindex(found.shape)])
        np.testing.assert_allclose(heat.sum((-2, -1)), 1, rtol=1e-4)
        np.testing.assert_allclose(found.received(), heat.mean(0), rtol=1e-4, atol=1e-7)
    subject = pictures.Subject(np.zeros((8, 8, 1), np.uint8), "digit", [("a name " * 20, 0.5), ("ж", 0.0)])
    page = pictures.attention_page([subject], maps, title=name)
    assert page.width == 1600 and 500 < page.height < 1500


def test_preprocessing_normalises():
    cfg = zoo.registry.PretrainedCfg("a.b", 4, 2, "timm", "none", "here", mean=(0.5,), std=(0.25,), in_chans=1)
    found = Preprocessing.of(cfg)
    values = found.normalized(np.array([[[[0], [255]]]], np.uint8))
    assert values.dtype == np.float32 and values.tolist() == [[[[-2.0], [2.0]]]]
