"""What the parity tests share: stored records of reference code, the weights they were made with, comparisons."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import zoo
from tests.reference.weights import pseudo_normal, pseudo_weights, sample

REFERENCE = Path(__file__).parent / "reference"


def part(record: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(prefix)}


def reference(name: str, prefix: str = "") -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A stored record and the weights it was made with."""
    with np.load(REFERENCE / f"{name}.npz") as file:
        record = part(dict(file), prefix)
    return record, pseudo_weights(json.loads(str(record["shapes"])))


def assert_near(actual, expected, relative: float, what: str):
    """Largest difference against the largest expected magnitude, and norm against norm."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    for measure, size in (("entry", lambda x: np.abs(x).max()), ("norm", np.linalg.norm)):
        error = size(actual - expected) / size(expected)
        assert error <= relative, f"{what}: relative error {error:.2e} by {measure}, at most {relative:.0e}"


def assert_features(features, record: dict[str, np.ndarray], relative: float):
    assert len(features) == sum(key.endswith("/sample") for key in record)
    for index, feature in enumerate(features):
        key = f"features{index}"
        assert feature.shape == tuple(record[f"{key}/shape"])
        array = np.asarray(feature, np.float64)
        moments = np.asarray([array.mean(), np.sqrt(np.square(array).mean())])
        assert_near(moments, record[f"{key}/mean_rms"], relative, f"{key}, mean and rms")
        # The samples are stored in float32, whose rounding is all that remains in float64.
        assert_near(sample(key, array, 256), record[f"{key}/sample"], max(relative, 1e-7), key)


def assert_gradients(gradients: dict[str, np.ndarray], record: dict[str, np.ndarray], relative: float):
    for name, expected in zip(sorted(gradients), record["gradient_norms"], strict=True):
        norm = np.linalg.norm(np.asarray(gradients[name], np.float64))
        assert norm == pytest.approx(expected, rel=relative), f"norm of the gradient of {name}"
    entries = part(record, "gradient/")
    assert entries
    for name, expected in entries.items():
        actual = sample(name, gradients[name], expected.size)
        assert_near(actual, expected, max(relative, 1e-7), f"gradient of {name}")


# Models are equal by their fields, so both namings share a compiled function.
@functools.cache
def forward(model):
    """A jitted function from variables and images to the output and the features."""

    @jax.jit
    def run(variables, images):
        features = zoo.forward_intermediates(model, variables, images, include_stem=True)
        return model.apply(variables, images), features

    return run


@functools.cache
def backward(model):
    """A jitted function from variables and images to gradients of sum(logits * direction), and the logits."""

    # A third less time to compile, and the program runs as fast.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "1"})
    def run(variables, images):
        def objective(params):
            logits = model.apply({**variables, "params": params}, images)
            direction = pseudo_normal("direction", logits.shape).astype(logits.dtype)
            return (logits * direction).sum(), logits

        return jax.grad(objective, has_aux=True)(variables["params"])

    return run
