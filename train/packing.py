"""Documents of any length laid out in rows of one length, every token predicted exactly once."""

import array
import bisect
import dataclasses
from collections.abc import Iterable
from typing import Literal

import numpy as np

from train.sequences import Example, check_index
from zoo.sequence.tokenizers import Encoding


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenised documents, one after the other; T tokens in all.

    Attributes:
        tokens: (T,) of the smallest unsigned dtype that holds them.
        sizes: (T,) likewise: how many bytes of text each token stands for.
        starts: int64 (documents + 1,): document i is tokens[starts[i] : starts[i + 1]]; none is empty.
    """

    tokens: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray


def corpus(documents: Iterable[Encoding]) -> Corpus:
    """Puts documents together; those without a token are left out."""
    tokens, sizes = [np.zeros(0, np.uint8)], [np.zeros(0, np.uint8)]
    for document in documents:
        if len(document.ids):
            tokens.append(_narrow(document.ids))
            sizes.append(_narrow(document.sizes))
    lengths = [len(document) for document in tokens]
    # The widest dtype among the documents is that of the whole.
    return Corpus(np.concatenate(tokens), np.concatenate(sizes), np.cumsum(lengths, dtype=np.int64))


def _narrow(array: np.ndarray) -> np.ndarray:
    return array.astype(np.min_scalar_type(int(array.max())))


@dataclasses.dataclass(frozen=True)
class Packed:
    """Rows of `length` tokens; a row is a number of pieces, each a run of tokens of one document.

    A piece is tokens[first : first + size], standing from position `offset` of its row on. Pieces are sorted by row,
    those of row r being first_piece[r] .. first_piece[r + 1] - 1. A document begins by reading the token `begin`; a
    piece from the middle of one reads the token before it, though nothing else of what came before.

    Attributes:
        tokens: (T,) of all documents.
        begins: int64 (documents,), sorted: where in `tokens` each document begins.
        first, size, offset: int64 (pieces,).
        first_piece: int64 (rows + 1,).
        row_bytes: int32 (rows,): bytes of text that the row's tokens stand for.
        length, begin: see above.
    """

    tokens: np.ndarray
    begins: np.ndarray
    first: np.ndarray
    size: np.ndarray
    offset: np.ndarray
    first_piece: np.ndarray
    row_bytes: np.ndarray
    length: int
    begin: int

    def __len__(self) -> int:
        return len(self.row_bytes)

    def __getitem__(self, index: int) -> Example:
        check_index(index, len(self))
        tokens, targets, segments = (np.zeros(self.length, np.int32) for _ in range(3))
        for number, piece in enumerate(range(self.first_piece[index], self.first_piece[index + 1]), 1):
            first, size, offset = self.first[piece], self.size[piece], self.offset[piece]
            place = slice(offset, offset + size)
            targets[place] = self.tokens[first : first + size]
            tokens[offset + 1 : offset + size] = targets[offset : offset + size - 1]
            nearest = np.searchsorted(self.begins, first)
            begins = nearest < len(self.begins) and self.begins[nearest] == first
            tokens[offset] = self.begin if begins else self.tokens[first - 1]
            segments[place] = number
        return {
            "tokens": tokens,
            "targets": targets,
            "weights": (segments > 0).astype(np.float32),
            "segments": segments,
            "bytes": np.int32(self.row_bytes[index]),
        }


def pack(corpus: Corpus, *, length: int, align: int, mode: Literal["packed", "stream"], begin: int) -> Packed:
    """Lays documents out in rows.

    Args:
        corpus: the documents.
        length: of a row.
        align: every document and piece starts at a multiple of this; what is left open before it is padding.
        mode: "packed": a document longer than `length` is cut, its full pieces being rows of their own; the rest of
            it, or a shorter document, goes in corpus order into the row where it leaves the least room, of several
            into the one that came to this room last.
            "stream": the rows are consecutive windows of the documents put one after the other.
        begin: the token that a document begins by reading.

    Raises:
        ValueError: `length` is no multiple of `align`, or `mode` is unknown.
    """
    check(length=length, align=align, mode=mode)
    layout = _packed if mode == "packed" else _stream
    pieces = np.frombuffer(layout(corpus.starts, length, align), np.int64).reshape(-1, 4)
    # The pieces come in the order of the tokens and leave none out.
    sizes = np.add.reduceat(corpus.sizes, pieces[:, 0], dtype=np.int64) if len(pieces) else pieces[:, 0]
    order = np.lexsort((pieces[:, 3], pieces[:, 2]))
    first, size, row, offset = (column[order] for column in pieces.T)
    rows = int(row[-1]) + 1 if len(row) else 0
    return Packed(
        tokens=corpus.tokens,
        begins=corpus.starts[:-1],
        first=first,
        size=size,
        offset=offset,
        first_piece=np.searchsorted(row, np.arange(rows + 1)),
        row_bytes=np.bincount(row, sizes[order], minlength=rows).astype(np.int32),
        length=length,
        begin=begin,
    )


def check(*, length: int, align: int, mode: str) -> None:
    """Raises ValueError for a layout that `pack` cannot make."""
    if length < 1 or align < 1 or length % align:
        raise ValueError(f"length={length} must be a positive multiple of align={align}")
    if mode not in ("packed", "stream"):
        raise ValueError(f"mode={mode!r} must be 'packed' or 'stream'")


def _packed(starts: np.ndarray, length: int, align: int) -> array.array:
    """Pieces (first, size, row, offset) by best fit: among the open rows, the one with the least room that suffices."""
    pieces = array.array("q")
    rooms: list[int] = []  # sorted: how much room there is in some open row, each number once
    rows_with: dict[int, list[int]] = {}
    rows = 0
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist()):
        while stop - start >= length:
            pieces.extend((start, length, rows, 0))
            start, rows = start + length, rows + 1
        if start == stop:
            continue
        place = bisect.bisect_left(rooms, stop - start)
        if place == len(rooms):
            row, room, rows = rows, length, rows + 1
        else:
            room = rooms[place]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rows_with[room], rooms[place]
        pieces.extend((start, stop - start, row, length - room))
        left = room - -(-(stop - start) // align) * align
        if left > 0:
            if left not in rows_with:
                bisect.insort(rooms, left)
            rows_with.setdefault(left, []).append(row)
    return pieces


def _stream(starts: np.ndarray, length: int, align: int) -> array.array:
    """Pieces (first, size, row, offset) of windows over the documents, each moved on to a multiple of `align`."""
    sizes = np.diff(starts)
    rounded = -(-sizes // align) * align
    places = np.cumsum(rounded) - rounded
    pieces = array.array("q")
    for start, size, place in zip(starts.tolist(), sizes.tolist(), places.tolist()):
        done = 0
        while done < size:
            row, offset = divmod(place + done, length)
            step = min(size - done, length - offset)
            pieces.extend((start + done, step, row, offset))
            done += step
    return pieces
