"""metrics.jsonl, the event files and the clock: what is written, and what is left after a kill."""

import json
import math
import pathlib
import struct
import subprocess
import sys

import numpy as np
import pytest
from etils import epath
from tensorboardX.proto import event_pb2

from tests import object_store
from train import metrics


def lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def crc32c(data: bytes) -> int:
    """Castagnoli's checksum bit by bit, from its polynomial."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    """As TFRecord files have it: rotated right by 15 bits, plus a constant."""
    value = crc32c(data)
    return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def events(workdir) -> list[list[event_pb2.Event]]:
    """The events of each file, in the order in which TensorBoard reads the files; checksums are checked."""
    files = []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda path: path.name):
        data, found = path.read_bytes(), []
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = data[12 : 12 + length]
            assert data[8:12] == masked(data[:8]) and data[12 + length : 16 + length] == masked(event)
            found.append(event_pb2.Event.FromString(event))
            data = data[16 + length :]
        files.append(found)
    return files


def shown(workdir) -> list[tuple[int, str, float]]:
    """The scalars that TensorBoard shows: a session's start hides what came before from its step on."""
    scalars = []
    for event in (event for file in events(workdir) for event in file):
        if event.WhichOneof("what") == "session_log" and event.session_log.status == 1:
            scalars = [scalar for scalar in scalars if scalar[0] < event.step]
        scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return scalars


def test_lines(tmp_path):
    writer = metrics.Writer(tmp_path / "new" / "run")
    writer.write(10, {"loss": 0.1, "accuracy": np.float32(0.1), "count": np.int64(3), "array": np.array(2.5)})
    writer.write(10, {"b": math.nan, "a": -math.inf, "c": None})
    text = (tmp_path / "new" / "run" / "metrics.jsonl").read_text()
    first, second = text.splitlines()
    assert first == '{"step": 10, "accuracy": 0.10000000149011612, "array": 2.5, "count": 3, "loss": 0.1}'
    assert second == '{"step": 10, "a": null, "b": null, "c": null}'
    assert text.endswith("\n")


def test_refused_lines(tmp_path):
    writer = metrics.Writer(tmp_path)
    writer.write(10, {"loss": 1.0})
    with pytest.raises(ValueError, match=r"step 9 comes after step 10 in .*metrics.jsonl; call resume\(step\)"):
        writer.write(9, {"loss": 1.0})
    with pytest.raises(TypeError, match="metric 'loss' must be a number or None, got 'low'"):
        writer.write(11, {"loss": "low"})
    assert lines(tmp_path) == [{"step": 10, "loss": 1.0}]


def test_only_process_0_writes(tmp_path):
    with metrics.Writer(tmp_path / "run", process_index=1) as writer:
        writer.write(1, {"loss": 1.0})
        assert writer.resume(0) == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tail", [b"", b'{"step": 40, "lo', b'{"step": 40, "loss": 1.0}', b"\x00\xff\n"])
def test_resumed_run_reads_like_an_uninterrupted_one(tmp_path, tail):
    def run(workdir, first, last):
        with metrics.Writer(workdir) as writer:
            dropped = writer.resume(first)
            for step in range(first + 1, last + 1):
                writer.write(step, {"loss": 1 / step})
                if step % 10 == 0:
                    writer.write(step, {"test_loss": 2 / step})
        return dropped

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole, 0, 50)
    run(killed, 0, 33)
    with (killed / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    again = metrics.Writer(killed)
    again.resume(20)
    assert again.redone == 13
    run(killed, 20, 33)
    assert run(killed, 20, 50) == 13 + 1  # steps 21 to 33 and the evaluation at step 30
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert shown(killed) == shown(whole) and len(shown(whole)) == 55
    assert [path.name for path in killed.iterdir() if path.name.endswith(".tmp")] == []


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path):
    writer = metrics.Writer(tmp_path)
    writer.write(5, {"loss": 1.0})
    again = metrics.Writer(tmp_path)
    with pytest.raises(ValueError, match="step 1 comes after step 5"):
        again.write(1, {"loss": 3.0})
    assert again.resume(0) == 1
    again.write(1, {"loss": 3.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 3.0}]


def test_event_files(tmp_path):
    writer = metrics.Writer(tmp_path)
    writer.write(3, {"train/loss": 0.5, "lr": 2, "missing": None})
    (file,) = events(tmp_path)
    assert file[0].file_version == "brain.Event:2"
    assert [event.step for event in file[1:]] == [1, 3]
    assert {value.tag: value.simple_value for value in file[2].summary.value} == {
        "train/loss": 0.5,
        "lr": 2.0,
    }


def test_event_files_are_in_order_whatever_the_clock_says(tmp_path, monkeypatch):
    for now in (2_000_000_000.5, 1_000_000_000.0, 1_000_000_000.0):
        monkeypatch.setattr(metrics.time, "time", lambda now=now: now)
        writer = metrics.Writer(tmp_path)
        writer.resume(0)
        writer.write(1, {"loss": now})
    assert len(events(tmp_path)) == 3
    assert [scalar[:2] for scalar in shown(tmp_path)] == [(1, "loss")]
    assert [file[0].wall_time for file in events(tmp_path)] == [
        2_000_000_000.5,
        1_000_000_000.0,
        1_000_000_000.0,
    ]


def test_without_append_and_rename(tmp_path, monkeypatch):
    store = object_store.install(monkeypatch, tmp_path)
    workdir = epath.Path(f"{object_store.PREFIX}bucket/run")
    with metrics.Writer(workdir) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": 1 / step})
        assert store.writes == 0
        writer.flush()
        writer.flush()
        assert store.writes == 2 and len(lines(workdir)) == 5
        writer.write(6, {"loss": 1 / 6})
    assert [line["step"] for line in lines(workdir)] == [1, 2, 3, 4, 5, 6]
    with metrics.Writer(workdir) as writer:
        assert writer.resume(4) == 2
        writer.write(5, {"loss": 5.0})
    assert lines(workdir)[-2:] == [{"step": 4, "loss": 0.25}, {"step": 5, "loss": 5.0}]
    assert [scalar[0] for scalar in shown(workdir)] == [1, 2, 3, 4, 5] and shown(workdir)[-1][2] == 5.0


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    writer = metrics.Writer(tmp_path)
    monkeypatch.setattr(writer._lines, "path", epath.Path("/dev/full"))
    with pytest.raises(OSError, match="cannot write metrics: No space left on device: '/dev/full'"):
        writer.write(1, {"loss": 1.0})


def test_tensorboard_leaves_no_trace(tmp_path):
    """What its import drags in where it is installed, environment, threads, filters, handlers: none of it."""
    for name in ("torch", "comet_ml", "boto3"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')\n")
    code = """
import atexit, logging, os, signal, sys, threading, warnings
from train import metrics
def world():
    return (list(warnings.filters), dict(os.environ), threading.enumerate(), logging.root.handlers[:],
            logging.root.level, [signal.getsignal(s) for s in (2, 15, 17)], sys.excepthook, sys.path[:])
import numpy, google.protobuf.message
writer = metrics.Writer("run")
before = world()
writer.write(1, {"loss": 1.0})
assert world() == before
assert not {"torch", "comet_ml", "boto3", "jax"} & set(sys.modules)
"""
    root = pathlib.Path(metrics.__file__).parent.parent
    environment = {"PYTHONPATH": f"{tmp_path}:{root}"}
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "run" / "tensorboard").exists()


def test_final_line():
    line = metrics.final_line({"test_loss": math.nan, "seconds": 1.5, "accuracy": np.float64(0.5), "step": 7})
    assert line == '{"step": 7, "seconds": 1.5, "accuracy": 0.5, "test_loss": null}'


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_meter():
    clock = Clock()
    meter = metrics.Meter(unit="tokens", clock=clock)
    assert meter.seconds() == 0 and meter.rates() == {"tokens_per_second": 0.0}
    clock.now += 1
    with meter.phase("compile"):
        clock.now += 8
    for _ in range(4):
        with meter.phase("data"):
            clock.now += 0.25
        with meter.phase("step"):
            clock.now += 0.5
        meter.count(64)
    with meter.phase("eval"):
        clock.now += 3
        with meter.phase("data"):
            clock.now += 1
        clock.now += 1
    assert meter.seconds() == 17
    # 256 tokens in 1 of other, 2 of data and 2 of steps.
    assert meter.rates() == {"tokens_per_second": 256 / 5}
    expected = {"compile": 8, "data": 2, "step": 2, "eval": 4, "checkpoint": 0, "other": 1}
    assert meter.seconds_by_phase() == {f"seconds/{name}": seconds for name, seconds in expected.items()}
    shares = {f"goodput/{name}": round(seconds / 17, 4) for name, seconds in expected.items()}
    assert meter.goodput() == {**shares, "goodput/lost": 0.0}
    # One of the four steps had been done before.
    meter.redo(1)
    assert meter.goodput() == {**shares, "goodput/step": round(1.5 / 17, 4), "goodput/lost": round(0.5 / 17, 4)}
    with meter.phase("checkpoint"):
        clock.now += 5
    assert meter.rates() == {"tokens_per_second": 0.0}


def test_meter_after_an_exception_and_with_a_wrong_name():
    clock = Clock()
    meter = metrics.Meter(clock=clock)
    with pytest.raises(RuntimeError), meter.phase("step"):
        clock.now += 1
        raise RuntimeError
    clock.now += 3
    assert meter.seconds_by_phase()["seconds/other"] == 3
    with (
        pytest.raises(ValueError, match="phase must be one of compile, data, .*, got 'train'"),
        meter.phase("train"),
    ):
        pass
