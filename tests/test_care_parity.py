"""CARE against the authors' code in float64, see `reference/make_care.py`, and against a table made from sines."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import zoo
from tests.parity import assert_features, assert_gradients, backward, forward, part, reference
from tests.reference.weights import pseudo_images, pseudo_normal

CASES = (("care_s0", "224x224"), ("care_s0", "96x64"), ("care_s0", "225x97"), ("care_s2", "96x64"))
# Reached in float32: logits within 2e-6, features within 1e-6.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE, FLOAT64_TOLERANCE = 1e-5, 2e-4, 1e-9


@functools.cache
def loaded(variant: str):
    """A stored record, the weights it was made with, and the model and variables loaded from them."""
    record, weights = reference(f"{variant}_official")
    variant, fields = ("care_s0", dict(depths=(1, 1, 1, 1))) if variant == "care_small" else (variant, {})
    return record, weights, *zoo.load_pretrained(variant, weights, num_classes=100, **fields)


def images_of(size: str, batch: int = 2) -> np.ndarray:
    return pseudo_images((batch, *map(int, size.split("x")), 3))


def mean_of_heads(record: dict[str, np.ndarray]) -> np.ndarray:
    return (record["head"] + record["dist_head"]) / 2


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "size"), CASES)
def test_logits_and_features(variant, size):
    record, _, model, variables, _ = loaded(variant)
    record = part(record, f"{size}/")
    with jax.default_matmul_precision("highest"):
        logits, features = forward(model)(variables, images_of(size))
        # In training the head gives what both classifiers say.
        both = jax.jit(functools.partial(model.apply, train=True, method="forward_head"))(variables, features[-1])
    np.testing.assert_allclose(logits, mean_of_heads(record), rtol=0, atol=OUTPUT_TOLERANCE)
    for actual, name in zip(both, ("head", "dist_head"), strict=True):
        np.testing.assert_allclose(actual, record[name], rtol=0, atol=OUTPUT_TOLERANCE, err_msg=name)
    assert [feature.shape[-1] for feature in features[1:]] == [channels for channels, _ in model.feature_info]
    assert_features(features, record, OUTPUT_TOLERANCE)


def under_reference_names(model, variables, path):
    """Gradients are shaped like the parameters, so that saving them gives every one its reference name."""
    zoo.save_pretrained(model, variables, path)
    statistics, rest = {}, {}
    for name, value in load_file(path).items():
        (statistics if "running" in name else rest)[name] = value.astype(np.float64)
    return rest, statistics


@pytest.mark.slow
@pytest.mark.parametrize("variant", ("care_s0", "care_s2"))
def test_gradients(variant, tmp_path):
    record, _, model, variables, _ = loaded(variant)
    record = part(record, "96x64/")
    with jax.default_matmul_precision("highest"):
        gradients, logits = backward(model)(variables, images_of("96x64"))
    np.testing.assert_allclose(logits, mean_of_heads(record), rtol=0, atol=OUTPUT_TOLERANCE)
    saved, _ = under_reference_names(model, {**variables, "params": gradients}, tmp_path / "gradients.safetensors")
    assert_gradients(saved, record, GRADIENT_TOLERANCE)


@functools.cache
def differentiated(model, train: bool):
    """A jitted function from variables and images to the gradients, both heads' logits and the statistics.

    Of the logits a weighted sum is differentiated: in training each head's has its own weights.
    """

    # Two thirds less time to compile.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
    def run(variables, images):
        def objective(params):
            everything = {**variables, "params": params}
            logits, state = model.apply(everything, images, train=train, mutable=["batch_stats"])
            logits = logits if train else (logits,)
            weights = [pseudo_normal("direction", out.shape, seed) for seed, out in enumerate(logits)]
            return sum((out * w.astype(out.dtype)).sum() for out, w in zip(logits, weights)), (logits, state)

        return jax.grad(objective, has_aux=True)(variables["params"])

    return run


@pytest.mark.slow
@pytest.mark.parametrize("mode", ("evaluation", "training"))
def test_a_small_network(mode, tmp_path):
    """One of every kind of block; in training both heads' logits from the batch's statistics, which are kept."""
    record, _, model, variables, _ = loaded("care_small")
    record, train = part(record, f"{mode}/"), mode == "training"
    if train:
        variables = {**variables, "batch_stats": jax.tree.map(jnp.zeros_like, variables["batch_stats"])}
    with jax.default_matmul_precision("highest"):
        gradients, (logits, state) = differentiated(model, train)(variables, images_of("96x64", 3 if train else 2))
    expected = (record["head"], record["dist_head"]) if train else (mean_of_heads(record),)
    for actual, wanted in zip(logits, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=OUTPUT_TOLERANCE)

    saved, statistics = under_reference_names(model, {"params": gradients, **state}, tmp_path / "saved.safetensors")
    norms = dict(zip(sorted(saved), record["gradient_norms"], strict=True))
    # Statistics of the batch take out what a bias before them adds.
    without = [name for name, norm in norms.items() if norm < 1e-9]
    assert bool(without) == train and all(name.endswith("bias") for name in without)
    assert max((abs(saved.pop(name)).max() for name in without), default=0) < 1e-4
    assert_gradients(saved, {**record, "gradient_norms": [norms[name] for name in sorted(saved)]}, GRADIENT_TOLERANCE)
    for kind in ("mean", "var") if train else ():
        found = [np.linalg.norm(statistics[name]) for name in sorted(statistics) if name.endswith(kind)]
        np.testing.assert_allclose(found, record[f"statistics/{kind}"], rtol=1e-5, err_msg=kind)


def test_float64():
    """In double precision only rounding is left of the difference: the arithmetic is the reference's."""
    record, _, model, variables, _ = loaded("care_small")
    record = part(record, "evaluation/")
    with jax.enable_x64(True):
        model = model.clone(dtype=jnp.float64, param_dtype=jnp.float64)
        variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
        logits, features = forward(model)(variables, images_of("96x64").astype(np.float64))
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits, mean_of_heads(record), rtol=0, atol=FLOAT64_TOLERANCE)
    assert_features(features, record, FLOAT64_TOLERANCE)


# What the authors' code computes from weights and images that closed forms give, each row: five
# logits, their mean and (unbiased) standard deviation, and the first logit of either head.
GOLDEN = {
    ("care_s0", "224x224"): (-0.39431, -1.12532, 1.08166, 0.47145, -1.31769, -0.001415, 0.957352, -0.49859, -0.29003),
    ("care_s0", "96x64"): (-0.40717, -1.11724, 1.08947, 0.45848, -1.31739, -0.001419, 0.957002, -0.50847, -0.30588),
    ("care_s1", "224x224"): (0.79371, -1.93880, 0.51525, 1.68960, -1.53206, -0.001404, 1.402901, 0.34125, 1.24617),
    ("care_s1", "96x64"): (0.72642, -1.92175, 0.57187, 1.63713, -1.55586, -0.001449, 1.388322, 0.27110, 1.18174),
    ("care_s2", "224x224"): (1.92845, -1.72975, 1.51369, -1.04427, 0.53700, -0.000038, 1.336909, 2.78085, 1.07605),
    ("care_s2", "96x64"): (1.38126, -1.45658, 1.54029, -1.36813, 1.12759, -0.000204, 1.077592, 1.74651, 1.01602),
}


def sine_weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Weights that are sines of the index in a tensor and of the tensor's place among all."""
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            continue
        size = int(np.prod(shape))
        s = np.sin(0.37 * np.arange(size) + 1.3 * len(weights)).reshape(shape)
        if name.endswith("running_var"):
            value = 1 + 0.5 * s**2
        elif name.endswith("running_mean"):
            value = 0.1 * s
        elif name.endswith("gamma"):
            value = 0.5 + 0.1 * s
        elif name.endswith("bias"):
            value = 0.05 * s
        else:
            value = s * np.sqrt(2 * shape[0] / size) if len(shape) > 1 else 1 + 0.1 * s
        weights[name] = value.astype(np.float32)
    return weights


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "size"), GOLDEN)
def test_golden_table(variant, size):
    shapes = json.loads(str(reference(f"{variant}_official")[0]["shapes"]))
    for head in ("head", "dist_head"):
        shapes[f"{head}.fc.weight"][0] = 1000
        shapes[f"{head}.fc.bias"] = [1000]
    model, variables, _ = zoo.load_pretrained(variant, sine_weights(shapes))
    height, width = map(int, size.split("x"))
    images = np.sin(0.013 * np.arange(3 * height * width)).reshape(1, 3, height, width).transpose(0, 2, 3, 1)

    @jax.jit
    def run(variables, images):
        features = model.apply(variables, images, method="forward_features")
        heads = functools.partial(model.apply, variables, features, method="forward_head")
        return heads(), *heads(train=True)

    logits, first, second = (np.asarray(x, np.float64)[0] for x in run(variables, images.astype(np.float32)))
    found = [*logits[:5], logits.mean(), logits.std(ddof=1), first[0], second[0]]
    np.testing.assert_allclose(found, GOLDEN[variant, size], rtol=0, atol=1e-4)
