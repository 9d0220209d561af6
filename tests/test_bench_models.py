"""The benchmark of whole models and of recall: what its programs are asked, what they answer, how it is shown."""

import dataclasses
import json
import re
import subprocess
import types
import xml.etree.ElementTree

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from kernels.bench import against, children, html, measure, recall, rows, suites
from kernels.bench.__main__ import main
from kernels.bench.crossover import crossovers
from kernels.bench.plots import Line, plot
from kernels.bench.rows import Row
from kernels.bench.table import WIDTH, table
from tests.test_bench import LIMITS, PLAN, about, check_page, double, on_cpu, slowed, told, toy_case
from tests.test_bench_report import row
from train import bench_models, bench_recall, loop, model_steps, timm_steps
from zoo import registry

FAST = model_steps.Effort(3, 1e-3, 0.1)


def model_row(name="davit_nano", direction="inference", median=5.0, implementation="zoo", **changes) -> Row:
    known = dict(implementation=implementation, family="image model", shape="batch 64 of 8x8x3")
    known |= dict(pattern="self noncausal", direction=direction, images_per_s=64e3 / median, label=name, error=None)
    return dataclasses.replace(row(name, median=median, **known | changes), length=None)


def recall_row(mixer, variant, mqar, median=5.0, state=1000, **changes) -> Row:
    scores = dict(
        mqar=mqar, mqar_low=mqar - 0.02, mqar_high=mqar + 0.01, passkey=1.0, passkey_low=1.0, passkey_high=1.0
    )
    known = dict(op=mixer, label=mixer, family="recall", direction="training", tokens_per_s=1e5, seeds=3)
    known |= dict(implementation="zoo", shape="N32", state_bytes=state, equal_state=state == 1000, error=None)
    return dataclasses.replace(row(variant, median=median, **known | scores | changes), length=None)


def answering(monkeypatch, found, code=0, meta=None):
    """Replaces the programs of the suites by one that prints these rows; the words that it was given."""
    asked = []

    def run(command, **options):
        asked.append(command)
        return types.SimpleNamespace(
            returncode=code, stdout="noise of a driver\n" + rows.to_text(meta or about(), found)
        )

    monkeypatch.setattr(subprocess, "run", run)
    return asked


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "model"], "unknown suite 'model'; did you mean 'models'"),
        (["--suite", "models", "--size", "smal"], "unknown size 'smal'; did you mean 'small'"),
        (["--suite", "models", "--dtypes", "float23"], "unknown dtype 'float23'; did you mean 'float32'"),
        (["--suite", "models", "--workdir", "x"], "--suite models trains nothing"),
        (["--suite", "quick", "--workdir", "x"], "--suite quick trains nothing"),
        (["--suite", "recall", "--recall", "x.json"], "of which --suite recall has no rows"),
        (["--suite", "recall", "--topology", "v5e:2x2"], "--suite recall trains, on the device that is here"),
        (["--topology", "v5e:2x2", "--repeats", "5"], "--repeats is about times"),
        (["--topology", "v5e:2x2", "--against", "x.json"], "--against is about times"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, said, capsys):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_every_option_reaches_the_program(monkeypatch, capsys):
    asked = answering(monkeypatch, [model_row()])
    options = ["--ops", "davit_nano,vit_nano", "--size", "small", "--shapes", "8x8x3", "--dtypes", "bfloat16"]
    assert main(["--suite", "models", *options, "--repeats", "5"]) == 0
    (command,) = asked
    assert command[1:3] == ["-m", "train.bench_models"]
    given = dict(zip(command[3::2], command[4::2]))
    assert given == dict(zip(options[::2], options[1::2])) | {"--repeats": "5"}


def test_without_the_package_train_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(children.importlib.util, "find_spec", lambda name: None)
    assert main(["--suite", "recall"]) == 2
    assert "needs the package train beside kernels" in capsys.readouterr().err


def test_a_program_that_fails_is_an_error(monkeypatch, capsys):
    answering(monkeypatch, [], code=2)
    assert main(["--suite", "models"]) == 2
    assert "train.bench_models ended with exit code 2" in capsys.readouterr().err


def test_models_are_told_and_written(monkeypatch, capsys, tmp_path):
    found = [model_row(direction=direction, median=m) for direction, m in (("inference", 5.0), ("training", 20.0))]
    found.append(model_row(direction="inference", implementation="timm eager", median=7.0))
    found.append(
        model_row(implementation="timm compiled", median_ms=None, status="not measured", reason="timm is not installed")
    )
    answering(monkeypatch, found)
    files = {name: str(tmp_path / f"rows.{name}") for name in ("json", "csv", "html")}
    assert main(["--suite", "models", *[part for name, file in files.items() for part in (f"--{name}", file)]]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= WIDTH
    assert "12.8 k" in out and "not measured, timm is not installed: timm compiled (davit_nano)" in out
    assert "error" not in out
    assert [r["images_per_s"] for r in json.loads((tmp_path / "rows.json").read_text())["rows"]][:2] == [12800, 3200]
    page = check_page((tmp_path / "rows.html").read_text())
    assert "per second" in (tmp_path / "rows.html").read_text()
    assert sum(tag == "tr" for tag, _ in page.tags) == len(found) + 1


def test_recall_is_told_with_the_best_first_and_states_that_are_not_equal_marked():
    found = [recall_row("linear_attention", "no decay", 0.5), recall_row("transformer", "softmax", 0.99, state=9000)]
    text = told(found)
    assert text.index("transformer") < text.index("linear_attention")
    assert "99.0 (97..100)" in text and "50.0 (48..51)" in text and "9 kB *" in text and "1 kB " in text
    page = html.page(about(), found, crossovers(found))
    check_page(page)
    assert "Recall against time: MQAR, training" in page and "softmax (9 kB of state)" in page


def test_scores_join_the_causal_rows_of_their_variant():
    scores = [recall_row("gated_deltanet", "gated delta", 0.9)]
    found = [row("gated delta"), row("gated delta", pattern="self noncausal"), row("GLA")]
    recall.join(found, scores)
    assert [r.mqar for r in found] == [0.9, None, None] and found[0].seeds == 3 and found[0].equal_state
    assert "MQAR, %" in told(found) and "90.0" in told(found)
    with pytest.raises(ValueError, match="has scores of gated delta, which no row here is of"):
        recall.join([row("GLA")], scores)


def test_a_flat_axis_begins_at_nothing():
    drawn = plot("title", [Line("a", [(1, 0.0), (10, 98.0)])], x="x", y="%", x_text=str, y_text=str, flat=True)
    root = xml.etree.ElementTree.fromstring(drawn)
    low, high = (float(e.get("cy")) for e in root.iter("circle"))
    said = [e.text for e in root.iter("text")]
    assert low == 260 and 14 <= high < 30 and {"0.0", "25.0", "100.0"} <= set(said)


def test_what_was_slow_once_is_no_regression():
    old, new = [row(median=1.0), row("delta", median=1.0)], [row(median=1.5), row("delta", median=1.5)]
    asked = []

    def again(some):
        asked.append([r.variant for r in some])
        return [row("GLA", median=1.02), row("delta", median=1.4 - 0.1 * len(asked))]

    first, second = against.confirmed(against.compare(new, old), again)
    assert (first.verdict, first.row.median_ms) == ("same", 1.02)
    assert second.is_regression and second.row.median_ms == pytest.approx(1.2)
    assert asked == [["GLA", "delta"], ["delta"]]


def test_intervals_that_nearly_touch_do_not_tell_two_runs_apart():
    (change,) = against.compare([row(median=1.1, noise=0.02)], [row(median=1.0, noise=0.02)])
    assert change.verdict == "slower"
    spread = dict(p20_ms=1.02, p80_ms=1.13, median_ms=1.12)
    (change,) = against.compare([row(**spread)], [row(median=1.0, noise=0.0)])
    assert change.verdict == "same"


def test_twice_the_time_is_slower_however_much_it_spreads():
    spread = dict(p20_ms=2.5, p80_ms=90.0, median_ms=30.0)
    (change,) = against.compare([row(**spread)], [row(median=1.0)])
    assert change.verdict == "slower"
    (change,) = against.compare([row(median=1.0)], [row(**spread)])
    assert change.verdict == "faster"


def test_a_machine_that_is_slower_itself_is_said_to_be():
    now, then = (dict(bandwidth=b, rates={"float32": rate}) for b, rate in ((5e9, 1e11), (1e10, 1.1e11)))
    assert "copies at 0.50 of the rate" in against.slower_machine(now, then)
    assert "multiplies" not in against.slower_machine(now, then)
    assert against.slower_machine(then, now) is against.slower_machine(now, {}) is None


def test_a_kernel_that_was_slowed_is_slow_again(monkeypatch, capsys, tmp_path):
    """By the command: everything is as it was but one kernel, which is measured once more and stays slow."""
    case = {"run": double}
    made = [toy_case(on_cpu(lambda x, factor: case["run"](x, factor)))]
    monkeypatch.setattr(suites, "chosen", lambda *arguments: made)
    monkeypatch.setattr("kernels.bench.__main__.limits", lambda device, dtypes: LIMITS)
    file = str(tmp_path / "old.json")
    command = ["--repeats", "3"]
    assert main([*command, "--json", file]) == 0
    case["run"] = slowed
    capsys.readouterr()
    assert main([*command, "--against", file]) == 1
    told = capsys.readouterr()
    assert "slower: double, causal (pallas_triton, forward" in told.out
    assert "measured again" in told.err and "(xla" not in re.findall("slower: .*", told.out)


def test_only_wanted_rows_are_measured_again():
    (key,) = {r.key for r in measure.measure([toy_case()], PLAN) if r.direction == "forward"}
    found = measure.measure([toy_case(on_cpu(double))], dataclasses.replace(PLAN, wanted=frozenset([key])))
    assert [r.key for r in found] == [key] and found[0].median_ms > 0


def test_the_models_of_the_suite_are_models_of_the_zoo():
    for size, names in bench_models.MODELS.items():
        assert set(names) <= set(registry.list_models()) and len(set(names)) == len(names), size
    of_families = {registry.family_of(name).name for names in bench_models.MODELS.values() for name in names}
    assert of_families == {family.name for family in registry.families()}
    assert bench_models.batch_size("davit_tiny", "cpu") == 4 and bench_models.batch_size("davit_nano", "cpu") == 64
    with pytest.raises(ValueError, match="did you mean 'davit_tiny'"):
        bench_models.jobs("small", ["davit_tinny"], [], ["float32"], "cpu")


def test_peers_that_are_not_installed_are_said_to_be_absent(monkeypatch):
    monkeypatch.setattr(timm_steps.importlib.util, "find_spec", lambda name: None)
    assert [peer.absent for peer in timm_steps.peers("davit_tiny", 4, "float32")] == ["timm is not installed"] * 2
    assert timm_steps.peers("care_s0", 4, "float32") == timm_steps.peers("davit_nano", 4, "float32") == []
    assert set(timm_steps.versions().values()) == {"not installed, not measured"}


def test_a_model_is_timed():
    job = model_steps.job("vit_nano", 2, "float32")
    absent = model_steps.Peer("timm eager", None, "timm is not installed")
    found = model_steps.measure([dataclasses.replace(job, peers=[absent])], LIMITS, FAST, ("inference",))
    ours, peer = found
    model = registry.create_model("vit_nano")
    assert ours.status == "ok" and ours.median_ms > 0 and ours.peak_bytes > 0 and ours.times_floor > 0
    assert ours.images_per_s == pytest.approx(2 / ours.median_ms * 1e3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    assert ours.parameters == sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    # Parameters and uint8 images come in, logits go out.
    assert ours.bytes == 4 * ours.parameters + 2 * 8 * 8 * 3 + 4 * 2 * model.num_classes
    assert (peer.status, peer.reason, peer.median_ms) == ("not measured", "timm is not installed", None)


def test_a_model_that_cannot_be_built_is_a_result(monkeypatch):
    monkeypatch.setattr(model_steps.program, "build", lambda *arguments: 1 / 0)
    found = model_steps.measure([model_steps.job("vit_nano", 2, "float32")], LIMITS, FAST)
    assert [r.status for r in found] == ["failed"] * 2 and "ZeroDivisionError" in found[0].reason


def runs(mixer, tmp_path, monkeypatch, accuracy, rates=()):
    """Trainings whose accuracy is a function of (task, seed, learning rate); what was trained."""
    done = []

    def trained(config, place):
        done.append((config.data.name, config.seed, config.optim.lr))
        return {"test_accuracy": accuracy(*done[-1])}

    monkeypatch.setattr(bench_recall, "trained", trained)
    setting = dataclasses.replace(bench_recall.settings("small")[0], rates=rates)
    return bench_recall.Runs(mixer, setting, "float32", epath.Path(tmp_path), lambda line: None), done


def test_scores_are_those_of_three_seeds(tmp_path, monkeypatch):
    made, done = runs("gated_deltanet", tmp_path, monkeypatch, lambda task, seed, rate: seed / 10)
    assert made.scores() == {"mqar": [0.0, 0.1, 0.2], "passkey": [0.0, 0.1, 0.2]}
    assert [task for task, *_ in done] == ["mqar"] * 3 + ["passkey"] * 3


def test_the_learning_rate_is_chosen_by_a_seed_that_is_not_scored(tmp_path, monkeypatch):
    rates = (1e-3, 1e-2)
    made, done = runs(
        "retnet", tmp_path, monkeypatch, lambda task, seed, rate: rate if task == "mqar" else -rate, rates
    )
    made.scores()
    assert {(task, seed, rate) for task, seed, rate in done if seed != bench_recall.VALIDATION_SEED} == {
        (task, seed, best) for task, best in (("mqar", 1e-2), ("passkey", 1e-3)) for seed in (0, 1, 2)
    }
    assert {rate for _, seed, rate in done if seed == bench_recall.VALIDATION_SEED} == set(rates)


def test_a_run_that_diverges_recalls_nothing(tmp_path, monkeypatch):
    def diverges(*arguments):
        raise loop.NotFinite("the loss of step 3 is not finite")

    made, _ = runs("retnet", tmp_path, monkeypatch, diverges)
    assert made.scores()["mqar"] == [0.0] * 3


def test_states_of_the_small_preset_are_those_of_two_matrices():
    sizes = {}
    for mixer in ("transformer", "linear_attention", "retnet", "gated_deltanet", "yaad"):
        config = bench_recall.config_lib.load(f"{bench_recall.CONFIG}:mqar_small,{mixer}")
        dataset = bench_recall.inputs.open_dataset(config, "train")
        sizes[mixer] = bench_recall.state_bytes(config, dataset)
    layers, matrices, taps = 2, 2 * 32 * 32 * 4, 3 * 3 * 64 * 4
    # And where in the row it is.
    assert sizes["gated_deltanet"] == layers * (matrices + taps) + 4
    assert sizes["linear_attention"] == sizes["retnet"] == sizes["gated_deltanet"]
    # A memory of as many numbers, as it is and as it was when its chunk began.
    assert sizes["yaad"] >= layers * (2 * matrices + taps)
    # Keys and values of every token.
    assert sizes["transformer"] >= layers * 2 * 32 * 64 * 4


def test_the_published_setting_is_zoologys():
    settings = bench_recall.settings("full")
    assert len(settings) == 4 * 4 and all(len(each.rates) == 4 for each in settings)
    config = bench_recall.Runs("retnet", settings[5], "float32", epath.Path("."), print).config("mqar_128x8", 0, 1e-2)
    assert config.data.options.to_dict() == {"num_kv_pairs": 8} and config.data.length == 128
    assert config.total_steps * config.data.batch_size == 64 * 100_000 and config.model.overrides.width == 128
    assert config.model.overrides.mlp_hidden == 0 and config.optim.lr == 1e-2 and config.optim.clip_norm is None


@pytest.mark.slow
def test_models_are_measured_by_the_command(capsys, tmp_path):
    file = str(tmp_path / "models.json")
    command = ["--suite", "models", "--ops", "vit_nano", "--repeats", "3", "--json", file]
    assert main(command) == 0
    assert "vit_nano" in capsys.readouterr().out
    meta, found = rows.read_json(file)
    assert [r.direction for r in found] == ["inference", "training"] and all(r.images_per_s > 0 for r in found)
    assert {"timm", "torch"} == set(meta["peers"]) and meta["suite"] == "models"


@pytest.mark.slow
def test_recall_is_trained_once(monkeypatch, tmp_path):
    """With three steps each; the second time everything is read back."""
    changes = {"total_steps": 3, "optim.warmup_steps": 1, "data.eval_examples": 64, "data.eval_batch_size": 64}
    changes |= {"model.overrides.depth": 1, "model.overrides.mlp_hidden": 0}
    few = tuple(f"--config.{key}={value}" for key, value in changes.items())
    setting = dataclasses.replace(bench_recall.settings("small")[0], words=few)
    monkeypatch.setattr(bench_recall, "settings", lambda size: [setting])
    monkeypatch.setattr(bench_recall, "SEEDS", (0,))
    arguments = bench_recall.parser("", "").parse_args(["--ops", "linear_attention"])
    arguments.workdir = str(tmp_path)
    meta, found = bench_recall.run(arguments, print)
    assert [r.direction for r in found] == ["inference", "training"] and all(r.tokens_per_s > 0 for r in found)
    assert all(0 <= r.mqar_low <= r.mqar <= r.mqar_high <= 1 and r.passkey is not None for r in found)
    assert table(meta, found) and len(list(tmp_path.glob("*_seed0/result.json"))) == 2
    scores = [r.mqar for r in found]
    monkeypatch.setattr(loop, "train", None)
    monkeypatch.setattr(model_steps, "measure", lambda *arguments, **options: found)
    again = bench_recall.run(arguments, print)[1]
    assert [r.mqar for r in again] == scores
