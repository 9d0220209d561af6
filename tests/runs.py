"""A run that takes seconds: a very small DaViT on the digits."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = "configs/digits.py:davit_nano"
SMALL = (
    "--config.model.overrides.depths=(1,)",
    "--config.model.overrides.dims=(8,)",
    "--config.model.overrides.num_heads=(2,)",
    "--config.data.batch_size=16",
    "--config.optim.warmup_steps=2",
    "--config.total_steps=12",
    "--config.eval_every=4",
    "--config.log_every=2",
    "--config.checkpoint.every_steps=3",
    "--config.checkpoint.keep=20",
)


def overrides(**values) -> list[str]:
    """Words for the command line; in the names a double underscore stands for a dot."""
    return [*SMALL, *(f"--config.{name.replace('__', '.')}={value}" for name, value in values.items())]


def command(workdir, *words: str) -> list[str]:
    """The command line of a small run in a process of its own."""
    return [sys.executable, "-m", "train", "--config", CONFIG, "--workdir", str(workdir), *SMALL, *words]


def start(workdir, *words: str, **variables: str) -> subprocess.Popen:
    """Starts a small run, with these environment variables besides; it says on stderr what it does."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **variables}
    pipe = subprocess.PIPE
    return subprocess.Popen(command(workdir, *words), cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def lines(workdir) -> list[dict]:
    """`metrics.jsonl`, without what differs from run to run: times and rates."""
    text = (pathlib.Path(workdir) / "metrics.jsonl").read_text()
    return [without_times(json.loads(line)) for line in text.splitlines()]


def without_times(metrics: dict) -> dict:
    """Metrics that are the same whenever and however fast a run is."""
    return {
        name: value
        for name, value in metrics.items()
        if not (name.startswith(("seconds", "goodput", "memory")) or name.endswith("_per_second") or name == "mfu")
    }


def left_behind(workdir) -> list[str]:
    """What a run that did not start left in its workdir, but for empty folders."""
    return sorted(str(path) for path in pathlib.Path(workdir).rglob("*") if path.is_file())
