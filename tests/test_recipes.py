"""The recipes in `configs/` start, with all that they switch on."""

import pathlib
import re

import jax
import pytest

import zoo
from configs import digits, raster, recall, text
from train import config as config_lib
from train import loop
from zoo import registry
from zoo.image_model import ImageModel
from zoo.keymap import flatten
from zoo.pretrained import abstract_variables
from zoo.sequence.language_model import LanguageModel


def models(kind, pattern="*"):
    """Names of the models of a kind."""
    return [name for name in zoo.list_models(pattern) if issubclass(registry.family_of(name).module, kind)]


PATCHES = pathlib.Path(__file__).parent / "data" / "tfds" / "colour_patches" / "1.0.0"
NARROW = ("model.overrides.depths=(1, 1, 1, 1)", "model.overrides.dims=(24, 48, 96, 192)")
SMALL = ("model.overrides.depths=(1,)", "model.overrides.dims=(8,)", "model.overrides.num_heads=(1,)")
RUNS = [
    ("davit_tiny", SMALL),
    pytest.param("davit_tiny", NARROW, marks=pytest.mark.slow),
    pytest.param("maxvit_nano", (), marks=pytest.mark.slow),
    pytest.param("biformer_nano", (), marks=pytest.mark.slow),
    pytest.param("care_nano", ("distill.teacher=", "model.overrides.depths=(1, 1)"), marks=pytest.mark.slow),
    pytest.param("vit_nano", ("model.overrides.depths=(1,)",), marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, words", RUNS)
def test_imagenet_recipe_on_another_tfds_data_set(tmp_path, name, words):
    """Encoded JPEGs of several sizes; every augmentation, bfloat16, mixing and the schedule of the recipe."""
    words = (
        "data.name=tfds",
        f"data.path={PATCHES}",
        "data.eval_split=test",
        "data.batch_size=8",
        "data.image_size=32",
        "data.workers=1",
        "total_steps=3",
        "log_every=1",
        "optim.warmup_steps=1",
        "optim.cooldown_steps=1",
        "accum_steps=1",
        *words,
    )
    config = config_lib.load(f"configs/imagenet.py:{name}", [f"--config.{word}" for word in words])
    run = loop.prepare(config, str(tmp_path))
    result = loop.train(run)
    assert result["step"] == 3
    # The second batch of the 10 test examples is ragged; were it not masked, tenths would not come out.
    assert result["test_accuracy"] * 10 == pytest.approx(round(result["test_accuracy"] * 10), abs=1e-9)
    assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(run.program.abstract_state.params))


def test_imagenet_recipe_takes_every_image_model():
    for name in models(ImageModel):
        config = config_lib.load(f"configs/imagenet.py:{name}")
        assert config.model.name == name
        zoo.create_model(name, image_size=config.data.image_size, **config.model.overrides)


def steps_per_epoch(batch_size):
    return 1_281_167 // batch_size


def test_davits_recipe():
    """The defaults of the official train script with its README's options, in optimizer steps of 1,024 images."""
    config = config_lib.load("configs/imagenet.py:davit_tiny")
    epoch = steps_per_epoch(1024)
    assert config.total_steps == 310 * epoch and config.optim.warmup_steps == 5 * epoch
    assert (config.optim.lr, config.optim.weight_decay, config.optim.clip_norm) == (1e-3, 0.05, 1.0)
    assert (config.augment.mixup, config.augment.cutmix, config.loss.label_smoothing) == (0.8, 1.0, 0.1)


def test_maxvits_recipes():
    """Pre-training at 224 and fine-tuning at 384, as in the official `hp/vision_i1k.py`."""
    config = config_lib.load("configs/imagenet.py:maxvit_small_tf_224")
    assert (config.data.batch_size, config.total_steps) == (4096, 300 * steps_per_epoch(4096))
    assert (config.optim.lr, config.optim.end_lr, config.optim.warmup_steps) == (3e-3, 1e-5, 10_000)
    assert (config.augment.mixup, config.augment.cutmix, config.ema) == (0.8, 0.0, 0.9999)
    assert config.model.overrides.drop_path_rate == 0.3 and config.data.mean == (0.485, 0.456, 0.406)
    config = config_lib.load("configs/imagenet.py:maxvit_large_tf_384")
    assert (config.data.batch_size, config.data.image_size) == (512, 384)
    assert config.total_steps == 30 * steps_per_epoch(512)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.schedule) == (5e-5, 1e-8, "constant")
    assert config.model.overrides.drop_path_rate == 0.6 and config.data.mean == (0.5, 0.5, 0.5)


def test_biformers_recipe():
    config = config_lib.load("configs/imagenet.py:biformer_small")
    assert (config.data.batch_size, config.optim.lr, config.optim.clip_norm) == (1024, 1e-3, None)
    assert (config.data.repeats, config.model.overrides.drop_path_rate, config.ema) == (3, 0.15, 0.0)


def test_cares_recipe():
    config = config_lib.load("configs/imagenet.py:care_s1")
    assert (config.data.batch_size, config.optim.lr, config.optim.clip_norm) == (1536, 2.5e-3, None)
    assert config.optim.warmup_steps == 20 * steps_per_epoch(1536)
    assert (config.distill.kind, config.distill.alpha) == ("hard", 0.5)
    assert config.distill.teacher in zoo.list_models(pretrained=True)


@pytest.mark.parametrize("name, tables", [("maxvit_tiny_tf_224", 22), ("maxvit_rmlp_pico_rw_256", 0)])
def test_tables_of_relative_positions_are_not_decayed(name, tables):
    config = config_lib.load(f"configs/imagenet.py:{name}")
    model = zoo.create_model(name)
    paths = flatten(abstract_variables(model))
    spared = [path for path in paths if any(re.fullmatch(p, path) for p in config.optim.no_decay)]
    assert len(spared) == tables and all("table" in path for path in spared)
    assert sum("table" in path for path in paths) == tables


def test_digits_takes_the_nano_of_every_image_family():
    # AHAN's learns faces, with configs/twins.py.
    assert sorted([*digits.MODELS, "ahan_nano"]) == models(ImageModel, "*_nano")
    for name in digits.MODELS:
        assert config_lib.load(f"configs/digits.py:{name}").model.name == name


def test_text_and_recall_take_the_nano_of_every_language_model():
    nanos = [*models(LanguageModel, "*_nano"), "routing_transformer_nano"]
    assert sorted(text.MODELS) == sorted(nanos)
    assert sorted(f"{name}_nano" for name in recall.MIXERS) == sorted(models(LanguageModel, "*_nano"))
    for file, rows in (
        *(("text", rows) for rows in text.TABLES.values()),
        *(("recall", rows) for rows in recall.TABLES.values()),
        *(("raster", rows) for rows in raster.TABLES.values()),
    ):
        for row in rows:
            config = config_lib.load(f"configs/{file}.py:{row}")
            assert config.task == "next_token" and zoo.create_model(config.model.name, **config.model.overrides)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("configs/text.py:yaad", "no text config for 'yaad'; there are: yaad_nano, "),
        ("configs/recall.py:mqar", r"no recall config 'mqar'; it takes TASK,MIXER: one of mqar, "),
        ("configs/recall.py:copy,yaad", "for 'copy' one of routing_transformer_seq2seq"),
        ("configs/raster.py:yaad", "no raster config for 'yaad'"),
    ],
)
def test_configs_that_there_are_not(spec, message):
    with pytest.raises(config_lib.ConfigError, match=message):
        config_lib.load(spec)
