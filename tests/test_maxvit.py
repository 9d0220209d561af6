"""MaxViT's variants and fields, and the parts of a block against plain numpy."""

import functools

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import zoo
from tests.reference.weights import pseudo_normal
from zoo import registry
from zoo.layers import Conv, DepthwiseConv, SqueezeExcite
from zoo.mbconv import MBConv, average_pool
from zoo.preprocess import published_transform
from zoo.watch import attention_maps

# As timm counts them; at 384 and 512 pixels with tables for windows of 12 x 12 and 16 x 16 tokens.
PARAMETERS = {
    "maxvit_tiny_tf_224": 30_916_528,
    "maxvit_tiny_tf_384": 30_977_008,
    "maxvit_tiny_tf_512": 31_049_584,
    "maxvit_small_tf_224": 68_927_956,
    "maxvit_small_tf_384": 69_018_676,
    "maxvit_small_tf_512": 69_127_540,
    "maxvit_base_tf_224": 119_467_708,
    "maxvit_base_tf_384": 119_653_468,
    "maxvit_base_tf_512": 119_876_380,
    "maxvit_large_tf_224": 211_785_560,
    "maxvit_large_tf_384": 212_033_240,
    "maxvit_large_tf_512": 212_330_456,
    "maxvit_xlarge_tf_224": 474_951_952,
    "maxvit_xlarge_tf_384": 475_323_472,
    "maxvit_xlarge_tf_512": 475_769_296,
    "maxvit_pico_rw_256": 7_457_996,
    "maxvit_nano_rw_256": 15_451_148,
    "maxvit_tiny_rw_224": 29_057_312,
    "maxvit_tiny_rw_256": 29_066_720,
    "maxvit_rmlp_pico_rw_256": 7_515_980,
    "maxvit_rmlp_nano_rw_256": 15_501_452,
    "maxvit_rmlp_tiny_rw_256": 29_148_896,
    "maxvit_rmlp_small_rw_224": 64_895_044,
    "maxvit_rmlp_small_rw_256": 64_895_044,
    "maxvit_rmlp_base_rw_224": 116_135_788,
    "maxvit_rmlp_base_rw_384": 116_135_788,
    "maxvit_nano": 191_560,
}
WITH_21K_CLASSES = {"base": 135_495_975, "large": 233_149_635, "xlarge": 506_987_643}
TINY = dict(depths=(1, 1), dims=(8, 16), head_dim=4, stem_dims=(8, 8), num_classes=3)


def tiny(**overrides):
    return zoo.create_model("maxvit_nano", **{**TINY, **overrides})


def values(name, *shape):
    return pseudo_normal(name, shape).astype(np.float32)


def shapes_of(model, *size):
    """The variables' shapes, by tracing alone."""
    size = size or model.input_size()
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size, model.in_chans)))


@functools.cache
def variables_of(model):
    """Variables of order 1, none of them what a norm or a bias starts from; compiling `init` takes much longer."""

    def draw(path, leaf):
        values = np.random.default_rng(list(jax.tree_util.keystr(path).encode())).normal(size=leaf.shape)
        return jnp.asarray(1 + 0.1 * values if leaf.ndim == 1 else values / leaf.shape[-2] ** 0.5, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes_of(model))


def count(model):
    return {kind: sum(leaf.size for leaf in jax.tree.leaves(tree)) for kind, tree in shapes_of(model).items()}


# Tracing the deep ones takes seconds each.
QUICK = (
    *("maxvit_tiny_tf_224", "maxvit_tiny_tf_512", "maxvit_small_tf_224", "maxvit_nano"),
    *("maxvit_nano_rw_256", "maxvit_rmlp_pico_rw_256", "maxvit_rmlp_small_rw_224"),
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in PARAMETERS])
def test_parameter_counts(name):
    assert count(zoo.create_model(name))["params"] == PARAMETERS[name]


def test_every_variant_is_counted():
    assert sorted(PARAMETERS) == zoo.list_models("maxvit*")


def test_count_of_statistics():
    # timm's 47,650 less the 34 counters of its norms.
    assert count(zoo.create_model("maxvit_tiny_tf_224"))["batch_stats"] == 47_650 - 34


@pytest.mark.slow
@pytest.mark.parametrize("size", WITH_21K_CLASSES)
def test_parameters_with_21843_classes(size):
    assert count(zoo.create_model(f"maxvit_{size}_tf_224.in21k"))["params"] == WITH_21K_CLASSES[size]


def test_published_weights():
    """Each tag's size, classes, mean, deviation and crop, as timm has them."""
    official = zoo.list_models("maxvit_*_tf_*", pretrained=True)
    assert len(official) == 21
    imagenet, half = (registry.IMAGENET_MEAN, registry.IMAGENET_STD), ((0.5,) * 3, (0.5,) * 3)
    for tag in official:
        cfg, at_224 = zoo.pretrained_cfg(tag), "_tf_224." in tag
        assert (cfg.mean, cfg.std) == (imagenet if at_224 and tag.endswith(".in1k") else half)
        assert (cfg.crop_pct, cfg.crop_mode) == ((0.95, "center") if at_224 else (1.0, "squash"))
        assert cfg.num_classes == (21843 if tag.endswith(".in21k") else 1000)
    own = {
        "maxvit_nano_rw_256.sw_in1k": (1000, 0.95),
        "maxvit_tiny_rw_224.sw_in1k": (1000, 0.95),
        "maxvit_rmlp_pico_rw_256.sw_in1k": (1000, 0.95),
        "maxvit_rmlp_nano_rw_256.sw_in1k": (1000, 0.95),
        "maxvit_rmlp_tiny_rw_256.sw_in1k": (1000, 0.95),
        "maxvit_rmlp_small_rw_224.sw_in1k": (1000, 0.9),
        "maxvit_rmlp_base_rw_224.sw_in12k": (11821, 0.95),
        "maxvit_rmlp_base_rw_224.sw_in12k_ft_in1k": (1000, 0.95),
        "maxvit_rmlp_base_rw_384.sw_in12k_ft_in1k": (1000, 1.0),
    }
    assert sorted([*official, *own]) == zoo.list_models("maxvit*", pretrained=True)
    for tag, expected in own.items():
        cfg = zoo.pretrained_cfg(tag)
        assert (cfg.num_classes, cfg.crop_pct) == expected and (cfg.mean, cfg.std) == half
        assert cfg.crop_mode == ("squash" if "384" in tag else "center")
    for tag in (*official, *own):
        cfg = zoo.pretrained_cfg(tag)
        assert cfg.image_size == zoo.create_model(tag).image_size
        assert (cfg.interpolation, cfg.hub_id, cfg.naming) == ("bicubic", f"timm/{tag}", "timm")


def test_the_crop_mode_of_the_weights_is_used():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 90, 3), np.uint8)
    squashed = published_transform(zoo.pretrained_cfg("maxvit_tiny_tf_384.in1k"), 32)
    centred = published_transform(zoo.pretrained_cfg("maxvit_tiny_tf_224.in1k"), 32)
    assert (squashed.crop_mode, centred.crop_mode) == ("squash", "center")
    expected = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(squashed.pixels(pixels), np.asarray(expected))
    assert not np.array_equal(centred.pixels(pixels), np.asarray(expected))


@pytest.mark.parametrize(
    "fields, window, multiple",
    [
        (dict(), (7, 7), (224, 224)),
        (dict(image_size=None), (7, 7), (224, 224)),
        (dict(image_size=384), (12, 12), (384, 384)),
        (dict(image_size=(224, 448)), (7, 14), (224, 448)),
        (dict(image_size=448, window=7), (7, 7), (224, 224)),
        (dict(image_size=(224, 448), window=7), (7, 7), (224, 224)),
        (dict(image_size=(448, 672), window=(7, 3)), (7, 3), (224, 96)),
    ],
    ids=str,
)
def test_windows_follow_the_image_size(fields, window, multiple):
    model = zoo.create_model("maxvit_tiny_tf_224", **fields)
    assert (model.window_size, model.size_multiple) == (window, multiple)
    assert model.feature_info == ((64, 4), (128, 8), (256, 16), (512, 32))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: zoo.create_model("maxvit_tiny_tf_224", image_size=(225, 250)),
            r"image_size=\(225, 250\): .* multiples of 32, .* the nearest that fits is 224x256",
        ),
        (
            lambda: zoo.create_model("maxvit_tiny_tf_224", image_size=9),
            "image_size=9: .* the nearest that fits is 32x32",
        ),
        (
            lambda: zoo.create_model("maxvit_tiny_tf_224", image_size=256, window=7),
            "got 256x256, the nearest that fits is 224x224",
        ),
        (lambda: shapes_of(tiny(), 8, 13), "got 8x13, the nearest that fits is 8x16"),
        (lambda: shapes_of(tiny(strides=(2,)), 8, 8), "as long as one another, got 2, 2 and 1"),
        (lambda: shapes_of(tiny(head_dim=5), 8, 8), r"dims must be multiples of head_dim=5, got \(8, 16\)"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_stochastic_depth_schedules():
    """Official: `rate * b / L`, which the last block does not reach; timm: linspace."""
    model = zoo.create_model("maxvit_tiny_tf_224", drop_path_rate=0.2)
    np.testing.assert_allclose(model.drop_path_rates(), 0.2 * np.arange(11) / 11, rtol=1e-12)
    model = zoo.create_model("maxvit_tiny_tf_224", drop_path_rate=0.2, drop_path_schedule="timm")
    np.testing.assert_allclose(model.drop_path_rates(), np.linspace(0, 0.2, 11), rtol=1e-12)


def test_every_branch_is_dropped():
    """At a rate of (almost) 1 in training a block passes on its shortcut: nothing but pooling and projection."""
    model = tiny(drop_path_rate=2 * (1 - 1e-9))
    variables = variables_of(model)
    x = jnp.asarray(values("images", 2, 8, 8, 3))

    @jax.jit
    def run(variables, x):
        how = dict(train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})
        return model.apply(variables, x, method="forward_intermediates", **how)[0]

    _, first, second = run(variables, x)
    shortcut = variables["params"]["stages_1_0"]["mbconv"]["shortcut"]
    expected = np.asarray(first).reshape(2, 4, 2, 4, 2, 8).mean((2, 4)) @ shortcut["kernel"] + shortcut["bias"]
    np.testing.assert_allclose(second, expected, rtol=1e-5, atol=1e-6)


def test_heads_and_features():
    x = jnp.asarray(values("images", 2, 8, 16, 3))
    model = tiny()
    variables = variables_of(model)

    @jax.jit
    def run(variables, x):
        features = model.apply(variables, x, method="forward_features")
        head = functools.partial(model.apply, variables, features, method="forward_head")
        return model.apply(variables, x), features, head(), head(pre_logits=True)

    logits, features, from_features, hidden = run(variables, x)
    assert features.shape == (2, 4, 8, 16)
    np.testing.assert_allclose(from_features, logits, rtol=1e-5, atol=1e-7)
    headless = {kind: {k: v for k, v in tree.items() if k != "head"} for kind, tree in variables.items()}
    pooled = jax.jit(tiny(num_classes=0).apply)(headless, x)
    np.testing.assert_allclose(pooled, hidden, rtol=1e-5, atol=1e-7)
    assert "head_norm" not in shapes_of(tiny(features_only=True))["params"]


def test_attention_maps():
    model = tiny()
    maps = attention_maps(model, variables_of(model), jnp.asarray(values("images", 2, 16, 8, 3)))
    assert list(maps) == [f"stages_{i}_0/{kind}/attention" for i in range(2) for kind in ("block", "grid")]
    found = maps["stages_0_0/grid/attention"]
    assert (found.partition, found.window, found.shape) == ("grid", (4, 4), (16, 8))
    assert found.weights.shape == (2, 8, 2, 16, 16)
    assert found.reach((5, 3))[0].sum() == 16 and found.reach((5, 3))[0, 1::4, 1::2].all()
    assert maps["stages_0_0/block/attention"].reach((5, 3))[0, 4:8, :4].all()


def test_layers_for_layer_wise_learning_rates():
    model = zoo.create_model("maxvit_tiny_tf_224")
    layer_of, last = registry.family_of("maxvit_tiny_tf_224").layers(model)
    assert last == 12
    found = [
        layer_of(path) for path in ("stem/conv2/bias", "stages_0_1/mbconv/se/fc1/bias", "stages_2_4/x", "head/bias")
    ]
    assert found == [0, 2, 9, 12]


ONE_STAGE = dict(depths=(1,), dims=(8,), strides=(2,), stem_dims=(4, 4), image_size=4)


@pytest.mark.slow
def test_rematerialization_changes_nothing():
    x = jnp.asarray(values("images", 2, 4, 4, 3))

    def gradient(remat):
        model = tiny(remat=remat, **ONE_STAGE)

        def loss(variables):
            logits, updated = model.apply(variables, x, train=True, mutable=["batch_stats"])
            return (logits**2).sum(), updated

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables_of(tiny(**ONE_STAGE)))

    for expected, found in zip(jax.tree.leaves(gradient("none")), jax.tree.leaves(gradient("full")), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_computes_and_float32_stores():
    model = tiny(dtype=jnp.bfloat16, **ONE_STAGE)
    variables = variables_of(model)
    x = jnp.asarray(values("images", 4, 4, 4, 3))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits = jax.jit(model.apply)(variables, x)
    assert logits.dtype == jnp.bfloat16
    expected = jax.jit(tiny(**ONE_STAGE).apply)(variables, x)
    np.testing.assert_allclose(logits.astype(jnp.float32), expected, atol=0.1)


@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
@pytest.mark.parametrize("size", [(8, 6), (7, 5)], ids=str)
def test_same_padding_with_stride_2_puts_the_odd_zero_at_the_bottom_and_right(size, depthwise):
    """Even sides get one zero after them and none before, as TensorFlow has it; odd ones get one on each side."""
    height, width = size
    x = jnp.asarray(values("image", 1, height, width, 4))
    layer = DepthwiseConv(3, 2, "SAME", use_bias=False) if depthwise else Conv(5, 3, 2, "SAME", use_bias=False)
    kernel = values("kernel", 3, 3, 1 if depthwise else 4, 4 if depthwise else 5)
    found = layer.apply({"params": {"kernel": kernel}}, x)
    padded = np.pad(x, ((0, 0), *((side % 2, 1) for side in size), (0, 0)))
    expected = np.zeros(found.shape)
    for row in range((height + 1) // 2):
        for column in range((width + 1) // 2):
            patch = padded[0, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            taps = (
                np.einsum("ijc,ijc->c", patch, kernel[:, :, 0]) if depthwise else np.einsum("ijc,ijco", patch, kernel)
            )
            expected[0, row, column] = taps
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_squeeze_and_excitation():
    x = values("image", 2, 3, 5, 8)
    weights = {"fc1": (values("a", 8, 2), values("b", 2)), "fc2": (values("c", 2, 8), values("d", 8))}
    params = {name: dict(kernel=kernel, bias=bias) for name, (kernel, bias) in weights.items()}
    found = SqueezeExcite(2).apply({"params": params}, jnp.asarray(x))
    for image, gated in zip(x.astype(np.float64), found):
        squeezed = image.mean((0, 1)) @ weights["fc1"][0] + weights["fc1"][1]
        gate = squeezed / (1 + np.exp(-squeezed)) @ weights["fc2"][0] + weights["fc2"][1]
        np.testing.assert_allclose(gated, image / (1 + np.exp(-gate)), rtol=1e-5, atol=1e-6)


def test_average_pool():
    x = values("image", 2, 4, 6, 3)
    found = average_pool(jnp.asarray(x))
    assert found.shape == (2, 2, 3, 3)
    np.testing.assert_allclose(found[1, 1, 2], x[1, 2:4, 4:6].mean((0, 1)), rtol=1e-6, atol=1e-7)


def test_training_of_the_computed_bias_wants_randomness():
    """It has dropout, in training only."""
    how = dict(design="timm", relative_bias="mlp", layer_scale=1e-6, hidden_head=False, **ONE_STAGE)
    model = tiny(**how)
    variables, x = shapes_of(model), jnp.zeros((2, 4, 4, 3))
    train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        jax.eval_shape(train, variables, x)
    logits, _ = jax.eval_shape(functools.partial(train, rngs={"dropout": jax.random.key(0)}), variables, x)
    assert logits.shape == jax.eval_shape(model.apply, variables, x).shape == (2, 3)
    assert not any("bias" in variables["params"]["stem"][name] for name in ("conv1", "conv2"))


@pytest.mark.parametrize("strides", [1, 2])
def test_the_shortcut_is_projected_only_where_the_width_changes(strides):
    for channels, projected in ((8, False), (4, True)):
        init = functools.partial(MBConv(8, strides).init, train=False)
        shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 4, 4, channels)))
        assert ("shortcut" in shapes["params"]) == projected
        assert shapes["params"]["se"]["fc1"]["kernel"].shape == (32, 2)
        assert shapes["params"]["expand"]["kernel"].shape == (channels, 32)
