"""Writes a state dict as `torch.save` does since torch 1.6, without torch: a zip archive of a pickle and storages.

The pickle is put together opcode by opcode from the few that `torch.load(..., weights_only=True)` runs. Every tensor
has a storage of its own.

Source: `torch/serialization.py` for the archive, `torch/_utils.py` for `_rebuild_tensor_v2`, `pickletools` for the
opcodes.
"""

import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import BinaryIO

import numpy as np

from zoo.formats.torch_pickle import DTYPES, STORAGES

# All names in an archive begin with that of a folder; torch takes it from the file's name and reads any.
_ROOT = "archive"
_VERSION = b"3\n"
_ALIGNMENT = 64

_STORAGE_OF = {
    np.dtype(DTYPES[dtype]): storage for storage, dtype in STORAGES.items() if storage != "torch.storage.UntypedStorage"
}


def write_torch(
    file: BinaryIO, arrays: Mapping[str, tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]]
) -> None:
    """Writes a dict of contiguous tensors.

    Args:
        file: open for writing, seekable.
        arrays: name -> its shape, its dtype and a function that returns it.

    Raises:
        ValueError: for a dtype of which torch has no storage.
    """
    for name, (_, dtype, _) in arrays.items():
        if dtype not in _STORAGE_OF:
            raise ValueError(f"torch has no storage of dtype {dtype}, which {name!r} has")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{_ROOT}/data.pkl", _pickled(arrays))
        archive.writestr(f"{_ROOT}/byteorder", b"little")
        for key, (_, _, read) in enumerate(arrays.values()):
            data = np.ascontiguousarray(read()).reshape(-1).view(np.uint8).data
            with archive.open(_aligned(file, f"{_ROOT}/data/{key}"), "w", force_zip64=True) as member:
                member.write(data)
        archive.writestr(f"{_ROOT}/version", _VERSION)


def _aligned(file: BinaryIO, name: str) -> zipfile.ZipInfo:
    """An entry whose data begins at a multiple of 64 bytes, as torch's own do: a field that means nothing fills up."""
    entry = zipfile.ZipInfo(name)
    # The header's fixed part, the name, the field of a 64-bit length, and this field's own beginning.
    begin = file.tell() + 30 + len(name) + 20 + 4
    filler = -begin % _ALIGNMENT
    entry.extra = struct.pack("<2sH", b"FB", filler) + bytes(filler)
    return entry


def _pickled(arrays: Mapping[str, tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]]) -> bytes:
    items = b"".join(
        _text(name) + _tensor(key, shape, _STORAGE_OF[dtype])
        for key, (name, (shape, dtype, _)) in enumerate(arrays.items())
    )
    return pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS + pickle.STOP


def _tensor(key: int, shape: tuple[int, ...], storage: str) -> bytes:
    """`_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)`."""
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    identity = (_text("storage"), _name(storage), _text(str(key)), _text("cpu"), _integer(math.prod(shape)))
    hooks = _name("collections.OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = (
        _tuple(*identity) + pickle.BINPERSID,
        _integer(0),
        _tuple(*map(_integer, shape)),
        _tuple(*map(_integer, strides)),
        pickle.NEWFALSE,
        hooks,
    )
    return _name("torch._utils._rebuild_tensor_v2") + _tuple(*arguments) + pickle.REDUCE


def _name(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()


def _text(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _integer(number: int) -> bytes:
    if number < 1 << 31:
        return pickle.BININT + struct.pack("<i", number)
    return pickle.LONG1 + b"\x08" + struct.pack("<q", number)


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE
