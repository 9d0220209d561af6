"""ViT's own: parameter counts, sizes, changed attention, chosen tokens, maps, published files, layers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import zoo
from tests.variables import filled
from zoo import pictures, registry
from zoo.errors import WeightsError
from zoo.keymap import flatten
from zoo.position_embedding import resize_positions
from zoo.pretrained import abstract_variables
from zoo.vit_blocks import Block
from zoo.watch import DenseMap

PARAMETERS = {
    "vit_tiny_patch16_224": 5_717_416,
    "vit_tiny_patch16_384": 5_790_376,
    "vit_small_patch16_224": 22_050_664,
    "vit_small_patch16_384": 22_196_584,
    "vit_base_patch16_224": 86_567_656,
    "vit_base_patch16_384": 86_859_496,
    "vit_base_patch32_224": 88_224_232,
    "vit_base_patch32_384": 88_297_192,
    "vit_large_patch16_224": 304_326_632,
    "vit_large_patch16_384": 304_715_752,
    "deit_tiny_patch16_224": 5_717_416,
    "deit_tiny_distilled_patch16_224": 5_910_800,
    "deit_small_patch16_224": 22_050_664,
    "deit_small_distilled_patch16_224": 22_436_432,
    "deit_base_patch16_224": 86_567_656,
    "deit_base_distilled_patch16_224": 87_338_192,
    "deit_base_patch16_384": 86_859_496,
    "deit_base_distilled_patch16_384": 87_630_032,
    "deit3_small_patch16_224": 22_059_496,
    "deit3_small_patch16_384": 22_205_416,
    "deit3_medium_patch16_224": 38_849_512,
    "deit3_base_patch16_224": 86_585_320,
    "deit3_base_patch16_384": 86_877_160,
    "deit3_large_patch16_224": 304_374_760,
    "deit3_large_patch16_384": 304_763_880,
    "deit3_huge_patch14_224": 632_126_440,
    "vit_nano": 202_698,
}
TINY = dict(depths=(2, 1), dim=12, num_heads=3, num_classes=3)


def tiny(**overrides):
    return zoo.create_model("vit_nano", **{**TINY, **overrides})


def normal(*shape: int, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


LAWS = {"kernel": (0, 0.4), "scale": (1, 0.2), "layer_scale1": (1, 0.2), "layer_scale2": (1, 0.2)}


@functools.cache
def init(model):
    return filled(abstract_variables(model), LAWS, 0.3)


# Compiles in half the time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


# Of models that differ in size alone, one.
QUICK = ("vit_base_patch16_224", "deit_tiny_patch16_224", "deit_small_patch16_224", "vit_base_patch32_384", "vit_nano")
QUICK += ("deit_tiny_distilled_patch16_224", "deit3_small_patch16_224")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PARAMETERS]
)
def test_parameter_counts(name):
    model = zoo.create_model(name)
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_variables(model))) == PARAMETERS[name]
    d, rows, heads = model.dim, model.grid[0] * model.grid[1], 1 + model.distilled
    block = 12 * d**2 + 13 * d + 2 * d * (model.layer_scale is not None)
    stem = 3 * model.patch**2 * d + d + heads * d + (rows + heads * model.embed_class) * d
    head = heads * model.num_classes * (d + 1)
    assert sum(model.depths) * block + stem + 2 * d + head == PARAMETERS[name]


def test_every_variant_is_counted():
    assert sorted(PARAMETERS) == sorted([*zoo.list_models("vit*"), *zoo.list_models("deit*")])


def test_without_a_classifier():
    variables = abstract_variables(zoo.create_model("vit_base_patch16_224", num_classes=0))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 85_798_656
    assert "head" not in variables["params"]


def test_tags_and_their_settings():
    cfg = zoo.pretrained_cfg("vit_base_patch16_224.augreg_in21k")
    assert (cfg.num_classes, cfg.crop_pct, cfg.mean, cfg.std) == (21843, 0.9, (0.5,) * 3, (0.5,) * 3)
    cfg = zoo.pretrained_cfg("deit_small_distilled_patch16_224")
    assert (cfg.hub_id, cfg.mean) == ("timm/deit_small_distilled_patch16_224.fb_in1k", registry.IMAGENET_MEAN)
    cfg = zoo.pretrained_cfg("vit_base_patch16_384.orig_in21k_ft_in1k")
    assert (cfg.image_size, cfg.crop_pct, cfg.crop_mode, cfg.interpolation) == (384, 1.0, "center", "bicubic")
    assert zoo.pretrained_cfg("deit3_small_patch16_224.fb_in22k_ft_in1k").crop_pct == 1.0
    assert zoo.pretrained_cfg("vit_large_patch16_224.mae").license == "cc-by-nc-4.0"
    assert len(zoo.list_models("vit*", pretrained=True)) == 33
    assert len(zoo.list_models("deit*", pretrained=True)) == 24


def test_features_and_the_head():
    model = tiny(image_size=(4, 6))
    variables = init(model)
    assert model.grid == (2, 3) and model.feature_info == ((12, 2), (12, 2))

    @jit
    def run(variables, x):
        call = functools.partial(model.apply, variables)
        tokens = call(x, method="forward_tokens")
        maps = zoo.forward_intermediates(model, variables, x, include_stem=True)
        return tokens, maps, call(x), call(tokens[-1], pre_logits=True, method="forward_head")

    x = normal(2, 4, 6, 3)
    tokens, maps, logits, pooled = run(variables, x)
    assert [t.shape for t in tokens] == [(2, 7, 12)] * 3
    for sequence, found in zip(tokens, maps, strict=True):
        np.testing.assert_allclose(found, sequence[:, 1:].reshape(2, 2, 3, 12), rtol=1e-6)
    params = variables["params"]
    np.testing.assert_allclose(logits, pooled @ params["head"]["kernel"] + params["head"]["bias"], rtol=1e-5, atol=1e-6)
    bare = tiny(image_size=(4, 6), features_only=True)
    stages = {name: leaf for name, leaf in params.items() if not name.startswith("head")}
    assert abstract_variables(bare)["params"].keys() == stages.keys()
    chex.assert_trees_all_close(list(jit(bare.apply)({"params": stages}, x)), maps[1:], rtol=1e-5, atol=1e-5)


def joined(query, key, value, return_weights, order):
    """Plainly written: one softmax over the keys of an image and of the one that `order` puts in its place."""
    key, value = (jnp.concatenate([part, part[order]], axis=1) for part in (key, value))
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    weights = jnp.exp(logits) / jnp.exp(logits).sum(-1, keepdims=True)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
    return (out, weights) if return_weights else out


@pytest.mark.parametrize("remat", ["none", "full"])
def test_changed_attention(remat):
    """Of some blocks; a partner that is the image itself changes nothing, another does, and has a gradient."""
    plain, model = tiny(), tiny(remat=remat)
    variables, x = init(model), normal(2, 8, 8, 3)

    @functools.partial(jax.jit, static_argnums=3)
    def logits(variables, x, order, model=model):
        attend = functools.partial(joined, order=order)
        tokens = model.apply(variables, x, attend={1: attend, 2: attend}, method="forward_tokens")
        return model.apply(variables, tokens[-1], method="forward_head")

    expected = jit(plain.apply)(variables, x)
    np.testing.assert_allclose(logits(variables, x, jnp.arange(2)), expected, rtol=1e-4, atol=1e-5)
    swapped = logits(variables, x, jnp.array([1, 0]))
    assert abs(swapped - expected).max() > 0.01
    gradient = jax.grad(lambda x: logits(variables, x, jnp.array([1, 0]))[0].sum())(x)
    assert abs(gradient[1]).max() > 1e-3
    chex.assert_trees_all_close(logits(variables, x, jnp.array([1, 0]), plain), swapped, rtol=1e-4, atol=1e-5)


def test_weights_of_every_block():
    """Rows sum to 1, those of a changed attention too; asking for them does not change the tokens."""
    model = tiny(remat="dots")
    variables, x = init(model), normal(2, 8, 8, 3)
    swap = functools.partial(joined, order=jnp.array([1, 0]))

    @jit
    def run(variables, x):
        call = functools.partial(model.apply, variables, x, attend={1: swap}, method="forward_tokens")
        return call(return_weights=True), call()

    (tokens, weights), without = run(variables, x)
    assert [found.shape for found in weights] == [(2, 3, 17, 17), (2, 3, 17, 34), (2, 3, 17, 17)]
    for found in weights:
        np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    chex.assert_trees_all_close(tokens, without, rtol=1e-5, atol=1e-5)


def test_only_some_tokens_attend():
    """They come out as from the whole block; the others give keys and values alone."""
    block = Block(3, (2, 3), qkv_bias=False, layer_scale=1.0)
    x, rows = normal(2, 7, 12), jnp.array([[0, 5, 2], [0, 1, 6]])
    abstract = jax.eval_shape(functools.partial(block.init, train=False), jax.random.key(0), x)
    variables = filled(abstract, LAWS, 0.3)
    assert "bias" not in variables["params"]["attention"]["qkv"]

    @jit
    def run(variables, x):
        everything = block.apply(variables, x, False, return_weights=True)
        return everything, block.apply(variables, x, False, return_weights=True, rows=rows)

    whole, chosen = run(variables, x)
    for found, expected, axis in ((chosen[0], whole[0], 0), (chosen[1], whole[1], 1)):
        for i in range(2):
            np.testing.assert_allclose(found[i], jnp.take(expected[i], rows[i], axis=axis), rtol=1e-5, atol=1e-6)
    weighted = jit(jax.grad(lambda x: block.apply(variables, x, False, rows=rows)[0].sum()))(x)
    assert abs(weighted[0, 3]).max() > 1e-4 and not weighted[1].any()


def test_stochastic_depth():
    rates = zoo.create_model("vit_tiny_patch16_224", drop_path_rate=0.1).drop_path_rates()
    np.testing.assert_allclose(rates, np.linspace(0, 0.1, 12), rtol=1e-12)
    block = Block(3, (2, 3), drop_path=0.5)
    x = normal(64, 7, 12)
    abstract = jax.eval_shape(functools.partial(block.init, train=False), jax.random.key(0), x)
    variables = filled(abstract, LAWS, 0.3)
    out = jit(lambda key: block.apply(variables, x, True, rngs={"dropout": key}))(jax.random.key(0))
    # Both branches of a quarter of the samples are dropped.
    untouched = np.asarray((out == x).all((1, 2)))
    assert 6 <= untouched.sum() <= 26


def test_bfloat16_is_near_float32():
    variables, x = init(tiny()), normal(4, 8, 8, 3)
    expected = jit(tiny().apply)(variables, x)
    logits = jit(tiny(dtype=jnp.bfloat16).apply)(variables, x)
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits.astype(jnp.float32), expected, atol=0.05 * float(abs(expected).max()))


def test_attention_maps():
    """Of every block those that the block itself gives; the class token lies nowhere on the map."""
    model = tiny(distilled=True)
    variables, x = init(model), normal(1, 8, 8, 3)
    maps = jax.device_get(zoo.attention_maps(model, variables, x))
    assert list(maps) == [f"stages_{place}/attention" for place in ("0_0", "0_1", "1_0")]
    _, weights = jit(functools.partial(model.apply, method="forward_tokens", return_weights=True))(variables, x)
    for found, expected in zip(maps.values(), weights, strict=True):
        assert isinstance(found, DenseMap) and (found.shape, found.prefix, found.heads) == ((4, 4), 2, 3)
        np.testing.assert_allclose(found.weights, expected, rtol=1e-5, atol=1e-6)
        expected = np.asarray(expected).mean(1)
        heat = np.stack([found.heat(token) for token in np.ndindex(4, 4)])
        np.testing.assert_allclose(heat[:, 0].reshape(16, 16), expected[0, 2:, 2:], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.received(), heat.mean(0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found.of_prefix(1)[0].reshape(16), expected[0, 1, 2:], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="number must be from 0 and below 2"):
        found.of_prefix(2)
    subject = pictures.Subject(np.zeros((8, 8, 3), np.uint8), "digit", [("one", 0.5)])
    assert pictures.attention_page([subject], maps, title="vit_nano").width == 1600


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Weights of a model with layer scale under the names of timm and of the official code."""
    model, folder = tiny(layer_scale=1e-6, embed_class=False), tmp_path_factory.mktemp("vit")
    found = {}
    for naming in ("timm", "official"):
        zoo.save_pretrained(model, init(model), folder / f"{naming}.safetensors", naming=naming)
        found[naming] = load_file(folder / f"{naming}.safetensors")
    return found


@pytest.mark.parametrize("naming", ["timm", "official"])
def test_published_files(official, naming):
    """Bare, or under "model" as DeiT's; its layer scale is called gamma_1, timm's ls1.gamma."""
    weights = official[naming]
    assert ("blocks.2.gamma_1" if naming == "official" else "blocks.2.ls1.gamma") in weights
    fields = {**TINY, "layer_scale": 1e-6, "embed_class": False}
    expected = init(tiny(layer_scale=1e-6, embed_class=False))
    for source in (weights, {"model": weights}):
        _, variables, report = zoo.load_pretrained("vit_nano", source, **fields)
        assert report.naming == naming
        chex.assert_trees_all_equal(variables, expected)
    _, _, report = zoo.load_pretrained("vit_nano", weights, **{**fields, "num_classes": 5})
    assert set(report.replaced) == {"params/head/kernel", "params/head/bias"}
    _, _, report = zoo.load_pretrained(
        "vit_nano", weights | {"pre_logits.fc.bias": np.ones(12, np.float32)}, in_chans=1, **fields
    )
    assert report.adapted == {"params/stem/conv/kernel": "3 -> 1 channels"}
    assert list(report.ignored.values()) == [("pre_logits.fc.bias",)]
    with pytest.raises(WeightsError, match="blocks.3.norm1"):
        zoo.load_pretrained("vit_nano", weights | {"blocks.3.norm1.weight": np.ones(12, np.float32)}, **fields)


def test_positions_that_do_not_fit(tmp_path):
    """A class token where there should be none; a grid that passes for a square one; a method for tables."""
    model = tiny()
    zoo.save_pretrained(model, init(model), tmp_path / "saved.safetensors")
    load = functools.partial(zoo.load_pretrained, "vit_nano", tmp_path / "saved.safetensors", **TINY)
    with pytest.raises(WeightsError, match=r"only 0 and a square number of positions .* not \(17, 12\)"):
        load(embed_class=False)
    with pytest.raises(WeightsError, match="by 'bicubic' or 'bilinear', not by 'geometric'"):
        load(image_size=16, resize="geometric")
    with pytest.raises(ValueError, match="2 x 8 position embeddings have the shape of 4 x 4"):
        load(image_size=(4, 16))
    report = load(image_size=16, resize="bilinear")[2]
    assert list(report.resized.values()) == ["(17, 12) -> (65, 12), bilinear"]
    with pytest.raises(ValueError, match=r"of 8 channels can be resized, not \(16, 4\)"):
        resize_positions(np.ones((16, 4)), (25, 8), "bicubic", grid=(5, 5), prefix=0)


def test_layers_count_blocks():
    layer_of, last = registry.family_of("vit_nano").layers(tiny())
    paths = ("stem/pos_embed", "stem/cls_token", "stages_0_1/norm1/scale", "stages_1_0/mlp/fc1/bias", "head_norm/bias")
    assert [layer_of(path) for path in paths] == [0, 0, 2, 3, 4] and last == 4
    assert flatten(init(tiny())).keys() >= {f"params/{path}" for path in paths}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tiny(num_heads=5), "num_heads must divide dim, got 5 and 12"),
        (lambda: tiny(image_size=9), "got 9x9, the nearest that fits is 8x8"),
        (
            lambda: jax.eval_shape(tiny().apply, init(tiny()), normal(1, 8, 12, 3)),
            r"takes 8x8 pixels, got 8x12; image_size=\(8, 12\)",
        ),
        (lambda: jax.eval_shape(tiny().apply, init(tiny()), normal(1, 8, 8, 1)), "images must be .*, 3"),
        (
            lambda: tiny().apply(init(tiny()), normal(1, 8, 8, 3), attend={3: joined}, method="forward_tokens"),
            "attend: there is no block 3, they are numbered from 0 to 2",
        ),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()
