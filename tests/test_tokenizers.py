"""Tokenizers: reversible, their tokens' sizes adding up to the text, read from files of two libraries."""

import io
import json
import pickle
import sys

import numpy as np
import pytest
import sentencepiece
import tokenizers

from train import text, vocabulary
from zoo.sequence.tokenizers import Bytes, Tokenizer, open_tokenizer

LINES = ["def f(x):", "    return x + 1", "", "class A:", "    name = 'été naïve 日本'", "    <s> and </s>"] * 20
TEXTS = [
    "def f(x):\n    return f(x)  # twice\n",
    "  leading, trailing  ",
    "été 日本 🙂 x\n\n\n\ty",
    "<s> is text here, and so is </s>",
    "x",
]


def bpe(path, special=("<unk>", "<s>"), normalizer=None):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(special),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["\n".join(LINES)], trainer)
    tokenizer.save(str(path))
    return path


def pieces(path, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        vocab_size=320,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


EXACT = dict(
    byte_fallback=True,
    remove_extra_whitespaces=False,
    normalization_rule_name="identity",
    add_dummy_prefix=False,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "bpe": bpe(root / "bpe.json"),
        "bpe_without_begin": bpe(root / "plain.json", special=()),
        "pieces": pieces(root / "exact.model", **EXACT),
        "pieces_without_begin": pieces(root / "nobos.model", bos_id=-1, **EXACT),
        "normalising": pieces(root / "normalising.model"),
        "lowercase": bpe(root / "lowercase.json", normalizer=tokenizers.normalizers.Lowercase()),
    }


KINDS = ("bytes", "bpe", "bpe_without_begin", "pieces", "pieces_without_begin")


def opened(files, kind):
    return open_tokenizer(files.get(kind, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(files, kind):
    tokenizer = opened(files, kind)
    assert isinstance(tokenizer, Tokenizer)
    for string in TEXTS:
        content = string.encode()
        ids, sizes = tokenizer.encode_sized(content)
        assert ids.dtype == sizes.dtype == np.int32 and ids.shape == sizes.shape
        np.testing.assert_array_equal(tokenizer.encode(content), ids)
        assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == content
        assert tokenizer.decode([tokenizer.begin, *ids.tolist()]) == content
        assert ids.min() >= 0 and ids.max() < tokenizer.vocab_size and tokenizer.begin not in ids
        assert sizes.min() >= 0 and sizes.sum() == len(content)
    assert tokenizer.encode(b"").shape == (0,) and tokenizer.decode([]) == b""


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_those_of_the_tokens(files, kind):
    """Where the tokens up to some place decode to whole characters, their sizes are those of that text."""
    tokenizer = opened(files, kind)
    for string in TEXTS:
        content = string.encode()
        ids, sizes = tokenizer.encode_sized(content)
        checked = 0
        for stop in range(1, len(ids) + 1):
            if content.startswith(decoded := tokenizer.decode(ids[:stop])):
                assert sizes[:stop].sum() == len(decoded)
                checked += 1
        assert checked > 0.6 * len(ids)


def test_bytes():
    tokenizer = Bytes()
    content = bytes(range(256)) * 2
    np.testing.assert_array_equal(tokenizer.encode(content), list(content))
    assert (tokenizer.vocab_size, tokenizer.begin) == (257, 256)
    assert tokenizer.decode(tokenizer.encode(content)) == content
    np.testing.assert_array_equal(tokenizer.encode_sized(content).sizes, 1)


def test_vocabularies(files):
    bpe = tokenizers.Tokenizer.from_file(str(files["bpe"]))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(files["pieces"]))
    with_own = {"bpe": (bpe.get_vocab_size(), bpe.token_to_id("<s>")), "pieces": (len(pieces), pieces.bos_id())}
    for kind, (size, begin) in with_own.items():
        tokenizer = opened(files, kind)
        assert (tokenizer.vocab_size, tokenizer.begin) == (size, begin)
    for kind in ("bpe_without_begin", "pieces_without_begin"):
        tokenizer = opened(files, kind)
        assert tokenizer.begin == tokenizer.vocab_size - 1
        assert tokenizer.begin not in {int(i) for string in TEXTS for i in tokenizer.encode(string.encode())}
    plain = tokenizers.Tokenizer.from_file(str(files["bpe_without_begin"]))
    assert opened(files, "bpe_without_begin").vocab_size == plain.get_vocab_size() + 1


def test_ids_are_those_of_the_libraries(files):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(files["pieces"]))
    plain = tokenizers.Tokenizer.from_file(str(files["bpe_without_begin"]))
    for string in TEXTS:
        assert opened(files, "pieces").encode(string.encode()).tolist() == pieces.encode(string)
        assert opened(files, "bpe_without_begin").encode(string.encode()).tolist() == plain.encode(string).ids


def test_settings_in_the_file_do_not_cut_or_add(files, tmp_path):
    """A file may ask for truncation, padding and special tokens, none of which belong into a corpus."""
    tokenizer = tokenizers.Tokenizer.from_file(str(files["bpe"]))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=100)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(tmp_path / "set.json"))
    content = TEXTS[0].encode()
    expected = opened(files, "bpe").encode(content)
    assert len(expected) > 3
    np.testing.assert_array_equal(open_tokenizer(tmp_path / "set.json").encode(content), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_pickles_and_fingerprints(files, kind):
    tokenizer = opened(files, kind)
    again = pickle.loads(pickle.dumps(tokenizer))
    content = TEXTS[2].encode()
    np.testing.assert_array_equal(again.encode(content), tokenizer.encode(content))
    assert again.fingerprint == tokenizer.fingerprint and again.begin == tokenizer.begin
    assert len({opened(files, other).fingerprint for other in KINDS}) == len(KINDS)


@pytest.mark.parametrize("kind", ["normalising", "lowercase"])
def test_text_that_a_tokenizer_loses(files, kind, tmp_path):
    tokenizer = opened(files, kind)
    content = b"Def  f(x):\n    Return x\n\n"
    ids, sizes = tokenizer.encode_sized(content)
    assert tokenizer.decode(ids) != content and sizes.sum() == len(content)
    (tmp_path / "a.txt").write_bytes(content * 30)
    dataset = text.open_text("files", split="train", path=tmp_path / "a.txt", length=32, tokenizer=files[kind])
    assert "the tokenizer loses something of 1 documents" in dataset.detail


@pytest.mark.parametrize("kind", ["bpe", "pieces", "bpe_without_begin"])
@pytest.mark.parametrize("mode", ["packed", "stream"])
def test_text_in_rows(files, kind, mode, tmp_path):
    """All tokens of all documents are predicted once, and their bytes add up to those of the corpus."""
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for number in range(12):
            (tmp_path / split / f"{number}.txt").write_text((f"{split} {number}\n" + "".join(TEXTS)) * (number + 1))
    tokenizer = opened(files, kind)
    dataset = text.open_text("files", split="train", path=tmp_path, length=24, align=8, mode=mode, tokenizer=tokenizer)
    documents = text.open_documents("files", split="train", path=tmp_path).texts
    rows = [dataset.read(index) for index in range(len(dataset))]
    got = np.concatenate([row["targets"][row["weights"] > 0] for row in rows])
    expected = np.concatenate([tokenizer.encode(document) for document in documents])
    np.testing.assert_array_equal(np.bincount(got), np.bincount(expected))
    assert sum(int(row["bytes"]) for row in rows) == sum(map(len, documents))
    begins = sum(int((row["tokens"][row["segments"] > 0] == tokenizer.begin).sum()) for row in rows)
    assert begins == len(documents)
    assert dataset.vocab_size == tokenizer.vocab_size and "the tokenizer loses nothing" in dataset.detail
    if mode == "stream":
        whole = iter(got.tolist())
        for document in documents:
            size = len(tokenizer.encode(document))
            assert tokenizer.decode([next(whole) for _ in range(size)]) == document


def test_text_that_is_no_utf8(files, tmp_path):
    (tmp_path / "latin.txt").write_bytes("naïve\n".encode("latin-1") * 40)
    for kind in ("bpe", "pieces"):
        words = (
            r"latin.txt of the text .*: not UTF-8, which the tokenizer .* needs: byte 2 is 0xef; .* 'bytes' takes any"
        )
        with pytest.raises(ValueError, match=words):
            text.open_text("files", split="train", path=tmp_path / "latin.txt", length=8, tokenizer=files[kind])
    dataset = text.open_text("files", split="train", path=tmp_path / "latin.txt", length=8)
    assert len(dataset) > 10


def test_names_and_files(tmp_path):
    with pytest.raises(
        ValueError, match="unknown tokenizer 'gpt2'.*; a .json file is read by the library `tokenizers`"
    ):
        open_tokenizer("gpt2")
    with pytest.raises(FileNotFoundError, match="the tokenizer file '/no/such.json' does not exist"):
        open_tokenizer("/no/such.json")
    (tmp_path / "x.json").write_text(json.dumps({"vocab": 3}))
    with pytest.raises(ValueError, match="x.json' is no file of the library `tokenizers`: "):
        open_tokenizer(tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="x.json' is no file of the library `tokenizers`: "):
        open_tokenizer(tmp_path / "x.json")
    (tmp_path / "x.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="x.model' is no sentencepiece model: "):
        open_tokenizer(tmp_path / "x.model")


def test_the_built_in_vocabulary_takes_three_bytes_of_source_code_at_once():
    tokenizer = open_tokenizer("python")
    assert (tokenizer.vocab_size, tokenizer.begin) == (2049, 2048)
    documents = text.open_documents("stdlib", split="test")
    found = text.open_text("stdlib", split="test", length=256, tokenizer="python")
    assert "the tokenizer loses nothing" in found.detail
    tokens = len(tokenizer.encode(documents.texts[0]))
    assert 2 < len(documents.texts[0]) / tokens < 4
    # Indentation is one token.
    assert len(tokenizer.encode(b"\n        return")) <= 3


def test_a_vocabulary_is_learnt_from_the_training_part_alone(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "train" / "a.txt").write_text("abcabc abcabc " * 40)
    (tmp_path / "test" / "b.txt").write_text("xyzxyz xyzxyz " * 400)
    file = tmp_path / "v.json"
    assert vocabulary.main([str(file), "--data=files", f"--path={tmp_path}", "--size=300"]) == 0
    assert "learnt from" in capsys.readouterr().out
    tokenizer = open_tokenizer(file)
    assert len(tokenizer.encode(b"abcabc abcabc")) == 2 and len(tokenizer.encode(b"xyzxyz")) == 6
    assert tokenizer.vocab_size < 300
    documents = text.open_documents("files", split="train", path=tmp_path)
    assert vocabulary.learn(documents, 300) == vocabulary.learn(documents, 300) == file.read_text()


def test_a_vocabulary_that_cannot_be_learnt(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n" * 40)
    for arguments, message in (
        (["v.json", "--size=255"], "size must be at least 256, the number of bytes, got 255"),
        (["v.txt"], "FILE must end in .json"),
        (["v.json", "--data=files", f"--path={tmp_path / 'a.txt'}"], "can't decode byte 0xe9"),
        (["v.json", "--data=files", f"--path={tmp_path / 'a.txt'}"], "error: a.txt of the "),
    ):
        assert vocabulary.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("v.*"))


@pytest.mark.parametrize(
    "library, kind, words",
    [
        ("tokenizers", "bpe", "pip install 'tokenizers>=0.20'"),
        ("sentencepiece", "pieces", "pip install 'sentencepiece>=0.2.2'"),
    ],
)
def test_libraries_that_are_not_installed(files, monkeypatch, library, kind, words):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=f"needs the library `{library}`: {words}"):
        opened(files, kind)


def test_old_sentencepiece(files, monkeypatch):
    monkeypatch.delattr(sentencepiece.SentencePieceProcessor, "EncodeAsOffsetMapping")
    with pytest.raises(ImportError, match="needs sentencepiece 0.2.2, which tells where .*; this is .*: pip install"):
        opened(files, "pieces")
