"""Model cards: everything that the config says, nothing that it does not."""

import ast
import dataclasses
import math
import re

import pytest

import zoo
from tests.toy_family import FAMILY
from zoo import registry
from zoo.keymap import flatten

FIRST = [next(iter(family.pretrained)) for family in registry.families() if family.pretrained]


@pytest.fixture(autouse=True, scope="module")
def traced_once():
    """Tracing takes seconds."""
    known = {}

    def traced(name, batch, overrides):
        key = name, batch, *overrides.items()
        known[key] = known.get(key) or zoo.info.traced(name, batch, overrides)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zoo.cards.traced", traced)
        yield traced


def facts(card):
    return dict(re.findall(r"^\| ([a-zA-Z0-9]+) \| (.*) \|$", card, re.MULTILINE))


@pytest.mark.parametrize("tag", FIRST)
def test_the_config_is_on_the_card(traced_once, tag):
    card, cfg = zoo.model_card(tag), zoo.pretrained_cfg(tag)
    info, _ = traced_once(tag, 1, {"image_size": cfg.image_size})
    assert card.startswith(f"# {tag}\n\n") and card.endswith("```\n") and "arXiv" in card.splitlines()[2]
    found = facts(card)
    assert found["model"] == f"`{tag.partition('.')[0]}`" and found["licence"] == cfg.license
    assert found["parameters"].startswith(f"{info.parameters:,}")
    assert found["MACs"] == f"{info.macs:,} at {cfg.image_size} x {cfg.image_size}"
    assert found["weights"].startswith(cfg.availability) and found["source"] == f"<{cfg.source}>"
    assert found["sha256"] == "unknown" and cfg.sha256 is None
    for text in (f"`crop_pct={cfg.crop_pct}`", f"{cfg.crop_mode!r}", cfg.interpolation, str(cfg.mean), str(cfg.std)):
        assert text in card
    assert str(info) in card and f"| {cfg.naming} | variables |" in card


@pytest.mark.parametrize("tag", FIRST)
def test_the_examples_of_names_are_the_key_maps(traced_once, tag):
    cfg = zoo.pretrained_cfg(tag)
    model = zoo.create_model(tag)
    leaves = flatten(traced_once(tag, 1, {"image_size": cfg.image_size})[1])
    rows = re.findall(r"^\| (`.*`.*) \| `(params/.*)` (\(.*\)) \|$", zoo.model_card(tag), re.MULTILINE)
    assert len(rows) == 3
    key_map = registry.family_of(tag).key_maps[cfg.naming](model)
    for theirs, ours, shape in rows:
        assert str(leaves[ours].shape) == shape
        name, there = re.fullmatch(r"`(.*)` (\(.*\))", theirs).groups()
        assert key_map.rule_of_source(name.removeprefix(key_map.prefix)).path == ours
        assert math.prod(ast.literal_eval(there)) == math.prod(ast.literal_eval(shape))


def test_what_can_be_loaded(monkeypatch):
    tag = "davit_nano.test"
    family = registry.family_of("davit_nano")
    cfg = dataclasses.replace(
        FAMILY.pretrained["toy_tiny.hub"], tag=tag, naming="timm", image_size=8, num_classes=10, source="https://x.org"
    )

    def card(**fields):
        monkeypatch.setitem(family.pretrained, tag, dataclasses.replace(cfg, **fields))
        return zoo.model_card("davit_nano")

    found = card(sha256="ab" * 32, filenames=("weights.bin", "other.bin"))
    assert f"`{'ab' * 32}`" in found and "`toys/toy` (weights.bin or other.bin)" in found
    assert 'zoo.load_pretrained("davit_nano.test", "weights.bin")' in found and "(B, 8, 8, 3) -> (B, 10)" in found
    assert "leave it out to have it fetched" in found
    assert "Download the file from the source" in card(hub_id=None)
    for availability, words in (("never released", "were never released"), ("link dead", "The link to these weights")):
        found = card(availability=availability)
        assert words in found and "toys/toy" not in found and facts(found)["weights"] == availability
    assert "-> (B, channels)" in card(num_classes=0) and "none: pooled features" in card(num_classes=0)
    assert "1. Resize both sides to 8 pixels, whatever" in card(crop_mode="squash", crop_pct=1.0)
    assert "1. Resize the shorter side to 9 pixels, bicubic" in card(crop_pct=0.875)


def test_errors():
    with pytest.raises(ValueError, match="did you mean 'davit_tiny.msft_in1k'"):
        zoo.model_card("davit_tiny.msft_in2k")
    with pytest.raises(ValueError, match="names no single set of weights"):
        zoo.model_card("davit_giant")
