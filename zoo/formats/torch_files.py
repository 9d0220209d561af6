"""Reads the two layouts of `torch.save`: zip archives and, before torch 1.6, pickles in a row.

Source: `torch/serialization.py`.
"""

import io
import mmap
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from zoo.errors import WeightsError
from zoo.formats.torch_pickle import Interpreter, Storage, Tensor, expect

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


def read_zip(data_pkl: bytes, record: Callable[[str], memoryview]) -> Any:
    """The object in a `torch.save` zip archive.

    Args:
        data_pkl: the archive's `data.pkl`.
        record: gives the bytes of `data/KEY`.

    Returns:
        Dicts, lists, tuples, scalars and numpy arrays that view the records.

    Raises:
        WeightsError: for a global that is not a tensor's, or a damaged file.
    """
    tree = Interpreter(io.BytesIO(data_pkl), len(data_pkl)).run()
    return _resolve(tree, lambda storage: record(f"data/{storage.key}"))


def read_legacy(file: mmap.mmap) -> Any:
    """The object in a file that `torch.save` wrote before 1.6 (or without its zip option).

    Five pickles (magic number, protocol, system, object, storage keys), then for every storage its number of
    elements as int64 and its bytes.

    Args:
        file: the mapped file, at its start.

    Returns:
        As `read_zip`.

    Raises:
        WeightsError: as `read_zip`, and where the file is cut short.
    """
    size = len(file)
    if Interpreter(file, size).run() != _LEGACY_MAGIC:
        raise WeightsError("a pickle, but not one of torch.save: the magic number is missing")
    if Interpreter(file, size).run() != _LEGACY_PROTOCOL:
        raise WeightsError(f"not of torch.save's protocol {_LEGACY_PROTOCOL}, the only one that can be read")
    system = Interpreter(file, size).run()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise WeightsError("written on a big-endian machine: save it again on a little-endian one")
    reader = Interpreter(file, size)
    tree = reader.run()
    keys = expect(Interpreter(file, size).run(), list)
    position, records = file.tell(), {}
    view = memoryview(file)
    for key in keys:
        storage = reader.storages.get(expect(key, str))
        if storage is None:
            raise WeightsError(f"damaged: storage {key!r:.40} belongs to no tensor")
        header = view[position : position + 8]
        start = position + 8
        end = start + storage.numel * storage.dtype.itemsize
        if end > size:
            raise WeightsError(f"truncated at byte {size}: storage {key!r} ends at byte {end}")
        if struct.unpack("<q", header)[0] != storage.numel:
            raise WeightsError(f"damaged at byte {position}: storage {key!r} states a wrong length")
        records[key] = view[start:end]
        position = end
    if missing := sorted(set(reader.storages) - set(records)):
        raise WeightsError(f"damaged: storages {missing} are missing")
    return _resolve(tree, lambda storage: records[storage.key])


def _resolve(tree: Any, data: Callable[[Storage], memoryview]) -> Any:
    """Tensors as arrays over their storages' bytes."""
    done: dict[int, Any] = {}

    def convert(node: Any) -> Any:
        if id(node) in done:
            return done[id(node)]
        if isinstance(node, Tensor):
            result: Any = _view(node, data(node.storage))
        elif isinstance(node, dict):
            result = {key: convert(value) for key, value in node.items()}
        elif isinstance(node, list | tuple):
            result = [convert(value) for value in node]
        else:
            return node
        done[id(node)] = result
        return result

    try:
        return convert(tree)
    except RecursionError:
        raise WeightsError("damaged: the pickle contains itself") from None
    except OverflowError as error:
        raise WeightsError(f"damaged: a tensor that no memory can hold ({error})") from None


def _view(tensor: Tensor, data: memoryview) -> np.ndarray:
    stored = tensor.storage
    if len(data) < (stored.offset + stored.numel) * stored.dtype.itemsize:
        raise WeightsError(f"damaged: storage {stored.key!r} has {len(data)} bytes, too few for its tensors")
    flat = np.frombuffer(data, np.uint8)
    flat = flat[: len(flat) // tensor.dtype.itemsize * tensor.dtype.itemsize].view(tensor.dtype)
    strides = [stride * tensor.dtype.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides, writeable=False)
