"""The zoo's front door: names, variants, parameter counts, features, stochastic depth, precision."""

import functools
import subprocess
import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo import registry

# With 1000 classes as published; Florence-2's towers have no classifier, but the head norm that their file lacks.
PARAMETERS = {
    "davit_tiny": 28_360_168,
    "davit_small": 49_745_896,
    "davit_base": 87_954_408,
    "davit_large": 196_811_752,
    "davit_huge": 348_922_856,
    "davit_giant": 1_406_470_120,
    "davit_base_fl": 90_370_048,
    "davit_huge_fl": 360_636_416,
    "davit_nano": 139_274,
}
TINY = dict(depths=(1, 1), dims=(8, 16), num_heads=(2, 4), num_classes=3)


def tiny(**overrides) -> nn.Module:
    return zoo.create_model("davit_nano", **{**TINY, **overrides})


def images(*shape: int):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


@functools.cache
def init(model: nn.Module, *shape: int):
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    model = zoo.create_model(name)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PARAMETERS[name]


def test_every_variant_is_counted():
    assert sorted(PARAMETERS) == zoo.list_models("davit*")


def test_list_models():
    assert zoo.list_models("davit_*_fl") == ["davit_base_fl", "davit_huge_fl"]
    assert zoo.list_models() == sorted(zoo.list_models())
    tags = zoo.list_models("davit_[tsb]*", pretrained=True)
    assert {"davit_tiny.msft_in1k", "davit_small.msft_in1k", "davit_base.msft_in1k"} <= set(tags)
    assert zoo.list_models("nothing*") == []


def test_tags_and_their_settings():
    cfg = zoo.pretrained_cfg("davit_tiny.msft_in1k")
    assert (cfg.image_size, cfg.num_classes, cfg.crop_pct, cfg.interpolation) == (224, 1000, 0.95, "bicubic")
    assert cfg == zoo.pretrained_cfg("davit_tiny")
    assert zoo.create_model("davit_tiny.msft_in1k").num_classes == 1000
    assert zoo.create_model("davit_tiny.msft_in1k", num_classes=7).num_classes == 7


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: zoo.create_model("davit_tinny"), ValueError, "unknown model 'davit_tinny'; did you mean 'davit_tiny'"),
        (
            lambda: zoo.create_model("davit_tiny", drop_path=0.1),
            TypeError,
            "'drop_path'; did you mean 'drop_path_rate'",
        ),
        (lambda: zoo.create_model("davit_tiny.msft_in21k"), ValueError, "unknown weights .* 'davit_tiny.msft_in1k'"),
        (lambda: zoo.pretrained_cfg("davit_giant"), ValueError, "names no single set of weights; its tags: none"),
        (lambda: init(tiny(), 1, 8, 8, 1), ValueError, r"images must be \(batch, height, width, 3\)"),
        (lambda: init(tiny(num_heads=(2,)), 1, 8, 8, 3), ValueError, "as long as one another, got 2, 2 and 1"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_name_is_registered_once():
    family = registry.family_of("davit_tiny")
    with pytest.raises(ValueError, match="family 'davit' is registered twice"):
        registry.register(family)


@pytest.mark.parametrize("size", [(8, 8), (9, 14), (1, 1)])
def test_forward_intermediates(size):
    model = tiny()
    variables = init(model, 1, 8, 8, 3)
    half = tuple(-(-side // 2) for side in size)

    @jax.jit
    def both(variables, x):
        features = zoo.forward_intermediates(model, variables, x)
        head = model.apply(variables, features[-1], method="forward_head")
        return zoo.forward_intermediates(model, variables, x, include_stem=True), features, head

    with_stem, features, head = both(variables, images(2, *size, 3))
    assert [f.shape for f in features] == [(2, *size, 8), (2, *half, 16)]
    assert [f.shape for f in with_stem] == [(2, *size, 8), (2, *size, 8), (2, *half, 16)]
    assert model.feature_info == ((8, 1), (16, 2))
    logits = jax.jit(model.apply)(variables, images(2, *size, 3))
    np.testing.assert_allclose(head, logits, rtol=1e-5, atol=1e-6)


def test_without_a_classifier_and_with_another_number_of_channels():
    model = tiny(num_classes=0, in_chans=1)
    variables = init(model, 1, 8, 8, 1)
    assert "head" not in variables["params"]
    assert jax.eval_shape(model.apply, variables, jnp.zeros((3, 8, 8, 1))).shape == (3, 16)


def test_stochastic_depth_schedules():
    """timm: linspace over pairs, both halves alike; official: linspace over all halves."""
    model = zoo.create_model("davit_tiny", drop_path_rate=0.3)
    np.testing.assert_allclose(model.drop_path_rates(), np.repeat(np.linspace(0, 0.3, 6)[:, None], 2, 1), rtol=1e-12)
    model = zoo.create_model("davit_tiny", drop_path_rate=0.3, drop_path_schedule="official")
    np.testing.assert_allclose(model.drop_path_rates(), np.linspace(0, 0.3, 12).reshape(6, 2), rtol=1e-12)


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    from zoo.layers import DropPath

    x = jnp.arange(1.0, 4001.0)[:, None, None, None] * jnp.ones((4000, 1, 1, 2))
    drop = DropPath(0.25)
    y = np.asarray(drop.apply({}, x, True, rngs={"dropout": jax.random.key(0)})) / np.asarray(x)
    assert set(np.unique(y.round(5))) == {0.0, np.float32(4 / 3).round(5)}
    np.testing.assert_array_equal(y[..., 0], y[..., 1])
    assert abs((y == 0).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)
    np.testing.assert_array_equal(drop.apply({}, x, False), x)


@pytest.mark.slow
def test_bfloat16_computes_and_float32_stores():
    model = tiny(dtype=jnp.bfloat16)
    variables = init(model, 1, 8, 8, 3)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits = jax.jit(model.apply)(variables, images(4, 8, 8, 3))
    assert logits.dtype == jnp.bfloat16
    expected = jax.jit(tiny().apply)(variables, images(4, 8, 8, 3))
    np.testing.assert_allclose(logits.astype(jnp.float32), expected, atol=0.05)
    halved = jax.eval_shape(tiny(param_dtype=jnp.bfloat16).init, jax.random.key(0), images(1, 8, 8, 3))
    assert {leaf.dtype for leaf in jax.tree.leaves(halved)} == {jnp.dtype("bfloat16")}


@pytest.mark.slow
def test_rematerialization_changes_nothing():
    variables = init(tiny(), 1, 8, 8, 3)

    x = images(2, 8, 8, 3)

    def gradient(remat):
        model = tiny(remat=remat, drop_path_rate=0.5)

        def loss(variables):
            logits = model.apply(variables, x, train=True, rngs={"dropout": jax.random.key(1)})
            return (logits**2).sum()

        return jax.jit(jax.value_and_grad(loss))(variables)

    expected = gradient("none")
    for remat in ("full", "dots"):
        chex.assert_trees_all_close(gradient(remat), expected, rtol=1e-5, atol=1e-6)


def test_importing_the_zoo_is_cheap():
    """What takes seconds to import is imported where it is needed."""
    heavy = ("torch", "tensorflow", "orbax", "grain", "tensorflow_datasets", "sklearn", "optax")
    code = f"import sys, zoo; zoo.list_models(); print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_features_only_has_no_head():
    whole, model = tiny(), tiny(features_only=True)
    variables = init(whole, 1, 8, 8, 3)
    stages = {name: leaf for name, leaf in variables["params"].items() if not name.startswith("head")}
    assert init(model, 1, 8, 8, 3)["params"].keys() == stages.keys()
    x = images(2, 9, 14, 3)
    features = jax.jit(model.apply)({"params": stages}, x)
    expected = jax.jit(functools.partial(zoo.forward_intermediates, whole))(variables, x)
    assert isinstance(features, tuple)
    chex.assert_trees_all_equal(list(features), expected)


def test_weights_load_without_the_head():
    whole = tiny()
    path_free = zoo.pretrained.flatten(init(whole, 1, 8, 8, 3))
    model, variables, report = zoo.load_pretrained("davit_nano", path_free, features_only=True, **TINY)
    assert report.ignored == {"features_only drops the head": tuple(p for p in path_free if "/head" in p)}
    assert report.replaced == ()
    found = zoo.pretrained.flatten(variables)
    assert found.keys() == {path for path in path_free if "/head" not in path}
    chex.assert_trees_all_equal(found, {path: path_free[path] for path in found})
