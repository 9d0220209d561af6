"""What a run records: metrics.jsonl, TensorBoard files, and where the time went."""

import contextlib
import functools
import json
import math
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

Metrics = Mapping[str, Any]

# Parts of the wall time: see `Meter`.
PHASES = ("compile", "data", "step", "eval", "checkpoint", "other")


class Writer:
    """Writes each set of metrics as one line of `metrics.jsonl` and as one TensorBoard event.

    A line is a JSON object with `step` first and the metrics in alphabetical order; what is not finite is
    null. By convention the names of what is measured of the machine begin with `seconds`, `goodput` or `memory`, end
    with `_per_second` or are `mfu`; all else is the same in every run of a config.

    On a disk a line is there once `write` returns. Object stores cannot append: there the files are rewritten
    whole by `flush`, which is therefore called before a checkpoint is saved. A run that goes on from a
    checkpoint keeps the lines up to its step, so all that a step has to say is written before it is saved. A
    context manager, which flushes at the end.
    """

    def __init__(self, workdir: epath.PathLike, *, process_index: int = 0):
        """Opens `workdir/metrics.jsonl`, to go on after its last whole line.

        Args:
            workdir: directory of the run, made where it does not exist.
            process_index: `jax.process_index()`; all but process 0 write nothing.
        """
        self._enabled = process_index == 0
        # Steps that were logged by a run that was killed, and of which no checkpoint was left.
        self.redone = 0
        self._workdir = epath.Path(workdir)
        self._events: _EventFile | None = None
        if self._enabled:
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._keep(math.inf)

    def resume(self, step: int, *, without: str | None = None) -> int:
        """Drops what a run wrote after the `step` (0: none done) from which this one goes on.

        Args:
            step: the last one whose lines stay.
            without: how the names begin of metrics of this very step that are to be written once more.

        Returns:
            The number of lines dropped; a half-written one went already when the file was opened.
        """
        if not self._enabled:
            return 0
        self._events, reached = None, self._last_step
        dropped = self._keep(step, without)
        self.redone = max(0, reached - step)
        return dropped

    def write(self, step: int, metrics: Metrics) -> None:
        """Writes host numbers (Python's or numpy's) that belong to a step.

        Raises:
            ValueError: if a later step was written already.
            TypeError: for a value that is not a number.
            OSError: if the files cannot be written.
        """
        if not self._enabled:
            return
        if step < self._last_step:
            raise ValueError(
                f"step {step} comes after step {self._last_step} in {self._lines.path}; "
                "call resume(step) where a run goes on"
            )
        if self._events is None:
            self._events = _EventFile(self._workdir / "tensorboard", self._last_step + 1)
        self._lines.write(_json_line({"step": step}, metrics).encode() + b"\n")
        self._events.write(step, metrics)
        self._last_step = step

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        self.flush()

    def flush(self) -> None:
        """Hands over what is still held back."""
        if self._enabled:
            self._lines.flush()
            if self._events is not None:
                self._events.file.flush()

    def _keep(self, last_step: int | float, without: str | None = None) -> int:
        """Keeps the whole lines up to a step, rewriting the file if that changes it; counts the others."""
        path = self._workdir / "metrics.jsonl"
        content = path.read_bytes() if path.exists() else b""
        lines = content.splitlines(keepends=True)
        steps = {line: _step_of(line) for line in lines}
        kept = [line for line in lines if steps[line] is not None and steps[line] <= last_step]
        if without is not None:
            again = [any(name.startswith(without) for name in json.loads(line)) for line in kept]
            kept = [line for line, found in zip(kept, again) if not (found and steps[line] == last_step)]
        self._last_step = max((steps[line] for line in kept), default=0)
        self._lines = _GrowingFile(path, content)
        if len(kept) < len(lines):
            self._lines.replace(b"".join(kept))
        return len(lines) - len(kept)


def final_line(metrics: Metrics) -> str:
    """The one line of JSON that a command prints on stdout: `step` and `seconds` first, then by name."""
    first = {name: metrics[name] for name in ("step", "seconds") if name in metrics}
    return _json_line(first, {name: value for name, value in metrics.items() if name not in first})


def _json_line(first: Metrics, metrics: Metrics) -> str:
    numbers = {name: number(name, value) for name, value in [*first.items(), *sorted(metrics.items())]}
    return json.dumps(numbers, allow_nan=False)


def number(name: str, value: Any) -> int | float | None:
    """A metric as JSON has it: None for what is not finite; `TypeError` for what is not a number."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None:
        return None
    raise TypeError(f"metric {name!r} must be a number or None, got {value!r}")


def _step_of(line: bytes) -> int | None:
    """The step of a whole line, None for anything else."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else None


def replace_file(path: epath.Path, content: bytes) -> None:
    """Writes a file whole: a kill leaves the old content or this, as a plain write to an object store does."""
    if "://" in str(path):
        path.write_bytes(content)
        return
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_bytes(content)
    beside.replace(path)


class _GrowingFile:
    """A file to which bytes are added; rewritten whole at each flush where its file system cannot append."""

    def __init__(self, path: epath.Path, content: bytes = b""):
        self.path = path
        self._whole = bytearray(content) if "://" in str(path) else None
        self._flushed = True

    def replace(self, content: bytes) -> None:
        """Puts other content in the place of the old one, at once: a kill leaves the one or the other."""
        if self._whole is not None:
            self._whole[:] = content
        replace_file(self.path, content)

    def write(self, data: bytes) -> None:
        """Adds bytes; on a disk they are handed over before this returns."""
        if self._whole is not None:
            self._whole += data
            self._flushed = False
            return
        try:
            with self.path.open("ab") as file:
                file.write(data)
        except OSError as error:
            raise OSError(error.errno, f"cannot write metrics: {error.strerror}", str(self.path)) from error

    def flush(self) -> None:
        """Rewrites the file where that is the only way."""
        if not self._flushed:
            self.path.write_bytes(bytes(self._whole))
            self._flushed = True


class _EventFile:
    """A TensorBoard event file of scalars; what older files in the directory say of later steps is hidden."""

    def __init__(self, directory: epath.Path, first_step: int):
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names: this one must be last whatever the time is.
        stamps = [path.name.split(".")[3] for path in directory.glob("events.out.tfevents.*")]
        stamp = max([int(time.time()), *(int(stamp) + 1 for stamp in stamps if stamp.isdigit())])
        name = f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}"
        self.file = _GrowingFile(directory / name)
        self._write(file_version="brain.Event:2")
        self._write(step=first_step, session_log={"status": "START"})

    def write(self, step: int, metrics: Metrics) -> None:
        """Adds one event with all metrics that are numbers."""
        values = {name: number(name, value) for name, value in metrics.items()}
        scalars = [{"tag": name, "simple_value": value} for name, value in values.items() if value is not None]
        self._write(step=step, summary={"value": scalars})

    def _write(self, **fields: Any) -> None:
        """One record: length, its checksum, the event, its checksum."""
        event_pb2, masked_crc32c = _tensorboard()
        event = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(event))
        checksums = [struct.pack("<I", masked_crc32c(data)) for data in (length, event)]
        self.file.write(length + checksums[0] + event + checksums[1])


@functools.cache
def _tensorboard() -> tuple[Any, Callable[[bytes], int]]:
    """tensorboardX's event messages and checksum, without what else its import brings.

    Where they are installed the package imports torch, comet_ml and boto3 for writers that are not used here:
    seconds of start-up, another OpenMP runtime, warning filters, patched libraries. It also sets an
    environment variable that would be handed down to worker processes.
    """
    unwanted = [name for name in ("torch", "comet_ml", "boto3") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(unwanted))  # None makes an import fail
    variable = "CRC32C_SW_MODE"
    known = variable in os.environ
    try:
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import masked_crc32c
    finally:
        for name in unwanted:
            del sys.modules[name]
        if not known:
            os.environ.pop(variable, None)
    return event_pb2, masked_crc32c


class Meter:
    """Where the wall time of a run goes, and how fast the examples do.

    Every moment belongs to one of `PHASES`, that of the innermost open `phase` block or else `other`, so that
    their times add up to the wall time.
    """

    def __init__(self, unit: str = "images", clock: Callable[[], float] = time.perf_counter):
        """Starts the clock.

        Args:
            unit: what is counted, which names the rate: `images_per_second`.
            clock: seconds that never go backwards.
        """
        self._clock = clock
        self._rate = f"{unit}_per_second"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._open = ["other"]
        self._since = clock()
        self._examples = self._steps = self._redone = 0
        self._training_before = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Gives the time inside the block to a phase, less what blocks inside it take.

        Raises:
            ValueError: for a name that is not in `PHASES`.
        """
        if name not in PHASES:
            raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {name!r}")
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def count(self, examples: int) -> None:
        """Adds a training step and the examples that it has taken."""
        self._examples += examples
        self._steps += 1

    def redo(self, steps: int) -> None:
        """Notes how many of the steps to come were done before, by a process that was killed."""
        self._redone = steps

    def rates(self) -> dict[str, float]:
        """The rate since the last call: examples by the time spent on data, steps and other things.

        Compiling, evaluating and saving do not count, so that the rate is that of training.
        """
        self._charge()
        training = sum(self._seconds[name] for name in ("data", "step", "other"))
        elapsed, examples = training - self._training_before, self._examples
        self._training_before, self._examples = training, 0
        return {self._rate: examples / elapsed if elapsed > 0 else 0.0}

    def seconds(self) -> float:
        """The wall time so far."""
        self._charge()
        return sum(self._seconds.values())

    def seconds_by_phase(self) -> dict[str, float]:
        """The part of the wall time so far that each phase took: `seconds/compile` and so on."""
        self._charge()
        return {f"seconds/{name}": round(value, 3) for name, value in self._seconds.items()}

    def goodput(self) -> dict[str, float]:
        """What the wall time went to, as shares that add up to 1: `goodput/step`, the useful part, and so on.

        `goodput/lost` is the work of a process that was killed: the steps that this one does over again, as far as
        they had been logged, at its own mean time of a step. They are taken from the share of the steps.
        """
        self._charge()
        seconds = dict(self._seconds)
        redone = min(self._redone, self._steps) / max(self._steps, 1)
        seconds["lost"] = redone * seconds["step"]
        seconds["step"] -= seconds["lost"]
        whole = sum(seconds.values())
        return {f"goodput/{name}": round(value / whole, 4) if whole else 0.0 for name, value in seconds.items()}

    def _charge(self) -> None:
        now = self._clock()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now
