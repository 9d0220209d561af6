"""What a person sees of a run."""

import io
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from train.metrics import Metrics, number


class Progress:
    """What a person sees on stderr: a live bar on a terminal, else one plain line per `update`.

    A context manager. The bar shows the phase, the step, the time left and the newest metrics, as many as
    fit. What is printed through it, or by Python to stderr, goes above the bar. Only process 0 shows a bar.
    """

    def __init__(
        self, total_steps: int, *, start: int = 0, process_index: int = 0, stream: io.TextIOBase | None = None
    ):
        """Shows nothing yet.

        Args:
            total_steps: steps of the whole run.
            start: steps that are done already.
            process_index: `jax.process_index()`.
            stream: None means stderr.
        """
        self._stream = sys.stderr if stream is None else stream
        self._process_index = process_index
        self._total, self._step = total_steps, start
        self._phase = "starting"
        self._metrics: dict[str, Any] = {}
        self._started = time.perf_counter()
        self._first: tuple[int, float] | None = None
        self._live: Any = None

    def __enter__(self) -> "Progress":
        terminal = self._stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        if terminal and self._process_index == 0:
            # Imported here: without a terminal rich is not needed.
            from rich.console import Console
            from rich.live import Live

            self._live = Live(
                self,
                console=Console(file=self._stream, force_terminal=True, highlight=False),
                refresh_per_second=4,
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start()
        return self

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        self._phase = "done" if kind is None else "stopped"
        if self._live is not None:
            self._live.stop()
            self._live = None

    def phase(self, name: str) -> None:
        """Shows what is being done from now on: compiling, training, evaluating or saving."""
        self._phase = name

    def advance(self, step: int) -> None:
        """Notes that `step` steps are done; the time left is reckoned from the first call on."""
        self._step = step
        if self._first is None:
            self._first = (step, time.perf_counter())

    def update(self, step: int, metrics: Metrics) -> None:
        """Shows metrics in the order given; prints one line where there is no bar."""
        self.advance(step)
        self._metrics = dict(metrics)
        if self._live is None and self._process_index == 0:
            self._line(f"{self._describe(step, metrics)}  {self._time_left()}".rstrip())

    def report(self, step: int, metrics: Metrics) -> None:
        """Prints metrics that are to stay in sight, such as those of an evaluation."""
        self.announce(self._describe(step, metrics))

    def announce(self, text: str) -> None:
        """Prints a line that all processes would print alike; process 0 does."""
        if self._process_index == 0:
            self.message(text)

    def message(self, text: str) -> None:
        """Prints a line above the bar; processes other than 0 put their number before it."""
        if self._live is None:
            self._line(text if self._process_index == 0 else f"[process {self._process_index}] {text}")
        else:
            self._live.console.print(text, markup=False, emoji=False, soft_wrap=True)

    def _line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def _describe(self, step: int, metrics: Metrics) -> str:
        return "  ".join([f"step {step:,}/{self._total:,}", *(_show(*item) for item in metrics.items())])

    def _time_left(self) -> str:
        """Time for the rest at the speed so far; empty while there is none, and at the end."""
        if self._first is None or not self._first[0] < self._step < self._total:
            return ""
        step, since = self._first
        seconds = (time.perf_counter() - since) / (self._step - step) * (self._total - self._step)
        return f"{_duration(seconds)} left"

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        elapsed = f"{_duration(time.perf_counter() - self._started)} elapsed"
        row = Table.grid(padding=(0, 2, 0, 0), expand=True)
        row.add_column(no_wrap=True, width=10, style="bold")
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        row.add_column(no_wrap=True)
        row.add_row(
            self._phase,
            ProgressBar(total=self._total, completed=self._step, pulse=self._phase in ("starting", "compiling")),
            f"{self._step:,}/{self._total:,}",
            self._time_left() or elapsed,
        )
        yield row
        line = ""
        for name, value in self._metrics.items():
            longer = f"{line}  {_show(name, value)}".strip()
            if len(longer) > options.max_width:
                break
            line = longer
        yield Text(line, no_wrap=True)


def _show(name: str, value: Any) -> str:
    """A metric as a person reads it."""
    label = name.replace("_", " ").replace("/", " ")
    value = number(name, value)
    if value is None:
        return f"{label} not finite"
    if name.endswith("_per_second"):
        return f"{value:,.0f} {label.removesuffix(' per second')}/s"
    if "accuracy" in name:
        return f"{label} {value:.2%}"
    if name == "lr":
        return f"{label} {value:.1e}"
    return f"{label} {value:,}" if isinstance(value, int) else f"{label} {value:.4g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
