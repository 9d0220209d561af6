"""Reading, changing and comparing configs; every refusal names the key and the nearest right thing."""

import json
import pathlib
import subprocess
import sys

import ml_collections
import pytest

from train import config as config_lib
from train import optim, schema
from train.config import ConfigError, load

FILE = """
import ml_collections

def get_config(arg=None):
    if arg not in ("small", "large"):
        raise ValueError(f"no config for {arg!r}; there are: small, large")
    config = ml_collections.ConfigDict()
    config.model = dict(name="davit_nano", overrides=dict(drop_path_rate=0.1))
    config.data = dict(name="digits", eval_split="test", batch_size=64, mean=[0.5], std=[0.5])
    config.total_steps = 100 if arg == "small" else 1000
    return config
"""
SPEC = "own.py:small"


@pytest.fixture(autouse=True)
def config_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("own.py").write_text(FILE)


def words(*pairs: str) -> list[str]:
    return [f"--config.{pair}" for pair in pairs]


def refused(*pairs: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(SPEC, words(*pairs))
    return str(caught.value)


def test_file_over_defaults():
    config = load(SPEC)
    assert config.model.name == "davit_nano" and config.total_steps == 100
    assert config.model.overrides.to_dict() == {"drop_path_rate": 0.1}
    assert config.data.mean == (0.5,) and config.data.workers == 0
    assert config.optim.to_dict() == config_lib.default().optim.to_dict()
    assert load("own.py:large").total_steps == 1000


def test_frozen_and_convertible():
    config = load(SPEC)
    with pytest.raises(AttributeError):
        config.seed = 1
    free = ml_collections.ConfigDict(config)
    free.optim.lr = 0.5
    assert free.optim.lr == 0.5 and config.optim.lr == 1e-3


@pytest.mark.parametrize(
    ("word", "path", "value"),
    [
        ("optim.lr=3e-4", ("optim", "lr"), 3e-4),
        ("optim.lr=1", ("optim", "lr"), 1.0),
        ("total_steps=10_000", ("total_steps",), 10_000),
        ("mesh.data=-1", ("mesh", "data"), -1),
        ("augment.random_resized_crop=True", ("augment", "random_resized_crop"), True),
        ("augment.random_resized_crop=false", ("augment", "random_resized_crop"), False),
        ("augment.scale=(0.5,1)", ("augment", "scale"), (0.5, 1.0)),
        ("augment.scale=0.5, 1.0", ("augment", "scale"), (0.5, 1.0)),
        ("optim.no_decay=(table|embed)$,bias", ("optim", "no_decay"), ("(table|embed)$", "bias")),
        ("optim.no_decay=table", ("optim", "no_decay"), ("table",)),
        ("optim.no_decay=()", ("optim", "no_decay"), ()),
        ("optim.clip_norm=1", ("optim", "clip_norm"), 1.0),
        ("optim.clip_norm=None", ("optim", "clip_norm"), None),
        ("data.path=gs://bucket/a=b", ("data", "path"), "gs://bucket/a=b"),
        ("data.eval_split=none", ("data", "eval_split"), None),
        ("data.extra_eval.last360=last360", ("data", "extra_eval", "last360"), "last360"),
        ("data.extra_eval.odd=10", ("data", "extra_eval", "odd"), "10"),
        ("model.overrides.drop_path_rate=0.2", ("model", "overrides", "drop_path_rate"), 0.2),
        ("model.overrides.depths=(1, 1, 3)", ("model", "overrides", "depths"), (1, 1, 3)),
        ("model.overrides.head=null", ("model", "overrides", "head"), None),
        ("model.overrides.cpe=true", ("model", "overrides", "cpe"), True),
        ("model.overrides.schedule=official", ("model", "overrides", "schedule"), "official"),
    ],
)
@pytest.mark.parametrize("form", ["one word", "two words"])
def test_command_line(word, path, value, form):
    given = words(word) if form == "one word" else [f"--config.{word.split('=')[0]}", word.split("=", 1)[1]]
    found = load(SPEC, given)
    for name in path:
        found = found[name]
    assert found == value and type(found) is type(value)


def test_the_last_word_wins_and_others_stay():
    config = load(SPEC, words("model.overrides.a=1", "seed=1", "seed=2"))
    assert config.seed == 2 and config.model.overrides.to_dict() == {"drop_path_rate": 0.1, "a": 1}


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("optim.wieght_decay=1", ["'optim.wieght_decay'", "did you mean 'optim.weight_decay'"]),
        ("batch_size=1", ["'batch_size'", "'data.batch_size'"]),
        ("model.overrides.a.b=1", ["'model.overrides.a.b'"]),
        ("optim=1", ["optim is a section", "optim.lr"]),
        ("model.overrides=1", ["model.overrides is a section", "model.overrides.NAME"]),
        ("total_steps=1e3", ["total_steps must be an integer, got '1e3'"]),
        ("optim.lr=fast", ["optim.lr must be a finite number, got 'fast'"]),
        ("optim.lr=nan", ["optim.lr must be a finite number, got nan"]),
        ("optim.lr=None", ["optim.lr must be a finite number, got 'None'"]),
        ("optim.clip_norm=x", ["a finite number or None, got 'x'"]),
        ("augment.random_resized_crop=1", ["must be true or false, got '1'"]),
        ("augment.scale=0.5,x", ["augment.scale must be a tuple, each a finite number, got ('0.5', 'x')"]),
        ("model.overrides.x={1: 2}", ["model.overrides.x must be a number, text"]),
    ],
)
def test_refused_words(word, parts):
    message = refused(word)
    assert all(part in message for part in parts), message


def test_words_that_are_no_overrides():
    with pytest.raises(ConfigError, match="unexpected argument '--seed=1'; config keys are set with --config"):
        load(SPEC, ["--seed=1"])
    with pytest.raises(ConfigError, match="--config.seed has no value; write --config.seed=VALUE"):
        load(SPEC, ["--config.seed", "--config.ema=0.9"])


@pytest.mark.parametrize(
    ("section", "parts"),
    [
        ({"optim": {"lr": "1e-3"}}, ["optim.lr must be a finite number, got '1e-3'"]),
        ({"total_steps": 1.0}, ["total_steps must be an integer, got 1.0"]),
        ({"total_steps": True}, ["total_steps must be an integer, got True"]),
        ({"data": {"mean": 0.5}}, ["data.mean must be a tuple, each a finite number, got 0.5"]),
        ({"data": {"split": None}}, ["data.split must be text, got None"]),
        ({"model": "davit_nano"}, ["model is a section, not a value; set model.backbone, model.name"]),
        ({"dtype": {"compute": "bfloat16"}}, ["unknown key 'dtype.compute'"]),
        ({"augmnet": {}}, ["unknown key 'augmnet'"]),
    ],
)
def test_refused_files(section, parts):
    body = f"import ml_collections\ndef get_config(arg):\n    return ml_collections.ConfigDict({section!r})\n"
    pathlib.Path("bad.py").write_text(body)
    with pytest.raises(ConfigError) as caught:
        load("bad.py:x")
    assert all(part in str(caught.value) for part in parts), caught.value


def test_an_empty_section_of_a_file_changes_nothing():
    empty = "config.optim = {}\n    config.data.extra_eval = {}\n    return config"
    body = FILE.replace("return config", empty)
    pathlib.Path("own.py").write_text(body)
    assert load(SPEC).optim.to_dict() == config_lib.default().optim.to_dict()


def test_finding_the_file(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="own.py: no config for None; there are: small, large"):
        load("own.py")
    with pytest.raises(ConfigError, match="no config for 'tiny'; there are: small, large"):
        load("own.py:tiny")
    with pytest.raises(ConfigError, match="'configs/didgits.py'; did you mean 'configs/digits.py'"):
        load("configs/didgits.py:davit_nano")
    with pytest.raises(ConfigError, match="There are: .*configs/imagenet.py"):
        load("nowhere/xyz.py")
    pathlib.Path("empty.py").write_text("")
    with pytest.raises(ConfigError, match="has no function get_config"):
        load("empty.py:x")
    pathlib.Path("plain.py").write_text("def get_config(arg):\n    return {}\n")
    with pytest.raises(ConfigError, match="must return a ConfigDict, got dict"):
        load("plain.py:x")
    # Installed configs are found from any directory, under the name that they have in the repository.
    assert load("configs/digits.py:davit_nano").data.name == "digits"
    pathlib.Path("configs").mkdir()
    pathlib.Path("configs/digits.py").write_text(FILE)
    assert load("configs/digits.py:small").total_steps == 100


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("total_steps=0", "total_steps is not set"),
        ("model.name=", "model.name is not set"),
        ("accum_steps=3", "accum_steps 3 must divide data.batch_size 64"),
        ("accum_steps=0", "accum_steps must be at least 1, got 0"),
        ("optim.warmup_steps=100", "must leave some of total_steps 100"),
        ("optim.end_lr=1", "optim.end_lr 1.0 must be at most optim.lr 0.001"),
        ("optim.schedule=cosin", "unknown optim.schedule 'cosin'; did you mean 'cosine'"),
        ("optim.name=adamv", "unknown optim.name 'adamv'; did you mean 'adam' or 'adamw'"),
        ("task=classfy", "unknown task 'classfy'; did you mean 'classify'"),
        ("optim.clip_norm=0", "optim.clip_norm must be above 0, or None for no clipping, got 0.0"),
        ("optim.b2=1", "optim.b2 must be in [0, 1), got 1.0"),
        ("augment.hflip=2", "augment.hflip must be in [0, 1], got 2.0"),
        ("augment.scale=0.5", "augment.scale must be a range within (0, 1], got (0.5,)"),
        ("augment.ratio=2,1", "augment.ratio must be a range above 0, got (2.0, 1.0)"),
        ("data.std=0.5,0.5", "data.mean (0.5,) and data.std (0.5, 0.5)"),
        ("data.std=0", "data.std must be above 0 in every channel, got (0.0,)"),
        ("mesh.fsdp=-1", "at most one axis of mesh may be -1"),
        ("mesh.fsdp=0", "mesh.fsdp must be at least 1, or -1 for the rest, got 0"),
        ("seed=-1", "seed must be in [0, 2**32), got -1"),
        ("optim.no_decay=(", "optim.no_decay: '(' is not a regular expression"),
        ("model.overrides.dtype=bfloat16", "set dtype itself instead of model.overrides.dtype"),
        ("data.image_size=0", "data.image_size must be at least 1, got 0"),
    ],
)
def test_refused_values(word, part):
    assert part in refused(word)


def test_refused_together():
    assert "alternatives" in refused("augment.random_resized_crop=true", "augment.pad_crop=1")
    assert len(refused("total_steps=-1", "seed=-1", "optim.name=x").splitlines()) == 3


def test_every_range_and_choice_belongs_to_a_key():
    keys = schema.flatten(config_lib.default())
    assert set(schema.CHOICES) <= set(keys)
    ranged = [path for paths, _, _ in schema._RANGES for path in paths]
    assert len(ranged) == len(set(ranged)) and set(ranged) <= set(keys)
    numbers = {k for k, v in keys.items() if type(v) in (int, float)}
    assert numbers <= set(ranged)
    assert set(schema.CHOICES["optim.name"]) == set(optim.OPTIMIZERS)
    assert set(schema.CHOICES["optim.schedule"]) == set(optim.SCHEDULES)


def test_description_is_canonical():
    a = load(SPEC, words("seed=1", "optim.lr=0.5"))
    b = load(SPEC, words("optim.lr=0.5", "seed=1"))
    text = config_lib.describe(a)
    assert text == config_lib.describe(b) == config_lib.describe(ml_collections.ConfigDict(b))
    assert json.loads(text) == config_lib.plain(a) and json.loads(text)["data"]["mean"] == [0.5]
    assert config_lib.describe(json.loads(text)) == text


def test_differences_and_resume():
    a = load(SPEC)
    saved = json.loads(config_lib.describe(a))
    assert config_lib.differences(saved, a) == ()
    changes = words("total_steps=200", "mesh.data=2", "mesh.fsdp=-1", "checkpoint.keep=9", "data.workers=2")
    b = load(SPEC, changes)
    allowed = ("checkpoint.keep", "data.workers", "mesh.data", "mesh.fsdp", "total_steps")
    assert config_lib.differences(saved, b) == config_lib.check_resume(saved, b) == allowed
    c = load(SPEC, words("optim.lr=0.5", "model.overrides.x=1", "seed=0", "log_every=1"))
    assert config_lib.differences(a, c) == ("log_every", "model.overrides.x", "optim.lr")
    with pytest.raises(ConfigError) as caught:
        config_lib.check_resume(saved, c)
    assert "optim.lr: 0.001 there, 0.5 now" in str(caught.value)
    assert "model.overrides.x: None there, 1 now" in str(caught.value)
    assert "  log_every" not in str(caught.value)


def test_a_key_that_came_later_counts_with_its_default():
    saved = config_lib.plain(load(SPEC))
    del saved["optim"]["no_decay"], saved["remat"]
    assert config_lib.differences(saved, load(SPEC)) == ()
    assert config_lib.differences(saved, load(SPEC, words("remat=full"))) == ("remat",)


def test_reading_a_config_does_not_import_jax(tmp_path):
    code = f"import sys; from train import config; config.load({SPEC!r}); sys.exit('jax' in sys.modules)"
    environment = {"PYTHONPATH": str(pathlib.Path(config_lib.__file__).parent.parent)}
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=environment, check=True)
