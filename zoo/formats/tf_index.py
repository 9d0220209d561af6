"""The index of a TensorFlow checkpoint: which tensor is where in the data files.

It is a sorted table in LevelDB's format: blocks of entries in the order of their keys, each block with a checksum,
and a footer that says where the block is that lists the others. The keys are the names of the tensors, the values
messages of protocol buffers.

Source: LevelDB, `doc/table_format.md`; TensorFlow, `core/protobuf/tensor_bundle.proto`, and for the keys of variables
in parts `core/util/saved_tensor_slice_util.cc` and `core/lib/strings/ordered_code.cc`.
"""

import dataclasses
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from zoo.errors import WeightsError
from zoo.formats.crc32c import masked_crc32c

_MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
_FOOTER = 48
_TRAILER = struct.Struct("<BI")
_FORMAT_VERSION = 1
# Protocol buffers: wire type -> bytes of a number of fixed length.
_FIXED = {1: 8, 5: 4}
_PART = b"\0"

TO_THE_END = -1


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor, or a part of one, is.

    Attributes:
        dtype: the number of its dtype in `core/framework/types.proto`.
        shard, offset, size, crc: the number of the data file, the bytes in it and their masked checksum.
        parts: of a variable that was saved in parts, for each of them a (start, length) by axis.
    """

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    parts: tuple[tuple[tuple[int, int], ...], ...]


@dataclasses.dataclass(frozen=True)
class Index:
    """What a checkpoint holds.

    Attributes:
        path: the file that says so.
        shards: how many data files the checkpoint has.
        tensors: name -> where it is.
        parts: key, as `part_key` makes it, -> where that part of a tensor is.
    """

    path: Path
    shards: int
    tensors: Mapping[str, Entry]
    parts: Mapping[bytes, Entry]


def read_index(path: Path) -> Index:
    """Reads and checks a `.index` file.

    Raises:
        WeightsError: where it is missing, truncated, damaged or of another format.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; without it nothing says which tensors are in the .data files")
    try:
        return _parsed(path, path.read_bytes())
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error.__cause__
    except (ValueError, struct.error) as error:
        raise WeightsError(f"{path}: damaged: {error}") from error


def part_key(name: str, extents: Sequence[tuple[int, int]]) -> bytes:
    """The key of a part: name, number of axes, starts and lengths, spelled so that bytes sort as they do."""
    # Ordered codes begin a number with its length in bytes: zero has none, the number of axes one.
    key = _PART + name.encode() + b"\0\1" + (bytes([1, len(extents)]) if extents else b"\0")
    for number in (number for extent in extents for number in extent):
        # With a sign, the length is the number of leading ones, zeros if it is negative; one zero, and the number.
        size = 1 + (number if number >= 0 else ~number).bit_length() // 7
        ones = (1 << size) - 1 << 7 * size
        key += (number & (1 << 8 * size) - 1 ^ ones).to_bytes(size, "big")
    return key


def _parsed(path: Path, file: bytes) -> Index:
    if len(file) < _FOOTER or not file.endswith(_MAGIC):
        raise WeightsError(
            f"truncated at byte {len(file)}, or not of TensorFlow: it ends with {file[-8:]!r}, not with {_MAGIC!r}"
        )
    footer = file[-_FOOTER:]
    # The first of two handles, two numbers each, is that of a block about the table, which TensorFlow leaves empty.
    list(_block(file, footer))
    at = _varint(footer, _varint(footer, 0)[1])[1]
    values: dict[bytes, bytes] = {}
    last = None
    for _, handle in _block(file, footer[at:]):
        for key, value in _block(file, handle):
            if last is not None and key <= last:
                raise ValueError(f"its key {key!r:.80} is out of order")
            values[key], last = value, key
    if b"" not in values:
        raise ValueError("its header is missing")
    header = _fields(values.pop(b""), numbers=(1, 2), messages=(3,))
    if _last(header[2]) != 0:
        raise WeightsError("written on a big-endian machine: save it again on a little-endian one")
    version = _last(_fields(b"".join(header[3]), numbers=(2,))[2])
    if version > _FORMAT_VERSION:
        raise WeightsError(f"written in version {version} of its format; known: up to {_FORMAT_VERSION}")
    entries = {key: _entry(value) for key, value in values.items()}
    parts = {key: entry for key, entry in entries.items() if key.startswith(_PART)}
    if any(part.parts for part in parts.values()):
        raise ValueError("a part of a tensor has parts")
    tensors = {key.decode(): entry for key, entry in entries.items() if key not in parts}
    return Index(path, _last(header[1]), tensors, parts)


def _block(file: bytes, handle: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of the block that begins at the handle's first number and has its second one as length."""
    start, at = _varint(handle, 0)
    size, _ = _varint(handle, at)
    end, limit = start + size, len(file) - _FOOTER - _TRAILER.size
    if size < 4 or end > limit:
        raise ValueError(f"a block from byte {start} to {end} does not fit in the {limit} bytes before the footer")
    method, crc = _TRAILER.unpack_from(file, end)
    if masked_crc32c(file[start : end + 1]) != crc:
        raise ValueError(f"the bytes {start} to {end} fail their checksum")
    if method != 0:
        name = "with snappy" if method == 1 else f"by method {method}"
        raise WeightsError(f"compressed {name}, which TensorFlow does not do: save it again with TensorFlow")
    # Entries are followed by the places where keys are written in full, and the number of those.
    (restarts,) = struct.unpack_from("<I", file, end - 4)
    at, stop, key = start, end - 4 - 4 * restarts, b""
    if stop < start:
        raise ValueError(f"the block that ends at byte {end} is shorter than it says")
    while at < stop:
        shared, at = _varint(file, at)
        own, at = _varint(file, at)
        length, at = _varint(file, at)
        middle, next_one = at + own, at + own + length
        if shared > len(key) or next_one > stop:
            raise ValueError(f"the entry that ends at byte {next_one} does not fit in its block")
        key = key[:shared] + file[at:middle]
        yield key, file[middle:next_one]
        at = next_one


def _entry(message: bytes) -> Entry:
    fields = _fields(message, numbers=(1, 3, 4, 5, 6), messages=(2, 7))
    axes = _fields(b"".join(fields[2]), messages=(2,))[2]
    shape = tuple(_last(_fields(axis, numbers=(1,))[1]) for axis in axes)
    # Of a longer or larger one numpy makes no array, even if it is empty.
    if len(shape) > 32 or math.prod(max(n, 1) for n in shape) >= 1 << 48:
        raise ValueError(f"the shape {shape} is not that of an array")
    parts = []
    for part in fields[7]:
        axes = [_fields(axis, numbers=(1, 2)) for axis in _fields(part, messages=(1,))[1]]
        parts.append(tuple((_last(axis[1]), _last(axis[2], TO_THE_END)) for axis in axes))
    return Entry(_last(fields[1]), shape, *(_last(fields[number]) for number in (3, 4, 5, 6)), tuple(parts))


def _fields(message: bytes, *, numbers: Sequence[int] = (), messages: Sequence[int] = ()) -> dict[int, list]:
    """All values of the fields with these numbers, integers of the first and bytes of the second ones."""
    found: dict[int, list] = {field: [] for field in (*numbers, *messages)}
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        field, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, at = _varint(message, at)
        elif wire_type == 2 or wire_type in _FIXED:
            size, at = _varint(message, at) if wire_type == 2 else (_FIXED[wire_type], at)
            value, at = message[at : at + size], at + size
            value = value if wire_type == 2 else int.from_bytes(value, "little")
        else:
            raise ValueError(f"a field has wire type {wire_type}")
        if at > len(message) or (field in found and (wire_type == 2) != (field in messages)):
            raise ValueError(f"field {field} of an entry is cut short or has wire type {wire_type}")
        if field in found:
            found[field].append(value)
    return found


def _last(values: Sequence[int], default: int = 0) -> int:
    return values[-1] if values else default


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins at a byte, seven bits in each, and where the next thing begins."""
    value = 0
    for place, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, at + place + 1
    raise ValueError(f"a number at byte {at} has no end")
