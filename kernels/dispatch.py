"""Which implementation of an op runs: the one that is asked for, or the best that the platform has.

An op is a table of `Implementation`s. All take the same arguments; each says which calls it cannot serve.
With `implementation=None` the platform is decided when the program is *lowered*
(`jax.lax.platform_dependent`), so that a program lowered on a CPU host for a TPU contains the TPU kernel.
"""

import contextlib
import contextvars
import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from kernels import compat, partition

NAMES = ("xla", "cudnn", "pallas_tpu", "pallas_triton", "pallas_mosaic_gpu")
PLATFORMS = ("cpu", "tpu", "cuda", "rocm")
# `pallas_gpu` stands for whichever of the two is measured faster; the first of these that an op has is tried.
ALIASES = {"pallas_gpu": ("pallas_mosaic_gpu", "pallas_triton")}
DEFAULT_ORDER = ("pallas_tpu", "pallas_gpu", "cudnn", "xla")


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        name: one of `NAMES`.
        run: `run(*arrays, **options)`.
        unsupported: `unsupported(*arrays, **options)` returns None, or why this call cannot be served: the
            argument or shape at fault and what would do. It sees shapes and dtypes only.
        platforms: where it can be lowered.
        batched: of a kernel, which XLA cannot partition: whether each array has the batch first (all results do).
            None for what XLA partitions by itself.
    """

    name: str
    run: Callable[..., Any]
    unsupported: Callable[..., str | None] = lambda *arrays, **options: None
    platforms: tuple[str, ...] = PLATFORMS
    batched: tuple[bool, ...] | None = None

    def __post_init__(self):
        if self.name not in NAMES:
            raise ValueError(f"an implementation is called one of {', '.join(NAMES)}, not {self.name!r}")

    def refusal(self, arrays: Sequence[Any], options: dict[str, Any]) -> str | None:
        """Why this call cannot be served, or None."""
        reason = self.unsupported(*arrays, **options)
        if reason is None and self.batched is not None:
            reason = partition.refusal(arrays[0].shape[0])
        if reason is None and self.name == "pallas_triton":
            reason = compat.triton_refusal()
        return reason

    def __call__(self, *arrays: Any, **options: Any) -> Any:
        """Computes the op, each device of the mesh in effect its part of the batch."""
        if self.batched is None:
            return self.run(*arrays, **options)
        return partition.along_batch(functools.partial(self.run, **options), self.batched, arrays)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `dispatch` decided for one call: op, platform (None when forced), implementation, what was refused."""

    op: str
    platform: str | None
    implementation: str
    refused: tuple[str, ...]


_record: contextvars.ContextVar[list[Choice] | None] = contextvars.ContextVar("record", default=None)


@contextlib.contextmanager
def record_choices() -> Iterator[list[Choice]]:
    """Collects the choices made while tracing inside the block, in order, one per call and platform."""
    choices: list[Choice] = []
    token = _record.set(choices)
    try:
        yield choices
    finally:
        _record.reset(token)


# jit keeps a trace for each value.
_platforms = jax.make_user_context(PLATFORMS)


@contextlib.contextmanager
def only_for(*platforms: str) -> Iterator[None]:
    """What is traced inside the block will be lowered for these platforms alone.

    It saves the time that tracing the kernels of the others takes. `"gpu"` is both kinds of GPU, as in
    `jax.Device.platform`.
    """
    named = [name for platform in platforms for name in (("cuda", "rocm") if platform == "gpu" else (platform,))]
    with _platforms(tuple(name for name in PLATFORMS if name in named) or PLATFORMS):
        yield


def _note(op, platform, implementation, refused):
    choices = _record.get()
    if choices is not None:
        choices.append(Choice(op, platform, implementation, tuple(refused)))


def _expand(op: str, implementation: str | Sequence[str] | None) -> tuple[str, ...]:
    """The plain names, best first, that an `implementation` argument stands for."""
    if implementation is None:
        implementation = DEFAULT_ORDER
    elif isinstance(implementation, str):
        implementation = (implementation,)
    names: list[str] = []
    for name in implementation:
        if name not in NAMES and name not in ALIASES:
            known = [*NAMES, *ALIASES]
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
            raise ValueError(f"{op}: unknown implementation {name!r}{hint}")
        names += ALIASES.get(name, (name,))
    if not names:
        raise ValueError(f"{op}: implementation is an empty sequence; pass None for the platform's best")
    return tuple(names)


def dispatch(
    op: str,
    table: Sequence[Implementation],
    implementation: str | Sequence[str] | None,
    arrays: tuple[Any, ...],
    options: dict[str, Any],
) -> Any:
    """Runs an op through the implementation that is asked for.

    Args:
        op: the op's public name, for messages and records.
        table: its implementations; one of them is `xla`, which serves every call.
        implementation: a name forces that one; a sequence is an order of preference, and None the default
            order, of which each platform takes the first that it has and that serves the call.
        arrays: positional operands (arrays or None).
        options: keyword options; nothing in them is traced.

    Raises:
        ValueError: for an unknown name.
        NotImplementedError: if none of the named implementations exists for this op or serves this call;
            the message says why for each.
    """
    by_name = {i.name: i for i in table}
    names = _expand(op, implementation)
    usable: list[Implementation] = []
    refused: list[str] = []
    for name in names:
        if name not in by_name:
            refused.append(f"{name}: not written for this op, which has {', '.join(by_name)}")
            continue
        reason = by_name[name].refusal(arrays, options)
        if reason is None and not isinstance(implementation, str) and by_name[name].batched is not None:
            reason = partition.unknown_mesh(by_name[name].platforms)
        if reason is None:
            usable.append(by_name[name])
        else:
            refused.append(f"{name}: {reason}")
    if not usable:
        raise NotImplementedError(f"{op}: " + "; ".join(refused))
    if isinstance(implementation, str):
        _note(op, None, usable[0].name, refused)
        return usable[0](*arrays, **options)

    chosen: dict[str, Implementation] = {}
    platforms = _platforms.value
    for platform in platforms:
        for candidate in usable:
            if platform in candidate.platforms:
                chosen[platform] = candidate
                _note(op, platform, candidate.name, refused)
                break
    distinct = {i.name for i in chosen.values()}
    if len(distinct) == 1 and len(chosen) == len(platforms):
        return by_name[distinct.pop()](*arrays, **options)
    branches = {p: _closed(i, options) for p, i in chosen.items()}
    # No default branch: lowering for a platform without an implementation is jax's own clear error.
    return jax.lax.platform_dependent(*arrays, **branches)


def _closed(run: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    return lambda *arrays: run(*arrays, **options)
