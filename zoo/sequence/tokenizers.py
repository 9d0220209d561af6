"""From text to tokens and back: bytes, files of the `tokenizers` library, sentencepiece models."""

import dataclasses
import hashlib
import importlib
from types import ModuleType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import Int32

from zoo.registry import nearest

# What vocabularies call the token that stands before a text.
BEGIN_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "[BOS]", "<|endoftext|>")
# Vocabularies that come with the package.
BUILT_IN = {"python": epath.Path(__file__).parent / "python.json"}
REQUIREMENTS = {"tokenizers": "tokenizers>=0.20", "sentencepiece": "sentencepiece>=0.2.2"}


class Encoding(NamedTuple):
    """A text as tokens.

    Attributes:
        ids: int32 (n,).
        sizes: int32 (n,): how many bytes of the text each token stands for; they add up to the text's length, also
            where the tokenizer normalises or drops some of it.
    """

    ids: np.ndarray
    sizes: np.ndarray


@runtime_checkable
class Tokenizer(Protocol):
    """A reversible map from texts to token ids; picklable.

    Attributes:
        vocab_size: ids are 0 .. vocab_size - 1, `begin` included.
        begin: the token that stands before a text and that no text contains: from it the first token is predicted.
            It is the vocabulary's own token of that meaning, else one id more.
        fingerprint: tells whether two tokenizers are the same.
    """

    vocab_size: int
    begin: int
    fingerprint: str

    def encode_sized(self, text: bytes) -> Encoding:
        """The tokens of a text, without `begin`, and their sizes in bytes."""

    def encode(self, text: bytes) -> Int32[np.ndarray, "n"]:
        """The tokens of a text, without `begin`."""

    def decode(self, ids: Any) -> bytes:
        """The text of a sequence of tokens; `begin` stands for nothing."""


def open_tokenizer(name: epath.PathLike) -> Tokenizer:
    """The tokenizer of this name.

    Args:
        name: "bytes" for the 256 bytes; "python" for 2,048 byte pairs of Python's own source code, as
            `train.vocabulary` learns them; or a file: `.json` of the `tokenizers` library or `.model` of
            sentencepiece.

    Raises:
        ValueError: neither such a name nor a file of these kinds, or a file that its library cannot read.
        FileNotFoundError: the file is not there.
        ImportError: the library is not installed; it says how to install it.
    """
    if name == "bytes":
        return Bytes()
    kinds = {".json": JsonTokenizer, ".model": SentencePiece}
    path = BUILT_IN.get(str(name)) or epath.Path(name).expanduser()
    if path.suffix not in kinds:
        hint = nearest(str(name), ["bytes", *BUILT_IN, "FILE.json", "FILE.model"])
        raise ValueError(
            f"unknown tokenizer {str(name)!r}{hint}; a .json file is read by the library `tokenizers`, "
            "a .model file by `sentencepiece`"
        )
    if not path.is_file():
        raise FileNotFoundError(f"the tokenizer file {str(path)!r} does not exist")
    return kinds[path.suffix](path.read_bytes(), str(path))


@dataclasses.dataclass(frozen=True)
class Bytes:
    """The 256 bytes, and 256 for the begin of a text. It takes any file and loses nothing."""

    vocab_size: int = 257
    begin: int = 256
    fingerprint: str = "bytes"

    def encode_sized(self, text: bytes) -> Encoding:
        ids = self.encode(text)
        return Encoding(ids, np.ones_like(ids))

    def encode(self, text: bytes) -> Int32[np.ndarray, "n"]:
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def decode(self, ids: Any) -> bytes:
        ids = np.asarray(ids)
        return ids[ids != self.begin].astype(np.uint8).tobytes()


class _FromFile:
    """A tokenizer that a library makes from the bytes of a file."""

    def __init__(self, content: bytes, name: str):
        self._content, self._name = content, name
        self._library = self._load()
        self.fingerprint = f"{type(self).__name__}:{hashlib.sha256(content).hexdigest()}"
        size, begin = self._vocabulary()
        self.begin = size if begin is None else begin
        self.vocab_size = max(size, self.begin + 1)

    def __getstate__(self) -> tuple[bytes, str]:
        return self._content, self._name

    def __setstate__(self, state: tuple[bytes, str]) -> None:
        self.__init__(*state)

    def encode(self, text: bytes) -> Int32[np.ndarray, "n"]:
        return self.encode_sized(text).ids

    def encode_sized(self, text: bytes) -> Encoding:
        try:
            characters = text.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"not UTF-8, which the tokenizer {self._name!r} needs: byte {error.start} is "
                f"0x{text[error.start]:02x}; the tokenizer 'bytes' takes any text"
            ) from error
        ids, ends = self._encode(characters)
        if text and not len(ids):
            raise ValueError(f"the tokenizer {self._name!r} makes no token of the {len(text)} bytes {text[:40]!r}")
        # Of the tokens that share a character the first or the last gets its bytes, which is all the same for sums;
        # text that was dropped counts with the token after it, at the end with the last one.
        ends = np.maximum.accumulate(ends)
        ends[-1:] = len(text)
        return Encoding(np.asarray(ids, np.int32), np.diff(ends, prepend=0).astype(np.int32))

    def decode(self, ids: Any) -> bytes:
        return self._decode([int(each) for each in ids if each != self.begin]).encode()


class JsonTokenizer(_FromFile):
    """A tokenizer file of the `tokenizers` library. Special tokens in a text are text like any other."""

    def _load(self) -> Any:
        library = import_library("tokenizers", f"reading {self._name!r}")
        try:
            tokenizer = library.Tokenizer.from_str(self._content.decode())
        except Exception as error:
            raise ValueError(f"{self._name!r} is no file of the library `tokenizers`: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return tokenizer

    def _vocabulary(self) -> tuple[int, int | None]:
        special = {each.content: key for key, each in self._library.get_added_tokens_decoder().items() if each.special}
        begin = next((special[name] for name in BEGIN_NAMES if name in special), None)
        return max(self._library.get_vocab(with_added_tokens=True).values()) + 1, begin

    def _encode(self, text: str) -> tuple[list[int], np.ndarray]:
        encoding = self._library.encode(text, add_special_tokens=False)
        octets = np.frombuffer(text.encode(), np.uint8)
        # In UTF-8 every byte but 0b10xxxxxx begins a character.
        places = np.append(np.flatnonzero((octets & 0xC0) != 0x80), len(octets))
        return encoding.ids, places[[end for _, end in encoding.offsets]]

    def _decode(self, ids: list[int]) -> str:
        return self._library.decode(ids, skip_special_tokens=False)


class SentencePiece(_FromFile):
    """A sentencepiece model.

    Many models normalise: newlines become spaces, runs of spaces one. What they lose no model has to predict, so that
    bits per byte are then no longer those of the text.
    """

    def _load(self) -> Any:
        library = import_library("sentencepiece", f"reading {self._name!r}")
        if not hasattr(library.SentencePieceProcessor, "EncodeAsOffsetMapping"):
            raise ImportError(
                f"reading {self._name!r} needs sentencepiece 0.2.2, which tells where in the text a token lies; "
                f"this is {library.__version__}: pip install 'sentencepiece>=0.2.2'"
            )
        try:
            return library.SentencePieceProcessor(model_proto=self._content)
        except Exception as error:
            raise ValueError(f"{self._name!r} is no sentencepiece model: {error}") from error

    def _vocabulary(self) -> tuple[int, int | None]:
        begin = self._library.bos_id()
        return self._library.get_piece_size(), begin if begin >= 0 else None

    def _encode(self, text: str) -> tuple[list[int], np.ndarray]:
        # Given bytes, it counts offsets in bytes.
        mapping = self._library.encode(text.encode(), return_type="offset_mapping")
        return mapping["ids"], np.asarray([end for _, end in mapping["offsets"]], np.int64)

    def _decode(self, ids: list[int]) -> str:
        return self._library.decode(ids)


def import_library(name: str, purpose: str) -> ModuleType:
    """One of the optional libraries for tokens.

    Raises:
        ImportError: it is not installed; it names the purpose and says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{purpose} needs the library `{name}`: pip install '{REQUIREMENTS[name]}'") from error
