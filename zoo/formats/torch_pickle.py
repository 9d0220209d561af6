"""Interprets the pickles inside `torch.save` files without torch and without executing anything in them.

A pickle is a program: its opcodes may call any function of any module. Here they are interpreted by hand, and
the only things that can come of them are descriptions of tensors, dicts, lists, tuples, strings and numbers.
The name of anything else is refused before it is looked up.

Source: `torch/_utils.py` for the arguments of the rebuild functions; `pickletools` for the opcodes.
"""

import io
import mmap
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from zoo.errors import WeightsError

DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "complex64": np.complex64,
    "complex128": np.complex128,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
}
_DTYPE_NAMES = {f"torch.{name}": dtype for name, dtype in DTYPES.items()}
STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.ComplexFloatStorage": "complex64",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.storage.UntypedStorage": "uint8",
}


@dataclass(frozen=True)
class Storage:
    key: str
    dtype: np.dtype
    numel: int
    offset: int = 0


@dataclass(frozen=True)
class Tensor:
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class _Name:
    """A global that the pickle mentions: never looked up, only compared."""

    name: str


class _Mark:
    """Where an argument list starts on the stack."""


class Interpreter:
    """Runs one pickle over plain data."""

    def __init__(self, stream: io.BytesIO | mmap.mmap, size: int):
        self._stream, self._size = stream, size
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def run(self) -> Any:
        start = self._stream.tell()
        try:
            while code := self._stream.read(1):
                opcode = pickletools.code2op.get(code.decode("latin-1"))
                if opcode is None:
                    raise ValueError(f"there is no opcode {code!r}")
                if opcode.name == "STOP":
                    return self._stack.pop()
                # An argument is read only for the opcodes that are known here.
                self._step(opcode.name, lambda reader=opcode.arg: reader.reader(self._stream))
        except WeightsError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            if self._stream.tell() >= self._size:
                message = f"truncated at byte {self._size}: inside the pickle that begins at byte {start}"
            else:
                message = f"damaged: the pickle that begins at byte {start} is not well formed ({error})"
            raise WeightsError(message) from error
        raise WeightsError(f"truncated at byte {self._size}: the pickle from byte {start} has no end")

    def _step(self, opcode: str, argument: Callable[[], Any]) -> None:
        stack = self._stack
        match opcode:
            case "PROTO" | "FRAME":
                argument()
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode == "NEWTRUE")
            case (
                "INT"
                | "BININT"
                | "BININT1"
                | "BININT2"
                | "LONG"
                | "LONG1"
                | "LONG4"
                | "FLOAT"
                | "BINFLOAT"
                | "BINSTRING"
                | "SHORT_BINSTRING"
                | "UNICODE"
                | "BINUNICODE"
                | "SHORT_BINUNICODE"
                | "BINUNICODE8"
                | "BINBYTES"
                | "SHORT_BINBYTES"
                | "BINBYTES8"
            ):
                stack.append(argument())
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                stack.append(_Mark)
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "LIST":
                stack.append(self._since_mark())
            case "DICT":
                stack.append(_pairs(self._since_mark()))
            case "APPEND":
                value = stack.pop()
                expect(stack[-1], list).append(value)
            case "APPENDS":
                values = self._since_mark()
                expect(stack[-1], list).extend(values)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                expect(stack[-1], dict)[key] = value
            case "SETITEMS":
                pairs = _pairs(self._since_mark())
                expect(stack[-1], dict).update(pairs)
            case "POP":
                stack.pop()
            case "DUP":
                stack.append(stack[-1])
            case "POP_MARK":
                self._since_mark()
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[argument()] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument()])
            case "GLOBAL":
                stack.append(_name(argument().replace(" ", ".")))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_name(f"{module}.{attribute}"))
            case "REDUCE" | "NEWOBJ":
                arguments, name = stack.pop(), stack.pop()
                stack.append(_build(expect(name, _Name).name, expect(arguments, tuple)))
            case "BUILD":
                state = stack.pop()
                _set_state(stack[-1], state)
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case _:
                raise WeightsError(f"refused pickle opcode {opcode}: it does not occur in saved tensors")

    def _since_mark(self) -> list[Any]:
        stack = self._stack
        at = len(stack) - 1 - stack[::-1].index(_Mark)
        values = stack[at + 1 :]
        del stack[at:]
        return values

    def _storage(self, identity: Any) -> Storage:
        if not isinstance(identity, tuple) or identity[0] != "storage":
            raise WeightsError("refused a persistent object: only tensor storages are read")
        _, kind, key, _, numel, *view = identity
        kind, key, numel = expect(kind, _Name).name, expect(key, str), expect(numel, int)
        if kind not in STORAGES:
            raise WeightsError(f"refused storage type {kind}")
        storage = Storage(key, np.dtype(DTYPES[STORAGES[kind]]), numel)
        if numel < 0 or self.storages.setdefault(key, storage) != storage:
            raise WeightsError(f"damaged: storage {key!r:.40} is described in two ways")
        if view and view[0] is not None:
            # torch before 0.4 saved a view of a storage as (its key, offset, length).
            _, offset, numel = view[0]
            return Storage(key, storage.dtype, expect(numel, int), expect(offset, int))
        return storage


def _name(name: str) -> _Name:
    if name not in _BUILDERS and name not in STORAGES and name not in _DTYPE_NAMES:
        raise WeightsError(
            f"refused to build {name!r:.200}: only tensors, dicts, lists and numbers are read from a pickle,"
            " and nothing in it is executed. If you trust the file, load it where it was made and save its"
            " state_dict() alone, best as .safetensors"
        )
    return _Name(name)


def _build(name: str, arguments: tuple[Any, ...]) -> Any:
    if name not in _BUILDERS:
        raise WeightsError(f"damaged: {name!r} is called, which is not a function of saved tensors")
    return _BUILDERS[name](*arguments)


def _set_state(target: Any, state: Any) -> None:
    # numpy's byte order, and the `_metadata` (module versions) of a state_dict: no parameter is in them.
    if isinstance(target, np.dtype):
        return
    if not isinstance(target, dict) or not isinstance(state, dict):
        raise WeightsError(f"refused to set the state of a {type(target).__name__}")
    if "_metadata" not in state:
        target.update(state)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    storage = expect(storage, Storage)
    return _checked_tensor(storage, offset, shape, strides, storage.dtype)


def _typed_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    _requires_grad, _hooks, dtype, *_ = rest
    dtype = _DTYPE_NAMES[expect(dtype, _Name).name]
    return _checked_tensor(expect(storage, Storage), offset, shape, strides, np.dtype(dtype))


def _checked_tensor(storage: Storage, offset: Any, shape: Any, strides: Any, dtype: np.dtype) -> Tensor:
    numbers = (storage.offset, offset, *shape, *strides)
    if len(shape) != len(strides) or not all(isinstance(n, int) and 0 <= n < 1 << 48 for n in numbers):
        raise WeightsError("damaged: a tensor whose shape or strides are not those of an array")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides)) if all(shape) else offset - 1
    available = storage.numel * storage.dtype.itemsize // dtype.itemsize
    if last >= available:
        raise WeightsError(f"damaged: a tensor of shape {shape} reaches beyond its storage of {available}")
    return Tensor(storage, storage.offset + offset, tuple(shape), tuple(strides), dtype)


def _namespace() -> dict[str, Any]:
    return {}


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    return {key: value for key, value in pairs}


def _first(value: Any, *_: Any) -> Any:
    return value


def _dtype_of(code: Any, *_: Any) -> np.dtype:
    dtype = np.dtype(expect(code, str))
    if dtype.hasobject:
        raise WeightsError(f"refused a numpy array of dtype {code!r}")
    return dtype


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    return np.frombuffer(expect(data, bytes), expect(dtype, np.dtype))[0]


def _encoded(text: Any, _encoding: Any) -> bytes:
    return expect(text, str).encode("latin-1")


_BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.Size": _first,
    "collections.OrderedDict": _ordered_dict,
    "argparse.Namespace": _namespace,
    "numpy.dtype": _dtype_of,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "_codecs.encode": _encoded,
}


def expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise WeightsError(f"damaged pickle: a {kind.__name__} was expected, not a {type(value).__name__}")
    return value


def _pairs(values: list[Any]) -> dict[Any, Any]:
    return dict(zip(values[::2], values[1::2], strict=True))
