"""TensorFlow checkpoints without TensorFlow: `PREFIX.index`, `PREFIX.data-00000-of-00001` and so on.

Source: TensorFlow, `core/util/tensor_bundle/naming.h` and, for the file `checkpoint`,
`python/training/checkpoint_state.proto`.
"""

import difflib
import math
import mmap
import os
import re
from pathlib import Path

import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import Shaped

from zoo.errors import WeightsError
from zoo.formats.crc32c import masked_crc32c
from zoo.formats.tf_index import TO_THE_END, Entry, Index, part_key, read_index

# The numbers of `core/framework/types.proto`.
_DTYPES = {
    1: np.float32,
    2: np.float64,
    3: np.int32,
    4: np.uint8,
    5: np.int16,
    6: np.int8,
    8: np.complex64,
    9: np.int64,
    10: np.bool_,
    14: ml_dtypes.bfloat16,
    17: np.uint16,
    18: np.complex128,
    19: np.float16,
    22: np.uint32,
    23: np.uint64,
    24: ml_dtypes.float8_e5m2,
    25: ml_dtypes.float8_e4m3fn,
}
# Strings, such as the graph of Python objects, and variants.
_NO_NUMBERS = (7, 21)


def find_prefix(source: Path) -> Path | None:
    """The prefix of the checkpoint that a path means, None where it means none.

    Args:
        source: the prefix itself (`model.ckpt-100`), or one of the files that begin with it.
    """
    if not source.exists():
        return source if _index_file(source).is_file() else None
    member = re.fullmatch(r"(.+)\.(?:index|meta|data-\d{5}-of-\d{5})", source.name)
    return source.with_name(member[1]) if member else None


def nearest_prefix(source: Path) -> str:
    """The end of an error about a path that does not exist: the checkpoint beside it whose prefix is most like it."""
    prefixes = [path.name.removesuffix(".index") for path in source.parent.glob("*.index")]
    close = difflib.get_close_matches(source.name, prefixes, n=1)
    return f"; nearest TensorFlow checkpoint: {close[0]!r}" if close else ""


def find_prefix_in(directory: epath.Path) -> Path | None:
    """The prefix of the checkpoint that a directory stands for, None where it holds no checkpoint.

    That is the one which the file `checkpoint` names, or the only one there is.

    Raises:
        WeightsError: where the file names none that is there, where there are several and no such file, and for a
            directory that is not on a disk.
    """
    prefixes = sorted(path.name.removesuffix(".index") for path in directory.glob("*.index"))
    state = directory / "checkpoint"
    if not prefixes and not state.is_file():
        return None
    if "://" in str(directory):
        raise WeightsError(f"{directory}: a TensorFlow checkpoint is read from a disk only; copy its files there")
    local, there = Path(directory), f"it holds {', '.join(map(repr, prefixes)) or 'no .index file'}"
    if state.is_file():
        name = _newest(state.read_bytes())
        if name is None:
            raise WeightsError(f'{state}: damaged: it has no line model_checkpoint_path: "NAME"')
        # An absolute path may be that of the machine which wrote the checkpoint.
        for prefix in (local / name, local / os.path.basename(name)):
            if _index_file(prefix).is_file():
                return prefix
        raise WeightsError(f"{directory}: the file 'checkpoint' names {name!r}, which is not there; {there}")
    if len(prefixes) > 1:
        raise WeightsError(f"{directory}: {there}; pass the path of one of them")
    return local / prefixes[0]


def read_checkpoint(prefix: Path) -> tuple[dict[str, Shaped[np.ndarray, "..."]], tuple[str, ...]]:
    """The arrays of a checkpoint, each held against its checksum.

    Args:
        prefix: what the names of the checkpoint's files begin with.

    Returns:
        Name -> array, a read-only view of a data file unless the variable was saved in parts; and the names of
        the tensors that hold no numbers: strings and variants.

    Raises:
        WeightsError: naming the file that is missing, truncated, damaged or of another format.
    """
    index = read_index(_index_file(prefix))
    data = _Data(prefix, index)
    arrays = {}
    for name, entry in index.tensors.items():
        if entry.dtype in _NO_NUMBERS:
            continue
        array = _assembled(name, entry, index, data) if entry.parts else data.read(name, entry)
        if array is None:
            raise WeightsError(f"{index.path}: damaged: the parts of {name!r} do not make up {list(entry.shape)}")
        arrays[name] = array
    return arrays, tuple(name for name in index.tensors if name not in arrays)


def _index_file(prefix: Path) -> Path:
    return Path(f"{prefix}.index")


def _newest(state: bytes) -> str | None:
    """The path that the text of a file `checkpoint` gives for the newest one."""
    found = re.search(rb'^\s*model_checkpoint_path\s*:\s*"((?:[^"\\\n]|\\.)+)"', state, re.MULTILINE)
    if found is None:
        return None
    # A byte outside ASCII is written as a backslash and three octal digits.
    return os.fsdecode(
        re.sub(rb"\\([0-3][0-7]{2}|.)", lambda m: m[1] if len(m[1]) == 1 else bytes([int(m[1], 8)]), found[1])
    )


class _Data:
    """The data files of a checkpoint, mapped into memory; all that the index speaks of must be there."""

    def __init__(self, prefix: Path, index: Index):
        ends: dict[int, int] = {}
        for entry in (*index.tensors.values(), *index.parts.values()):
            if not entry.parts:
                ends[entry.shard] = max(ends.get(entry.shard, 0), entry.offset + entry.size)
        self._paths = {shard: Path(f"{prefix}.data-{shard:05d}-of-{index.shards:05d}") for shard in sorted(ends)}
        self._bytes = {}
        for shard, path in self._paths.items():
            if not path.is_file():
                raise WeightsError(f"{path}: no such file; {index.path.name} wants it beside itself")
            size = path.stat().st_size
            if size < ends[shard]:
                raise WeightsError(f"{path}: truncated at byte {size}: its tensors end at byte {ends[shard]}")
            with open(path, "rb") as file:
                # An empty file cannot be mapped.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
            self._bytes[shard] = np.frombuffer(mapped, np.uint8)

    def read(self, name: str, entry: Entry) -> np.ndarray:
        """The array of an entry, `name` being the tensor's."""
        path, end = self._paths[entry.shard], entry.offset + entry.size
        if entry.dtype not in _DTYPES:
            known = ", ".join(np.dtype(dtype).name for dtype in _DTYPES.values())
            raise WeightsError(f"{path}: {name!r} has TensorFlow's dtype number {entry.dtype}; known: {known}")
        dtype = np.dtype(_DTYPES[entry.dtype])
        if entry.size != math.prod(entry.shape) * dtype.itemsize:
            what = f"{name!r} {dtype}{list(entry.shape)}"
            raise WeightsError(f"{path}: damaged: {what} does not fill the bytes {entry.offset} to {end}")
        data = self._bytes[entry.shard][entry.offset : end]
        if masked_crc32c(data) != entry.crc:
            raise WeightsError(f"{path}: damaged: {name!r}, the bytes {entry.offset} to {end}, fails its checksum")
        return data.view(dtype).reshape(entry.shape)


def _assembled(name: str, entry: Entry, index: Index, data: _Data) -> np.ndarray | None:
    """A variable that was saved in parts, None where they do not fit together."""
    found = [index.parts.get(part_key(name, extents)) for extents in entry.parts]
    if any(part is None or part.dtype != entry.dtype for part in found):
        return None
    arrays = [data.read(name, part) for part in found]
    if sum(array.size for array in arrays) != math.prod(entry.shape):
        return None
    whole, filled = np.empty(entry.shape, arrays[0].dtype), np.zeros(entry.shape, bool)
    for extents, array in zip(entry.parts, arrays):
        where = tuple(slice(a, None if n == TO_THE_END else a + n) for a, n in extents)
        if len(where) != whole.ndim or whole[where].shape != array.shape:
            return None
        whole[where], filled[where] = array, True
    whole.flags.writeable = False
    return whole if filled.all() else None
