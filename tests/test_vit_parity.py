"""ViT and DeiT against timm's in float64, see `reference/make_vit.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import zoo
from tests.parity import REFERENCE, assert_features, assert_gradients, backward, forward, part, reference
from tests.reference.weights import pseudo_images, pseudo_normal, sample
from zoo.keymap import flatten
from zoo.position_embedding import resize_positions

# Reached in float32: logits within 4e-6, features within 2e-6, gradients within 4e-6.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE, FLOAT64_TOLERANCE = 2e-5, 2e-5, 1e-10
REDUCED = dict(image_size=32, patch=8, dim=48, depths=(1, 1, 1), num_heads=3)
MODELS = {
    "plain": ("vit_tiny_patch16_224", REDUCED),
    "distilled": ("deit_tiny_distilled_patch16_224", dict(REDUCED, qkv_bias=False)),
    "deit3": ("deit3_small_patch16_224", REDUCED),
}
WIDE = dict(dtype=jnp.float64, param_dtype=jnp.float64)


def images(height, width, dtype=np.float32):
    return pseudo_images((2, height, width, 3)).astype(dtype)


@functools.cache
def loaded(kind: str, **fields):
    """A stored record, the weights it was made with, and the model, variables and report of loading them."""
    record, weights = reference(f"vit_{kind}_timm")
    name, own = MODELS.get(kind, ("deit_tiny_patch16_224", dict(depths=(3, 3, 3, 3))))
    return record, weights, *zoo.load_pretrained(name, weights, **{**own, **fields})


def assert_outputs(model, variables, record, tolerance):
    x = images(*model.input_size(), jax.tree.leaves(variables)[0].dtype)
    with jax.default_matmul_precision("highest"):
        logits, features = forward(model)(variables, x)
    np.testing.assert_allclose(logits, record["logits"], rtol=0, atol=tolerance)
    assert_features(features, record, tolerance)


def assert_all_gradients(model, variables, record, tolerance, path):
    x = images(*model.input_size(), jax.tree.leaves(variables)[0].dtype)
    with jax.default_matmul_precision("highest"):
        gradients, logits = backward(model)(variables, x)
    np.testing.assert_allclose(logits, record["logits"], rtol=0, atol=tolerance)
    # Gradients are shaped like the parameters, so saving them gives every one its reference name.
    zoo.save_pretrained(model, {"params": gradients}, path)
    assert_gradients(load_file(path), record, tolerance)


def test_tiny():
    """DeiT-Ti whole, with the maps after every third block."""
    record, _, model, variables, report = loaded("deit_tiny")
    assert report.naming == "timm" and report.parameters == 5_717_416
    assert_outputs(model, variables, record, OUTPUT_TOLERANCE)


@pytest.mark.slow
def test_gradients_of_tiny(tmp_path):
    record, _, model, variables, _ = loaded("deit_tiny")
    assert_all_gradients(model, variables, record, GRADIENT_TOLERANCE, tmp_path / "g.safetensors")


@pytest.mark.parametrize("kind", MODELS)
def test_float64(kind, tmp_path):
    """In double precision only rounding is left of the difference: the arithmetic is the reference's."""
    with jax.enable_x64(True):
        record, weights, model, variables, _ = loaded(kind, **WIDE)
        expected = part(record, "32x32/")
        path = tmp_path / "saved.safetensors"
        # The logits are compared too.
        assert_all_gradients(model, variables, expected, FLOAT64_TOLERANCE, path)

        @jax.jit
        def run(variables, images):
            call = functools.partial(model.apply, variables)
            tokens, attended = call(images, method="forward_tokens", return_weights=True)
            pooled = call(tokens[-1], pre_logits=True, method="forward_head")
            maps = [call(found, method="patch_map") for found in tokens]
            return maps, attended, pooled, call(tokens[-1], train=True, method="forward_head")

        features, attended, pooled, training = run(variables, images(32, 32, np.float64))
        assert_features(features, expected, FLOAT64_TOLERANCE)
        np.testing.assert_allclose(pooled, expected["pre_logits"], rtol=0, atol=FLOAT64_TOLERANCE)
        wanted = record["training"] if kind == "distilled" else expected["logits"]
        np.testing.assert_allclose(training, wanted, rtol=0, atol=FLOAT64_TOLERANCE)
        zoo.save_pretrained(model, variables, path, dtype=np.float32)
    # They are stored in float32.
    np.testing.assert_allclose(np.stack(attended)[:, 0], record["weights"], rtol=0, atol=1e-7)
    saved = load_file(path)
    assert saved.keys() == weights.keys()
    for key, value in saved.items():
        np.testing.assert_array_equal(value, weights[key], err_msg=key)


@pytest.mark.parametrize("kind", MODELS)
def test_another_image_size_resamples_the_positions(kind):
    """3 x 7 positions from 4 x 4, those of the class and distillation tokens as they were."""
    with jax.enable_x64(True):
        record, _, model, variables, report = loaded(kind, image_size=(24, 56), **WIDE)
        prefix = {"plain": 1, "distilled": 2, "deit3": 0}[kind]
        shapes = f"({16 + prefix}, 48) -> ({21 + prefix}, 48), bicubic"
        assert report.resized == {"params/stem/pos_embed": shapes} and report.image_size == (24, 56)
        assert_outputs(model, variables, part(record, "24x56/"), FLOAT64_TOLERANCE)


@pytest.mark.parametrize("kind", ["plain", "deit3"])
def test_stages_are_nothing_but_places(kind, tmp_path):
    """The same blocks in one stage or in three; and the names of both, with each other's weights."""
    _, weights, _, variables, _ = loaded(kind)
    _, _, model, whole, _ = loaded(kind, depths=(3,))
    names = {f"params/stages_{i}_0/": f"params/stages_0_{i}/" for i in range(3)}

    def renamed(path):
        return next((path.replace(ours, theirs) for ours, theirs in names.items() if path.startswith(ours)), path)

    expected = {renamed(path): value for path, value in flatten(variables).items()}
    found = flatten(whole)
    assert expected.keys() == found.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    zoo.save_pretrained(model, whole, tmp_path / "saved.safetensors")
    saved = load_file(tmp_path / "saved.safetensors")
    assert saved.keys() == weights.keys()
    for key, value in saved.items():
        np.testing.assert_array_equal(value, weights[key], err_msg=key)


def test_positions():
    """torch's antialiased interpolation."""
    with np.load(REFERENCE / "vit_positions.npz") as file:
        records = dict(file)
    assert len(records) == 8
    for key, expected in records.items():
        method, prefix, sides = key.split("/")
        prefix, grid = int(prefix), tuple(map(int, sides.split("x")))
        positions = pseudo_normal("positions", (1, prefix + 196, 16))[0]
        resized = resize_positions(positions, (prefix + grid[0] * grid[1], 16), method, grid=grid, prefix=prefix)
        np.testing.assert_array_equal(resized[:prefix], positions[:prefix])
        np.testing.assert_allclose(sample(key, resized, expected.size), expected, rtol=0, atol=1e-12)


def test_positions_as_jax_does_it():
    positions = pseudo_normal("positions", (1, 196, 16))[0].astype(np.float32)
    for grid in ((24, 24), (7, 9)):
        expected = jax.image.resize(positions.reshape(14, 14, 16), (*grid, 16), "cubic").reshape(-1, 16)
        found = resize_positions(positions, expected.shape, "bicubic", grid=grid, prefix=0)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
