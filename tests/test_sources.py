"""Where examples come from: the digits, folders, TFDS data sets, and the images in them."""

import dataclasses
import io
import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

from tests import data_transforms
from tests.datasets import COLOURS, PATCHES, TFDS_DIR, TFRECORD, patches
from train import data, sources
from zoo.preprocess import decode


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **({"format": "PNG"} | options))
    return buffer.getvalue()


GRADIENT = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3) * 2


@pytest.mark.parametrize("form", [GRADIENT, encoded(Image.fromarray(GRADIENT))])
def test_decode_colour(form):
    np.testing.assert_array_equal(decode(form, channels=3, name="x"), GRADIENT)
    luma = decode(form, channels=1, name="x")
    assert luma.shape == (6, 5, 1) and luma.dtype == np.uint8
    np.testing.assert_allclose(luma[..., 0], GRADIENT @ [0.299, 0.587, 0.114], atol=1)


@pytest.mark.parametrize(
    "form",
    [GRADIENT[..., 0], GRADIENT[..., :1], encoded(Image.fromarray(GRADIENT[..., 0]))],
    ids=["2d", "3d", "png"],
)
def test_decode_grey(form):
    np.testing.assert_array_equal(decode(form, channels=1, name="x"), GRADIENT[..., :1])
    np.testing.assert_array_equal(decode(form, channels=3, name="x"), GRADIENT[..., [0, 0, 0]])


def test_decode_drops_alpha_and_resolves_palettes():
    with_alpha = np.concatenate([GRADIENT, np.full((6, 5, 1), 7, np.uint8)], axis=2)
    for form in (with_alpha, encoded(Image.fromarray(with_alpha))):
        np.testing.assert_array_equal(decode(form, channels=3, name="x"), GRADIENT)
    palette = Image.fromarray(GRADIENT).quantize(16)
    colours = np.asarray(palette.convert("RGB"))
    for options in ({}, {"transparency": bytes(range(16))}):
        np.testing.assert_array_equal(decode(encoded(palette, **options), channels=3, name="x"), colours)


@pytest.mark.parametrize(
    "form, words",
    [
        (b"not an image", r"picture 3 cannot be decoded \(12 bytes\): no format that PIL knows"),
        (b"", "picture 3 cannot be decoded"),
        (encoded(Image.fromarray(GRADIENT))[:-30], "picture 3 cannot be decoded.*truncated"),
        (encoded(Image.fromarray(GRADIENT), format="JPEG")[:-40], "picture 3 cannot be decoded"),
        (
            encoded(Image.fromarray(GRADIENT[..., 0].astype(np.uint16) * 200)),
            "picture 3 has more than 8 bits",
        ),
        (GRADIENT.astype(np.float32), "picture 3 has shape .* and dtype float32"),
        (GRADIENT[..., :2], r"picture 3 has shape \(6, 5, 2\)"),
        (GRADIENT[0, :, 0], r"picture 3 has shape \(5,\)"),
    ],
)
def test_decode_errors(form, words):
    with pytest.raises(ValueError, match=words):
        decode(form, channels=3, name="picture 3")


@pytest.fixture(scope="module")
def sklearn_digits():
    from sklearn.datasets import load_digits

    return load_digits()


def test_digits_split_is_that_of_sklearn(sklearn_digits):
    from sklearn.model_selection import train_test_split

    split = dict(test_size=360, random_state=0, stratify=sklearn_digits.target)
    levels_of = dict(zip(("train", "test"), train_test_split(sklearn_digits.images, **split)))
    labels_of = dict(zip(("train", "test"), train_test_split(sklearn_digits.target, **split)))
    for name, size in (("train", 1437), ("test", 360)):
        dataset = sources.open_source("digits", split=name)
        assert len(dataset) == size == len(levels_of[name])
        expected = sorted(
            (label, level.astype(int).tobytes()) for label, level in zip(labels_of[name], levels_of[name])
        )
        got = sorted(
            (label, np.rint(image[..., 0] * (16 / 255)).astype(int).tobytes())
            for label, image in zip(dataset.source.labels, dataset.source.images)
        )
        assert got == expected


def test_digits_natural_split(sklearn_digits):
    first, last = (sources.open_source("digits", split=name) for name in ("first1437", "last360"))
    images = np.concatenate([first.source.images, last.source.images])
    assert len(first) == 1437 and len(last) == 360
    np.testing.assert_array_equal(np.rint(images[..., 0] * (16 / 255)), sklearn_digits.images)
    np.testing.assert_array_equal(last.source.labels, sklearn_digits.target[-360:])
    assert images.min() == 0 and images.max() == 255 and images.dtype == np.uint8
    assert first.image_shape == (8, 8, 1) and first.num_classes == 10 and first.channels == 1


def test_digits_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        sources.open_source("digits", split="test").source[0]["image"][0] = 1


def test_digits_fingerprints():
    names = ("train", "test", "first1437", "last360")
    prints = {sources.open_source("digits", split=name).fingerprint for name in names}
    assert len(prints) == 4
    assert prints == {sources.open_source("digits", split=name).fingerprint for name in names}


@pytest.mark.parametrize(
    "name, options, words",
    [
        (
            "digits",
            {"split": "valid"},
            "unknown split 'valid' of 'digits', which has train, test, first1437, last360",
        ),
        ("digits", {"split": "test", "path": "/x"}, "'/x' was given, but 'digits' is built in"),
        ("digit", {"split": "test"}, "unknown data set 'digit'; did you mean 'digits'"),
        (
            "imagenet",
            {"split": "test"},
            "unknown data set 'imagenet'; known: digits, folder, tfds, tfds:NAME",
        ),
        ("tfds:", {"split": "test"}, "unknown data set 'tfds:'"),
        ("tfds", {"split": "test"}, "data set 'tfds' needs a path: the version directory"),
        ("folder", {"split": "test"}, "data set 'folder' needs a path: the directory that holds"),
    ],
)
def test_names_and_splits(name, options, words):
    with pytest.raises(ValueError, match=words):
        sources.open_source(name, **options)


@pytest.mark.parametrize("split, size", [("train", 24), ("test", 10), ("train[:75%]", 18), ("train+test", 34)])
@pytest.mark.parametrize("by_name", [False, True])
def test_tfds(split, size, by_name):
    name, path = ("tfds:colour_patches:1.0.0", TFDS_DIR) if by_name else ("tfds", PATCHES)
    dataset = sources.open_source(name, split=split, path=path)
    assert len(dataset) == size
    assert dataset.label_names == COLOURS and dataset.num_classes == 3
    assert dataset.image_shape is None and dataset.channels == 3
    stripes = []
    for index in range(size):
        example = dataset.source[index]
        assert isinstance(example["image"], bytes)
        image = decode(example["image"], channels=3, name="x")
        assert image.shape == (40, 32, 3)
        assert image.mean(axis=(0, 1)).argmax() == example["label"]
        stripes.append((example["label"], image.sum(axis=(1, 2), dtype=int).argmin() // 2))
    keys = {(key % 3, key % 20) for key in range(24)}
    assert set(stripes) <= keys
    if split == "train":
        assert set(stripes) == keys


def test_tfds_fingerprints():
    prints = [patches(split).fingerprint for split in ("train", "test", "train[:50%]")]
    assert len(set(prints)) == 3
    by_name = sources.open_source("tfds:colour_patches", split="train", path=TFDS_DIR)
    assert by_name.fingerprint == prints[0]


def copied(tmp_path, directory, edit=None):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if edit:
        features = tmp_path / "features.json"
        content = json.loads(features.read_text())
        edit(content["featuresDict"]["features"])
        features.write_text(json.dumps(content))
    return tmp_path


def _no_label(features):
    features["caption"] = features.pop("label")


def _no_image(features):
    del features["image"]


def _label_is_text(features):
    features["label"] = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}


def _deep_image(features):
    features["image"]["image"] |= {"dtype": "uint16", "encodingFormat": "png"}


@pytest.mark.parametrize(
    "edit, words",
    [
        (_no_label, r"has no feature 'label'.* it has 'caption' \(ClassLabel\), 'image' \(Image\)"),
        (_no_image, r"has no feature 'image'.* it has 'label' \(ClassLabel\)"),
        (_label_is_text, "feature 'label' of .* is no ClassLabel .*'label' \\(Text\\)"),
        (_deep_image, "feature 'image' of .* dtype uint16; uint8"),
    ],
)
def test_tfds_features_that_do_not_do(tmp_path, edit, words):
    path = copied(tmp_path, PATCHES, edit)
    with pytest.raises(ValueError, match=words):
        sources.open_source("tfds", split="train", path=path)


@pytest.mark.parametrize(
    "split, words",
    [
        ("valid", "unknown split 'valid' of the TFDS data set colour_patches/1.0.0, which has train, test"),
        ("train[:50", "unknown split"),
        ("train[:0]", r"split 'train\[:0\]' of the .* has no example"),
    ],
)
def test_tfds_splits(split, words):
    with pytest.raises(ValueError, match=words):
        patches(split)


def test_tfrecord_files():
    with pytest.raises(NotImplementedError) as info:
        sources.open_source("tfds", split="train", path=TFRECORD)
    lines = str(info.value).splitlines()
    assert "colour_patches_tfrecord/1.0.0 is stored as tfrecord" in lines[0]
    assert lines[1:] == [
        "  pip install tensorflow tensorflow-datasets array_record apache-beam mlcroissant",
        f"  tfds convert_format --dataset_version_dir={TFRECORD} --out_file_format=array_record --num_workers=1",
    ]


def test_converted_tfrecord_files(tmp_path):
    # What the command above leaves: the same directory with ArrayRecord files and a note of the second format.
    path = copied(tmp_path, TFRECORD)
    info = json.loads((path / "dataset_info.json").read_text())
    info["alternativeFileFormats"] = ["array_record"]
    (path / "dataset_info.json").write_text(json.dumps(info))
    for split in ("train", "test"):
        written = PATCHES / f"colour_patches-{split}.array_record-00000-of-00001"
        name = f"colour_patches_tfrecord-{split}.array_record-00000-of-00001"
        (path / name).write_bytes(written.read_bytes())
    dataset = sources.open_source("tfds", split="train", path=path)
    assert len(dataset) == 3
    assert decode(dataset.source[2]["image"], channels=3, name="x").shape == (40, 32, 3)


def test_tfds_data_set_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError) as info:
        sources.open_source("tfds:mnist:3.0.1", split="train", path=tmp_path)
    text = str(info.value)
    assert f"'mnist:3.0.1' is not prepared in '{tmp_path}', and nothing is downloaded unasked" in text
    assert "pip install tensorflow tensorflow-datasets array_record importlib_resources\n" in text
    assert f'tfds.builder("mnist:3.0.1", data_dir="{tmp_path}", file_format="array_record")' in text
    assert list(tmp_path.iterdir()) == []


def test_tfds_directory_of_another_level(tmp_path):
    for path in (PATCHES.parent, TFDS_DIR):
        with pytest.raises(FileNotFoundError, match="no dataset_info.json; did you mean '.*/1.0.0'"):
            sources.open_source("tfds", split="train", path=path)
    with pytest.raises(FileNotFoundError, match="nor has any directory in it"):
        sources.open_source("tfds", split="train", path=tmp_path)


def test_tfds_broken_image_is_named():
    dataset = patches()
    records = [dataset.source.records[i].replace(b"\xff\xd8", b"\x00\x00") for i in range(24)]
    dataset = dataclasses.replace(dataset, source=dataclasses.replace(dataset.source, records=records))
    batches = data.eval_iterator(dataset, batch_size=2, transform=data_transforms.plain)
    with pytest.raises(ValueError, match="example 0 of the TFDS data set colour_patches/1.0.0 train cannot be decoded"):
        next(batches)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pets"
    for split, number in (("train", 3), ("test", 1)):
        for label, name in enumerate(("cat", "dog", "eel")):
            directory = root / split / name
            directory.mkdir(parents=True)
            for i in range(number):
                image = Image.fromarray(np.full((6, 8, 3), 40 * label + 5 * i, np.uint8))
                image.save(directory / f"{i}{('.png', '.WEBP', '.bmp')[i]}", **({"lossless": True} if i == 1 else {}))
    Image.fromarray(np.full((6, 8), 200, np.uint8)).save(root / "train" / "dog" / "grey.JPEG", quality=95)
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / "cat" / ".hidden.png").write_text("no image")
    (root / "README").write_text("no split")
    return root


def open_folder(root, split="train"):
    return sources.open_source("folder", split=split, path=str(root))


def test_folder(folder):
    dataset = open_folder(folder)
    assert len(dataset) == 10 and len(open_folder(folder, "test")) == 3
    assert dataset.label_names == ("cat", "dog", "eel") and dataset.num_classes == 3
    assert [example["label"] for example in map(dataset.source.__getitem__, range(10))] == [0] * 3 + [1] * 4 + [2] * 3
    with data.eval_iterator(dataset, batch_size=10, transform=data_transforms.plain) as batches:
        images = next(batches)["image"]
    assert images.shape == (10, 6, 8, 3)
    expected = [0, 5, 10, 40, 45, 50, 200, 80, 85, 90]
    np.testing.assert_array_equal(images[:, 2, 2], np.repeat(np.array(expected, np.uint8)[:, None], 3, axis=1))


def test_folder_on_any_path_class(folder, monkeypatch):
    assert open_folder(folder).fingerprint == open_folder(epath.Path(folder)).fingerprint
    monkeypatch.setenv("HOME", str(folder.parent))
    assert open_folder("~/pets").fingerprint == open_folder(folder).fingerprint


def test_folder_fingerprints(folder):
    original = open_folder(folder).fingerprint
    assert open_folder(folder, "test").fingerprint != original
    moved = folder.rename(folder.parent / "animals")
    assert open_folder(moved).fingerprint == original
    image = moved / "train" / "cat" / "0.png"
    image.write_bytes(image.read_bytes() + b"\0")
    changed = open_folder(moved).fingerprint
    image.rename(image.with_name("00.png"))
    assert len({original, changed, open_folder(moved).fingerprint}) == 3


def test_folder_with_a_broken_image(folder):
    (folder / "train" / "eel" / "0.png").write_bytes(b"broken")
    batches = data.eval_iterator(open_folder(folder), batch_size=10, transform=data_transforms.plain)
    with pytest.raises(ValueError, match=r"example 7 of the folder .*/train \(.*/eel/0.png\) cannot be decoded"):
        next(batches)


def test_folder_errors(folder):
    with pytest.raises(FileNotFoundError, match="'/no/where' is not a directory; the layout should be split/"):
        open_folder("/no/where")
    with pytest.raises(ValueError, match="unknown split 'valid' of the folder .*, which has test, train; the layout"):
        open_folder(folder, "valid")
    with pytest.raises(ValueError, match="unknown split 'train' of the folder .*, which has none; the layout"):
        open_folder(folder / "test" / "cat")
    with pytest.raises(ValueError, match="'.*/test/cat' has no class directory; the layout"):
        open_folder(folder / "test", "cat")
    (folder / "test" / "eel").rename(folder / "test" / "fox")
    for split in ("train", "test"):
        with pytest.raises(ValueError, match="different classes") as info:
            open_folder(folder, split)
        assert "only in 'train': eel" in str(info.value) and "only in 'test': fox" in str(info.value)
    for file in (folder / "test").rglob("*.png"):
        file.unlink()
    (folder / "test" / "fox").rename(folder / "test" / "eel")
    with pytest.raises(ValueError, match="no image in any class directory of '.*/test': looked for .jpg"):
        open_folder(folder, "test")
