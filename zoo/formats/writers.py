"""Writes weight files: the whole file or nothing."""

import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from zoo.formats.readers import SAFETENSORS_DTYPES
from zoo.formats.torch_writer import write_torch

_CODES = {np.dtype(dtype): code for code, dtype in SAFETENSORS_DTYPES.items()}

# Reads one array when its turn comes, so that no more than one is in memory twice.
Arrays = Mapping[str, tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]]

SUFFIXES = (".safetensors", ".npz", ".pth", ".pt")


def write_weights(path: str | os.PathLike, arrays: Arrays) -> None:
    """Writes arrays to a safetensors, numpy or torch file, whichever the name says.

    bfloat16 stays bfloat16: in `.npz`, where numpy has no name for it, as two bytes of unknown type, which
    `zoo.formats.readers` takes back for what it is.

    Args:
        path: the file; a present one is replaced once the new one is complete.
        arrays: name -> its shape, its dtype and a function that returns it.

    Raises:
        ValueError: for another suffix, or a dtype that the format does not have.
        OSError: where the file cannot be written; nothing is left behind then.
    """
    path = Path(path).expanduser()
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, got {str(path)!r}")
    write = dict(zip(SUFFIXES, (_write_safetensors, _write_npz, write_torch, write_torch)))[path.suffix]
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise type(error)(error.errno, f"cannot create a file here: {error.strerror}", str(path.parent)) from None
    try:
        with open(handle, "wb") as file:
            write(file, arrays)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp keeps others out; a weight file is as readable as any other new file.
        os.umask(mask := os.umask(0))
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _write_safetensors(file: BinaryIO, arrays: Arrays) -> None:
    # The format's own writer puts wide dtypes first, so that every tensor is aligned to its own width.
    order = sorted(arrays, key=lambda name: (-arrays[name][1].itemsize, name))
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        shape, dtype, _ = arrays[name]
        if dtype not in _CODES:
            raise ValueError(f"safetensors has no dtype {dtype}, which {name!r} has")
        end = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    # "pt" is what readers of torch's names ask for; it says nothing about this writer.
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        file.write(_bytes(arrays[name][2]()))


def _write_npz(file: BinaryIO, arrays: Arrays) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, (shape, dtype, read) in arrays.items():
            if dtype.kind == "V" and dtype != np.dtype(ml_dtypes.bfloat16):
                raise ValueError(f"npz has no dtype {dtype}, which {name!r} has")
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(
                    member, {"descr": dtype.str, "fortran_order": False, "shape": tuple(shape)}
                )
                member.write(_bytes(read()))


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
