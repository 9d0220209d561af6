"""`python -m zoo list`."""

import argparse
import dataclasses
import json
from typing import Any

import zoo
from zoo import registry
from zoo.counts import counts_of
from zoo.info import input_size, weights_of
from zoo.tables import scaled, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="with the wildcards * ? [...], such as 'davit*'")
    parser.add_argument(
        "--pretrained", action="store_true", help="patterns are of full tags, one row for each of these"
    )
    parser.add_argument("--json", action="store_true", help="a JSON list instead of the table")


def run(arguments: argparse.Namespace) -> int:
    names = _matching(arguments.patterns or ["*"], arguments.pretrained)
    entries = [_entry(name) for name in names]
    if arguments.json:
        print(json.dumps(entries, indent=2))
        return 0
    print("\n".join(_table(entries, arguments.pretrained)))
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


def _entry(name: str) -> dict[str, Any]:
    parameters, macs = counts_of(name)
    weights = [dataclasses.asdict(zoo.pretrained_cfg(tag)) for tag in weights_of(name)]
    return {
        "name": name,
        "parameters": parameters,
        "macs": macs,
        "input_size": input_size(name),
        "weights": weights,
    }


def _table(entries: list[dict[str, Any]], pretrained: bool) -> list[str]:
    """One row a model and one more for each further set of its weights, or one row a tag."""
    names = ("weights",) if pretrained else ("model",)
    rows = [(*names, "params", "MACs", "input", *(() if pretrained else ("weights",)), "availability", "licence")]
    for entry in entries:
        sizes = (scaled(entry["parameters"]), scaled(entry["macs"]))
        own = (entry["name"], *sizes, "x".join(map(str, dict.fromkeys(entry["input_size"]))))
        for weights in entry["weights"]:
            tag = () if pretrained else (weights["tag"].partition(".")[2],)
            rows.append((*own, *tag, weights["availability"], weights["license"]))
            own = ("",) * len(own)
        if not entry["weights"]:
            rows.append((*own, "-", "", ""))
    return table(rows, "<>>>" + "<" * (len(rows[0]) - 4))
