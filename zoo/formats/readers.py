"""Weight files of every format as numpy arrays that view the file: nothing is copied, nothing is executed.

Formats are told apart by their first bytes. What a file promises about its own size is checked before any
array is made, so that a truncated file is reported as one.
"""

import ast
import dataclasses
import hashlib
import json
import math
import mmap
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from zoo.errors import WeightsError
from zoo.formats import orbax_dir, tf_checkpoint, torch_files
from zoo.keymap import flatten

# How training scripts call the state dicts in one file: raw, moving average.
_RAW_NAMES = ("state_dict", "model", "model_state_dict", "module")
_EMA_NAMES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.")

SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "C64": np.complex64,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class Source:
    """The arrays of one source, under the names they have there.

    Attributes:
        arrays: name -> array, read-only views where the format allows it.
        path: the file, directory or prefix of a checkpoint's files, None for a mapping.
        format: `"safetensors"`, `"npz"`, `"torch"`, `"torch (legacy)"`, `"orbax"`, `"tensorflow"` or
            `"mapping"`.
        sha256: digest of the file, None where there is not one file.
        weights: `"ema"` or `"raw"` where the source distinguishes them, else None.
        unwrapped: what was taken off on the way to the arrays: an outer dict's key, a prefix of all names.
        beside: what else the outer dict held (`"optimizer"`, `"epoch"`, ...); a TensorFlow checkpoint's strings.
    """

    arrays: Mapping[str, np.ndarray]
    path: str | None
    format: str
    sha256: str | None = None
    weights: str | None = None
    unwrapped: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


def read_weights(source: Any, weights: str | None = None) -> dict[str, np.ndarray]:
    """All arrays of a source by name, as `open_source` finds them."""
    return dict(open_source(source, weights).arrays)


def open_source(source: Any, weights: str | None = None, *, default: str = "ema") -> Source:
    """Opens a weight file, a checkpoint directory of the train loop, or a mapping of arrays.

    Args:
        source: path of a `.safetensors`, `.npz` or torch file (zip or legacy), of an Orbax directory, of a
            TensorFlow checkpoint (its prefix such as `model.ckpt-100`, one of its files, or a directory whose file
            `checkpoint` names it or that holds no other), or a (nested) mapping of numpy, jax, torch or TensorFlow
            arrays.
        weights: `"ema"` for the moving average, `"raw"` for the weights as trained; None takes the average
            where there is one.
        default: `"raw"` lets None take the weights as trained where a file or mapping has both.

    Raises:
        WeightsError: for a file that is missing, truncated, damaged, of no known format or that wants code
            executed, and where `weights` asks for what the source does not hold.
    """
    if weights not in (None, "ema", "raw"):
        raise ValueError(f"weights must be 'ema', 'raw' or None, got {weights!r}")
    if isinstance(source, Mapping):
        return _select(source, weights, default, path=None, format="mapping", sha256=None)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source must be a path or a mapping of arrays, got {type(source).__name__}")
    if (directory := orbax_dir.checkpoint_path(source)).is_dir():
        prefix = tf_checkpoint.find_prefix_in(directory)
        return _open_directory(directory, weights) if prefix is None else _open_tensorflow(prefix, weights)
    path = Path(source).expanduser()
    if "://" in str(source):
        raise WeightsError(f"{source}: only checkpoint directories are read from there; copy the file to a disk")
    if (prefix := tf_checkpoint.find_prefix(path)) is not None:
        return _open_tensorflow(prefix, weights)
    if not path.exists():
        raise WeightsError(f"{path}: no such file{tf_checkpoint.nearest_prefix(path)}")
    try:
        tree, format = _read_file(path)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error.__cause__
    return _select(tree, weights, default, path=str(path), format=format, sha256=file_sha256(path))


def file_sha256(path: str | os.PathLike) -> str:
    """The file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_directory(path: epath.Path, weights: str | None) -> Source:
    root, step = orbax_dir.locate(path)
    try:
        step, state, _ = orbax_dir.read_state(root, step, only=("params", "model_state", "ema"))
    except orbax_dir.CheckpointError as error:
        raise WeightsError(f"{path}: {error}") from error
    tree = {"state_dict": {"params": state["params"], **state["model_state"]}, "ema": state["ema"]}
    found = _select(tree, weights, path=str(path), format="orbax", sha256=None)
    return dataclasses.replace(found, unwrapped=(f"step {step}",), beside=())


def _open_tensorflow(prefix: Path, weights: str | None) -> Source:
    arrays, strings = tf_checkpoint.read_checkpoint(prefix)
    found = _select(arrays, weights, path=str(prefix), format="tensorflow", sha256=None)
    return dataclasses.replace(found, beside=strings)


def _read_file(path: Path) -> tuple[Any, str]:
    size = path.stat().st_size
    if size == 0:
        raise WeightsError("truncated at byte 0: the file is empty")
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if path.suffix == ".safetensors" or data[8:9] == b"{":
        return _read_safetensors(data), "safetensors"
    if data[:4] == b"PK\x03\x04":
        return _read_zip(path, data)
    if data[:1] == b"\x80":
        return torch_files.read_legacy(data), "torch (legacy)"
    raise WeightsError(
        f"not a weight file: it begins with {data[:8]!r}; safetensors, npz, torch (.pth, .pt, .bin) files, Orbax"
        " directories and TensorFlow checkpoints can be read"
    )


def _read_safetensors(data: mmap.mmap) -> dict[str, np.ndarray]:
    """Source: https://huggingface.co/docs/safetensors, section Format."""
    size = len(data)
    begin = 8 + struct.unpack("<Q", data[:8])[0] if size >= 8 else 8
    if begin > size:
        raise WeightsError(f"truncated at byte {size}: its header ends at byte {begin}")
    try:
        header = json.loads(data[8:begin])
        header.pop("__metadata__", None)
        entries = {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()}
        numbers = [n for _, shape, *offsets in entries.values() for n in (*shape, *offsets)]
        if not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise ValueError("a length or offset is not a natural number")
        end = begin + max((last for _, _, _, last in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"damaged: the header up to byte {begin} is not that of safetensors") from error
    if end > size:
        raise WeightsError(f"truncated at byte {size}: its tensors end at byte {end}")
    if end < size:
        raise WeightsError(f"damaged: {size - end} bytes follow the last tensor at byte {end}")
    arrays = {}
    for name, (code, shape, first, last) in entries.items():
        if code not in SAFETENSORS_DTYPES:
            raise WeightsError(f"{name!r} has dtype {code}; known: {', '.join(SAFETENSORS_DTYPES)}")
        dtype = np.dtype(SAFETENSORS_DTYPES[code])
        count = math.prod(shape)
        if last - first != count * dtype.itemsize:
            raise WeightsError(f"damaged: {name!r} {code}{list(shape)} does not fill bytes {first} to {last}")
        arrays[name] = np.frombuffer(data, dtype, count, begin + first).reshape(shape)
    return arrays


def _read_zip(path: Path, data: mmap.mmap) -> tuple[Any, str]:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        # The last record of a complete archive has this signature and at least 22 bytes.
        if 0 <= data.rfind(b"PK\x05\x06") <= len(data) - 22:
            raise WeightsError(f"damaged: its zip directory cannot be read ({error})") from error
        message = f"truncated at byte {len(data)}: the zip directory that ends a complete file is missing"
        raise WeightsError(message) from error
    with archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
        if pickles:
            root = pickles[0].removesuffix("data.pkl")

            def record(name: str) -> memoryview:
                if root + name not in members:
                    raise WeightsError(f"damaged: record {name!r:.80} is missing")
                return _member(archive, data, members[root + name])

            # Files from before torch 2.1 do not say, and come from little-endian machines.
            if f"{root}byteorder" in members and bytes(record("byteorder")) != b"little":
                raise WeightsError("written on a big-endian machine: save it again on a little-endian one")
            return torch_files.read_zip(bytes(record("data.pkl")), record), "torch"
        if not members or not all(name.endswith(".npy") for name in members):
            raise WeightsError("a zip archive of neither numpy arrays (.npz) nor torch (no data.pkl)")
        arrays = {}
        for name, info in members.items():
            name = name.removesuffix(".npy")
            arrays[name] = _read_npy(_member(archive, data, info), name)
        return arrays, "npz"


def _member(archive: zipfile.ZipFile, data: mmap.mmap, info: zipfile.ZipInfo) -> memoryview:
    """The bytes of one member: a view of the file unless it is compressed."""
    if info.compress_type != zipfile.ZIP_STORED:
        try:
            return memoryview(archive.read(info))
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise WeightsError(f"damaged: {info.filename!r} cannot be decompressed ({error})") from error
    header = data[info.header_offset : info.header_offset + 30]
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise WeightsError(f"damaged at byte {info.header_offset}: the entry {info.filename!r} is not there")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start = info.header_offset + 30 + name_length + extra_length
    view = memoryview(data)[start : start + info.file_size]
    if len(view) < info.file_size:
        end = start + info.file_size
        raise WeightsError(f"truncated at byte {len(data)}: {info.filename!r} ends at byte {end}")
    # torch can be told to leave the checksums out, and writes zeros.
    if info.CRC and zlib.crc32(view) != info.CRC:
        raise WeightsError(f"damaged: the bytes {start} to {start + info.file_size} fail their checksum")
    return view


def _read_npy(view: memoryview, name: str) -> np.ndarray:
    """Source: `numpy.lib.format`, read by hand so that the array stays a view of the file."""
    try:
        if bytes(view[:6]) != b"\x93NUMPY":
            raise ValueError("no numpy header")
        wide = view[6] >= 2
        begin = 12 if wide else 10
        length = struct.unpack("<I" if wide else "<H", view[8:begin])[0]
        header = ast.literal_eval(bytes(view[begin : begin + length]).decode("latin-1"))
        dtype, shape = np.dtype(header["descr"]), header["shape"]
        if dtype.hasobject:
            raise WeightsError(f"refused {name!r}: it holds Python objects, which only a pickle can restore")
        # numpy stores bfloat16 as two bytes of unknown type; no other such type has two.
        dtype = np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype
        array = np.frombuffer(view, dtype, math.prod(shape), begin + length)
        return array.reshape(shape, order="F" if header["fortran_order"] else "C")
    except WeightsError:
        raise
    except (ValueError, KeyError, TypeError, SyntaxError, IndexError, struct.error) as error:
        raise WeightsError(f"damaged: {name!r} is not a numpy array ({error})") from error


def _select(
    tree: Any, weights: str | None, default: str = "ema", *, path: str | None, format: str, sha256: str | None
) -> Source:
    """Unwraps outer dicts and prefixes, and chooses between raw and averaged weights."""
    where = path or "the mapping"
    if not isinstance(tree, Mapping):
        raise WeightsError(f"{where} holds a {type(tree).__name__}, not a dict of tensors")
    raw = next((name for name in _RAW_NAMES if isinstance(tree.get(name), Mapping)), None)
    ema = next((name for name in _EMA_NAMES if isinstance(tree.get(name), Mapping) and tree[name]), None)
    wanted = weights or (default if raw else "ema")
    chosen, kind = (ema, "ema") if ema and wanted != "raw" else (raw, "raw" if ema else None)
    unwrapped, beside = (), ()
    if chosen is not None:
        beside = tuple(sorted(str(name) for name in tree if name not in (chosen, ema, raw)))
        tree, unwrapped = tree[chosen], (chosen,)
    elif ema:
        raise WeightsError(f"{where} holds averaged weights ({ema!r}) only, not raw ones")
    arrays = {name: as_numpy(value, name) for name, value in flatten(tree).items()}
    # TensorFlow ends its variables' names with the number of an output.
    if arrays and all(name.endswith(":0") for name in arrays):
        arrays = {name[:-2]: array for name, array in arrays.items()}
    while prefix := next((p for p in _WRAPPER_PREFIXES if _is_common(p, arrays)), None):
        arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
        unwrapped = (*unwrapped, prefix)
    if not arrays:
        raise WeightsError(f"{where} holds no tensors")
    return Source(arrays, path, format, sha256, kind, unwrapped, beside)


def _is_common(prefix: str, names: Mapping[str, Any]) -> bool:
    # Most, not all: one name with a mistake in it must not hide that the others are wrapped.
    return sum(name.startswith(prefix) for name in names) > len(names) / 2


def as_numpy(value: Any, name: str) -> np.ndarray:
    """An array of any framework as numpy, without importing the framework.

    Raises:
        WeightsError: for what is not an array of numbers.
    """
    if isinstance(value, np.ndarray):
        array = value
    elif hasattr(value, "detach"):
        array = _torch_to_numpy(value)
    else:
        try:
            array = np.asarray(value)
        except ValueError:
            array = np.asarray(None)
    if array.dtype.kind not in "fiubc" and array.dtype.type.__module__ != ml_dtypes.bfloat16.__module__:
        raise WeightsError(f"{name!r} is a {type(value).__name__}, not an array of numbers")
    return array


def _torch_to_numpy(tensor: Any) -> np.ndarray:
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        # numpy() refuses bfloat16; whoever made the tensor has imported torch.
        return tensor.contiguous().view(sys.modules["torch"].int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
