"""Writes TensorFlow checkpoints, also such as TensorFlow would not write; shares nothing with the reader."""

import os
import struct

import ml_dtypes
import numpy as np

NUMBERS = {np.dtype(np.float32): 1, np.dtype(np.int64): 9, np.dtype(ml_dtypes.bfloat16): 14}


def beside(prefix, ending):
    """One of a checkpoint's files."""
    return prefix.with_name(prefix.name + ending)


def varint(number):
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def field(number, value):
    """A field of a message of protocol buffers: of bytes, or of an integer."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


HEADER = field(1, 1) + field(3, field(1, 1))


def entry(array, offset, data, *, dtype=None, shape=None, crc=None):
    """Where an array is in the data file, or a lie about it."""
    sizes = array.shape if shape is None else shape
    return b"".join(
        (
            field(1, NUMBERS[array.dtype] if dtype is None else dtype),
            field(2, b"".join(field(2, field(1, n)) for n in sizes)),
            field(4, offset),
            field(5, len(data)),
            varint(6 << 3 | 5) + struct.pack("<I", mask(slow_crc32c(data)) if crc is None else crc),
        )
    )


def write_index(prefix, pairs, *, per_block=3, method=0):
    """Writes pairs of keys and values in blocks of so many, in the order given."""
    file, handles = b"", []

    def write_block(content):
        nonlocal file
        previous, body = b"", b""
        for key, value in content:
            shared = len(os.path.commonprefix([key, previous]))
            body += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
            previous = key
        body += struct.pack("<II", 0, 1)
        handle = varint(len(file)) + varint(len(body))
        body += bytes([method])
        file += body + struct.pack("<I", mask(slow_crc32c(body)))
        return handle

    for first in range(0, len(pairs), per_block):
        block = pairs[first : first + per_block]
        handles.append((block[-1][0], write_block(block)))
    footer = write_block([]) + write_block(handles)
    beside(prefix, ".index").write_bytes(file + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57))


def write_checkpoint(prefix, arrays, *, header=HEADER, per_block=3, method=0, **of_entries):
    """Writes arrays to one data file and the index."""
    data, pairs = b"", [(b"", header)]
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        pairs.append((name.encode(), entry(array, len(data), array.tobytes(), **of_entries)))
        data += array.tobytes()
    write_index(prefix, pairs, per_block=per_block, method=method)
    beside(prefix, ".data-00000-of-00001").write_bytes(data)


def write_parts(prefix, shape, listed, stored):
    """Writes the variable `x`: the extents of its parts, and (key, shape) of what there is, filled with ones."""
    data, pairs = b"", [(b"", HEADER)]
    for key, size in sorted(stored):
        ones = np.ones(size, np.float32)
        pairs.append((key, entry(ones, len(data), ones.tobytes())))
        data += ones.tobytes()
    slices = (b"".join(field(1, field(1, a) + (field(2, n) if n else b"")) for a, n in part) for part in listed)
    axes = b"".join(field(2, field(1, n)) for n in shape)
    pairs.append((b"x", field(1, 1) + field(2, axes) + b"".join(field(7, part) for part in slices)))
    write_index(prefix, pairs)
    beside(prefix, ".data-00000-of-00001").write_bytes(data)


def slow_crc32c(data):
    """CRC-32C as everybody computes it, byte by byte."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def mask(crc):
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % (1 << 32)


def _shifted(byte):
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_TABLE = [_shifted(byte) for byte in range(256)]
