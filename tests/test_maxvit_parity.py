"""MaxViT against timm's code in float64, see `reference/make_maxvit.py`."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import zoo
from tests.parity import REFERENCE, assert_features, assert_gradients, assert_near, backward, forward, part, reference
from tests.reference.weights import pseudo_images, pseudo_normal
from zoo import registry
from zoo.keymap import flatten
from zoo.relative_bias import expand_table, resize_table

# Reached in float32: logits within 2e-6, features within 5e-6 of the largest, gradients within 5e-5.
LOGITS_TOLERANCE, FEATURES_TOLERANCE, GRADIENT_TOLERANCE, FLOAT64_TOLERANCE = 1e-5, 2e-5, 2e-4, 1e-10
REDUCED = dict(depths=(1, 2), dims=(32, 64), strides=(2, 2), stem_dims=(32, 32))
WIDE = dict(dtype=jnp.float64, param_dtype=jnp.float64)


def images(size: str, dtype=np.float32):
    return pseudo_images((2, *map(int, size.split("x")), 3)).astype(dtype)


@functools.cache
def loaded(record: str, name: str = "maxvit_tiny_tf_224", **fields):
    """A stored record, the weights it was made with, and the model, variables and report of loading them."""
    found, weights = reference(record)
    return found, weights, *zoo.load_pretrained(name, weights, **fields)


def assert_outputs(model, variables, record, size, logits_tolerance, features_tolerance):
    expected = part(record, f"{size}/")
    with jax.default_matmul_precision("highest"):
        logits, features = forward(model)(variables, images(size, jax.tree.leaves(variables)[0].dtype))
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=logits_tolerance)
    assert_features(features, expected, features_tolerance)


def double(variables):
    """Variables in float64."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)


def assert_all_gradients(model, variables, record, size, tolerance, path):
    with jax.default_matmul_precision("highest"):
        gradients, _ = backward(model)(variables, images(size, jax.tree.leaves(variables)[0].dtype))
    # Gradients are shaped like the parameters, so saving them gives every one its reference name.
    zoo.save_pretrained(model, {**variables, "params": gradients}, path)
    named = {name: value for name, value in load_file(path).items() if "running_" not in name}
    assert_gradients(named, part(record, f"{size}/"), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["224x448", "224x224"])
def test_tiny(size):
    record, _, model, variables, _ = loaded("maxvit_tiny_timm")
    assert_outputs(model, variables, record, size, LOGITS_TOLERANCE, FEATURES_TOLERANCE)


@pytest.mark.slow
def test_tiny_at_384_with_the_tables_of_224():
    record, _, model, variables, report = loaded("maxvit_tiny_timm", image_size=384)
    assert set(report.resized.values()) == {f"({h}, 13, 13) -> ({h}, 23, 23), bilinear" for h in (2, 4, 8, 16)}
    assert len(report.resized) == 22
    assert_outputs(model, variables, record, "384x384", LOGITS_TOLERANCE, FEATURES_TOLERANCE)


@pytest.mark.slow
def test_gradients_of_tiny(tmp_path):
    record, _, model, variables, _ = loaded("maxvit_tiny_timm")
    assert_all_gradients(model, variables, record, "224x224", GRADIENT_TOLERANCE, tmp_path / "g.safetensors")


@pytest.mark.parametrize("side", [48, pytest.param(96, marks=pytest.mark.slow)])
def test_another_image_size_resizes_the_tables(side):
    """Windows of 6 x 6 and 12 x 12 tokens from tables for 7 x 7."""
    record, _, model, variables, report = loaded("maxvit_reduced_timm", image_size=side, **REDUCED)
    assert model.window_size == (side // 8, side // 8)
    assert len(report.resized) == 6
    assert_outputs(model, variables, record, f"{side}x{side}", LOGITS_TOLERANCE, FEATURES_TOLERANCE)


def test_windows_that_are_not_square():
    record, _, model, variables, report = loaded("maxvit_oblong_timm", image_size=(16, 24), **REDUCED)
    assert model.window_size == (2, 3) and not report.resized
    assert_outputs(model, variables, record, "32x24", LOGITS_TOLERANCE, FEATURES_TOLERANCE)


@pytest.mark.slow
def test_float64(tmp_path):
    """In double precision only rounding is left of the difference: the arithmetic is the reference's."""
    with jax.enable_x64(True):
        record, _, model, variables, _ = loaded("maxvit_oblong_timm", image_size=(16, 24), **REDUCED, **WIDE)
        variables = double(variables)
        assert_outputs(model, variables, record, "32x24", FLOAT64_TOLERANCE, FLOAT64_TOLERANCE)
        assert_all_gradients(model, variables, record, "32x24", FLOAT64_TOLERANCE, tmp_path / "g.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("record", "name", "fields"),
    [
        ("maxvit_rw_timm", "maxvit_tiny_rw_224", dict()),
        ("maxvit_rmlp_timm", "maxvit_rmlp_small_rw_224", dict(hidden_head=True)),
    ],
)
def test_the_design_of_timm(record, name, fields, tmp_path):
    """Queries, keys and values head by head, Swin's tables or computed ones, layer scale, symmetric padding."""
    fields = REDUCED | dict(stem_dims=(16, 32), image_size=(16, 24)) | fields
    with jax.enable_x64(True):
        record, weights, model, variables, _ = loaded(record, name, **fields, **WIDE)
        variables = double(variables)
        assert_outputs(model, variables, record, "32x24", FLOAT64_TOLERANCE, FLOAT64_TOLERANCE)
        path = tmp_path / "saved.safetensors"
        assert_all_gradients(model, variables, record, "32x24", FLOAT64_TOLERANCE, path)
        zoo.save_pretrained(model, variables, path, dtype=np.float32)
    for key, value in load_file(path).items():
        np.testing.assert_array_equal(value, weights[key], err_msg=key)


def test_tables_of_swin_count_the_other_way():
    """Flat, heads last, query less key; square tables of any size are read."""
    model = zoo.create_model("maxvit_tiny_rw_224")
    (timm_names, *_) = registry.family_of("maxvit_tiny_rw_224").key_maps.values()
    name = "stages.1.blocks.0.attn_grid.attn.rel_pos.relative_position_bias_table"
    rule = timm_names(model).rule_of_source(name).rule
    assert rule.resize is resize_table
    for side in (7, 8):
        flat = pseudo_normal("flat", ((2 * side - 1) ** 2, 4))
        table = rule.transform.apply(flat)
        for dy, dx in ((0, 0), (2, -3), (1 - side, side - 1)):
            row = (side - 1 - dy) * (2 * side - 1) + side - 1 - dx
            np.testing.assert_array_equal(table[:, dy + side - 1, dx + side - 1], flat[row])


def test_training_uses_and_averages_the_statistics_of_the_batch(tmp_path):
    """Biased variances, and running averages that keep 0.99, as the official code has it (torch would keep 0.9)."""
    with jax.enable_x64(True):
        record, weights, model, variables, _ = loaded("maxvit_oblong_timm", image_size=(16, 24), **REDUCED, **WIDE)
        expected = part(record, "training/")

        @jax.jit
        def run(variables, images):
            return model.apply(variables, images, train=True, mutable=["batch_stats"])

        variables = double(variables)
        logits, updated = run(variables, images("32x24", np.float64))
        np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=FLOAT64_TOLERANCE)
        zoo.save_pretrained(model, {**variables, **updated}, tmp_path / "trained.safetensors")
    saved = load_file(tmp_path / "trained.safetensors")
    batch = part(expected, "batch/")
    assert len(batch) == 2 * 10
    for name, value in batch.items():
        name = re.sub(r"(mean|var)$", r"running_\1", name)
        np.testing.assert_allclose(
            saved[name], 0.99 * weights[name].astype(np.float64) + 0.01 * value, rtol=1e-9, atol=1e-12
        )


def test_round_trip_is_bit_equal(tmp_path):
    _, weights, model, variables, _ = loaded("maxvit_oblong_timm", image_size=(16, 24), **REDUCED)
    zoo.save_pretrained(model, variables, tmp_path / "saved.safetensors")
    saved = load_file(tmp_path / "saved.safetensors")
    counters = {name for name in weights if name.endswith("num_batches_tracked")}
    assert saved.keys() == weights.keys() - counters
    for key, value in saved.items():
        np.testing.assert_array_equal(value, weights[key], err_msg=key)


TENSORFLOW_NAMES = (
    (r"^stem\.conv(\d)", lambda m: f"stem/conv_{int(m[1]) - 1}"),
    (r"^stem\.norm1", "stem/norm_0"),
    (r"^stages\.(\d)\.blocks\.(\d)\.", r"block_0\1_0\2/"),
    (r"/conv\.shortcut\.expand", "/mbconv/shortcut_conv"),
    (r"/conv\.pre_norm", "/mbconv/pre_norm"),
    (r"/conv\.conv1_1x1", "/mbconv/expand_conv"),
    (r"/conv\.norm1", "/mbconv/expand_norm"),
    (r"/conv\.conv2_kxk", "/mbconv/depthwise_conv"),
    (r"/conv\.norm2", "/mbconv/depthwise_norm"),
    (r"/conv\.se\.fc1", "/mbconv/se/reduce_conv2d"),
    (r"/conv\.se\.fc2", "/mbconv/se/expand_conv2d"),
    (r"/conv\.conv3_1x1", "/mbconv/shrink_conv"),
    (r"/attn_(block|grid)\.(.*)", lambda m: "/" + m[2] + {"block": "", "grid": "_1"}[m[1]]),
    (r"/norm1\.(\w+?)(_1)?$", r"/attn_layer_norm\2.\1"),
    (r"/norm2\.(\w+?)(_1)?$", r"/ffn_layer_norm\2.\1"),
    (r"/attn\.rel_pos\.relative_position_bias_table(_1)?", r"/attention\1/relative_bias"),
    (r"/attn\.(qkv|proj)\.(weight|bias)(_1)?", r"/attention\3/\1.\2"),
    (r"/mlp\.fc1\.(weight|bias)(_1)?", r"/ffn\2/expand_dense.\1"),
    (r"/mlp\.fc2\.(weight|bias)(_1)?", r"/ffn\2/shrink_dense.\1"),
    (r"/proj\.", "/o."),
    (r"^head\.norm", "final_layer_norm"),
    (r"^head\.pre_logits\.fc", "cls_head/inner_dense"),
    (r"^head\.fc", "cls_head/logit_dense"),
    (r"norm(_\d)?\.weight$", r"norm\1.gamma"),
    (r"norm(_\d)?\.bias$", r"norm\1.beta"),
    (r"\.running_mean$", ".moving_mean"),
    (r"\.running_var$", ".moving_variance"),
    (r"depthwise_conv\.weight$", "depthwise_conv.depthwise_kernel"),
    (r"(conv|conv_\d|conv2d)\.weight$", r"\1.kernel"),
    (r"\.(\w+)$", r"/\1"),
)


def tensorflow_checkpoint(weights):
    """timm's arrays as the variables of the official code, the relative tables and all biases as they are."""
    variables = {}
    for name, value in weights.items():
        if name.endswith("num_batches_tracked"):
            continue
        for pattern, replacement in TENSORFLOW_NAMES:
            name = re.sub(pattern, replacement, name)
        if "/qkv/" in name:
            for letter, rows in zip("qkv", np.split(value, 3)):
                heads = rows.reshape(-1, 32, *rows.shape[1:])
                variables[name.replace("/qkv/", f"/{letter}/")] = (
                    np.moveaxis(heads, -1, 0) if heads.ndim == 3 else heads
                )
            continue
        if name.endswith("depthwise_kernel"):
            value = np.einsum("cihw->hwci", value)
        elif value.ndim == 4:
            value = np.einsum("oihw->hwio", value)
        elif value.ndim == 2:
            value = value.T
            if name.endswith("/o/weight"):
                value = value.reshape(-1, 32, value.shape[-1])
        variables[name] = value
    return {f"maxvit/{name}": value for name, value in variables.items()}


def test_tensorflow_names():
    """Moving averages win over the raw variables; slots and counters are left out; tables are resized."""
    _, weights, model, variables, _ = loaded("maxvit_reduced_timm", image_size=96, **REDUCED)
    averaged = tensorflow_checkpoint(weights)
    checkpoint = {"global_step": np.int64(93_750), "beta1_power": np.float32(0)}
    for name, value in averaged.items():
        checkpoint[f"{name}/ExponentialMovingAverage"] = value
        checkpoint[name] = np.zeros_like(value)
        if "moving_" not in name:
            checkpoint |= {f"{name}/{slot}": np.ones_like(value) for slot in ("Adam", "Adam_1")}
    tables = [name for name in averaged if name.endswith("relative_bias")]
    assert len(tables) == 6 and "maxvit/block_01_01/attention_1/relative_bias" in tables
    assert averaged["maxvit/block_01_00/attention/q/weight"].shape == (64, 2, 32)
    _, found, report = zoo.load_pretrained("maxvit_tiny_tf_224", checkpoint, image_size=96, **REDUCED)
    assert (report.naming, report.weights, len(report.resized)) == ("tensorflow", "ema", 6)
    expected, found = flatten(variables), flatten(found)
    assert expected.keys() == found.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_tensorflow_names_round_trip(tmp_path):
    _, weights, model, variables, _ = loaded("maxvit_oblong_timm", image_size=(16, 24), **REDUCED)
    zoo.save_pretrained(model, variables, tmp_path / "saved.npz", naming="tensorflow")
    with np.load(tmp_path / "saved.npz") as saved:
        expected = tensorflow_checkpoint(weights)
        assert set(saved) == set(expected)
        for key, value in expected.items():
            np.testing.assert_array_equal(saved[key], value, err_msg=key)


@pytest.mark.parametrize("method", ["bilinear", "bicubic", "geometric"])
def test_table_resize(method):
    """torch's interpolation, and timm's geometric one, which it computes in float32."""
    table = pseudo_normal("table", (2, 13, 13))
    with np.load(REFERENCE / "tables.npz") as file:
        records = part(dict(file), f"{method}/")
    assert records.keys() == {"23x23", "31x31", "7x7", "13x27"}
    for expected in records.values():
        resized = resize_table(table, expected.shape, method)
        np.testing.assert_allclose(resized, expected, rtol=0, atol=3e-6 if method == "geometric" else 1e-12)


def test_table_resize_as_jax_does_it():
    table = pseudo_normal("table", (2, 13, 13)).astype(np.float32)
    expected = jax.image.resize(table, (2, 23, 31), "bilinear", antialias=False)
    np.testing.assert_allclose(resize_table(table, (2, 23, 31), "bilinear"), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"only the height and width .* not \(2, 13, 13\)"):
        resize_table(table, (4, 23, 23), "bilinear")
    with pytest.raises(ValueError, match="method must be one of 'bilinear', 'bicubic', 'geometric', got 'nearest'"):
        resize_table(table, (2, 23, 23), "nearest")


@pytest.mark.parametrize("window", [(2, 3), (4, 1), (3, 3)], ids=str)
def test_bias_of_every_pair_of_tokens(window):
    """`bias[query, key] = table[key - query + window - 1]`, by a loop; and the gradient is its transpose."""
    height, width = window
    table = pseudo_normal("table", (2, 2 * height - 1, 2 * width - 1)).astype(np.float32)
    tokens = [(row, column) for row in range(height) for column in range(width)]
    expected = np.zeros((2, len(tokens), len(tokens)), np.float32)
    cotangent = pseudo_normal("cotangent", expected.shape).astype(np.float32)
    transposed = np.zeros_like(table)
    for q, (qi, qj) in enumerate(tokens):
        for k, (ki, kj) in enumerate(tokens):
            expected[:, q, k] = table[:, ki - qi + height - 1, kj - qj + width - 1]
            transposed[:, ki - qi + height - 1, kj - qj + width - 1] += cotangent[:, q, k]

    @jax.jit
    def both(table, cotangent):
        bias, pull = jax.vjp(expand_table, table)
        return bias, pull(cotangent)[0]

    bias, gradient = both(table, cotangent)
    np.testing.assert_array_equal(bias, expected)
    assert_near(gradient, transposed, 1e-6, "gradient")
