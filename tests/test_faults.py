"""The campaign of faults, in small: `train.faults` has the figures, `fault_runs` and `fault_checks` make them."""

import json
import pathlib

import pytest

from train import fault_checks, fault_runs, faults, processes
from train.__main__ import main


def test_the_command_prints_a_table_and_fails_where_a_figure_does(monkeypatch, tmp_path, capsys):
    def measured(place, arguments):
        assert place.is_dir() and arguments.kills == 3
        return dict(kills=3, wrong=0, distance=2.5e-9)

    def broken(place, arguments):
        raise RuntimeError("no run started")

    lines = {
        "R1": faults.Figure("first", measured, lambda found: not found["wrong"]),
        "R2": faults.Figure("second", broken, lambda found: True),
    }
    monkeypatch.setattr(faults, "FIGURES", lines)
    words = ["--kills", "3", "--workdir", str(tmp_path)]
    assert faults.main(["--only", "R1", *words]) == 0
    head, _, row = capsys.readouterr().out.splitlines()
    assert head == "| id | what has to hold | found | seconds |"
    assert row.startswith("| R1 | first | kills 3, wrong 0, distance 2.5e-09 | ")
    assert faults.main([*words, "--json"]) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["R1"]["holds"] and not found["R2"]["holds"] and "no run started" in found["R2"]["error"]
    assert "R2: DOES NOT HOLD" in err
    with pytest.raises(SystemExit) as end:
        faults.main(["--only", "R1,R99"])
    assert end.value.code == 2 and "no R99; there are R1, R2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, message",
    [
        (("localhost:1", 2, None), "go together; --process-id is missing"),
        (("localhost", 2, 0), "must be HOST:PORT of process 0, got 'localhost'"),
        (("localhost:1", 2, 2), "--process-id must be from 0 to 1, one less than --num-processes, got 2"),
    ],
)
def test_processes_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        processes.join(*given)


def test_the_options_of_processes_need_the_one_that_joins_them(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--config", "a", "--workdir", "b", "--process-id", "1"])
    assert end.value.code == 2 and "need --distributed" in capsys.readouterr().err


@pytest.mark.slow
def test_damage_is_detected_named_and_passed_over(tmp_path):
    found = fault_checks.damage(tmp_path, 2, seed=1)
    assert found == dict(trials=10, undetected=0, unnamed=0, wrong=0, restarted=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_runs_lose_one_save_at_most_and_end_as_others_do(tmp_path):
    found = fault_runs.kills(tmp_path, 10, seed=1)
    assert found["kills"] == 10 and found["in_saves"] >= 1 and found["ends"] >= 1 and found["saves_lost"] <= 1
    assert found["failed"] == found["wrong"] == found["left"] == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_gigabyte_is_saved_when_the_run_is_told_to_stop_twice(tmp_path):
    found = fault_runs.preempted(tmp_path)
    assert found["code"] == 143 and found["saved"] and found["gigabytes"] > 1 and found["seconds"] <= 30


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "gone"])
def test_a_run_without_disk_ends_and_loses_nothing(tmp_path, kind):
    found = fault_runs.starved(tmp_path, kind)
    assert found["intervals"] <= 2
    assert found | dict(intervals=0) == dict(code=1, named=True, intervals=0, newest=True, restarted=True)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_compute_what_one_does(tmp_path, count):
    found = fault_runs.processes(tmp_path, count)
    assert found["distance"] <= 1e-6 and found["loss"] <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, config, mesh",
    [
        (4, fault_runs.CONFIG, dict(mesh__data=2, mesh__tensor=4)),
        (2, "configs/raster.py:gated_deltanet_nano", dict(mesh__data=1, mesh__sequence=8)),
    ],
    ids=["tensor", "sequence"],
)
def test_processes_that_share_rows_compute_what_one_does(tmp_path, count, config, mesh):
    """Each has the devices of half the width of a layer, or half the tokens of every row."""
    found = fault_runs.processes(tmp_path, count, config=config, **mesh)
    assert found["distance"] <= 1e-6 and found["loss"] <= 1e-6


@pytest.mark.slow
def test_the_others_end_when_a_process_is_killed_and_all_go_on(tmp_path):
    found = fault_runs.torn(tmp_path)
    assert found["codes"] == [processes.LOST] and found["seconds"] <= 60 and found["named"] and found["restarted"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_processes_stop_together_and_go_on_in_any_number(tmp_path):
    """One of two is told to stop; four go on, then one: the metrics are those of a run in one piece."""
    settings = dict(total_steps=40, checkpoint__every_steps=7, eval_every=0)
    assert fault_runs.Child(tmp_path / "straight", **settings).finish()[0] == 0
    two = fault_runs.together(tmp_path / "run", 2, **settings)
    two[0].until(lambda: two[0].step() >= 3)
    two[1].process.terminate()
    assert [child.finish()[0] for child in two] == [143, 143]
    (stopped,) = {child.said().splitlines()[-1] for child in two}
    step = max(fault_runs.good_steps(tmp_path / "run"))
    assert stopped.startswith(f"stopped by SIGTERM after step {step}, which is saved") and 3 <= step < 40
    four = fault_runs.together(tmp_path / "run", 4, **(settings | dict(total_steps=40)))
    four[0].until(lambda: four[0].step() > step)
    four[3].process.terminate()
    assert {child.finish()[0] for child in four} <= {0, 143}
    assert f"going on from step {step} of" in four[0].said()
    assert fault_runs.Child(tmp_path / "run", **settings).finish()[0] == 0
    found, expected = (fault_runs.lines(tmp_path / name) for name in ("run", "straight"))
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, other in zip(found, expected):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_numbers_that_are_not_finite_are_named_by_the_next_log(tmp_path):
    assert fault_checks.not_finite(tmp_path, at=(2, 5)) == dict(runs=2, wrong=0)


@pytest.mark.slow
def test_a_state_moves_between_meshes(tmp_path):
    assert fault_checks.meshes(tmp_path) == dict(meshes=4, differ=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", faults.ACCUMULATED)
def test_accumulation_changes_the_gradient_by_rounding_alone(name):
    assert max(fault_checks.accumulated(None, name).values()) <= faults.ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maxvit_nano", "care_nano"])
def test_with_batch_statistics_the_parts_of_a_batch_are_batches_of_their_own(name):
    """As everywhere: each part is normalised by its own mean and variance, so the gradient is another one."""
    assert fault_checks.accumulated(None, name, parts=(2,))["2"] > 1e-3


def test_the_root_of_the_package_has_the_configs():
    assert (fault_runs.ROOT / fault_runs.CONFIG.partition(":")[0]).exists() and isinstance(
        fault_runs.ROOT, pathlib.Path
    )
