"""Transforms for tests/test_data.py, in a module of their own that worker processes import quickly."""

import os

import numpy as np


def plain(example):
    return {"image": example["image"], "index": np.int32(example["index"])}


def draws(example, rng):
    return {"image": example["image"], "draw": rng.integers(2**32, dtype=np.uint32)}


def cropped(example, rng):
    return {"image": example["image"][rng.integers(8) :][:32], "draw": rng.integers(2**32, dtype=np.uint32)}


def fails_at_seven(example):
    if example["index"] == 7:
        raise RuntimeError("no luck with seven")
    return plain(example)


def dies(example):
    os._exit(3)


def tells_of_backends(example, rng):
    import jax

    try:
        # Only possible as long as no backend is initialised.
        jax.config.update("jax_num_cpu_devices", 3)
        started = False
    except RuntimeError:
        started = True
    return {"backends": np.bool_(started), "process": np.int32(os.getpid())}
