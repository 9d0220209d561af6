"""Verification runs: they learn, go on bit for bit, are scored and drawn, and refuse what does not fit."""

import dataclasses
import json
import pathlib
import shutil

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import zoo
from tests import runs
from train import checkpoint, compare, evaluate, face_report, faces, loop, margins, step, triplets, verification
from train import config as config_lib
from train.checkpoint import read_state
from train.identities import IdentityOrder

CONFIG = "configs/twins.py"
PEOPLE = dict(pairs=6, validation_pairs=3, test_pairs=4, singles=2, images=3, eval_images=3, size=24)
SMALL = dict(
    **{f"data__options__{name}": value for name, value in PEOPLE.items()},
    **{f"model__overrides__{name}": value for name, value in dict(dim=16, num_heads=2, patch=6).items()},
    model__overrides__embedding_dim=8,
    model__overrides__depths="(2,)",
    model__overrides__pair_layers="(1,2)",
    data__batch_size=32,
    data__eval_batch_size=16,
    accum_steps=2,
    verification__images_per_identity=2,
    verification__replicates=20,
    optim__warmup_steps=1,
    total_steps=6,
    log_every=1,
    eval_every=3,
    checkpoint__every_steps=3,
    checkpoint__keep=5,
)


def words(**values):
    return [f"--config.{name.replace('__', '.')}={value}" for name, value in (SMALL | values).items()]


def train(workdir, row="full", **values):
    return loop.train(loop.prepare(config_lib.load(f"{CONFIG}:{row}", words(**values)), str(workdir)))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    return workdir, train(workdir)


def test_what_a_run_tells(straight):
    workdir, result = straight
    kinds = {name.removeprefix("test_").removesuffix("_accuracy") for name in result if name.endswith("_accuracy")}
    assert kinds == {"general", "twin", "hard_twin"}
    # One family alone, as hard twins here, has no interval.
    for kind in kinds - {"hard_twin"}:
        found = [result[f"test_{kind}_accuracy{end}"] for end in ("_low", "", "_high")]
        assert 0 <= found[0] <= found[1] <= found[2] <= 1
    # Four pairs and a single of three pictures each; of the pairs one is hard.
    assert result["test_general_genuine_pairs"] == 27 and result["test_twin_impostor_pairs"] == 36
    assert result["test_hard_twin_impostor_pairs"] == 9
    lines = [line for line in runs.lines(workdir) if "train/loss" in line]
    for line in lines:
        whole = line["train/margin_loss"] + 0.1 * line["train/triplet_loss"]
        assert line["train/loss"] == pytest.approx(whole, rel=1e-5)
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]


def test_going_on_is_bit_equal(straight, tmp_path, capsys):
    """Model, weights of the people, optimizer and the order of the batches."""
    workdir = tmp_path / "cut"
    shutil.copytree(straight[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    again = train(workdir)
    assert "going on from step 3 of 6" in capsys.readouterr().err
    assert runs.without_times(again) == runs.without_times(straight[1])
    assert runs.lines(workdir) == runs.lines(straight[0])
    found, expected = (read_state(directory / "checkpoints", 6)[1] for directory in (workdir, straight[0]))
    chex.assert_trees_all_equal(found, expected)
    assert found["task"]["params"]["people"].shape == (8, 14) and found["task"].get("state", {}) == {}
    before = read_state(workdir / "checkpoints", 3)[1]["task"]["params"]["people"]
    assert (found["task"]["params"]["people"] != before).any()


def test_scored_again(straight, tmp_path, capsys):
    workdir, result = straight
    again = evaluate.score_run(workdir)
    metrics = {name: value for name, value in result.items() if name.startswith("test_")}
    for name, value in metrics.items():
        assert again[name] == pytest.approx(value, abs=1e-6), name
    assert again["examples"] == (2 * 3 + 1 + 2 * 4 + 1) * 3 and "images_per_second" in again
    assert face_report.main(["--workdir", str(workdir), "--out", str(tmp_path / "pictures")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {f"test_{name}": value for name, value in printed.items() if name != "step"} == {
        name: pytest.approx(value, abs=1e-6) for name, value in metrics.items()
    }
    for name in ("roc", "scores", "faces", "maps"):
        with Image.open(tmp_path / "pictures" / f"{name}.png") as image:
            assert image.mode == "RGB" and image.width > 500 and len(np.unique(np.asarray(image))) > 10


def test_the_model_is_saved_without_the_people(straight):
    model, variables, report = zoo.load_pretrained(
        "ahan_nano",
        str(straight[0]),
        num_classes=0,
        **dict(image_size=24, dim=16, num_heads=2, patch=6, embedding_dim=8, depths=(2,), pair_layers=(1, 2)),
    )
    saved = read_state(straight[0] / "checkpoints", 6)[1]
    chex.assert_trees_all_equal(variables["params"], saved["params"])
    assert verification.TASK not in variables["params"] and "people" not in str(report)
    assert model.num_classes == 0


@pytest.mark.slow
def test_compared(tmp_path, capsys):
    words_of_rows = words(total_steps=2, eval_every=0)
    command = ["--config", f"{CONFIG}:ablation", "--workdir", str(tmp_path), "--only", "backbone,0"]
    assert compare.main([*command, *words_of_rows]) == 0
    table, line = capsys.readouterr().out.rsplit("\n", 2)[:2]
    row = json.loads(line)["backbone,0"]
    head, first = table.splitlines()
    assert head.split()[:3] == ["parameters", "images", "seconds"] and "hard twins" in head
    low, high = (f"{100 * row[f'test_twin_accuracy_{end}']:.1f}%" for end in ("low", "high"))
    assert first.startswith("backbone,0") and f"% [{low}, {high}]" in first
    assert row["images"] == 64 and "tokens" not in row and "state" not in row


def test_full_tables(tmp_path, capsys):
    command = ["--workdir", str(tmp_path), "--full", "--only", "hca,7", "--config"]
    assert compare.main([*command, f"{CONFIG}:ablation"]) == 2
    assert "did you mean 'hca,2'" in capsys.readouterr().err
    assert compare.main([*command, f"{CONFIG}:quick"]) == 2
    assert "quick_full' names no table" in capsys.readouterr().err


@pytest.mark.slow
def test_rows_are_contrasted(tmp_path, capsys):
    """Of both rows on the same pairs, once from the checkpoints and once from what the rows say."""
    command = ["--config", f"{CONFIG}:quick", "--workdir", str(tmp_path)]
    assert compare.main([*command, *words(total_steps=1, optim__warmup_steps=0, eval_every=0)]) == 0
    table, line = capsys.readouterr().out.rsplit("\n", 2)[:2]
    found = json.loads(line)
    for kind, values in found["contrasts"]["full - backbone"].items():
        sides = (found[name][f"test_{kind}_accuracy"] for name in ("full", "backbone"))
        assert values["difference"] == pytest.approx(np.subtract(*sides)), kind
        # One pair is hard, which leaves nothing to draw from.
        assert kind == "hard_twin" or values["low"] <= values["difference"] <= values["high"]
    assert "full - backbone" in table and "accuracy, mean of seeds" in table


def test_a_report_without_twins_or_maps(straight, tmp_path):
    """A set of people who have no twin still has pictures."""
    run = evaluate.score_faces(straight[0])
    alone = dataclasses.replace(run.dataset, twins=np.full_like(run.dataset.twins, -1))
    assert face_report.face_sheet(alone).height > 100
    assert face_report.map_sheet(dataclasses.replace(run, dataset=alone), "no twins").width >= 1200


def test_rows_of_the_table():
    for table in ("ablation", "ablation_full", "quick"):
        for row in config_lib.table(f"{CONFIG}:{table}")[1]:
            config = config_lib.load(f"{CONFIG}:{row}")
            modules = config.model.overrides
            name = row.partition(",")[0]
            assert modules.hca == ("hca" in name or name == "full"), row
            assert (modules.pair_probability > 0) == ("ta_pwca" in name or name == "full"), row
            assert config.seed == int(row.partition(",")[2] or 0)
    with pytest.raises(config_lib.ConfigError, match="no twins config 'all'; it takes published, or ROW or ROW,SEED"):
        config_lib.load(f"{CONFIG}:all")
    published = config_lib.load(f"{CONFIG}:published")
    assert published.data.batch_size // published.accum_steps == 64 and published.verification.margin is None


class Stub(nn.Module):
    """Embeddings that are a matrix times the mean colours; it notes what it is told of twins."""

    width: int = 5

    @nn.compact
    def __call__(self, images, train=False, twin_index=None):
        x = nn.Dense(self.width, use_bias=False, name="dense")(images.mean((1, 2)))
        if twin_index is not None:
            self.sow("told", "twin_index", twin_index)
        return x


LABELS = np.array([0, 1, 4, 0, 1, 4], np.int32)
TASK = verification.Verification(
    num_people=6,
    width=5,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    twins=jnp.array([1, 0, 3, 2, 5, 4], jnp.int32),
    scale=8.0,
    margin=0.2,
)


@pytest.fixture(scope="module")
def batch():
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    return TASK.prepare({"image": jnp.asarray(images), "label": jnp.asarray(LABELS)}, jax.random.key(0))


def variables_of(task, batch):
    held = task.init(jax.random.key(1))
    params = Stub().init(jax.random.key(2), batch["image"])["params"]
    return {"params": {**params, verification.TASK: held["params"]}, verification.TASK: held["state"]}


@pytest.mark.parametrize("name", ["arcface", "cosface", "adaface"])
def test_loss_is_that_of_the_margin_and_a_tenth_of_the_triplets(name, batch):
    task = dataclasses.replace(TASK, loss_name=name)
    variables = variables_of(task, batch)
    loss, (metrics, state) = task.loss(Stub(), variables, batch, jax.random.key(0))
    embeddings = Stub().apply({"params": variables["params"]}, batch["image"])
    cosines = margins.class_cosines(embeddings, variables["params"][verification.TASK]["people"])
    labels = jnp.asarray(LABELS)
    norms = jnp.linalg.norm(embeddings, axis=1)
    how = dict(scale=8.0, margin=0.2)
    expected_state = {}
    if name == "arcface":
        logits = margins.arcface_logits(cosines, labels, **how)
    elif name == "cosface":
        logits = margins.cosface_logits(cosines, labels, **how)
    else:
        expected_state = margins.update_norm_statistics(margins.first_norm_statistics(), norms)
        logits = margins.adaface_logits(cosines, labels, norms, expected_state, **how)
    masks = triplets.triplet_masks(labels, task.twins[labels])
    triplet, share = triplets.batch_hard_triplet(embeddings, *masks)
    identity = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    assert float(loss) == pytest.approx(float(identity + 0.1 * triplet), rel=1e-6)
    assert float(metrics["triplet_loss"]) == pytest.approx(float(triplet)) and float(metrics["triplet_share"]) == share
    chex.assert_trees_all_close(state[verification.TASK], expected_state, rtol=1e-6)
    alone, _ = dataclasses.replace(task, triplet_weight=0.0).loss(Stub(), variables, batch, jax.random.key(0))
    assert float(alone) == pytest.approx(float(identity), rel=1e-6)


def test_a_model_is_told_the_twins(batch):
    """In training each image the row of one of its twin, -1 where there is none."""
    told = []

    class Told(Stub):
        def __call__(self, images, train=False, twin_index=None):
            told.append((train, None if twin_index is None else np.asarray(twin_index).tolist()))
            return super().__call__(images, train, twin_index)

    variables = variables_of(TASK, batch)
    TASK.loss(Told(), variables, batch, jax.random.key(0))
    rows = {name: jnp.zeros(6, bool) for name in ("twin", "hard", "validation", "mask")}
    images = jnp.zeros((6, 4, 4, 3), jnp.uint8)
    TASK.evaluate(Told(), {"params": variables["params"]}, {"image": images, "label": batch["label"], **rows})
    assert told == [(True, [1, 0, -1, 4, 3, -1]), (False, None)]

    class Untold(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            return nn.Dense(5, use_bias=False, name="dense")(images.mean((1, 2)))

    assert np.isfinite(TASK.loss(Untold(), variables, batch, jax.random.key(0))[0])


def test_parts_of_a_batch_are_whole(batch):
    """A step of two parts is the mean of the losses of what `IdentityOrder` made for each, weights of people too."""
    ordered = IdentityOrder(np.arange(6).repeat(2), np.arange(6) ^ 1, batch_size=16, parts=2, images=2, twin_share=1.0)
    labels = np.arange(6).repeat(2)[ordered(0)]
    images = np.random.default_rng(1).integers(0, 256, (16, 4, 4, 3), dtype=np.uint8)
    given = {"image": jnp.asarray(images), "label": jnp.asarray(labels, jnp.int32)}
    optimizer = optax.sgd(1.0)
    inputs = dict(images=batch["image"])
    first = step.init_state(Stub(), optimizer, inputs, seed=0, ema=False, task=TASK)
    train_step = step.make_train_step(Stub(), optimizer, lambda count: 1.0, accum_steps=2)
    state, metrics = jax.jit(train_step)(first, given, jax.random.key(0), TASK)

    def loss(params, part):
        rows = {name: value[part::2] for name, value in given.items()}
        prepared = TASK.prepare(rows, jax.random.key(0))
        return TASK.loss(Stub(), {"params": params, verification.TASK: {}}, prepared, jax.random.key(0))[0]

    params = step.trained(first.params, first.task)
    assert set(params) == {"dense", verification.TASK}
    values, grads = zip(*(jax.value_and_grad(loss)(params, part) for part in (0, 1)))
    assert float(metrics["loss"]) == pytest.approx(float(sum(values)) / 2, rel=1e-6)
    moved = jax.tree.map(lambda p, a, b: p - (a + b) / 2, params, *grads)
    chex.assert_trees_all_close(step.trained(state.params, state.task), moved, rtol=1e-5, atol=1e-6)
    for part in (0, 1):
        assert float(triplets.twin_rows(given["label"][part::2], TASK.twins[given["label"]][part::2])[1].mean()) == 1


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(data__batch_size=30), "data.batch_size 30 must be a multiple of accum_steps times .*, 4"),
        (dict(verification__images_per_identity=1), "images_per_identity 1 leaves triplets without positives"),
        (dict(augment__mixup=0.2), "augment.mixup 0.2 is for classes; task 'verification' takes 0"),
        (dict(loss__label_smoothing=0.1), "loss.label_smoothing 0.1 is for classes"),
        (dict(data__repeats=2), "data.repeats 2 has no meaning for batches of identities"),
        (dict(verification__loss="arcfce"), "unknown verification.loss 'arcfce'; did you mean 'arcface'"),
        (dict(verification__twin_share=2), r"verification.twin_share must be in \[0, 1\], got 2"),
        (dict(distill__teacher="vit_nano"), "teaches classes; task 'verification' has none"),
    ],
)
def test_settings_that_cannot_be(values, message):
    with pytest.raises(config_lib.ConfigError, match=message):
        config_lib.load(f"{CONFIG}:backbone", words(**values))


def test_starting_from_a_backbone(tmp_path):
    """The ViT's part comes from its weights, the rest is drawn."""
    sizes = dict(image_size=24, dim=16, num_heads=2, depths=(2,), patch=6, num_classes=3)
    vit = zoo.create_model("vit_nano", **sizes)
    weights = jax.jit(vit.init)(jax.random.key(5), jnp.zeros((1, 24, 24, 3)))
    zoo.save_pretrained(vit, weights, tmp_path / "vit.safetensors")
    given = dict(model__backbone="vit_nano", model__weights=tmp_path / "vit.safetensors")
    states = []
    for name, values in (("drawn", {}), ("given", given)):
        states.append(loop.prepare(config_lib.load(f"{CONFIG}:full", words(**values)), str(tmp_path / name)).state)
    drawn, found = (state.params for state in states)
    for name in ("stem", "stages_0_0", "stages_0_1", "head_norm"):
        chex.assert_trees_all_equal(found[name], weights["params"][name])
    for name in ("parts", "asymmetry", "fusion"):
        chex.assert_trees_all_equal(found[name], drawn[name])


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(data__eval_split="train"), "14 people are both in the drawn twins train and in the drawn twins train"),
        (dict(data__batch_size=128), "a batch wants 12 pairs of twins: there are 6; lower twin_share or batch_size"),
        (dict(data__eval_split="test"), "drawn twins test cannot be scored: the validation part has no general pairs"),
        (dict(data__options__eval_images=1), "cannot be scored: no pairs to verify: there must be a person of two"),
        (dict(data__name="digits"), "unknown data set 'digits' for verification"),
        (dict(model__overrides__features_only=True), "gives .*; verification needs embeddings, one per image"),
    ],
)
def test_data_and_models_that_do_not_fit(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        loop.prepare(config_lib.load(f"{CONFIG}:backbone", words(**values)), str(tmp_path))


def test_one_image_of_everyone(tmp_path):
    """Training goes on without NaN; scoring says what is missing."""
    one = dict(
        data__options__images=1, data__options__eval_images=1, total_steps=1, optim__warmup_steps=0, eval_every=0
    )
    result = train(tmp_path, "backbone", data__eval_split="None", **one)
    assert result["step"] == 1 and np.isfinite(runs.lines(tmp_path)[0]["train/loss"])
    with pytest.raises(ValueError, match="no pairs to verify: there must be a person of two images"):
        evaluate.score_run(tmp_path, split="validation+test")


def test_a_checkpoint_from_before_tasks_had_anything(tmp_path):
    """Its state has no part `task`, and goes on in one that has, as long as nothing is in there."""
    state = {"params": {"kernel": jnp.arange(3.0)}}
    with checkpoint.Checkpoints(tmp_path, every_steps=1, keep=1) as checkpoints:
        checkpoints.save(1, state, data={}, config={})
        checkpoints.wait()
        restored = checkpoints.restore({**state, "task": {}})
    chex.assert_trees_all_equal(restored.state, {**state, "task": {}})


@pytest.mark.slow
def test_a_folder_of_people(tmp_path, capsys):
    """Images of several sizes, with the size that the model sees named in the config."""
    root = tmp_path / "people"
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 4), ("test", 4)):
        names = [f"{split}{i}" for i in range(count)]
        for name in names:
            (root / "images" / name).mkdir(parents=True)
            for i in range(2):
                pixels = rng.integers(0, 256, (30 + i, 28, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "images" / name / f"{i}.png")
        (root / f"{split}.txt").write_text("\n".join(names))
    pairs = [f"{s}{2 * i},{s}{2 * i + 1}" for s, n in (("train", 3), ("validation", 2), ("test", 1)) for i in range(n)]
    (root / "pairs.csv").write_text("\n".join(["identity,twin", *pairs]))
    values = dict(
        data__name="people", data__path=root, data__image_size=24, total_steps=1, optim__warmup_steps=0, eval_every=0
    )
    with_folder = [word for word in words(**values) if "options" not in word]
    config = config_lib.load(f"{CONFIG}:backbone", with_folder)
    result = loop.train(loop.prepare(config, str(tmp_path / "run")))
    assert result["test_twin_genuine_pairs"] == 2 and result["test_twin_impostor_pairs"] == 4
    assert "test_twin_accuracy_low" not in result and "test_hard_twin_accuracy" not in result
    assert faces.open_faces("people", split="train", path=pathlib.Path(root)).pairs.tolist() == [[0, 1], [2, 3], [4, 5]]
