"""Text in rows: every byte predicted exactly once, from what stands before it, wherever the text comes from."""

import hashlib
import pathlib
import pickle
import subprocess
import sys
import sysconfig
import zlib

import numpy as np
import pytest

from tests.datasets import PATCHES, TFRECORD
from tests.texts import write_tfds
from train import packing, text
from zoo.sequence.tokenizers import Bytes, Encoding

BEGIN = 256


def documents_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(256, size=length, dtype=np.uint8).tobytes() for length in lengths]


def packed(documents, **options):
    corpus = packing.corpus(Bytes().encode_sized(document) for document in documents)
    return packing.pack(corpus, **{"align": 1, "begin": BEGIN} | options)


def runs(row):
    """The documents and parts of documents of a row as (first position, tokens, targets)."""
    assert row["weights"].dtype == np.float32 and row["tokens"].dtype == row["targets"].dtype == np.int32
    np.testing.assert_array_equal(row["weights"], row["segments"] > 0)
    for segment in range(1, row["segments"].max() + 1):
        places = np.flatnonzero(row["segments"] == segment)
        np.testing.assert_array_equal(places, np.arange(places[0], places[-1] + 1))
        yield int(places[0]), row["tokens"][places], row["targets"][places]
    padding = row["segments"] == 0
    assert not row["tokens"][padding].any() and not row["targets"][padding].any()


def check_rows(rows, documents, *, length, align):
    """Puts the documents together again from the rows, whatever the layout."""
    pieces, total = [], 0
    for row in rows:
        assert all(row[key].shape == (length,) for key in ("tokens", "targets", "weights", "segments"))
        assert row["bytes"] == row["weights"].sum() and row["bytes"].dtype == np.int32
        total += int(row["bytes"])
        for place, tokens, targets in runs(row):
            assert place % align == 0
            np.testing.assert_array_equal(tokens[1:], targets[:-1])
            pieces.append((tokens[0], bytes(targets.astype(np.uint8))))
    assert total == sum(map(len, documents))
    starts = [content for first, content in pieces if first == BEGIN]
    rest = [(first, content) for first, content in pieces if first != BEGIN]
    for document in filter(None, documents):
        start = next(content for content in starts if document.startswith(content))
        starts.remove(start)
        done = len(start)
        while done < len(document):
            # Documents are random bytes, so that a piece has its place by the byte before it and its content.
            piece = next(
                (first, content)
                for first, content in rest
                if first == document[done - 1] and document.startswith(content, done)
            )
            rest.remove(piece)
            done += len(piece[1])
        assert done == len(document)
    assert not starts and not rest


@pytest.mark.parametrize("mode", ["packed", "stream"])
@pytest.mark.parametrize("length, align", [(16, 1), (16, 4), (16, 16), (1, 1), (100, 20)])
def test_every_byte_is_predicted_once(mode, length, align):
    documents = documents_of([5, 40, 0, 16, 33, 3, 3, 17, 64, 9, 100, 1, 15, 2, 8])
    rows = packed(documents, length=length, align=align, mode=mode)
    check_rows(list(rows), documents, length=length, align=align)


def test_random_corpora():
    rng = np.random.default_rng(1)
    for trial in range(30):
        align = int(rng.integers(1, 5))
        length = align * int(rng.integers(1, 12))
        documents = documents_of(rng.integers(0, 60, size=rng.integers(1, 25)), seed=trial)
        for mode in ("packed", "stream"):
            rows = packed(documents, length=length, align=align, mode=mode)
            check_rows(list(rows), documents, length=length, align=align)


def test_packed_layout():
    documents = documents_of([10, 3, 5, 4, 2, 1])
    rows = list(packed(documents, length=8, mode="packed"))
    # 10 is a row of 8 and 2 in the next, which has room for the 3; then 2 and 1 go where they leave the least room.
    layout = [[(place, len(targets)) for place, _, targets in runs(row)] for row in rows]
    assert layout == [[(0, 8)], [(0, 2), (2, 3)], [(0, 5), (5, 2), (7, 1)], [(0, 4)]]
    tokens = next(runs(rows[1]))[1]
    assert tokens[0] == documents[0][7]


def test_packing_wastes_little():
    sizes = np.random.default_rng(0).integers(1, 200, size=500)
    rows = packed(documents_of(sizes), length=128, mode="packed")
    assert len(rows) <= 1.03 * sizes.sum() / 128


def test_stream_layout():
    documents = documents_of([10, 3, 5, 4])
    plain = list(packed(documents, length=8, mode="stream"))
    whole = b"".join(documents)
    assert b"".join(row["targets"][row["segments"] > 0].astype(np.uint8).tobytes() for row in plain) == whole
    assert [row["segments"].tolist() for row in plain] == [
        [1] * 8,
        [1] * 2 + [2] * 3 + [3] * 3,
        [1] * 2 + [2] * 4 + [0] * 2,
    ]
    aligned = list(packed(documents, length=8, align=4, mode="stream"))
    assert [row["segments"].tolist() for row in aligned] == [
        [1] * 8,
        [1, 1, 0, 0, 2, 2, 2, 0],
        [1] * 5 + [0] * 3,
        [1] * 4 + [0] * 4,
    ]


def test_rows_count_the_bytes_of_their_tokens():
    """Tokens of several bytes, or of none, take theirs along to whichever row they come."""
    rng = np.random.default_rng(0)
    encodings = [
        Encoding(rng.integers(70000, size=n, dtype=np.int32), rng.integers(0, 300, size=n, dtype=np.int32))
        for n in (7, 20, 0, 3, 9)
    ]
    size_of = {int(i): int(s) for encoding in encodings for i, s in zip(encoding.ids, encoding.sizes)}
    for mode in ("packed", "stream"):
        rows = packing.pack(packing.corpus(encodings), length=8, align=2, mode=mode, begin=70000)
        for row in rows:
            assert row["bytes"] == sum(size_of[int(target)] for target in row["targets"][row["segments"] > 0])
        assert sum(int(row["bytes"]) for row in rows) == sum(int(each.sizes.sum()) for each in encodings)


def test_a_corpus_of_nothing():
    assert len(packed([], length=4, mode="packed")) == len(packed([b"", b""], length=4, mode="stream")) == 0


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(length=10, align=4), "length=10 must be a positive multiple of align=4"),
        (dict(length=0), "length=0 must be"),
        (dict(length=4, align=0), "align=0"),
    ],
)
def test_layouts_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        packed([b"abc"], mode="packed", **options)


def own_files(root, left_out):
    """The files that belong to a corpus, found with the shell's tools."""
    found = subprocess.run(["find", ".", "-type", "f", "-name", "*.py"], cwd=root, capture_output=True, text=True)
    names = [line.removeprefix("./") for line in found.stdout.splitlines()]
    return sorted(name for name in names if left_out.isdisjoint(name.split("/")))


def test_stdlib():
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    names = own_files(root, {"site-packages", "dist-packages", "test", "tests", "idle_test"})
    parts = {split: text.open_documents("stdlib", split=split) for split in ("train", "test")}
    assert sorted(parts["train"].names + parts["test"].names) == names
    assert len(names) > 400 and "argparse.py" in names and "asyncio/tasks.py" in names
    for name in names:
        number = int.from_bytes(hashlib.sha1(name.encode()).digest(), "big")
        assert name in parts["test" if number % 20 == 0 else "train"].names
    contents = {name: content for part in parts.values() for name, content in zip(part.names, part.texts)}
    digest = hashlib.sha256(b"".join((root / name).read_bytes() for name in names)).hexdigest()
    assert all(contents[name] == (root / name).read_bytes() for name in names[::50])
    version = ".".join(map(str, sys.version_info[:3]))
    for split, part in parts.items():
        size = sum(map(len, part.texts))
        assert f"Python {version}" in part.detail and digest in part.detail
        assert f"{split!r} is {len(part.texts):,} of them, {size:,} bytes" in part.detail


@pytest.mark.parametrize("mode", ["packed", "stream"])
def test_stdlib_in_rows(mode):
    documents = text.open_documents("stdlib", split="test")
    dataset = text.open_text("stdlib", split="test", length=256, align=64, mode=mode)
    rows = [dataset.read(index) for index in range(len(dataset))]
    assert sum(int(row["bytes"]) for row in rows) == sum(map(len, documents.texts))
    # All bytes of the corpus, and none twice, by their number of occurrences.
    got = np.concatenate([row["targets"][row["segments"] > 0] for row in rows])
    expected = np.frombuffer(b"".join(documents.texts), np.uint8)
    np.testing.assert_array_equal(np.bincount(got, minlength=256), np.bincount(expected, minlength=256))
    firsts = [
        bytes(targets[:8].astype(np.uint8)) for row in rows for _, tokens, targets in runs(row) if tokens[0] == BEGIN
    ]
    assert sorted(firsts) == sorted(document[:8] for document in documents.texts if document)
    assert dataset.vocab_size == 257 and dataset.length == 256 and dataset.align == 64
    assert documents.detail in dataset.detail and f"{len(dataset):,} rows" in dataset.detail
    assert len(dataset) < 1.01 * len(expected) / 256


def small_files(root):
    texts = {
        f"{folder}{i}.txt": f"text {folder}{i}\n".encode() * (i + 1) for folder in ("", "a/", "b/c/") for i in range(30)
    }
    texts |= {".hidden": b"no", ".git/config": b"no"}
    for name, content in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return {name: content for name, content in texts.items() if not name.startswith(".")}


def test_directory_without_splits(tmp_path):
    texts = small_files(tmp_path)
    parts = {split: text.open_documents("files", split=split, path=tmp_path) for split in ("train", "test")}
    for split, part in parts.items():
        chosen = [
            name
            for name in sorted(texts)
            if (int(hashlib.sha1(name.encode()).hexdigest(), 16) % 20 == 0) == (split == "test")
        ]
        assert part.names == tuple(chosen) and part.texts == tuple(texts[name] for name in chosen)
    assert 0 < len(parts["test"].names) < 15
    assert len({part.fingerprint for part in parts.values()}) == 2
    with pytest.raises(ValueError, match="unknown split 'valid' of the directory .*, which has train, test"):
        text.open_documents("files", split="valid", path=tmp_path)


def test_directory_with_splits(tmp_path):
    for split in ("train", "test", "valid"):
        (tmp_path / split / "deep").mkdir(parents=True)
        (tmp_path / split / "deep" / "b.txt").write_text(f"b of {split}")
        (tmp_path / split / "a.txt").write_text(f"a of {split}")
    for split in ("train", "test", "valid"):
        part = text.open_documents("files", split=split, path=str(tmp_path))
        assert part.names == ("a.txt", "deep/b.txt")
        assert part.texts == (f"a of {split}".encode(), f"b of {split}".encode())
    with pytest.raises(ValueError, match="unknown split 'dev' of the directory .*, which has test, train, valid"):
        text.open_documents("files", split="dev", path=tmp_path)
    before = text.open_documents("files", split="train", path=tmp_path).fingerprint
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert text.open_documents("files", split="train", path=moved).fingerprint == before
    (moved / "train" / "a.txt").write_text("a of train!")
    assert text.open_documents("files", split="train", path=moved).fingerprint != before


def test_single_file(tmp_path):
    path = tmp_path / "book.txt"
    lines = [f"line {number}\n".encode() for number in range(1000)]
    path.write_bytes(b"".join(lines))
    train, test = (text.open_documents("files", split=split, path=path) for split in ("train", "test"))
    assert train.texts[0] + test.texts[0] == path.read_bytes()
    assert test.texts[0].startswith(b"line ") and 0.04 < len(test.texts[0]) / path.stat().st_size <= 0.05
    path.write_bytes(b"no line ends here")
    assert text.open_documents("files", split="train", path=path).texts == (b"no line ends here",)
    with pytest.raises(ValueError, match="of 17 bytes is too short to have a 'test' part"):
        text.open_documents("files", split="test", path=path)
    with pytest.raises(ValueError, match="unknown split 'valid' of the file"):
        text.open_documents("files", split="valid", path=path)


REVIEWS = {"train": [b"good film", "r\u00e9sum\u00e9".encode(), b"", b"bad"], "test": [b"never seen"]}


@pytest.mark.parametrize("by_name", [True, False])
def test_tfds(tmp_path, by_name):
    root = write_tfds(tmp_path / "reviews", REVIEWS)
    name, path = ("tfds:reviews", tmp_path) if by_name else ("tfds", root)
    for split, expected in (*REVIEWS.items(), ("train[:50%]", REVIEWS["train"][:2])):
        dataset = text.open_text(name, split=split, path=path, length=16)
        check_rows(list(dataset.source), expected, length=16, align=1)
        digest = hashlib.sha256(b"".join(expected)).hexdigest()
        assert f"reviews/1.0.0 {split}, feature 'text'" in dataset.detail and digest in dataset.detail
    prints = {text.open_documents(name, split=split, path=path).fingerprint for split in ("train", "test")}
    assert len(prints) == 2


def test_tfds_other_feature(tmp_path):
    root = write_tfds(tmp_path / "books", REVIEWS, feature="book_text")
    documents = text.open_documents("tfds", split="test", path=root, feature="book_text")
    assert documents.texts == (b"never seen",)
    for feature in ("text", "stars"):
        with pytest.raises(ValueError) as info:
            text.open_documents("tfds", split="test", path=root, feature=feature)
        assert f"no text feature {feature!r}, only 'book_text' (Text), 'stars' (ClassLabel)" in str(info.value)
        assert "its texts are 'book_text'" in str(info.value)
    with pytest.raises(ValueError, match="no text feature 'text'.* none of them is text"):
        text.open_documents("tfds", split="test", path=PATCHES)


def test_tfds_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="'pg19' is not prepared in .*, and nothing is downloaded unasked"):
        text.open_documents("tfds:pg19", split="train", path=tmp_path)
    with pytest.raises(FileNotFoundError, match="not a prepared TFDS data set"):
        text.open_documents("tfds", split="train", path=tmp_path)
    with pytest.raises(NotImplementedError, match="stored as tfrecord, which has no random access"):
        text.open_documents("tfds", split="train", path=TFRECORD)
    root = write_tfds(tmp_path / "reviews", REVIEWS | {"empty": []})
    with pytest.raises(ValueError, match="unknown split 'valid' of the TFDS data set reviews/1.0.0, which has"):
        text.open_documents("tfds", split="valid", path=root)
    with pytest.raises(ValueError, match="split 'empty' of the .* has no example"):
        text.open_documents("tfds", split="empty", path=root)


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("stdlb", {}, "unknown text 'stdlb'; did you mean 'stdlib'"),
        ("tfds:", {}, "unknown text 'tfds:'"),
        ("stdlib", {"path": "/x"}, "'/x' was given, but 'stdlib' is built in"),
        ("stdlib", {"split": "valid"}, "unknown split 'valid' of 'stdlib' .*, which has train, test"),
        ("stdlib", {"feature": "body"}, "feature='body' was given, but only TFDS data sets have features"),
        ("files", {}, "data set 'files' needs a path: a text file or a directory of them"),
        ("tfds", {}, "data set 'tfds' needs a path: the version directory"),
        ("stdlib", {"length": 100, "align": 64}, "length=100 must be a positive multiple of align=64"),
        ("stdlib", {"tokenizer": "byte"}, "unknown tokenizer 'byte'; did you mean 'bytes'"),
    ],
)
def test_errors(name, options, words):
    with pytest.raises(ValueError, match=words):
        text.open_text(name, **{"split": "test", "length": 64} | options)


def test_errors_of_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="'/no/where' is neither a file nor a directory"):
        text.open_documents("files", split="train", path="/no/where")
    with pytest.raises(ValueError, match="has no file"):
        text.open_documents("files", split="train", path=tmp_path)
    (tmp_path / "a.txt").write_text("text")
    empty = "test" if int(hashlib.sha1(b"a.txt").hexdigest(), 16) % 20 else "train"
    with pytest.raises(ValueError, match=f"none of the 1 files .* falls into the '{empty}' part"):
        text.open_documents("files", split=empty, path=tmp_path)
    (tmp_path / "b.bin").write_bytes(b"text\0more")
    with pytest.raises(ValueError, match=r"b.bin' is no text: it has a NUL, byte 4"):
        text.open_documents("files", split="train", path=tmp_path)


def test_fingerprints_and_pickles(tmp_path):
    small_files(tmp_path)

    def opened(**options):
        return text.open_text("files", path=tmp_path, **{"split": "train", "length": 128} | options)

    first = opened()
    again = pickle.loads(pickle.dumps(first))
    assert again.fingerprint == first.fingerprint == opened().fingerprint
    for index in range(len(first)):
        for key, array in first.read(index).items():
            np.testing.assert_array_equal(again.read(index)[key], array)
    others = [{"length": 64}, {"align": 8}, {"mode": "stream"}, {"split": "test"}]
    prints = {opened(**other).fingerprint for other in others}
    assert len(prints | {first.fingerprint}) == 5
    for index in (-1, len(first)):
        with pytest.raises(IndexError, match=f"example {index} of {len(first)}"):
            first.read(index)


def test_zlib():
    documents = text.open_documents("stdlib", split="test").texts
    compressor, size = zlib.compressobj(9), 0
    for document in documents:
        size += len(compressor.compress(document))
    size += len(compressor.flush())
    assert text.zlib_bits_per_byte(documents) == pytest.approx(8 * size / sum(map(len, documents)), rel=1e-6)
    assert 1.5 < text.zlib_bits_per_byte(documents) < 2.5
    with pytest.raises(ValueError, match="hold no byte"):
        text.zlib_bits_per_byte([b""])
