"""Text to train on: the standard library's source code, files of any kind, TFDS data sets."""

import dataclasses
import hashlib
import itertools
import pathlib
import platform
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
from etils import epath

from train import packing, prepared, splits
from train.sequences import SequenceSet
from zoo.registry import nearest
from zoo.sequence.tokenizers import Bytes, Encoding, Tokenizer, open_tokenizer

SPLITS = ("train", "test")
# One in this many documents, and of a single file this part, is for testing.
TEST_SHARE = 20
TEST_DIRECTORIES = frozenset({"test", "tests", "idle_test"})
INSTALLED_DIRECTORIES = frozenset({"site-packages", "dist-packages"})


@dataclasses.dataclass(frozen=True)
class Documents:
    """The documents of one split, not yet tokenised.

    Attributes:
        name: what error messages call them.
        names: of each document.
        texts: of each document.
        fingerprint: tells from the content whether two splits are the same.
        detail: a line about the content for a person.
    """

    name: str
    names: tuple[str, ...]
    texts: tuple[bytes, ...]
    fingerprint: str
    detail: str


def open_text(
    name: str,
    *,
    split: str,
    length: int,
    path: epath.PathLike | None = None,
    tokenizer: epath.PathLike | Tokenizer = "bytes",
    align: int = 1,
    mode: Literal["packed", "stream"] = "packed",
    feature: str = "text",
) -> SequenceSet:
    """Opens one split of a text as rows of tokens. Nothing is ever downloaded; the tokens are held in memory.

    Every byte is predicted exactly once an epoch: a document's first token from the tokenizer's `begin`, each later
    one from those of its row before it. No end of a document is predicted, so that bits per byte are those of the
    text alone.

    Args:
        name, split, path, feature: see `open_documents`.
        length: number of tokens of a row.
        tokenizer: "bytes", a file as `zoo.sequence.tokenizers.open_tokenizer` takes it, or a tokenizer.
        align, mode: see `train.packing.pack`.

    Returns:
        The rows. `detail` names the corpus, with the sha256 of its content, and says whether the tokenizer loses
        any of it.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError, ImportError: as `open_documents`, `open_tokenizer` and
            `pack` do; text that the tokenizer cannot take.
    """
    packing.check(length=length, align=align, mode=mode)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = open_tokenizer(tokenizer)
    documents = open_documents(name, split=split, path=path, feature=feature)
    corpus = packing.corpus(_encoded(documents, tokenizer))
    source = packing.pack(corpus, length=length, align=align, mode=mode, begin=tokenizer.begin)
    layout = f"{mode} in rows of {length}" + (f", documents at multiples of {align}" if align > 1 else "")
    detail = f"{documents.detail}; {len(corpus.tokens):,} tokens, {len(source):,} rows"
    if not isinstance(tokenizer, Bytes):
        # Of an empty document the corpus has nothing.
        pieces = zip(itertools.pairwise(corpus.starts), filter(None, documents.texts), strict=True)
        lossy = sum(tokenizer.decode(corpus.tokens[start:end]) != text for (start, end), text in pieces)
        detail += f"; the tokenizer loses {f'something of {lossy:,} documents' if lossy else 'nothing'}"
    return SequenceSet(
        name=f"{documents.name}, {layout}",
        source=source,
        fingerprint=splits.fingerprint(
            f"text:{name}:{split}", documents.fingerprint, tokenizer.fingerprint, mode, f"{length} {align}"
        ),
        vocab_size=tokenizer.vocab_size,
        length=length,
        align=align,
        packed=True,
        detail=detail,
    )


def _encoded(documents: Documents, tokenizer: Tokenizer) -> Iterator[Encoding]:
    for name, text in zip(documents.names, documents.texts):
        try:
            yield tokenizer.encode_sized(text)
        except ValueError as error:
            raise ValueError(f"{name} of the {documents.name}: {error}") from error


def open_documents(name: str, *, split: str, path: epath.PathLike | None = None, feature: str = "text") -> Documents:
    """Reads the documents of one split.

    Args:
        name: one of
            "stdlib": the source files of the Python that runs this, without installed packages and tests. The test
                part are the files whose sha1 of the relative path is 0 modulo 20. It differs between versions of
                Python, as the sha256 in `detail` tells;
            "files": all files below the directory `path`, hidden ones left out. If it has both the directories
                "train" and "test", its directories are the splits; else the test part is chosen as above. If `path`
                is a file, its last twentieth, from the beginning of a line on, is the test part;
            "tfds", "tfds:NAME[/CONFIG][:VERSION]": a prepared TFDS data set, `path` as for images.
        split: "train", "test", a directory's name or a TFDS split.
        path: a local path or a URL that `etils.epath` knows.
        feature: which feature of a TFDS data set is the text.

    Raises:
        ValueError: an unknown name or split, a missing or superfluous path or feature, a file that is no text.
        FileNotFoundError: nothing is there; for a TFDS data set it says how to prepare it.
        NotImplementedError: a TFDS data set in another format than ArrayRecord; it says how to convert it.
    """
    is_tfds = name == "tfds" or (name.startswith("tfds:") and name != "tfds:")
    if feature != "text" and not is_tfds:
        raise ValueError(f"feature={feature!r} was given, but only TFDS data sets have features, not {name!r}")
    if is_tfds:
        return _tfds(name, split, path, feature)
    if name == "stdlib":
        if path is not None:
            raise ValueError(f"data path {str(path)!r} was given, but 'stdlib' is built in and takes none")
        return _stdlib(split)
    if name == "files":
        return _files(splits.required_path(path, name, "a text file or a directory of them"), split)
    raise ValueError(f"unknown text {name!r}{nearest(name, ['stdlib', 'files', 'tfds', 'tfds:NAME'])}")


def zlib_bits_per_byte(documents: Iterable[bytes]) -> float:
    """What zlib makes of the documents, put together as one stream and given nothing else, at its best level, 9.

    A figure to compare a model's bits per byte with, though not quite like with like: zlib sees across the borders of
    documents and has learnt nothing beforehand.
    """
    text = b"".join(documents)
    if not text:
        raise ValueError("documents hold no byte, so there are no bits per byte")
    return 8 * len(zlib.compress(text, 9)) / len(text)


def _is_for_testing(relative: str) -> bool:
    return int(hashlib.sha1(relative.encode(), usedforsecurity=False).hexdigest(), 16) % TEST_SHARE == 0


def _stdlib(split: str) -> Documents:
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    left_out = TEST_DIRECTORIES | INSTALLED_DIRECTORIES
    relative = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if left_out.isdisjoint(path.relative_to(root).parts)
    )
    if not relative:
        raise FileNotFoundError(
            f"this Python keeps no source files in {str(root)!r}; 'files' with a data path takes others"
        )
    texts = [(root / each).read_bytes() for each in relative]
    whole = f"standard library of Python {platform.python_version()}"
    return _selected(whole, relative, texts, split, f"'stdlib' ({whole})")


def _selected(whole: str, relative: Sequence[str], texts: Sequence[bytes], split: str, where: str) -> Documents:
    """The part of a set of files that their names' sha1 puts into this split."""
    if split not in SPLITS:
        raise splits.unknown_split(split, SPLITS, where)
    chosen = [place for place, each in enumerate(relative) if _is_for_testing(each) == (split == "test")]
    if not chosen:
        raise ValueError(f"none of the {len(relative)} files of the {whole} falls into the {split!r} part")
    return _documents(whole, split, [relative[i] for i in chosen], [texts[i] for i in chosen], texts)


def _documents(
    whole: str, split: str, names: Sequence[str], texts: Sequence[bytes], all_texts: Sequence[bytes]
) -> Documents:
    digest = hashlib.sha256(b"".join(all_texts)).hexdigest()
    counts = f"{len(all_texts):,} files, {sum(map(len, all_texts)):,} bytes"
    part = f"{split!r} is {len(texts):,} of them, {sum(map(len, texts)):,} bytes"
    return Documents(
        name=f"{whole}, {split}",
        names=tuple(names),
        texts=tuple(texts),
        fingerprint=splits.fingerprint(f"{split}:{len(texts)} files", *names, *texts),
        detail=f"{whole}: {counts}, sha256 of their content {digest}; {part}",
    )


def _files(root: epath.Path, split: str) -> Documents:
    whole = f"text {str(root)!r}"
    if root.is_file():
        if split not in SPLITS:
            raise splits.unknown_split(split, SPLITS, f"the file {str(root)!r}")
        text = _read(root)
        border = text.find(b"\n", len(text) - len(text) // TEST_SHARE) + 1 or len(text)
        part = text[:border] if split == "train" else text[border:]
        if not part:
            raise ValueError(f"the {whole} of {len(text)} bytes is too short to have a {split!r} part")
        return _documents(whole, split, [root.name], [part], [text])
    if not root.is_dir():
        raise FileNotFoundError(f"data path {str(root)!r} is neither a file nor a directory")
    if all((root / known).is_dir() for known in SPLITS):
        known = sorted(each.name for each in root.iterdir() if each.is_dir() and not each.name.startswith("."))
        if split not in known:
            raise splits.unknown_split(split, known, f"the directory {str(root)!r}")
        names, texts = _below(root / split)
        return _documents(f"{whole} {split}", split, names, texts, texts)
    names, texts = _below(root)
    where = f"the directory {str(root)!r} (one without the directories 'train' and 'test')"
    return _selected(whole, names, texts, split, where)


def _below(root: epath.Path) -> tuple[list[str], list[bytes]]:
    """The names, relative to `root`, and contents of all files below it, in the order of the names."""
    paths = sorted((path.relative_to(root).as_posix(), path) for path in _walk(root))
    if not paths:
        raise ValueError(f"{str(root)!r} has no file")
    return [name for name, _ in paths], [_read(path) for _, path in paths]


def _walk(directory: epath.Path) -> Iterator[epath.Path]:
    for entry in directory.iterdir():
        if not entry.name.startswith("."):
            if entry.is_dir():
                yield from _walk(entry)
            else:
                yield entry


def _read(path: epath.Path) -> bytes:
    text = path.read_bytes()
    if b"\0" in text:
        raise ValueError(f"{str(path)!r} is no text: it has a NUL, byte {text.index(0)}")
    return text


def _tfds(name: str, split: str, path: epath.PathLike | None, feature: str) -> Documents:
    import tensorflow_datasets as tfds

    data = prepared.open_prepared(name, split=split, path=path)
    features = data.info.features
    found = dict(features) if isinstance(features, tfds.features.FeaturesDict) else {}
    texts = [key for key in sorted(found) if found[key].shape == () and found[key].np_dtype == np.object_]
    if feature not in texts:
        listing = ", ".join(f"{key!r} ({type(found[key]).__name__})" for key in sorted(found)) or repr(features)
        hint = f"its texts are {', '.join(map(repr, texts))}" if texts else "none of them is text"
        raise ValueError(f"the {data.name} has no text feature {feature!r}, only {listing}; {hint}")
    # Only this one is parsed.
    reader = tfds.features.FeaturesDict({feature: found[feature]})
    documents = tuple(bytes(reader.deserialize_example_np(record)[feature]) for record in data.records)
    digest = hashlib.sha256(b"".join(documents)).hexdigest()
    size = f"{len(documents):,} documents, {sum(map(len, documents)):,} bytes"
    return Documents(
        name=f"{data.name}, {split}",
        names=tuple(f"document {number}" for number in range(len(documents))),
        texts=documents,
        fingerprint=data.fingerprint(feature, digest),
        detail=f"{data.name} {split}, feature {feature!r}: {size}, sha256 of their content {digest}",
    )
