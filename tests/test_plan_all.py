"""Plans of every family: what is kept, what is tried where a step does not fit, and the compiler of a TPU itself."""

import dataclasses
import json

import jax
import pytest
from etils import epath

from kernels import hlo
from tests import mesh_runs
from tests.tpu_child import in_tpu_process
from train import compile as command
from train import plan_all

FSDP = {"fsdp": plan_all.MESHES["fsdp"]}
TWO = {name: plan_all.NANOS[name] for name in ("davit_nano", "gla_nano")}


def made_up(settings, largest):
    """What a plan of these settings comes to: a GiB an example, two where nothing is recomputed, of so many."""
    (batch,) = (int(word.partition("=")[2]) for word in settings if word.startswith("data.batch_size="))
    peak = batch * (1 if "remat=full" in settings else 2) * 2**30
    known = dict(fits=peak <= largest * 2**30, hbm_bytes_peak=peak, hbm_bytes_limit=largest * 2**30, batch=batch)
    known |= dict(mesh=dict(data=1, fsdp=256), devices=256, flops=256 * 10**12, bytes=2**30, bound="memory")
    return known | dict(seconds=0.25, collectives={"all-gather": dict(count=3, bytes=2**20, sent=2**20)})


@pytest.mark.parametrize(
    "largest, remat, batch, fits",
    [(2048, False, 1024, True), (1024, True, 1024, True), (600, True, 512, True), (100, True, 256, False)],
)
def test_what_does_not_fit_is_planned_with_less(monkeypatch, largest, remat, batch, fits):
    monkeypatch.setattr(
        plan_all,
        "_planned",
        lambda row, settings, limit: row | dict(settings=settings, plan=made_up(settings, largest)),
    )
    models = {"davit_giant": plan_all.MODELS["davit_giant"]}
    (row,) = plan_all.campaign(models, ["v5e:16x16"], FSDP, None, limit=1)
    assert row["plan"]["batch"] == batch and ("remat=full" in row["settings"]) == remat and plan_all.fits(row) == fits
    assert len(row["tried"]) == remat + (batch < 1024) + (batch < 512) + (not fits)


def test_what_is_in_the_file_is_not_planned_again(monkeypatch, tmp_path):
    asked, broken = [], ["gla_nano"]

    def planned(row, settings, limit):
        asked.append((row["model"], row["mesh"]))
        error = (
            dict(error="ValueError: no") if row["model"] in broken else dict(plan=made_up(("data.batch_size=1",), 9))
        )
        return row | dict(settings=settings) | error

    monkeypatch.setattr(plan_all, "_planned", planned)
    file = epath.Path(tmp_path) / "plans.json"
    rows = plan_all.campaign(TWO, ["v5e:2x2"], FSDP, file, limit=1)
    assert [plan_all.fits(row) for row in rows] == [True, False] and json.loads(file.read_text()) == rows
    assert plan_all.campaign(TWO, ["v5e:2x2"], plan_all.MESHES, file, limit=1)[:2] == rows
    both = [("davit_nano", "fsdp"), ("gla_nano", "fsdp")]
    assert asked == both + [(name, "fsdp+tensor") for name, _ in both]
    table = plan_all.markdown(rows)
    assert "| davit_nano | v5e:2x2 | fsdp | 1 | 2.00 of 9.00 GiB | yes | 1.00 T | 1.00 GiB | 3 of 1.00 MiB |" in table
    assert "**ValueError: no**" in table and table.endswith("2 plans: 1 compiled, 1 fit, 1 failed.")

    broken.clear()
    rows = plan_all.campaign(TWO, ["v5e:2x2"], FSDP, file, limit=1, again=True)
    assert asked[4:] == both[1:] and all(map(plan_all.fits, rows))


def test_every_plan_of_the_campaign_has_a_config_and_every_word_is_known(monkeypatch):
    monkeypatch.setattr(
        plan_all, "_planned", lambda row, settings, limit: row | dict(settings=settings, error=row["model"])
    )
    for models in (plan_all.MODELS, plan_all.NANOS):
        rows = plan_all.campaign(models, plan_all.TOPOLOGIES, plan_all.MESHES, None, limit=1)
        assert len(rows) == 6 * len(models)


def test_unknown_names_are_told(capsys):
    with pytest.raises(SystemExit):
        plan_all.main(["--json", "x", "--models", "davit_gaint"])
    assert "no davit_gaint; there are davit_giant" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["vit_nano", "transformer_nano"])
def test_weights_and_gradients_are_all_that_goes_along_fsdp(name):
    run, dataset = mesh_runs.built(name, fsdp=8)
    rows = {name: abstract(array, run.rows) for name, array in mesh_runs.batch_of(dataset, 0).items()}
    key = abstract(jax.eval_shape(lambda: jax.random.key(0)), run.replicated)
    compiled = run.train_step.trace(run.abstract_state, rows, key, run.task).lower().compile()
    sent = hlo.summary(compiled.as_text(), 8).collectives
    params = jax.tree.leaves(run.abstract_state.params)
    divided = sum(nbytes(leaf) for leaf in params if "fsdp" in leaf.sharding.spec)
    assert set(sent) == {"all-gather", "all-reduce"} and sent["all-gather"].bytes == divided
    whole = sum(nbytes(leaf) for leaf in params)
    # Beside the gradients the loss and the like.
    assert divided < whole <= sent["all-reduce"].bytes < 1.1 * whole


def nbytes(array):
    return array.size * array.dtype.itemsize


def abstract(array, sharding):
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


# More blocks of one kind are compiled one by one, and show nothing else.
ONE, EACH, OF_ROWS = ("model.overrides.depths=(1,)",), ("model.overrides.depths=(1, 1)",), ("model.overrides.depth=1",)
SHALLOW = dict.fromkeys(list(plan_all.NANOS)[7:], OF_ROWS) | dict(vit_nano=ONE, dcal_nano=ONE, care_nano=EACH)
SHALLOW["routing_transformer_seq2seq_nano"] += ("model.overrides.encoder_depth=1",)


def plans(names, topology, effort):
    """What the compiler of a TPU makes of models, with the weights divided over all chips."""
    found = {}
    for name in names:
        config, words = (plan_all.MODELS | plan_all.NANOS)[name]
        words = (*words, *plan_all.MESHES["fsdp"].split(","), *SHALLOW.get(name, ()))
        overrides = [f"--config.{word}" for word in words]
        (made,) = command.make(config, topology, overrides=overrides, effort=effort)
        found[name] = dataclasses.asdict(made)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("names", [list(plan_all.NANOS)[:7], list(plan_all.NANOS)[7:]], ids=["images", "sequences"])
def test_a_nano_of_every_family_is_planned_and_fits(names):
    for name, found in in_tpu_process(plans, names, "v5e:2x2", "O0", seconds=850).items():
        assert found["fits"] and found["hbm_bytes_state"] < found["hbm_bytes_peak"] < found["hbm_bytes_limit"], name
        assert found["flops"] and found["bytes"] and found["seconds"] and found["mesh"]["fsdp"] == 4, name
        assert found["compiler_options"] == {"xla_optimization_level": "EFFORT_O0"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_davit_giant_is_planned_for_256_chips():
    (found,) = in_tpu_process(plans, ["davit_giant"], "v5e:16x16", "O0", seconds=850).values()
    assert found["devices"] == 256 and found["parameters"] == 1_406_470_120 and found["fits"]
    # Each weight in bfloat16 at most twice, and no activation.
    assert found["collectives"]["all-gather"]["bytes"] < 4 * found["parameters"]
    assert "all-to-all" not in found["collectives"]


def largest_batch():
    """The plan with the largest batch of a very small model."""
    small = dict(depths="(1,)", dims="(8,)", num_heads="(2,)")
    words = [f"--config.model.overrides.{name}={value}" for name, value in small.items()]
    (found,) = command.make("configs/digits.py:davit_nano", "v5e:2x2", overrides=words, batch="auto", effort="O0")
    (more,) = command.make(
        "configs/digits.py:davit_nano", "v5e:2x2", overrides=words, batch=found.batch * 5 // 4, effort="O0"
    )
    return [dataclasses.asdict(each) for each in (found, more)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_largest_batch_that_fits_on_four_chips():
    found, more = in_tpu_process(largest_batch, seconds=850)
    assert found["fits"] and not more["fits"] and found["batch"] % 4 == 0
    assert found["hbm_bytes_peak"] <= found["hbm_bytes_limit"] < more["hbm_bytes_peak"]
