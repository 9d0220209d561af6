"""The only file that looks at the jax version, at what this jaxlib was built with, and at how kernels are run."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton
from jax.sharding import ManualAxisType

# jit keeps a trace for each value.
_interpreting = jax.make_user_context(False)


@contextlib.contextmanager
def interpret() -> Iterator[None]:
    """Kernels traced inside the block are interpreted: plain XLA operations on whatever platform there is.

    That shows which numbers a kernel gives, not that it compiles.
    """
    with _interpreting(True):
        yield


def interpreting() -> bool:
    """Whether kernels that are traced now will be interpreted."""
    return _interpreting.value


def pallas_call(body: Callable[..., None], **options: Any) -> Callable[..., Any]:
    """`pl.pallas_call`, interpreted inside `interpret()`; takes its options but `interpret`."""
    return pl.pallas_call(body, interpret=interpreting(), **options)


# By function and static arguments; each keeps its traces by the shapes of its operands.
@functools.cache
def _jitted(function: Callable[..., Any], static: tuple[tuple[str, Hashable], ...]):
    def traced(*arrays):
        return function(*arrays, **dict(static))

    traced.__name__ = getattr(function, "__name__", "kernel").lstrip("_")
    return jax.jit(traced)


def traced_once(function: Callable[..., Any], static: dict[str, Hashable], *arrays: Any) -> Any:
    """`function(*arrays, **static)`, traced once for all calls with these shapes and static arguments.

    `jax.lax.platform_dependent` traces every branch several times and a model calls an op once a layer; a kernel
    costs 10 to 100 times what its XLA form does to trace. So each is traced behind a `jit`, which keeps the trace.

    Args:
        function: of the module, not a closure: it is the key of the cache.
        static: hashable keyword arguments.
        *arrays: operands, trees of arrays or None.
    """
    return _jitted(function, tuple(sorted(static.items())))(*arrays)


def forget_traced() -> None:
    """Empties the cache of `traced_once`: for tests that change what a trace depends on."""
    _jitted.cache_clear()


def tpu_params(**options: Any) -> pltpu.CompilerParams:
    """Compiler parameters of a Mosaic TPU kernel: `dimension_semantics`, `vmem_limit_bytes` and the like."""
    return pltpu.CompilerParams(**options)


def tpu_roll_rows(x: jax.Array, shift: int) -> jax.Array:
    """The rows of a matrix in a TPU kernel, row i moved right by `shift + i` columns, round the end."""
    if interpreting():
        # jax would write out a roll for every row.
        row, column = (jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
        return jnp.take_along_axis(x, (column - row - shift) % x.shape[1], axis=1)
    return pltpu.roll(x, shift, 1, stride=1, stride_axis=0)


# What jax 0.11 and later say whenever a Triton kernel is lowered.
TRITON_DEPRECATION = r"The Pallas Triton backend is deprecated and will be removed in a future JAX version\."


def triton_is_deprecated() -> bool:
    """Whether this jax says so of every Triton kernel that it lowers."""
    return jax.__version_info__ >= (0, 11)


@contextlib.contextmanager
def lowering_triton() -> Iterator[None]:
    """Inside the block lowering a Triton kernel does not warn that jax is going to drop it, which we know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=TRITON_DEPRECATION, category=DeprecationWarning)
        yield


def triton_params(num_warps: int, num_stages: int) -> Any:
    """Compiler parameters of a Triton kernel."""
    return triton.CompilerParams(num_warps=num_warps, num_stages=num_stages)


def triton_dot(a: jax.Array, b: jax.Array, **options: Any) -> jax.Array:
    """A matrix product inside a Triton kernel; its options are `trans_a`, `trans_b`, `allow_tf32`, `precision`."""
    return triton.dot(a, b, **options)


def triton_refusal() -> str | None:
    """Why the GPUs of this host cannot run Triton kernels, or None where they can or there are none."""
    if jax.default_backend() != "gpu" or _is_rocm():
        return None
    found = jax.devices()[0]
    if float(found.compute_capability) < 8:
        return (
            f"{found.device_kind} has compute capability {found.compute_capability}; Triton takes 8.0 (Ampere) and up"
        )
    return None


def shape_like(shape: tuple[int, ...], dtype: Any, *operands: Any) -> jax.ShapeDtypeStruct:
    """The result of a kernel: it varies over the mesh axes, inside `shard_map`, that any operand varies over."""
    varying = frozenset().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(operands)))
    if varying:
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=ManualAxisType(varying=varying))
    return jax.ShapeDtypeStruct(shape, dtype)


def has_cudnn() -> bool:
    """Whether a program traced here may contain cuDNN calls (jax checks the library while tracing)."""
    return jax.default_backend() == "gpu" and jax.devices()[0].platform == "gpu" and not _is_rocm()


def _is_rocm() -> bool:
    return "rocm" in getattr(jax.devices()[0].client, "platform_version", "").lower()


def match_varying(*arrays):
    """The arrays with the same varying manual axes: what a `custom_vjp` inside `shard_map` needs.

    jax does this by itself for the operands of its own primitives, and sums the gradient of the broadcast
    operand over the axes that were added; for a function with a gradient of its own it only raises. None stays None.
    """
    present = [a for a in arrays if a is not None]
    union = frozenset().union(*(jax.typeof(a).mat.varying for a in present))

    def matched(a):
        missing = () if a is None else tuple(union - jax.typeof(a).mat.varying)
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    return tuple(matched(a) for a in arrays)
