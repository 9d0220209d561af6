"""The display: plain lines without a terminal, a bar that nothing tears on one."""

import fcntl
import io
import json
import os
import pathlib
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from rich.console import Console

from train import progress
from train.progress import Progress


def test_plain_lines(monkeypatch):
    monkeypatch.setattr(progress.time, "perf_counter", iter([0.0, 10.0, 12.0, 112.0]).__next__)
    stream = io.StringIO()
    with Progress(1200, start=100, stream=stream) as shown:
        shown.message("going on from step 100")
        shown.phase("compiling")
        shown.phase("training")
        shown.advance(101)  # the clock of the time left starts here: 10 s
        shown.update(151, {"loss": 0.123456, "accuracy": 0.98611, "lr": 1e-3, "images_per_second": 2310.4})
        shown.update(1101, {"train/loss": float("nan"), "count": 12345})
        shown.report(1200, {"test_accuracy": 1.0})
        shown.update(1200, {"loss": 0.1})
    assert stream.getvalue().splitlines() == [
        "going on from step 100",
        "step 151/1,200  loss 0.1235  accuracy 98.61%  lr 1.0e-03  2,310 images/s  0:42 left",
        "step 1,101/1,200  train loss not finite  count 12,345  0:10 left",
        "step 1,200/1,200  test accuracy 100.00%",
        "step 1,200/1,200  loss 0.1",
    ]


def test_other_processes_only_pass_messages_on():
    stream = io.StringIO()
    with Progress(10, process_index=3, stream=stream) as shown:
        shown.update(1, {"loss": 1.0})
        shown.report(1, {"loss": 1.0})
        shown.message("a disk is full")
    assert stream.getvalue() == "[process 3] a disk is full\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (59.6, "1:00"), (3599.0, "59:59"), (3600.0, "1:00:00"), (90061.0, "25:01:01")],
)
def test_durations(seconds, text):
    assert progress._duration(seconds) == text


@pytest.mark.parametrize("width", [40, 60, 100])
def test_the_bar_fits(width):
    shown = Progress(1_200_000, stream=io.StringIO())
    shown.phase("evaluating")
    shown.advance(1)
    shown.update(600_000, {"loss": 1.25, "accuracy": 0.5, "lr": 1e-3, "images_per_second": 2310.0, "grad_norm": 1.0})
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(shown)
    bar, line = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue()).splitlines()
    assert len(bar) <= width and len(line) <= width
    assert bar.startswith("evaluating  ") and "600,000/1,200,000" in bar and ("━" in bar) == (width >= 60)
    assert line.startswith("loss 1.25  accuracy 50.00%") and ("2,310 images/s" in line) == (width >= 60)
    assert ("grad norm 1" in line) == (width == 100)


SCRIPT = """
import sys, time, warnings
from train import metrics, progress
with progress.Progress(40) as shown:
    shown.message("first [bold] message :smile:")
    shown.phase("training")
    for step in range(1, 41):
        time.sleep(0.01)
        shown.advance(step)
        if step % 10 == 0:
            shown.update(step, {"loss": 1 / step, "accuracy": 0.5})
        if step == 20:
            shown.report(step, {"test_accuracy": 0.9833})
            warnings.warn("a library warns")
            print("a library prints", file=sys.stderr)
print(metrics.final_line({"step": 40, "seconds": 0.5}))
"""


def screen(data: str, height: int, width: int) -> list[str]:
    """What a terminal shows after these bytes, for the few control sequences that a bar uses."""
    rows, row, column = [[" "] * width for _ in range(height)], 0, 0
    for control, final, text in re.findall(r"\x1b\[([?0-9;]*)([A-Za-z])|([^\x1b])", data):
        if text == "\r":
            column = 0
        elif text == "\n":
            row += 1
        elif text:
            rows[row][column] = text
            column += 1
        elif final == "A":
            row -= int(control or 1)
        elif final == "K":
            rows[row] = [" "] * width
        else:
            assert final in "mhl", f"unexpected control sequence {control}{final}"
    return ["".join(line).rstrip() for line in rows]


def test_nothing_tears_the_bar_on_a_terminal(tmp_path):
    """In a pseudo terminal of 60 columns: stdout stays clean, messages are above the bar, one bar is left."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {"TERM": "xterm-256color", "PYTHONPATH": str(pathlib.Path(progress.__file__).parent.parent)}
    process = subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path, env=environment, stdin=follower, stdout=subprocess.PIPE, stderr=follower,
    )  # fmt: skip
    os.close(follower)
    data = b""
    try:
        while chunk := os.read(leader, 65536):
            data += chunk
    except OSError:
        pass  # how Linux says that the other end is closed
    finally:
        os.close(leader)
    stdout, _ = process.communicate()
    assert process.returncode == 0 and json.loads(stdout) == {"step": 40, "seconds": 0.5}
    lines = [line for line in screen(data.decode(), 40, 60) if line]
    assert lines[0] == "first [bold] message :smile:"
    assert lines[1] == "step 20/40  test accuracy 98.33%"
    assert "UserWarning: a library warns" in "".join(lines[2:-3])
    assert lines[-3] == "a library prints"
    assert re.fullmatch(r"done        ━+  40/40  0:\d\d elapsed", lines[-2])
    assert lines[-1] == "loss 0.025  accuracy 50.00%"
