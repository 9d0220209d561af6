"""`python -m zoo`: results on stdout, the rest on stderr, exit codes, and no traceback whatever is given."""

import argparse
import dataclasses
import importlib
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo import __main__ as cli
from zoo import registry
from zoo.commands.arguments import image_size
from zoo.counts import FILE, counts_of


def run(capsys, *argv):
    """Exit code, stdout and stderr of a command."""
    try:
        code = cli.main([str(word) for word in argv])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """`davit_nano` with pseudo-random weights, in a file."""
    path = tmp_path_factory.mktemp("weights") / "nano.safetensors"
    model = zoo.create_model("davit_nano")
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    draw = np.random.default_rng(0).standard_normal
    zoo.save_pretrained(model, jax.tree.map(lambda leaf: draw(leaf.shape, np.float32), shapes), path)
    return path


def test_help(capsys):
    code, out, err = run(capsys)
    assert code == 0 and err == "" and out == run(capsys, "--help")[1]
    for name, (_, summary) in cli.COMMANDS.items():
        assert summary in out
        code, text, _ = run(capsys, name, "--help")
        assert code == 0 and text.startswith(f"usage: python -m zoo {name} ")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_argument_has_help(name):
    parser = argparse.ArgumentParser()
    importlib.import_module(cli.COMMANDS[name][0]).add_arguments(parser)
    assert len(parser._actions) > 1
    assert all(action.help for action in parser._actions)


def test_unknown_commands_and_options(capsys):
    code, out, err = run(capsys, "lists")
    assert (code, out) == (2, "") and "invalid choice: 'lists'" in err
    assert run(capsys, "list", "--pretrain")[0] == 2
    assert run(capsys, "info")[0] == run(capsys, "convert", "a", "b")[0] == 2


@pytest.mark.parametrize("pretrained", [False, True])
def test_list_of_all(capsys, pretrained):
    code, out, err = run(capsys, "list", *(["--pretrained"] if pretrained else []))
    head, *rows = out.splitlines()
    assert (code, err) == (0, "")
    words = ["params", "MACs", "input", *(["weights"] if not pretrained else []), "availability", "licence"]
    assert head.split() == ["weights" if pretrained else "model", *words]
    assert max(map(len, out.splitlines())) <= 120
    # A second set of weights stands in a row of its own, without the model's name.
    assert [row.split()[0] for row in rows if row[0] != " "] == zoo.list_models(pretrained=pretrained)
    assert sum(row.split()[-1] != "-" for row in rows) == len(zoo.list_models(pretrained=True))
    at = head.index("availability")
    for row in rows:
        assert row.endswith("-") or (row[at - 2 : at] == "  " and row[at] != " ")


def test_rows_of_the_list(capsys):
    code, out, err = run(capsys, "list", "davit_nano", "davit_[t]*")
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["model", "params", "MACs", "input", "weights", "availability", "licence"],
        ["davit_nano", "139.3", "k", "3.706", "M", "8", "-"],
        ["davit_tiny", "28.36", "M", "4.520", "G", "224", "msft_in1k", "published", "apache-2.0"],
    ]


def test_every_count_is_stored():
    assert sorted(json.loads(FILE.read_text())) == sorted([*zoo.list_models(), *zoo.list_models(pretrained=True)])


def test_list_as_json(capsys):
    (entry,) = json.loads(run(capsys, "list", "davit_nano", "--json")[1])
    assert entry == {
        "name": "davit_nano",
        "parameters": 139_274,
        "macs": 3_706_368,
        "input_size": [8, 8],
        "weights": [],
    }
    entries = json.loads(run(capsys, "list", "--json", "--pretrained")[1])
    assert [entry["name"] for entry in entries] == zoo.list_models(pretrained=True)
    for entry in entries:
        (cfg,) = entry["weights"]
        assert cfg["tag"] == entry["name"] and cfg["availability"] in ("published", "never released", "link dead")
        assert entry["input_size"] == [cfg["image_size"]] * 2
        assert (entry["parameters"], entry["macs"]) == counts_of(entry["name"])


@pytest.mark.parametrize(
    "pattern, hint",
    [
        ("davit_tinny", "did you mean 'davit_tiny'"),
        ("davit", "'davit*' does"),
        ("nano", "'*nano*' does"),
        ("davit_tinny*", "did you mean 'davit_tiny'"),
    ],
)
def test_patterns_that_match_nothing(capsys, pattern, hint):
    code, out, err = run(capsys, "list", "davit_tiny", pattern)
    assert (code, out) == (2, "") and err.startswith(f"error: no model matches {pattern!r}; {hint}")


def test_what_listing_imports():
    heavy = ("train", "torch", "tensorflow", "orbax", "grain", "zoo.commands.convert")
    code = (
        "import sys; from zoo.__main__ import main; main(['list', 'davit*']);"
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr.splitlines()[-1] == "[]"


def test_a_reader_that_stops(tmp_path):
    """`python -m zoo list | head -1`, in a shell that says how the first of the two ended."""
    command = f"{sys.executable} -m zoo list --pretrained | true; echo ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env={**os.environ}, check=True)
    assert found.stdout == "0\n" and "Error" not in found.stderr


def test_info(capsys):
    code, out, err = run(capsys, "info", "davit_nano")
    assert (code, err) == (0, "") and out == f"{zoo.model_info('davit_nano')}\n"
    words = ("--image-size", "8x12", "--num-classes", 3, "--in-chans", 1, "--batch", 2)
    parsed = json.loads(run(capsys, "info", "davit_nano", "--json", *words)[1])
    assert (parsed["image_size"], parsed["num_classes"], parsed["in_chans"], parsed["batch"]) == ([8, 12], 3, 1, 2)
    code, out, err = run(capsys, "info", "davit_nanno")
    assert (code, out) == (2, "") and err.startswith("error: unknown model 'davit_nanno'; did you mean 'davit_nano'")
    assert "nearest that fits is 96x96" in run(capsys, "info", "maxvit_tiny_tf_224", "--image-size", 100)[2]


def test_sizes():
    assert (image_size("224"), image_size("8x12")) == (224, (8, 12))
    for text in ("", "0", "8x", "8x0", "x8", "-8", "8.5", "8x8x8"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
            image_size(text)


def test_verify(capsys, weights, tmp_path):
    code, out, _ = run(capsys, "verify", "davit_nano", weights, "--json", tmp_path / "report.json")
    assert code == 0 and out.endswith("nothing failed, 2 not checked\n")
    written = json.loads((tmp_path / "report.json").read_text())
    code, out, err = run(capsys, "verify", "davit_nano", weights, "--json", "-")
    assert (code, err) == (0, "") and json.loads(out) == written and written["passed"]
    code, out, _ = run(capsys, "verify", "davit_nano", weights, "--num-classes", 7)
    assert code == 2 and "num_classes=10, not 7" in out
    code, out, _ = run(capsys, "verify", "maxvit_nano", weights, "--json", "-")
    assert code == 2 and not json.loads(out)["passed"]


def test_verify_of_what_cannot_be_read(capsys, weights, tmp_path):
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(weights.read_bytes()[:-5])
    for words, message in (
        (("davit_nano", truncated), f"error: {truncated}: truncated at byte"),
        (("davit_nano", tmp_path / "absent.pth"), "no such file"),
        (("davit_nanno", weights), "did you mean 'davit_nano'"),
        (("davit_nano", weights, "--naming", "tim"), "did you mean 'timm'"),
        (("davit_nano", weights, "--reference", tmp_path / "absent.npz"), "absent.npz: no such file"),
    ):
        code, out, err = run(capsys, "verify", *words)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_convert(capsys, weights, tmp_path):
    for source, destination, *words in (
        (weights, "a.npz", "--naming", "official"),
        (tmp_path / "a.npz", "b"),
        (tmp_path / "b", "c.pth"),
        (tmp_path / "c.pth", "d.safetensors", "--naming", "timm"),
    ):
        code, out, _ = run(capsys, "convert", source, tmp_path / destination, "--model", "davit_nano", *words)
        assert code == 0 and f"{tmp_path / destination}: " in out
    assert (tmp_path / "d.safetensors").read_bytes() == weights.read_bytes()
    again = ("convert", weights, tmp_path / "a.npz", "--model", "davit_nano")
    code, out, err = run(capsys, *again)
    assert (code, out) == (2, "") and "exists" in err
    assert run(capsys, *again, "--overwrite", "--dtype", "bfloat16")[0] == 0
    code, out, err = run(capsys, "convert", weights, tmp_path / "e.npz", "--model", "davit_tiny")
    assert (code, out) == (2, "") and "does not fit davit_tiny" in err
    assert not (tmp_path / "e.npz").exists()


def test_card(capsys, tmp_path, monkeypatch):
    cfg = dataclasses.replace(
        zoo.pretrained_cfg("davit_tiny"), tag="davit_nano.ours", image_size=8, num_classes=10, availability="link dead"
    )
    monkeypatch.setitem(registry.family_of("davit_nano").pretrained, cfg.tag, cfg)
    code, out, err = run(capsys, "card", "davit_nano")
    assert (code, err) == (0, "") and out.startswith("# davit_nano.ours\n")
    code, told, err = run(capsys, "card", "davit_nano.ours", "--output", tmp_path / "card.md")
    assert (code, told) == (0, "") and (tmp_path / "card.md").read_text() == out
    assert run(capsys, "card", "davit_giant")[0] == 2
