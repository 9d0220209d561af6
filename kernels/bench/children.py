"""Suites of whole models: programs of the package `train`, which run as processes of their own.

The kernels know nothing of models, and a process that had started jax would keep the accelerator from them.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from kernels.bench.rows import Row, from_text

# Suite -> its program.
MODULES = {"models": "train.bench_models", "recall": "train.bench_recall"}


def run(suite: str, words: Sequence[str]) -> tuple[dict[str, Any], list[Row]]:
    """Meta data and rows of a suite; what its program has to say goes to stderr.

    Args:
        suite: a name in `MODULES`.
        words: the program's command line.

    Raises:
        RuntimeError: where `train` is not installed, or if the program fails.
    """
    if importlib.util.find_spec("train") is None:
        raise RuntimeError(
            f"--suite {suite} needs the package train beside kernels; pip install attention-zoo has both"
        )
    done = subprocess.run([sys.executable, "-m", MODULES[suite], *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"--suite {suite}: {MODULES[suite]} ended with exit code {done.returncode}")
    # Drivers may have said something on stdout before.
    meta, rows = from_text(done.stdout.strip().splitlines()[-1])
    return meta | {"command": " ".join(sys.argv)}, rows
