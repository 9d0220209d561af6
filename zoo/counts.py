"""Parameters and MACs of every model and of every set of weights, counted once: to count all takes minutes.

    python -m zoo.counts        # after a change of models: counts again and writes counts.json

The tests hold the file against the models.
"""

import functools
import json
import sys
from pathlib import Path

import zoo

FILE = Path(__file__).with_name("counts.json")


@functools.cache
def _stored() -> dict[str, list[int]]:
    return json.loads(FILE.read_text())


def counts_of(name: str) -> tuple[int, int]:
    """Parameters, and MACs of one image as `zoo.model_info` counts them, of a model or a full tag at its own size."""
    if name in _stored():
        parameters, macs = _stored()[name]
    else:
        info = zoo.model_info(name)
        parameters, macs = info.parameters, info.macs
    return parameters, macs


def main() -> None:
    """Counts all models and tags and writes the file."""
    counted = {}
    for name in (*zoo.list_models(), *zoo.list_models(pretrained=True)):
        print(name, file=sys.stderr)
        info = zoo.model_info(name)
        counted[name] = [info.parameters, info.macs]
    rows = (f"  {json.dumps(name)}: {json.dumps(pair)}" for name, pair in sorted(counted.items()))
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
