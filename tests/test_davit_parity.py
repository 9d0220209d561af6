"""DaViT against timm's and the authors' code in float64, see `reference/make_davit.py`."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import zoo
from kernels import channel_attention, window_attention
from tests.parity import assert_features, assert_gradients, assert_near, backward, forward, part, reference
from tests.reference.weights import pseudo_images, pseudo_normal, pseudo_weights, sample

NAMINGS = ("timm", "official")
SIZES = ("224x224", "225x231", "230x197")
# Reached in float32: logits and features within 3e-6, gradients within 5e-5.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE, FLOAT64_TOLERANCE = 2e-5, 2e-4, 1e-10


@functools.cache
def loaded(variant: str, naming: str):
    """A stored record, the weights it was made with, and the model and variables loaded from them."""
    record, weights = reference(f"{variant}_{naming}")
    return record, weights, *zoo.load_pretrained(variant, weights)


CASES = tuple(itertools.product(("davit_tiny", "davit_small"), SIZES))


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "size"), CASES)
def test_logits_and_features(variant, size):
    images = pseudo_images((2, *map(int, size.split("x")), 3))
    for naming in NAMINGS:
        record, _, model, variables, _ = loaded(variant, naming)
        record = part(record, f"{size}/")
        with jax.default_matmul_precision("highest"):
            logits, features = forward(model)(variables, images)
        np.testing.assert_allclose(logits, record["logits"], rtol=0, atol=OUTPUT_TOLERANCE)
        assert_features(features, record, OUTPUT_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "size"), CASES)
def test_logits_and_gradients(variant, size, tmp_path):
    images = pseudo_images((2, *map(int, size.split("x")), 3))
    for naming in NAMINGS:
        record, _, model, variables, _ = loaded(variant, naming)
        record = part(record, f"{size}/")
        with jax.default_matmul_precision("highest"):
            gradients, logits = backward(model)(variables, images)
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


@pytest.mark.slow
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
    (
        ("davit_tiny", "timm"),
        ("davit_tiny", "official"),
        pytest.param("davit_base_fl", "florence2", marks=pytest.mark.slow),
    ),
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
