"""SIGTERM: how a run learns that it has to stop, and how its processes agree on the step after which they do."""

from __future__ import annotations

import signal
from typing import Any

import jax
from jax.experimental import multihost_utils

# What a shell reports of a process that SIGTERM ended: the same whether or not there was something to save.
EXIT_CODE = 128 + signal.SIGTERM


class Preempted(Exception):
    """A run was told to stop, and its last step is saved."""

    def __init__(self, step: int):
        super().__init__(f"stopped by SIGTERM after step {step}, which is saved; the same command goes on from there")
        self.step = step


class Notice:
    """Whether a run has been told to stop: a context manager, for the main thread.

    Until `listen` a SIGTERM ends the process as always. From then on it only makes `arrived` true, and so does every
    further one. Where processes run together, the one that hears of it tells the others through JAX's coordination
    service, which picks a call of `arrived` that none of them has reached: it is true there and later, for all.
    """

    def __init__(self) -> None:
        self._received = self._together = False
        self._asked = 0
        self._before: Any = None

    def listen(self) -> None:
        """Takes SIGTERM over, to be called when there is something to save."""
        # The service has a handler of its own, from `jax.distributed.initialize` on.
        self._together = jax.distributed.is_initialized()
        if not self._together and self._before is None:
            self._before = signal.signal(signal.SIGTERM, self._receive)

    def arrived(self) -> bool:
        """Whether to stop now; every process has to ask equally often."""
        self._asked += 1
        if self._together and not self._received:
            self._received = multihost_utils.reached_preemption_sync_point(self._asked)
        return self._received

    def __enter__(self) -> Notice:
        return self

    def __exit__(self, *_: Any) -> None:
        """Gives SIGTERM back, unless it came: the process is about to end, and a second one must not disturb that."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN if self._received else self._before)

    def _receive(self, number: int, frame: Any) -> None:
        self._received = True
