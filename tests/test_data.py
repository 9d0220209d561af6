"""The data layer: order, resumption, sources, decoding, errors."""

import concurrent.futures
import dataclasses
import functools
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from etils import epath
from PIL import Image

from tests import data_transforms
from train import data, sources

TFDS_DIR = pathlib.Path(__file__).parent / "data" / "tfds"
PATCHES = TFDS_DIR / "colour_patches" / "1.0.0"
TFRECORD = TFDS_DIR / "colour_patches_tfrecord" / "1.0.0"
COLOURS = ("red", "green", "blue")
# (index, epoch) of the examples 0, 1, 2, 1436, 1437 and 143700 of 1437 with seed 0.
PINNED_ORDER = [(864, 0), (1111, 0), (303, 0), (797, 0), (234, 1), (1435, 100)]


def array_dataset(size, shape=(4, 4, 1)):
    images = np.arange(size, dtype=np.uint8).reshape(size, 1, 1, 1) * np.ones(shape, np.uint8)
    return sources.Dataset(
        name="numbers",
        source=sources.ArraySource(images, np.arange(size) % 5),
        fingerprint=f"numbers:{size}",
        num_classes=5,
        label_names=tuple("abcde"),
        image_shape=shape,
        channels=1,
    )


@functools.cache
def patches(split="train"):
    return sources.open_source("tfds", split=split, path=PATCHES)


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, reference in zip(batches, expected):
        assert batch.keys() == reference.keys()
        for key, value in reference.items():
            assert batch[key].dtype == value.dtype
            np.testing.assert_array_equal(batch[key], value)


def global_batches(dataset, count, *, processes, **options):
    """The first `count` global batches, put together from the slices of all processes."""
    slices = [
        data.train_iterator(dataset, process_index=p, process_count=processes, **options)
        for p in range(processes)
    ]

    def take(batches):
        with batches:
            return [next(batches) for _ in range(count)]

    # In parallel, as the processes of a run are.
    with concurrent.futures.ThreadPoolExecutor(processes) as executor:
        of_processes = list(executor.map(take, slices))
    return [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*of_processes)
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 97, 360, 1437])
@pytest.mark.parametrize("seed", [0, 12345678901])
def test_each_epoch_visits_each_example_once(size, seed):
    epochs = [
        [data.shuffled(epoch * size + i, size=size, seed=seed) for i in range(size)] for epoch in range(3)
    ]
    for number, epoch in enumerate(epochs):
        indices, counts = zip(*epoch)
        assert sorted(indices) == list(range(size))
        assert set(counts) == {number}
    if size > 7:
        assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_depends_on_the_seed():
    orders = {tuple(data.shuffled(i, size=97, seed=seed)[0] for i in range(97)) for seed in range(10)}
    assert len(orders) == 10


def test_the_order_looks_random():
    # Rank correlation of place and index: standard deviation 1 / sqrt(1437) = 0.026 for a random permutation.
    for epoch in range(5):
        order = [data.shuffled(epoch * 1437 + i, size=1437, seed=0)[0] for i in range(1437)]
        assert abs(np.corrcoef(order, np.arange(1437))[0, 1]) < 0.1


def test_the_order_stays_the_same_between_versions():
    # A run that goes on after an update of Grain or NumPy would otherwise see some examples twice.
    assert [data.shuffled(i, size=1437, seed=0) for i in (0, 1, 2, 1436, 1437, 143700)] == PINNED_ORDER


def test_batches_follow_the_order():
    dataset = array_dataset(11)
    with data.train_iterator(
        dataset, batch_size=4, seed=3, transform=data_transforms.draws, start=7
    ) as batches:
        for number in range(7, 7 + 4 * 20, 4):
            batch = next(batches)
            indices = [data.shuffled(i, size=11, seed=3)[0] for i in range(number, number + 4)]
            np.testing.assert_array_equal(batch["index"], indices)
            np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], indices)
            np.testing.assert_array_equal(batch["label"], np.asarray(indices) % 5)
            assert batch["index"].dtype == batch["label"].dtype == np.int32
            assert batch["image"].dtype == np.uint8


def test_augmentation_is_keyed_by_seed_example_and_epoch():
    dataset = array_dataset(30)

    def drawn(seed, batch_size, start):
        with data.train_iterator(
            dataset, batch_size=batch_size, seed=seed, transform=data_transforms.draws, start=start
        ) as batches:
            draws = {}
            for number in range(start, 60, batch_size):
                batch = next(batches)
                for row, (index, draw) in enumerate(zip(batch["index"].tolist(), batch["draw"].tolist())):
                    draws[index, (number + row) // 30] = draw
            return draws

    reference = drawn(0, 6, 0)
    assert len(set(reference.values())) == 60
    assert drawn(0, 15, 0) == reference
    assert drawn(0, 10, 30) == {key: draw for key, draw in reference.items() if key[1] == 1}
    assert not set(drawn(1, 6, 0).values()) & set(reference.values())


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("processes, resumed_with", [(1, 8), (2, 4), (4, 1), (8, 2)])
def test_order_with_threads_for_any_number_of_processes(processes, resumed_with, prefetch):
    options = dict(batch_size=16, seed=5, transform=data_transforms.cropped, prefetch=prefetch)
    expected = global_batches(patches(), 6, processes=1, **(options | {"prefetch": 0}))
    assert_same(global_batches(patches(), 6, processes=processes, **options), expected)
    resumed = global_batches(patches(), 3, processes=resumed_with, start=3 * 16, **options)
    assert_same(resumed, expected[3:])


def test_order_with_workers_for_any_number_of_processes():
    dataset = array_dataset(23, (40, 32, 1))
    options = dict(batch_size=16, seed=5, transform=data_transforms.cropped)
    expected = global_batches(dataset, 10, processes=1, **options)
    batches = []
    for processes, workers, count in ((8, 1, 2), (4, 1, 2), (2, 1, 2), (1, 2, 4)):
        batches += global_batches(
            dataset, count, processes=processes, workers=workers, start=16 * len(batches), **options
        )
    assert_same(batches, expected)


@pytest.mark.parametrize("size, batch_size", [(10, 4), (12, 4), (3, 8), (17, 16), (1, 8)])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_evaluation_covers_each_example_once(size, batch_size, processes):
    dataset = array_dataset(size)
    of_processes = []
    for p in range(processes):
        with data.eval_iterator(
            dataset,
            batch_size=batch_size,
            transform=data_transforms.plain,
            process_index=p,
            process_count=processes,
        ) as batches:
            of_processes.append(list(batches))
    assert {len(batches) for batches in of_processes} == {-(-size // batch_size)}
    whole = [
        {key: np.concatenate([b[key] for b in parts]) for key in parts[0]} for parts in zip(*of_processes)
    ]
    assert all(len(value) == batch_size for batch in whole for value in batch.values())
    every = {key: np.concatenate([batch[key] for batch in whole]) for key in whole[0]}
    np.testing.assert_array_equal(every["mask"], np.arange(len(whole) * batch_size) < size)
    np.testing.assert_array_equal(every["index"][every["mask"]], np.arange(size))
    np.testing.assert_array_equal(every["image"][every["mask"]], dataset.source.images)
    np.testing.assert_array_equal(every["label"][every["mask"]], dataset.source.labels)
    assert every["mask"].dtype == bool and every["label"].dtype == np.int32


def test_evaluation_with_workers():
    options = dict(batch_size=4, transform=data_transforms.plain)
    with data.eval_iterator(patches("test"), **options) as here:
        expected = list(here)
    with data.eval_iterator(patches("test"), workers=2, **options) as batches:
        assert_same(list(batches), expected)
    assert sum(batch["mask"].sum() for batch in expected) == 10


def test_what_follows_the_end():
    batches = data.eval_iterator(array_dataset(3), batch_size=4, transform=data_transforms.plain)
    next(batches)
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(batches)
    for _ in range(2):
        batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_background_surfaces(workers):
    batches = data.eval_iterator(
        array_dataset(12), batch_size=4, transform=data_transforms.fails_at_seven, workers=workers
    )
    assert next(batches)["index"].tolist() == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="no luck with seven"):
        next(batches)
    with pytest.raises(ValueError, match="closed, or an error ended them"):
        next(batches)


def test_a_worker_that_dies_is_noticed():
    with data.eval_iterator(
        array_dataset(4), batch_size=4, transform=data_transforms.dies, workers=1
    ) as batches:
        with pytest.raises(RuntimeError, match="exit code 3"):
            next(batches)


def test_closing_ends_the_threads():
    before = threading.active_count()
    batches = data.train_iterator(array_dataset(9), batch_size=3, seed=0, transform=data_transforms.draws)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    deadline = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


PROGRAM = """
import os, signal, socket, sys, time

def no_network(*args, **kwargs):
    raise AssertionError("the network was asked")

socket.socket.connect = socket.getaddrinfo = no_network

from tests import data_transforms
from train import data, sources

def main():
    dataset = sources.open_source("tfds:colour_patches", split="train", path=sys.argv[1])
    with data.train_iterator(dataset, batch_size=4, seed=0, transform=data_transforms.draws) as batches:
        next(batches)
    batches = data.train_iterator(
        dataset, batch_size=4, seed=0, transform=data_transforms.tells_of_backends, workers=1
    )
    batch = next(batches)
    print(batch["process"][0], flush=True)
    assert not batch["backends"].any()
    assert not data_transforms.tells_of_backends(None, None)["backends"]
    assert "tensorflow" not in sys.modules
    for name in ("SIGINT", "SIGTERM"):
        os.kill(batch["process"][0], getattr(signal, name))
    for _ in range(8):
        next(batches)
    print("ready", flush=True)
    if sys.argv[2] == "wait":
        time.sleep(60)

if __name__ == "__main__":
    main()
"""


def _start(tmp_path, end):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    root = pathlib.Path(__file__).parent.parent
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(script), str(TFDS_DIR), end],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root), "XLA_FLAGS": ""},
    )


def test_a_program_reads_without_tensorflow_network_or_jax_backends(tmp_path):
    process = _start(tmp_path, "leave")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.split()[1:] == ["ready"]
    # Batches that were not closed leave neither a worker nor a complaint behind.
    assert err == ""
    assert not _alive(int(out.split()[0]))


def test_workers_leave_when_their_program_is_killed(tmp_path):
    with _start(tmp_path, "wait") as process:
        worker = int(process.stdout.readline())
        assert process.stdout.readline() == "ready\n"
        assert _alive(worker)
        process.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 60
        while _alive(worker) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _alive(worker)


def _alive(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"batch_size": 6, "process_count": 4}, "batch_size=6 cannot be shared equally by 4 processes"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"process_index": 2, "process_count": 2}, "process_index=2 is not one of the process_count=2"),
        ({"workers": -1}, "workers=-1"),
        ({"workers": 1, "prefetch": 0}, "prefetch=0"),
        ({"seed": -1}, "seed=-1 is negative"),
        ({"start": -4}, "start=-4 is negative"),
        ({"channels": 2}, "channels=2"),
    ],
)
def test_arguments_out_of_range(options, words):
    options = {"batch_size": 4, "seed": 0, "transform": data_transforms.draws} | options
    with pytest.raises(ValueError, match=words):
        next(data.train_iterator(array_dataset(8), **options))


def test_no_examples():
    with pytest.raises(ValueError, match="the numbers has no example"):
        data.eval_iterator(array_dataset(0), batch_size=2, transform=data_transforms.plain)


def test_images_of_different_sizes_in_a_batch():
    dataset = array_dataset(8)
    ragged = [np.zeros((4 + i % 2, 4, 1), np.uint8) for i in range(8)]
    dataset = dataclasses.replace(dataset, source=[{"image": image, "label": 0} for image in ragged])
    batches = data.eval_iterator(dataset, batch_size=4, transform=data_transforms.plain)
    with pytest.raises(ValueError, match=r"'image' has the shapes \(4, 4, 1\), \(5, 4, 1\) within one batch"):
        next(batches)


def test_position():
    dataset = array_dataset(8)
    batches = data.train_iterator(dataset, batch_size=4, seed=0, transform=data_transforms.draws, start=100)
    stored = json.loads(json.dumps(dataclasses.asdict(batches.position(5))))
    batches.close()
    assert stored == {"examples": 120, "fingerprint": "numbers:8"}
    position = data.DataPosition(**stored)
    position.check(dataset)
    with pytest.raises(ValueError, match="'numbers:8'.*'numbers:9'"):
        position.check(array_dataset(9))


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **({"format": "PNG"} | options))
    return buffer.getvalue()


GRADIENT = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3) * 2


@pytest.mark.parametrize("form", [GRADIENT, encoded(Image.fromarray(GRADIENT))])
def test_decode_colour(form):
    np.testing.assert_array_equal(data.decode(form, channels=3, name="x"), GRADIENT)
    luma = data.decode(form, channels=1, name="x")
    assert luma.shape == (6, 5, 1) and luma.dtype == np.uint8
    np.testing.assert_allclose(luma[..., 0], GRADIENT @ [0.299, 0.587, 0.114], atol=1)


@pytest.mark.parametrize(
    "form",
    [GRADIENT[..., 0], GRADIENT[..., :1], encoded(Image.fromarray(GRADIENT[..., 0]))],
    ids=["2d", "3d", "png"],
)
def test_decode_grey(form):
    np.testing.assert_array_equal(data.decode(form, channels=1, name="x"), GRADIENT[..., :1])
    np.testing.assert_array_equal(data.decode(form, channels=3, name="x"), GRADIENT[..., [0, 0, 0]])


def test_decode_drops_alpha_and_resolves_palettes():
    with_alpha = np.concatenate([GRADIENT, np.full((6, 5, 1), 7, np.uint8)], axis=2)
    for form in (with_alpha, encoded(Image.fromarray(with_alpha))):
        np.testing.assert_array_equal(data.decode(form, channels=3, name="x"), GRADIENT)
    palette = Image.fromarray(GRADIENT).quantize(16)
    colours = np.asarray(palette.convert("RGB"))
    for options in ({}, {"transparency": bytes(range(16))}):
        np.testing.assert_array_equal(data.decode(encoded(palette, **options), channels=3, name="x"), colours)


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
        data.decode(form, channels=3, name="picture 3")


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


@pytest.mark.parametrize(
    "split, size", [("train", 24), ("test", 10), ("train[:75%]", 18), ("train+test", 34)]
)
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
        image = data.decode(example["image"], channels=3, name="x")
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
    assert data.decode(dataset.source[2]["image"], channels=3, name="x").shape == (40, 32, 3)


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
    with pytest.raises(
        ValueError, match="example 0 of the TFDS data set colour_patches/1.0.0 train cannot be decoded"
    ):
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
                image.save(
                    directory / f"{i}{('.png', '.WEBP', '.bmp')[i]}", **({"lossless": True} if i == 1 else {})
                )
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
    assert [example["label"] for example in map(dataset.source.__getitem__, range(10))] == [0] * 3 + [
        1
    ] * 4 + [2] * 3
    with data.eval_iterator(dataset, batch_size=10, transform=data_transforms.plain) as batches:
        images = next(batches)["image"]
    assert images.shape == (10, 6, 8, 3)
    expected = [0, 5, 10, 40, 45, 50, 200, 80, 85, 90]
    np.testing.assert_array_equal(
        images[:, 2, 2], np.repeat(np.array(expected, np.uint8)[:, None], 3, axis=1)
    )


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
    with pytest.raises(
        ValueError, match=r"example 7 of the folder .*/train \(.*/eel/0.png\) cannot be decoded"
    ):
        next(batches)


def test_folder_errors(folder):
    with pytest.raises(
        FileNotFoundError, match="'/no/where' is not a directory; the layout should be split/"
    ):
        open_folder("/no/where")
    with pytest.raises(
        ValueError, match="unknown split 'valid' of the folder .*, which has test, train; the layout"
    ):
        open_folder(folder, "valid")
    with pytest.raises(
        ValueError, match="unknown split 'train' of the folder .*, which has none; the layout"
    ):
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
