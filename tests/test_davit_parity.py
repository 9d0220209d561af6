"""DaViT against timm's and the authors' code in float64, see `reference/make_davit.py`."""

import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import zoo
from kernels import channel_attention, window_attention
from tests.reference.weights import pseudo_images, pseudo_normal, pseudo_weights, sample

REFERENCE = Path(__file__).parent / "reference"
NAMINGS = ("timm", "official")
SIZES = ("224x224", "225x231", "230x197")
# Reached in float32: logits and features within 3e-6, gradients within 5e-5.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE, FLOAT64_TOLERANCE = 2e-5, 2e-4, 1e-10


def part(record: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(prefix)}


def reference(name: str, prefix: str = "") -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A stored record and the weights it was made with."""
    with np.load(REFERENCE / f"{name}.npz") as file:
        record = part(dict(file), prefix)
    return record, pseudo_weights(json.loads(str(record["shapes"])))


@functools.cache
def loaded(variant: str, naming: str):
    """A stored record, the weights it was made with, and the model and variables loaded from them."""
    record, weights = reference(f"{variant}_{naming}")
    return record, weights, *zoo.load_pretrained(variant, weights)


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
    """A jitted function from parameters and images to the gradients of sum(logits * direction), and logits."""

    # A third less time to compile, and the program runs as fast.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "1"})
    def run(params, images):
        def objective(params):
            logits = model.apply({"params": params}, images)
            direction = pseudo_normal("direction", logits.shape).astype(logits.dtype)
            return (logits * direction).sum(), logits

        return jax.grad(objective, has_aux=True)(params)

    return run


def cases(*quick):
    """Every variant and size, all but `quick` marked slow."""
    every = itertools.product(("davit_tiny", "davit_small"), SIZES)
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in every]


@pytest.mark.parametrize(("variant", "size"), cases(("davit_small", "230x197")))
def test_logits_and_features(variant, size):
    images = pseudo_images((2, *map(int, size.split("x")), 3))
    for naming in NAMINGS:
        record, _, model, variables, _ = loaded(variant, naming)
        record = part(record, f"{size}/")
        with jax.default_matmul_precision("highest"):
            logits, features = forward(model)(variables, images)
        np.testing.assert_allclose(logits, record["logits"], rtol=0, atol=OUTPUT_TOLERANCE)
        assert_features(features, record, OUTPUT_TOLERANCE)


@pytest.mark.parametrize(("variant", "size"), cases(("davit_tiny", "225x231")))
def test_logits_and_gradients(variant, size, tmp_path):
    images = pseudo_images((2, *map(int, size.split("x")), 3))
    for naming in NAMINGS:
        record, _, model, variables, _ = loaded(variant, naming)
        record = part(record, f"{size}/")
        with jax.default_matmul_precision("highest"):
            gradients, logits = backward(model)(variables["params"], images)
        np.testing.assert_allclose(logits, record["logits"], rtol=0, atol=OUTPUT_TOLERANCE)
        # Gradients are shaped like the parameters, so saving them gives every one its reference name.
        path = tmp_path / f"{naming}.safetensors"
        zoo.save_pretrained(model, {"params": gradients}, path, naming=naming)
        assert_gradients(load_file(path), record, GRADIENT_TOLERANCE)


def test_float64():
    """In double precision only rounding is left of the difference: the arithmetic is the reference's."""
    record, weights = reference("davit_tiny_timm")
    record = part(record, "224x224/")
    with jax.enable_x64(True):
        wide = dict(dtype=jnp.float64, param_dtype=jnp.float64)
        model, variables, _ = zoo.load_pretrained("davit_tiny", weights, **wide)
        logits, features = forward(model)(variables, pseudo_images((2, 224, 224, 3)).astype(np.float64))
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits, record["logits"], rtol=0, atol=FLOAT64_TOLERANCE)
    assert_features(features, record, FLOAT64_TOLERANCE)


def test_florence2():
    """The image tower under Florence-2's own names, where the head norm is not in the file."""
    record, _, model, variables, report = loaded("davit_base_fl", "florence2")
    assert report.absent_in_source == {"params/head_norm/scale": 1.0, "params/head_norm/bias": 0.0}
    with jax.default_matmul_precision("highest"):
        pooled, features = forward(model)(variables, pseudo_images((2, *record["size"], 3)))
    np.testing.assert_allclose(pooled, record["pooled"], rtol=0, atol=OUTPUT_TOLERANCE)
    assert_features(features, record, OUTPUT_TOLERANCE)


@pytest.mark.parametrize(
    ("variant", "naming"),
    (("davit_tiny", "timm"), ("davit_tiny", "official"), ("davit_base_fl", "florence2")),
)
def test_round_trip_is_bit_equal(variant, naming, tmp_path):
    _, weights, model, variables, _ = loaded(variant, naming)
    zoo.save_pretrained(model, variables, tmp_path / "saved.safetensors", naming=naming)
    saved = load_file(tmp_path / "saved.safetensors")
    assert saved.keys() == weights.keys()
    for key, value in weights.items():
        assert saved[key].dtype == value.dtype, key
        np.testing.assert_array_equal(saved[key], value, err_msg=key)


def attend(op: str, inputs):
    """DaViT's attention of 3 heads between the two projections, which are kept as torch keeps them."""
    x = inputs["input"]
    b, h, w, c = x.shape
    qkv = x @ inputs["qkv.weight"].T + inputs["qkv.bias"]
    if op == "window":
        out = window_attention(qkv, num_heads=3, window=(7, 7), pad=inputs["qkv.bias"])
    else:
        q, k, v = jnp.moveaxis(qkv.reshape(b, h * w, 3, 3, c // 3), 2, 0)
        out = channel_attention(k, v, q).reshape(b, h, w, c)
    return out @ inputs["proj.weight"].T + inputs["proj.bias"]


@pytest.mark.parametrize(
    ("x64", "tolerance"),
    ((False, OUTPUT_TOLERANCE), (True, FLOAT64_TOLERANCE)),
    ids=("float32", "float64"),
)
@pytest.mark.parametrize("op", ("window", "channel"))
def test_attention_alone(op, x64, tolerance):
    """timm's attention modules: 7 x 7 windows on a 17 x 23 map, and channels over 3136 tokens."""
    record, weights = reference("davit_ops", f"{op}/")
    shape = tuple(record["input_shape"])
    with jax.enable_x64(x64), jax.default_matmul_precision("highest"):
        dtype = np.float64 if x64 else np.float32
        inputs = {name: value.astype(dtype) for name, value in weights.items()}
        inputs["input"] = (pseudo_images(shape) * float(record["input_scale"])).astype(dtype)
        direction = pseudo_normal("direction", shape).astype(dtype)

        @jax.jit
        def evaluate(inputs):
            def objective(inputs):
                output = attend(op, inputs)
                return (output * direction).sum(), output

            return jax.grad(objective, has_aux=True)(inputs)

        gradients, output = evaluate(inputs)
    assert output.dtype == dtype
    assert_near(sample("output", output, record["output"].size), record["output"], tolerance, "output")
    assert_gradients({name: np.asarray(value) for name, value in gradients.items()}, record, tolerance)


def test_pseudo_weights_do_not_depend_on_order_or_company():
    shapes = {"a.norm.weight": (4,), "a.conv.weight": (8, 1, 3, 3), "a.bn.running_var": (5000,)}
    weights = pseudo_weights(shapes)
    again = pseudo_weights(dict(reversed(shapes.items())))
    for name in shapes:
        np.testing.assert_array_equal(weights[name], again[name])
        np.testing.assert_array_equal(weights[name], pseudo_weights({name: shapes[name]})[name])
    # The stored references were made from these: another generator needs other references.
    expected = np.float32([0.96363103, 1.1058164, 0.9671831, 0.9633879])
    np.testing.assert_array_equal(weights["a.norm.weight"], expected)
    assert weights["a.bn.running_var"].mean() == pytest.approx(1, abs=0.01)
    assert weights["a.bn.running_var"].std() == pytest.approx(0.2, abs=0.01)
    assert weights["a.bn.running_var"].min() > 0
    with pytest.raises(KeyError, match="'a.mystery'"):
        pseudo_weights({"a.mystery": (2,)})
