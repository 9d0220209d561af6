"""Model cards: what is known of published weights, as Markdown."""

import math
import sys
from collections.abc import Mapping
from typing import Any

from zoo import registry
from zoo.info import ModelInfo, traced
from zoo.keymap import flatten
from zoo.pretrained import OWN_NAMING
from zoo.registry import PretrainedCfg

_RESIZED = {
    "center": "the shorter side to {0} pixels",
    "squash": "both sides to {0} pixels, whatever the aspect ratio",
    "border": "the longer side to {0} pixels and fill up to {0} x {0} with the mean",
}


def model_card(tag: str) -> str:
    """The card of published weights, written from their config and the model's own count.

    Args:
        tag: full tag, or the name of a model that has exactly one.

    Returns:
        Markdown. What the config does not say is not in it, or called unknown.

    Raises:
        ValueError: for an unknown tag.
    """
    cfg = registry.pretrained_cfg(tag)
    family = registry.family_of(cfg.tag)
    info, variables = traced(cfg.tag, 1, {"image_size": cfg.image_size})
    return "\n".join(
        [
            f"# {cfg.tag}",
            "",
            # A family's file begins with the paper's title and number.
            sys.modules[family.module.__module__].__doc__.strip().partition("\n")[0],
            "",
            *_facts(cfg, info),
            "",
            "## Preprocessing",
            "",
            *_preprocessing(cfg),
            "",
            "## Use",
            "",
            *_use(cfg),
            "",
            "## Names",
            "",
            *_names(cfg, variables),
            "",
            "## Stages",
            "",
            "```",
            *str(info).splitlines(),
            "```",
            "",
        ]
    )


def _facts(cfg: PretrainedCfg, info: ModelInfo) -> list[str]:
    side, head = cfg.image_size, f"{cfg.num_classes} classes" if cfg.num_classes else "none: pooled features"
    statistics = f", and {info.statistics:,} running statistics" if info.statistics else ""
    hub = f", on the Hugging Face hub as `{cfg.hub_id}` ({' or '.join(cfg.filenames)})" if cfg.hub_id else ""
    rows = (
        ("model", f"`{cfg.tag.partition('.')[0]}`"),
        ("parameters", f"{info.parameters:,}{statistics}"),
        ("MACs", f"{info.macs:,} at {side} x {side}"),
        ("input", f"{side} x {side}, {cfg.in_chans} channels"),
        ("classifier", head),
        ("weights", f"{cfg.availability}{hub if cfg.availability == 'published' else ''}"),
        ("licence", cfg.license),
        ("source", f"<{cfg.source}>"),
        ("sha256", f"`{cfg.sha256}`" if cfg.sha256 else "unknown"),
    )
    return ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)]


def _preprocessing(cfg: PretrainedCfg) -> list[str]:
    side, resized = cfg.image_size, math.floor(cfg.image_size / cfg.crop_pct)
    how = _RESIZED[cfg.crop_mode].format(resized)
    return [
        f"1. Resize {how}, {cfg.interpolation} (`crop_mode={cfg.crop_mode!r}`, `crop_pct={cfg.crop_pct}`).",
        f"2. Keep the central {side} x {side} pixels, scaled to [0, 1].",
        f"3. Subtract the mean {_numbers(cfg.mean)} and divide by the deviation {_numbers(cfg.std)}, per channel.",
    ]


def _use(cfg: PretrainedCfg) -> list[str]:
    file = cfg.filenames[0]
    what, shape = ("logits", cfg.num_classes) if cfg.num_classes else ("features", "channels")
    lines = {
        "published": "Download the file, or leave it out to have it fetched from the hub.",
        "never released": "These weights were never released; the names below are those that such a file would have.",
        "link dead": "The link to these weights is dead; whoever has the file can load it.",
    }
    note = lines[cfg.availability]
    if cfg.availability == "published" and cfg.hub_id is None:
        note = "Download the file from the source."
    return [
        note,
        "",
        "```python",
        "import zoo",
        f'model, variables, report = zoo.load_pretrained("{cfg.tag}", "{file}")',
        f"{what} = model.apply(variables, images)  # (B, {cfg.image_size}, {cfg.image_size}, {cfg.in_chans}) ->"
        f" (B, {shape})",
        "```",
    ]


def _names(cfg: PretrainedCfg, variables: Mapping[str, Any]) -> list[str]:
    """The namings that are read, and the first matrix of the first and the last stage as examples of the map."""
    family, model = registry.family_of(cfg.tag), registry.create_model(cfg.tag, image_size=cfg.image_size)
    key_map = family.key_maps[cfg.naming](model)
    leaves = {path: leaf.shape for path, leaf in flatten(variables).items()}
    entries = {path: key_map.rule_of_target(path) for path in leaves if path.endswith("/kernel")}
    others = [f"`{naming}`" for naming in (*family.key_maps, OWN_NAMING) if naming != cfg.naming]
    lines = [
        f"The file has the names of `{cfg.naming}`; files with those of {' and '.join(others)} are read as well.",
        "",
        f"| {cfg.naming} | variables |",
        "|---|---|",
    ]
    for part in ("stem", "stages_0_0", "head"):
        path = next((p for p, entry in entries.items() if p.startswith(f"params/{part}/") and entry), None)
        if path is not None:
            sources = entries[path].sources
            shapes = entries[path].rule.transform.source_shapes(leaves[path])
            there = ", ".join(f"`{key_map.prefix}{name}` {shape}" for name, shape in zip(sources, shapes))
            lines.append(f"| {there} | `{path}` {leaves[path]} |")
    return lines


def _numbers(values: tuple[float, ...]) -> str:
    return f"({', '.join(map(str, values))})"
