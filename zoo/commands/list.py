"""`python -m zoo list`."""

import argparse
import dataclasses
import json
import sys
from typing import Any

import zoo
from zoo import registry
from zoo.info import input_size, weights_of
from zoo.tables import scaled, table

# Counting takes about a second a model.
COUNTED = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="with the wildcards * ? [...], such as 'davit*'")
    parser.add_argument(
        "--pretrained", action="store_true", help="patterns are of full tags, one row for each of these"
    )
    parser.add_argument(
        "--counts", action="store_true", help=f"parameters and MACs, also of more than {COUNTED} models (a second each)"
    )
    parser.add_argument("--json", action="store_true", help="a JSON list instead of the table")


def run(arguments: argparse.Namespace) -> int:
    names = _matching(arguments.patterns or ["*"], arguments.pretrained)
    counted = arguments.counts or len(names) <= COUNTED
    if len(names) > COUNTED and counted:
        print(f"counting {len(names)} of them, about a second each ...", file=sys.stderr)
    entries = [_entry(name, counted) for name in names]
    if arguments.json:
        print(json.dumps(entries, indent=2))
        return 0
    print("\n".join(_table(entries, counted, arguments.pretrained)))
    if not counted:
        print(f"parameters and MACs: with --counts, or where at most {COUNTED} names match", file=sys.stderr)
    return 0


def _matching(patterns: list[str], pretrained: bool) -> list[str]:
    found: set[str] = set()
    for pattern in patterns:
        if not (names := zoo.list_models(pattern, pretrained=pretrained)):
            raise ValueError(f"no {'tag' if pretrained else 'model'} matches {pattern!r}{_hint(pattern, pretrained)}")
        found.update(names)
    return sorted(found)


def _hint(pattern: str, pretrained: bool) -> str:
    bare = pattern.strip("*")
    for wider in (f"{bare}*", f"*{bare}*"):
        if zoo.list_models(wider, pretrained=pretrained):
            return f"; {wider!r} does"
    return registry.nearest(bare, zoo.list_models(pretrained=pretrained))


def _entry(name: str, counted: bool) -> dict[str, Any]:
    info = zoo.model_info(name) if counted else None
    weights = [dataclasses.asdict(zoo.pretrained_cfg(tag)) for tag in weights_of(name)]
    return {
        "name": name,
        "parameters": info and info.parameters,
        "macs": info and info.macs,
        "image_size": input_size(name),
        "weights": weights,
    }


def _table(entries: list[dict[str, Any]], counted: bool, pretrained: bool) -> list[str]:
    """One row a model and one more for each further set of its weights, or one row a tag."""
    names = ("weights",) if pretrained else ("model",)
    counts = ("params", "MACs") if counted else ()
    rows = [(*names, *counts, "input", *(() if pretrained else ("weights",)), "availability", "licence")]
    for entry in entries:
        sizes = (scaled(entry["parameters"]), scaled(entry["macs"])) if counted else ()
        height, width = entry["image_size"]
        own = (entry["name"], *sizes, str(height) if height == width else f"{height}x{width}")
        for weights in entry["weights"]:
            tag = () if pretrained else (weights["tag"].partition(".")[2],)
            rows.append((*own, *tag, weights["availability"], weights["license"]))
            own = ("",) * len(own)
        if not entry["weights"]:
            rows.append((*own, "-", "", ""))
    left = len(rows[0]) - len(counts) - 2
    return table(rows, "<" + ">" * (len(counts) + 1) + "<" * left)
