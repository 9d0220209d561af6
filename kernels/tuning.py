"""Block sizes of kernels by device and shape, with the evidence for them; the defaults are in the kernels' files."""

import contextlib
import contextvars
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import pallas as pl

FILE = pathlib.Path(__file__).with_name("tuning.json")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One measured choice.

    Attributes:
        device: the start of a lower-cased `jax.Device.device_kind`.
        op: such as `"window"`.
        shape: the bucket, names to values, that it was measured for; see `bucket`.
        blocks: what the kernel takes, names to values.
        median_ms: device time of one call, in milliseconds.
        default_ms: the same with the defaults, in the same run.
        jax: version it was measured with.
        date: of the measurement, ISO 8601.
    """

    device: str
    op: str
    shape: dict[str, Any]
    blocks: dict[str, Any]
    median_ms: float
    default_ms: float
    jax: str
    date: str


def bucket(size: int) -> int:
    """Sizes that share an entry: the next power of two."""
    return pl.next_power_of_2(size)


@functools.cache
def entries(file: pathlib.Path = FILE) -> tuple[Entry, ...]:
    """The stored choices.

    Raises:
        ValueError: for a file that is not a list of such entries, naming it and what is wrong.
    """
    try:
        return tuple(Entry(**entry) for entry in json.loads(file.read_text()))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not a list of block sizes: {error}") from error


def device_kind(platform: str) -> str | None:
    """What the program that is being traced will run on, lower case, or None if that is not known.

    It is asked for of the mesh in effect, if that names a device, else of the default device, if it is of the
    `platform` (`"tpu"` or `"gpu"`).
    """
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        return abstract.device_kind.lower()
    if jax.default_backend() == platform:
        return jax.devices()[0].device_kind.lower()
    return None


@dataclasses.dataclass(frozen=True)
class Use:
    """Block sizes that a kernel was traced with: for which bucket, its defaults, and whether they were measured."""

    op: str
    shape: dict[str, Any]
    default: dict[str, Any]
    blocks: dict[str, Any]
    tuned: bool


_uses: contextvars.ContextVar[list[Use] | None] = contextvars.ContextVar("uses", default=None)
_trial: contextvars.ContextVar[tuple[str, dict[str, Any], dict[str, Any]] | None] = contextvars.ContextVar(
    "trial", default=None
)


@contextlib.contextmanager
def record_blocks() -> Iterator[list[Use]]:
    """Collects what `blocks` gives while tracing inside the block, in order."""
    uses: list[Use] = []
    token = _uses.set(uses)
    try:
        yield uses
    finally:
        _uses.reset(token)


@contextlib.contextmanager
def trying(op: str, shape: dict[str, Any], tried: dict[str, Any]) -> Iterator[None]:
    """Inside the block `blocks` gives these for this op and bucket, whatever is stored."""
    token = _trial.set((op, shape, tried))
    try:
        yield
    finally:
        _trial.reset(token)


def blocks(op: str, platform: str, default: dict[str, Any], **shape: Any) -> dict[str, Any]:
    """The block sizes for a call: the measured ones if there are any for this device and shape, else the default.

    Args:
        op: as in `Entry`.
        platform: `"tpu"` or `"gpu"`.
        default: names to values, used as they are where nothing was measured.
        **shape: the bucket; sizes go through `bucket` first where they may be anything.

    Raises:
        ValueError: if a stored choice names a block size that the kernel does not take.
    """
    chosen, tuned = _chosen(op, platform, shape)
    if set(chosen) - set(default):
        raise ValueError(f"{FILE}: {op} {shape} has block sizes {sorted(chosen)}, the kernel takes {sorted(default)}")
    chosen = {**default, **chosen}
    uses = _uses.get()
    if uses is not None:
        uses.append(Use(op, shape, default, chosen, tuned))
    return chosen


def _chosen(op, platform, shape) -> tuple[dict[str, Any], bool]:
    """What differs from the defaults, and whether it was measured."""
    trial = _trial.get()
    if trial is not None and trial[:2] == (op, shape):
        return trial[2], False
    kind = device_kind(platform)
    found = [e for e in entries() if kind is not None and kind.startswith(e.device) and (e.op, e.shape) == (op, shape)]
    if not found:
        return {}, False
    return max(found, key=lambda entry: (len(entry.device), entry.date)).blocks, True
