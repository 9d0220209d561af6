"""`python -m train.checkpoints`: what it says of good, damaged and unfinished steps, and what it removes."""

import json
import re
import shutil

import pytest

from tests.checkpoints import names_in, restore, save_steps
from train.checkpoints import main


@pytest.fixture
def workdir(tmp_path):
    """A run with a step of each kind: 1 and 2 good, 3 damaged, 4 without digests, 5 and 6 unfinished."""
    steps = tmp_path / "run" / "checkpoints"
    save_steps(steps, (1, 2, 3, 4))
    flip(steps / "3" / "data" / "metadata")
    (steps / "4" / "digests.json").unlink()
    (steps / "5.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (steps / "6.orbax-checkpoint-tmp-1234").mkdir()
    (steps / "notes").mkdir()
    return steps.parent


def flip(path):
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


def run(capsys, *argv):
    try:
        code = main([str(word) for word in argv])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def test_the_table_names_every_step_and_what_is_wrong(workdir, capsys):
    for given in (workdir, workdir / "checkpoints"):
        code, out, err = run(capsys, given, "--verify")
        head, *rows = [re.split(" {2,}", line.strip()) for line in out.splitlines()]
        assert code == 1 and err == "" and head == ["step", "size", "saved", "state"]
        assert [(row[0], row[-1]) for row in rows] == [
            ("1", "good"),
            ("2", "good"),
            ("3", "damaged: data/metadata differs from its xxh3-128 digest"),
            ("4", "without digests: digests.json is missing"),
            ("5", "unfinished: the save was cut short or is still going on"),
            ("6", "unfinished: the save was cut short or is still going on"),
        ]
    (line,) = run(capsys, workdir / "checkpoints" / "2", "--verify")[1].splitlines()[1:]
    assert line.split()[0] == "2" and line.endswith("good")


def test_without_verify_only_sizes_are_looked_at(workdir, capsys):
    lines = run(capsys, workdir)[1].splitlines()[1:]
    assert [line.endswith("good (by size)") for line in lines] == [True, True, True, False, False, False]
    (workdir / "checkpoints" / "2" / "data" / "metadata").write_text("")
    assert "damaged: data/metadata has 0 bytes instead of" in run(capsys, workdir)[1]


def test_json_says_the_same_and_sizes_in_bytes(workdir, capsys):
    code, out, _ = run(capsys, workdir, "--verify", "--json")
    found = json.loads(out)
    assert code == 1 and found["verified"] and found["directory"] == str(workdir / "checkpoints")
    first, _, third, *_ = found["steps"]
    files = [path for path in (workdir / "checkpoints" / "1").rglob("*") if path.is_file()]
    assert first["size"] == sum(path.stat().st_size for path in files)
    assert first["saved"] >= max(path.stat().st_mtime for path in files) - 1
    assert (third["state"], len(third["problems"])) == ("damaged", 1)


def test_repair_removes_what_is_damaged_or_unfinished_and_nothing_else(workdir, capsys):
    steps = workdir / "checkpoints"
    before = names_in(steps)
    code, _, err = run(capsys, workdir, "--repair", "--dry-run")
    assert code == 1 and names_in(steps) == before
    would = [line.split()[2] for line in err.splitlines() if line.startswith("would remove ")]
    code, _, err = run(capsys, workdir, "--repair")
    removed = [line.split()[1] for line in err.splitlines() if line.startswith("removed ")]
    assert removed == would and [path.rstrip(":").rsplit("/")[-1][0] for path in removed] == ["3", "5", "6"]
    assert code == 1 and names_in(steps) == ["1", "2", "4", "notes"]
    assert restore(steps, step=2).step == 2
    shutil.rmtree(steps / "4")
    code, _, err = run(capsys, workdir, "--repair")
    assert (code, err) == (0, "") and names_in(steps) == ["1", "2", "notes"]


def test_repair_leaves_all_where_no_step_is_good(workdir, capsys):
    steps = workdir / "checkpoints"
    for step in "12":
        flip(steps / step / "data" / "metadata")
    before = names_in(steps)
    code, _, err = run(capsys, workdir, "--repair")
    assert code == 1 and "none of these steps is good; nothing is removed" in err and names_in(steps) == before


def test_wrong_directories(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for given, message in (
        ("absent", "absent does not exist"),
        ("file", "file is a file; give a run's workdir"),
        ("empty", "no checkpoints in .*empty: expected folders named by their step"),
    ):
        code, out, err = run(capsys, tmp_path / given)
        assert (code, out) == (2, "") and err.startswith("error: ")
        assert re.search(message, err)
    assert run(capsys, tmp_path, "--dry-run")[0] == 2
