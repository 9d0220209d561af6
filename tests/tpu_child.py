"""Runs a function where programs can be compiled for TPUs: in a process of its own, with libtpu."""

import importlib
import json
import os
import subprocess
import sys


def in_tpu_process(function, *arguments, seconds: int = 280):
    """`function(*arguments)` of a test module, in a child process; arguments and result go through JSON.

    A worker of pytest has flags of XLA that make programs other than a user's.
    """
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.tpu_child", function.__module__, function.__name__, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    module, name, arguments = sys.argv[1:]
    print(json.dumps(getattr(importlib.import_module(module), name)(*json.loads(arguments))))
