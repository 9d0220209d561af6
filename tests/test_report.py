"""The page of a run: sums over processes, curves, and what it says where there is nothing to tell."""

import json
import re
from xml.etree import ElementTree

import pytest

from tests.checkpoints import save_steps
from train import host
from train.report import main, page, plot, read_lines, seconds, series


def timed(number, share=0.0, **spent):
    phases = dict.fromkeys(("compile", "data", "step", "eval", "checkpoint", "other"), 0.0) | spent
    return {"step": number, **{f"seconds/{name}": value for name, value in phases.items()}, "goodput/lost": share}


@pytest.fixture
def workdir(tmp_path):
    lines = [
        {**timed(10, compile=8.0, step=2.0), "train/loss": 2.0, "train/lr": 1e-3, "images_per_second": 100.0},
        {**timed(20, compile=8.0, step=4.0), "train/loss": None, "train/lr": 1e-3, "images_per_second": 110.0},
        {"step": 20, "eval/test_loss": 1.5, "eval/test_accuracy": 0.5, "eval/test_accuracy_low": 0.4},
        # Another process, of whose 4 seconds in steps one went to steps that had been done.
        {**timed(30, 0.1, compile=6.0, step=4.0), "train/loss": 1.0, "train/lr": 1e-3, "images_per_second": 120.0},
        {"step": 30, "eval/test_loss": 1.6, "eval/test_accuracy": 0.75, "eval/test_accuracy_low": 0.6},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4')
    (tmp_path / "config.json").write_text(json.dumps({"model": {"name": "a<b"}, "total_steps": 40}))
    save_steps(tmp_path / "checkpoints", (20, 30))
    return tmp_path


def test_the_times_of_processes_add_up_and_what_was_done_twice_is_no_step(workdir):
    spent = seconds(read_lines(workdir))
    assert spent == {
        **dict(compile=14.0, data=0.0, step=pytest.approx(7.0), eval=0.0, checkpoint=0.0, other=0.0),
        "lost": pytest.approx(1.0),
    }


def test_curves_leave_out_what_is_not_finite(workdir):
    found = series(read_lines(workdir))
    assert found["train/loss"] == [(10, 2.0), (30, 1.0)] and found["eval/test_accuracy"] == [(20, 0.5), (30, 0.75)]


@pytest.mark.parametrize(
    "values", [[1.0], [1.0, 1.0], [-1.0, 0.0, 2.0], [1e-4, 1.0, 5.0], [1.0 + i for i in range(2000)]]
)
def test_plots_are_drawings_within_their_frame(values):
    drawing = plot("a < b", {"one": list(enumerate(values, 1)), "two": [(1, values[0])]})
    svg = ElementTree.fromstring(re.search("<svg.*</svg>", drawing).group())
    points = " ".join(each.get("points") for each in svg.iter("polyline")).split()
    assert len(points) <= 600
    for point in points:
        x, y = map(float, point.split(","))
        assert 0 <= x <= 420 and 0 <= y <= 200
    assert "a &lt; b" in drawing


def test_the_page_has_everything_in_it(workdir, capsys):
    assert main([str(workdir)]) == 0
    assert capsys.readouterr().out == f"{workdir / 'report.html'}\n"
    text = (workdir / "report.html").read_text()
    assert text == page(workdir) and "<h1>a&lt;b</h1>" in text and "step 30 of 40" in text
    # Best of a loss is the lowest, of an accuracy the highest.
    assert "<td>test_loss</td><td>1.6</td><td>1.5</td>" in text
    assert "<td>test_accuracy</td><td>0.75</td><td>0.75</td>" in text and "accuracy_low" not in text
    assert "<td>lost</td><td>1.0</td><td>4.5%</td>" in text
    assert text.count("<svg") == 4 and "http" not in text
    assert re.search(r"<td>20</td><td>[\d.]+ kB</td><td>good</td>", text)


def test_without_a_run_there_is_no_page(tmp_path, capsys):
    for content in (None, "", '{"step": 1'):
        if content is not None:
            (tmp_path / "metrics.jsonl").write_text(content)
        assert main([str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "report.html").exists()


def test_the_memory_of_this_process_is_told():
    held = host.memory()
    assert 50e6 < held["memory/host"] < 1e12 and held.keys() <= {"memory/host", "memory/device", "memory/device_peak"}
