"""Several processes that train together: how they find one another, and what is said when one of them is gone."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
from typing import NoReturn

import jax

# The exit code of the processes that are left when one is lost.
LOST = 3
# After so long without a sign of life a process counts as lost. JAX's own default is 100 seconds.
HEARTBEAT_SECONDS = 30
# How long processes wait for one another at the start, and at the end, where process 0 reads the last checkpoint again.
START_SECONDS = 300
END_SECONDS = 300


def join(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Joins the other processes; to be called before JAX's devices are touched.

    Args:
        coordinator: HOST:PORT of process 0; None, like the others: as the TPU pod, SLURM or MPI says.
        count: how many processes there are.
        index: which one this is.

    Raises:
        ValueError: some of the three are given and some not, they do not fit, or nothing says what they are.
    """
    given = {"--coordinator": coordinator, "--num-processes": count, "--process-id": index}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(f"{', '.join(given)} go together; {', '.join(missing)} is missing")
    if not missing:
        host, colon, port = coordinator.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError(f"--coordinator must be HOST:PORT of process 0, got {coordinator!r}")
        if not 0 <= index < count:
            raise ValueError(f"--process-id must be from 0 to {count - 1}, one less than --num-processes, got {index}")
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            initialization_timeout=START_SECONDS,
            shutdown_timeout_seconds=END_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        hint = "" if not missing else "; outside TPU pods, SLURM and MPI give " + ", ".join(given)
        raise ValueError(f"cannot join the other processes: {reason}{hint}") from error
    _explain_abort()


def end(reason: str) -> NoReturn:
    """Ends this process where a computation that processes share has failed, without waiting for those that are gone.

    The interpreter's own end would: JAX and Orbax meet the other processes there.
    """
    line = (
        f"error: another process of this run ended or cannot be reached ({reason.splitlines()[0][:300]}); start all of "
        "them again, they go on from the newest checkpoint\n"
    )
    # Whatever lock on stderr another thread holds.
    os.write(2, line.encode())
    leave(LOST)


def leave(code: int) -> NoReturn:
    """Ends this process at once, so that the others, which still compute, soon see that it is gone."""
    os._exit(code)


def _explain_abort() -> None:
    """Has this process end as `end` does where JAX's service aborts it, in one of its threads, for a lost process."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: end("JAX's coordination service has lost it"))
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    # Nothing of Python runs once the interpreter is being taken down. This also keeps the handler alive.
    atexit.register(lambda: handler and libc.signal(signal.SIGABRT, None))
