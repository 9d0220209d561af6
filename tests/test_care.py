"""CARE's own: parameter counts, two heads, the last block, sizes, published files, attention maps, layers."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import zoo
from kernels import linear_attention
from kernels.linear import FEATURE_MAPS
from tests.parity import reference
from tests.variables import filled
from zoo import registry
from zoo.care import Attention
from zoo.errors import WeightsError
from zoo.keymap import check_key_map, flatten
from zoo.layers import LayerNorm, exact_gelu

# With 1000 classes: with both heads, as published, with one, with none; and the running statistics.
PARAMETERS = {
    "care_s0": (7_340_000, 6_312_952, 5_285_904, 8_800),
    "care_s1": (9_602_424, 8_575_376, 7_548_328, 12_048),
    "care_s2": (19_481_288, 17_941_216, 16_401_144, 17_104),
}
TINY = dict(depths=(1, 1), memory_dims=(4, 8), ratios=((2, 2), (2, 3)), head_dims=(None, 4), num_classes=3)


def tiny(**overrides):
    return zoo.create_model("care_nano", **{**TINY, "distilled": True, **overrides})


def normal(*shape: int):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


@functools.cache
def init(model):
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    return filled(variables, {"kernel": (0, 0.4), "scale": (1, 0.2), "var": (1, 0.1), "gamma": (0.5, 0.2)}, clip=2)


# Compiles in half the time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


@pytest.mark.parametrize("name", PARAMETERS)
def test_counts_and_official_names(name):
    model = zoo.create_model(name)
    abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    sizes = {path: leaf.size for path, leaf in flatten(abstract).items()}

    def count(*starts, but=()):
        return sum(size for path, size in sizes.items() if path.startswith(starts) and not path.startswith(but))

    both, one, none, statistics = PARAMETERS[name]
    assert count("params/") == both and count("batch_stats/") == statistics
    assert count("params/", but="params/dist_head") == one
    assert count("params/", but=("params/dist_head", "params/head")) == none

    shapes = json.loads(str(reference(f"{name}_official")[0]["shapes"]))
    # Those of the record have a hundred classes.
    shapes = {key: tuple(1000 if side == 100 else side for side in shape) for key, shape in shapes.items()}
    (key_map,) = (make(model) for make in registry.family_of(name).key_maps.values())
    assert not check_key_map(key_map, abstract, shapes)

    cfg = zoo.pretrained_cfg(f"{name}.in1k")
    assert cfg.filenames[0] == f"CARETrans_{name[-2:].upper()}.pth.tar"
    assert (cfg.image_size, cfg.crop_pct, cfg.interpolation) == (224, 0.875, "bicubic")
    assert cfg.mean == registry.IMAGENET_MEAN


def test_every_variant_is_counted():
    assert zoo.list_models("care_*") == sorted([*PARAMETERS, "care_nano"])


def test_two_heads():
    model = tiny()
    variables, features = init(model), normal(2, 3, 5, 96)
    head = functools.partial(model.apply, variables, features, method="forward_head")
    pooled = exact_gelu(features.mean((1, 2)))
    seen, said = [], []
    for name in ("head", "dist_head"):
        params = variables["params"]
        seen.append(LayerNorm(epsilon=1e-6).apply({"params": params[f"{name}_norm"]}, pooled))
        said.append(seen[-1] @ params[name]["kernel"] + params[name]["bias"])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    assert isinstance(head(train=True), tuple)
    close(head(train=True), said)
    close(head(), sum(said) / 2)
    close(head(pre_logits=True), sum(seen) / 2)
    without = tiny(num_classes=0)
    assert flatten(init(without)).keys() == flatten(variables).keys() - {
        f"params/{name}/{leaf}" for name in ("head", "dist_head") for leaf in ("kernel", "bias")
    }
    close(without.apply(variables, features, train=True, method="forward_head"), sum(seen) / 2)
    alone = tiny(distilled=False)
    assert not any("dist" in path for path in flatten(init(alone)))
    close(alone.apply(variables, features, train=True, method="forward_head"), said[0])
    close(alone.apply(variables, features, pre_logits=True, method="forward_head"), seen[0])


@pytest.mark.parametrize("size", [(2, 2), (9, 5)])
def test_any_size_and_features_only(size):
    """Stage 1 keeps the pixels, stage 2 leaves out an odd row or column; the last block widens 32 to 96."""
    model = tiny(features_only=True)
    assert model.feature_info == ((16, 1), (96, 2)) and model.least_size == (2, 2)
    variables = init(tiny())
    features = jit(model.apply)(variables, normal(2, *size, 3))
    assert [f.shape for f in features] == [(2, *size, 16), (2, size[0] // 2, size[1] // 2, 96)]
    if size[0] % 2:
        cropped = jit(model.apply)(variables, normal(2, *size, 3)[:, : size[0] // 2 * 2, : size[1] // 2 * 2])
        # The convolutions of stage 1 see the row that is left out, from at most 7 tokens away.
        assert cropped[1].shape == features[1].shape and not np.allclose(cropped[1], features[1])


def test_too_small():
    with pytest.raises(ValueError, match="got 31x64, the nearest that fits is 32x64"):
        zoo.create_model("care_s0", image_size=(31, 64))


def test_stochastic_depth_and_the_last_block():
    """Dropped, the last block has no shortcut to fall back on: the sample's features are zero."""
    rates = zoo.create_model("care_s0", drop_path_rate=0.1).drop_path_rates()
    np.testing.assert_allclose(rates, np.linspace(0, 0.1, 18), rtol=1e-12)
    spared = zoo.create_model("care_s0", drop_path_rate=0.1, drop_path_last=False).drop_path_rates()
    assert spared == [*rates[:-1], 0.0]

    @functools.partial(jit, static_argnums=0)
    def features(model, variables, images):
        run = functools.partial(model.apply, train=True, method="forward_features", mutable=["batch_stats"])
        return run(variables, images, rngs={"dropout": jax.random.key(0)})[0]

    images = normal(64, 4, 4, 3)
    dropped = features(tiny(drop_path_rate=0.5), init(tiny()), images)
    kept = features(tiny(drop_path_rate=0.5, drop_path_last=False), init(tiny()), images)
    zero = ~np.asarray(dropped).any((1, 2, 3))
    assert 16 < zero.sum() < 48 and np.asarray(kept).any((1, 2, 3)).all()
    np.testing.assert_allclose(dropped[~zero], 2 * kept[~zero], rtol=1e-4, atol=1e-5)


def test_rematerialization_keeps_the_tree_and_recomputes():
    def gradient(remat):
        model = tiny(remat=remat)

        def loss(params):
            run = functools.partial(model.apply, train=True, mutable=["batch_stats"])
            return run({**init(tiny()), "params": params}, normal(2, 4, 4, 3))[0][0].sum()

        return str(jax.make_jaxpr(jax.grad(loss))(init(tiny())["params"]))

    assert "remat" in gradient("full") and "remat" not in gradient("none")


def test_bfloat16_is_near_float32():
    variables, images = init(tiny()), normal(4, 8, 8, 3)
    expected = jit(tiny().apply)(variables, images)
    logits = jit(tiny(dtype=jnp.bfloat16).apply)(variables, images)
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits.astype(jnp.float32), expected, atol=0.05 * float(abs(expected).max()))


def test_attention_maps():
    """Where a query looks, as the module that runs has it: the weights of the linear attention."""
    module = Attention(head_dim=2)
    x = normal(2, 3, 4, 4)
    variables = module.init(jax.random.key(3), x)
    assert set(variables) == {"params"}
    out, sown = module.apply(variables, x, mutable=["attention"])
    (found,) = sown["attention"]["map"]
    np.testing.assert_array_equal(out, module.apply(variables, x))
    qk = (x @ variables["params"]["qk"]["kernel"] + variables["params"]["qk"]["bias"]).reshape(2, 12, 2, 2, 2)
    query, key, value = qk[:, :, 0], qk[:, :, 1], x.reshape(2, 12, 2, 2)
    expected, weights = linear_attention(query, key, value, return_weights=True)
    np.testing.assert_allclose(out.reshape(expected.shape), expected, atol=1e-6)
    np.testing.assert_allclose(found.query, FEATURE_MAPS["elu1"](query), atol=1e-6)
    np.testing.assert_allclose(found.heat((1, 2)), weights[:, :, 6].mean(1).reshape(2, 3, 4), atol=1e-5)
    np.testing.assert_allclose(found.received(), weights.mean((1, 2)).reshape(2, 3, 4), atol=1e-5)
    maps = zoo.attention_maps(tiny(), init(tiny()), normal(1, 8, 8, 3))
    assert [(path, found.shape) for path, found in maps.items()] == [("stages_1_0/attention", (4, 4))]


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A model's weights under the official names, with the counters that torch adds."""
    model = tiny()
    path = tmp_path_factory.mktemp("care") / "official.safetensors"
    zoo.save_pretrained(model, init(model), path)
    weights = load_file(path)
    counters = {key.replace("running_mean", "num_batches_tracked") for key in weights if key.endswith("running_mean")}
    return weights | {key: np.asarray(7, np.int64) for key in counters}


@pytest.mark.parametrize("wrap", ["bare", "state_dict", "model", "file"])
def test_published_files_in_every_wrapping(official, wrap, tmp_path):
    source = {
        "bare": official,
        "state_dict": {"state_dict": official, "epoch": 299, "arch": "CARETrans_S0"},
        "model": {"model": official},
        "file": tmp_path / "weights.safetensors",
    }[wrap]
    if wrap == "file":
        save_file(official, source)
    fields = {key: value for key, value in TINY.items() if key != "num_classes"}
    model, variables, report = zoo.load_pretrained("care_nano", source, distilled=True, **fields)
    assert model == tiny() and report.naming == "official"
    chex.assert_trees_all_equal(variables, init(tiny()))
    assert report.unwrapped == (() if wrap in ("bare", "file") else (wrap,))


def test_one_head_and_new_classes_from_a_published_file(official):
    fields = {key: value for key, value in TINY.items() if key != "num_classes"}
    load = functools.partial(zoo.load_pretrained, "care_nano", official, **fields)
    model, variables, report = load(distilled=False)
    assert not any("dist" in path for path in flatten(variables))
    assert "distilled=False leaves out" in str(report.ignored)
    chex.assert_trees_all_equal(variables["params"]["head"], init(tiny())["params"]["head"])
    _, variables, report = load(distilled=True, num_classes=5)
    assert set(report.replaced) == {
        f"params/{head}/{leaf}" for head in ("head", "dist_head") for leaf in ("kernel", "bias")
    }
    assert variables["params"]["dist_head"]["kernel"].shape == (96, 5)
    _, variables, _ = load(distilled=True, features_only=True)
    assert not any("head" in path.split("/")[1] for path in flatten(variables))
    single = {key: value for key, value in official.items() if not key.startswith("dist_head")}
    with pytest.raises(WeightsError, match="dist_head.fc.weight"):
        zoo.load_pretrained("care_nano", single, distilled=True, **fields)


def test_layers_count_blocks():
    layer_of, last = registry.family_of("care_s0").layers(zoo.create_model("care_s0"))
    expected = {
        "stem/conv/kernel": 0,
        "stages_0_0/gamma": 1,
        "downsamples_0/norm/bias": 3,
        "stages_1_0/gamma": 3,
        "stages_3_3/inter2/norm/scale": 18,
        "head_norm/scale": 19,
        "dist_head/kernel": 19,
    }
    assert {path: layer_of(path) for path in expected} == expected and last == 19


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (dict(depths=(1,)), "as long as one another, got 1, 2, 2, 2"),
        (dict(head_dims=(None, 3)), "head_dims must divide memory_dims or be None, got 3 for 8"),
    ],
)
def test_errors(overrides, words):
    with pytest.raises(ValueError, match=words):
        init(tiny(**overrides))
