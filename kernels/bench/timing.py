"""Times: the slope of the wall clock over calls, or what the device's own clock says of its kernels.

A single call tells little: starting it takes the host some time, and on an accelerator it returns before it has run.
So k calls are issued one after the other, then 2 k, and what the second k add is the time of k. Calls go round several
sets of operands, so that none is found in a cache, and the rows that are compared take turns, so that a machine that
grows slower is unfair to none.
"""

import collections
import contextlib
import gzip
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

SLOPE = "wall-clock slope"
PROFILER = "device profile"
# Issued at most without waiting; each holds its results in memory.
MAX_CALLS = 256


class Timed:
    """A program with operands, and the times that were taken of it.

    Attributes:
        call: `call(i)` starts the program with set `i` of its operands and returns what `wait` waits for.
        wait: blocks until a result is there.
        sets: how many sets there are.
        module: how the program is called in a profile, None if it is not to be looked for there.
    """

    def __init__(
        self,
        call: Callable[[int], Any],
        sets: int,
        module: str | None = None,
        wait: Callable[[Any], Any] = jax.block_until_ready,
    ):
        self.call, self.sets, self.module, self.wait = call, sets, module, wait
        self.calls = 1
        self.seconds: list[float] = []
        self.walls: list[float] = []
        self.method = SLOPE
        self._next = 0

    def run(self, calls: int) -> float:
        """Seconds of so many calls, the last of them waited for."""
        begin = time.perf_counter()
        out = None
        for _ in range(calls):
            out = self.call(self._next)
            self._next = (self._next + 1) % self.sets
        self.wait(out)
        return time.perf_counter() - begin

    def warm_up(self, target: float) -> None:
        """Runs on every set, then finds how many calls take `target` seconds."""
        for _ in range(self.sets):
            self.run(1)
        while (taken := self.run(self.calls)) < target and self.calls < MAX_CALLS:
            self.calls = min(MAX_CALLS, max(2 * self.calls, round(self.calls * target / max(taken, 1e-9))))

    def sample(self) -> None:
        """Takes one time of one call, and one of a call that is waited for."""
        self.walls.append(self.run(1))
        once, twice = self.run(self.calls), self.run(2 * self.calls)
        slope = (twice - once) / self.calls
        # A pause in the first half can hide the second one; all of it together is then an upper bound.
        self.seconds.append(slope if slope > 0 else twice / (2 * self.calls))


def take_turns(group: Sequence[Timed], repeats: int, target: float, budget: float) -> None:
    """Fills in the times of all, each in its turn.

    Args:
        group: programs to compare.
        repeats: samples of each.
        target: seconds that the calls of the shorter half of a sample should take.
        budget: seconds after which there are no more samples, once there are three.
    """
    for timed in group:
        timed.warm_up(target)
    begin = time.perf_counter()
    for repeat in range(repeats):
        if repeat >= 3 and time.perf_counter() - begin > budget * len(group):
            break
        for timed in group:
            timed.sample()


def profile(group: Sequence[Timed], repeats: int) -> None:
    """Replaces the times by those of the device's kernels, for the programs of which the profile has them all."""
    wanted = [timed for timed in group if timed.module]
    if not wanted:
        return
    with tempfile.TemporaryDirectory() as directory:
        with contextlib.suppress(RuntimeError):
            with jax.profiler.trace(directory):
                for _ in range(repeats):
                    for timed in wanted:
                        timed.run(1)
        events = read_trace(pathlib.Path(directory))
    for timed in wanted:
        seconds = device_seconds(events, timed.module, repeats)
        if seconds is not None:
            timed.seconds, timed.method = seconds, PROFILER


def read_trace(directory: pathlib.Path) -> list[dict[str, Any]]:
    """The events of the traces under a directory that `jax.profiler.trace` has written."""
    events = []
    for file in sorted(directory.rglob("*.trace.json.gz")):
        with gzip.open(file, "rt") as stream:
            events += json.load(stream).get("traceEvents", [])
    return events


def device_seconds(events: Iterable[dict[str, Any]], module: str, calls: int) -> list[float] | None:
    """How long the device was busy in each of so many calls of a program; None if the profile does not say.

    A TPU reports whole programs. A GPU reports kernels, each with the program that it belongs to: as every call starts
    the same ones, the n-th part of them in the order of time is the n-th call; kernels that overlap count once.
    """
    events = list(events)
    devices = {
        event.get("pid")
        for event in events
        if event.get("name") == "process_name" and "/device:" in event.get("args", {}).get("name", "")
    }
    whole, kernels = [], collections.defaultdict(list)
    for event in events:
        if event.get("ph") != "X" or event.get("pid") not in devices:
            continue
        span = event["ts"], event["ts"] + event["dur"]
        if event.get("name", "").partition("(")[0] == module:
            whole.append(span)
        elif event.get("args", {}).get("hlo_module", "").partition("(")[0] == module:
            kernels[event["pid"]].append(span)
    if len(whole) == calls:
        return [(end - start) / 1e6 for start, end in sorted(whole)]
    if len(kernels) != 1:
        return None
    spans = sorted(next(iter(kernels.values())))
    if len(spans) % calls:
        return None
    each = len(spans) // calls
    return [_covered(spans[i * each : (i + 1) * each]) / 1e6 for i in range(calls)]


def _covered(spans: Sequence[tuple[int | float, int | float]]) -> float:
    """The length of the union of intervals, which are sorted."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def percentiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th, in milliseconds."""
    low, middle, high = np.percentile(np.asarray(seconds) * 1e3, (20, 50, 80))
    return float(low), float(middle), float(high)
