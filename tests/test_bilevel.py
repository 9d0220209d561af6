"""Bi-level routing attention against full attention with a mask, and what the router promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import zoo
from kernels import bilevel_attention, region_descriptors, route_regions
from kernels.bilevel import pooled_region

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def choices(batch: int, regions: int, k: int):
    """Any k different regions for every region."""
    return jnp.asarray(np.argsort(RNG.random((batch, regions, regions)))[..., :k], jnp.int32)


def masked(qkv, indices, region, num_heads, scale, route_weights=None):
    """Full attention over the whole map in which a token sees the tokens of its region's chosen regions."""
    b, h, w, c3 = qkv.shape
    rows, columns = np.arange(h) // region[0], np.arange(w) // region[1]
    region_of = (rows[:, None] * -(-w // region[1]) + columns).reshape(-1)
    query, key, value = (part.reshape(b, h * w, num_heads, -1) for part in jnp.split(qkv, 3, axis=-1))
    hit = indices[..., None] == jnp.arange(indices.shape[1])
    factor = hit.sum(2) if route_weights is None else (hit * route_weights[..., None]).sum(2)
    seen, factor = (part[:, region_of][:, :, region_of][:, None] for part in (hit.any(2), factor))
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) * scale * factor
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights * factor, value).reshape(b, h, w, c3 // 3)


@pytest.mark.parametrize("soft", (False, True))
def test_equals_full_attention_with_a_mask(soft):
    region, heads, (b, h, w, c) = (3, 2), 2, (2, 9, 8, 8)
    with jax.enable_x64(True):
        arrays = {"qkv": normal(b, h, w, 3 * c).astype(jnp.float64)}
        if soft:
            arrays["route_weights"] = jax.nn.softmax(normal(b, 12, 5).astype(jnp.float64))
        indices, direction = choices(b, 12, 5), normal(b, h, w, c)

        def loss(function, **options):
            def objective(arrays):
                out = function(arrays["qkv"], indices, route_weights=arrays.get("route_weights"), **options)
                return (out * direction).sum(), out

            return jax.value_and_grad(objective, has_aux=True)(arrays)

        options = dict(num_heads=heads, region=region, scale=0.7)
        (_, out), gradients = loss(bilevel_attention, **options)
        (_, expected), expected_gradients = loss(masked, **options)
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(out, expected, atol=1e-12)
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=1e-12), gradients, expected_gradients)


def test_all_regions_are_full_attention_in_any_order():
    qkv, options = normal(2, 6, 6, 24), dict(num_heads=4, region=(3, 2))
    expected = masked(qkv, choices(2, 6, 6), (3, 2), 4, 8**-0.5)
    for _ in range(2):
        np.testing.assert_allclose(bilevel_attention(qkv, choices(2, 6, 6), **options), expected, atol=2e-6)


def test_zeros_fill_the_edges_and_take_part():
    qkv, indices = normal(1, 5, 7, 12), choices(1, 6, 2)
    filled = jnp.pad(qkv, ((0, 0), (0, 1), (0, 2), (0, 0)))
    options = dict(num_heads=2, region=(3, 3))
    expected = masked(filled, indices, (3, 3), 2, 4**-0.5)[:, :5, :7]
    np.testing.assert_allclose(bilevel_attention(qkv, indices, pad="zeros", **options), expected, atol=2e-6)


def test_weights_are_those_that_were_used():
    qkv, indices = normal(2, 4, 6, 12), choices(2, 6, 3)
    options = dict(num_heads=2, region=(2, 2), kv_downsample_mode="maxpool", kv_downsample_ratio=2)
    out, weights = bilevel_attention(qkv, indices, return_weights=True, **options)
    assert weights.shape == (2, 6, 2, 4, 3) and weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    np.testing.assert_array_equal(out, bilevel_attention(qkv, indices, **options))
    values = qkv[..., 8:].reshape(2, 2, 2, 3, 2, 4).max(axis=(2, 4)).reshape(2, 6, 4)
    chosen = jnp.stack([values[i][indices[i]] for i in range(2)]).reshape(2, 6, 3, 2, 2)
    mixed = jnp.einsum("brhmk,brkhd->brmhd", weights, chosen).reshape(2, 2, 3, 2, 2, 4)
    np.testing.assert_allclose(out, mixed.transpose(0, 1, 3, 2, 4, 5).reshape(2, 4, 6, 4), atol=1e-6)


@pytest.mark.parametrize(("mode", "kind"), (("ada_avgpool", "mean"), ("ada_maxpool", "max")))
def test_adaptive_bins_may_overlap(mode, kind):
    """Five tokens in two bins: the middle one is in both. One query region, k = 1, and keys that pick a bin."""
    qkv = normal(1, 5, 5, 3).at[..., :2].set(0)
    out = bilevel_attention(
        qkv, jnp.zeros((1, 1, 1), jnp.int32), num_heads=1, region=(5, 5), kv_downsample_mode=mode, kv_per_win=2
    )
    value = np.asarray(qkv[0, ..., 2])
    bins = [getattr(value[rows, columns], kind)() for rows in np.s_[:3, 2:] for columns in np.s_[:3, 2:]]
    # All logits are equal, so that every token reads the mean of the bins.
    np.testing.assert_allclose(out, np.full((1, 5, 5, 1), np.mean(bins)), atol=1e-6)


def test_descriptors_are_means_of_what_is_there():
    x = normal(2, 7, 5, 3)
    found = region_descriptors(x, (3, 2))
    expected = [x[:, i : i + 3, j : j + 2].mean((1, 2)) for i in (0, 3, 6) for j in (0, 2, 4)]
    np.testing.assert_allclose(found, np.stack(expected, 1), atol=1e-6)
    assert region_descriptors(x.astype(jnp.bfloat16), (3, 2)).dtype == jnp.float32


def test_router_prefers_the_lowest_index_among_equals():
    query, key = normal(1, 3, 4), jnp.ones((1, 6, 4))
    indices, weights = route_regions(query, key, k=4)
    np.testing.assert_array_equal(indices, np.broadcast_to(np.arange(4), (1, 3, 4)))
    np.testing.assert_allclose(weights, 0.25, atol=1e-7)


def test_router_takes_the_best_and_scales_by_the_width():
    query, key = normal(2, 5, 16), normal(2, 9, 16)
    indices, weights = route_regions(query, key, k=3)
    logits = np.einsum("bqc,bkc->bqk", query, key) / 4
    order = np.argsort(-logits, axis=-1)[..., :3]
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_allclose(weights, jax.nn.softmax(np.take_along_axis(logits, order, -1)), atol=1e-6)


def test_gradient_reaches_the_router_only_when_asked():
    query, key, direction = normal(1, 4, 8), normal(1, 4, 8), normal(1, 4, 2)

    def loss(query, key, differentiable):
        return (route_regions(query, key, k=2, differentiable=differentiable)[1] * direction).sum()

    for gradient in jax.grad(loss, argnums=(0, 1))(query, key, False):
        np.testing.assert_array_equal(gradient, 0)
    with jax.enable_x64(True):
        wide = [part.astype(jnp.float64) for part in (query, key)]
        check_grads(lambda *pair: loss(*map(jnp.asarray, pair), True), wide, order=1, modes=["rev"])


def test_bfloat16_is_accumulated_in_float32():
    qkv, indices = normal(1, 6, 6, 96).astype(jnp.bfloat16), choices(1, 4, 2)
    out, weights = bilevel_attention(qkv, indices, num_heads=1, region=(3, 3), return_weights=True)
    assert out.dtype == jnp.bfloat16 and weights.dtype == jnp.float32
    expected = masked(qkv.astype(jnp.float32), indices, (3, 3), 1, 32**-0.5)
    # Weights and output are rounded to 8 bits of mantissa once each.
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=2**-6)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (dict(num_heads=5), "num_heads=5"),
        (dict(region=(4,)), "region must be a pair"),
        (dict(region=(4, 4)), "pass pad='zeros' or resize to 8x8"),
        (dict(pad="edge"), "None or 'zeros', got 'edge'"),
        (dict(region=(2, 3)), "indices is for 4 regions; a map of 6x6 tokens has 6 of 2x3"),
        (dict(kv_downsample_mode="avgpol"), "did you mean 'avgpool'"),
        (dict(kv_downsample_mode="avgpool"), "needs a positive kv_downsample_ratio, got None"),
        (dict(kv_downsample_mode="ada_maxpool"), "needs a positive kv_per_win"),
        (dict(kv_per_win=2), "'identity' takes no kv_per_win"),
        (dict(kv_downsample_mode="maxpool", kv_downsample_ratio=4), "take at most 3"),
        (dict(kv_downsample_mode="conv"), "'conv' is a name without a meaning"),
        (dict(kv_downsample_mode="fracpool"), "use 'ada_avgpool'"),
        (dict(implementation="cudnn"), "which has pallas_tpu, pallas_triton, xla"),
    ],
)
def test_names_what_is_wrong(kwargs, words):
    kwargs = {"num_heads": 2, "region": (3, 3), **kwargs}
    with pytest.raises((ValueError, NotImplementedError), match=words):
        bilevel_attention.__wrapped__(normal(1, 6, 6, 12), choices(1, 4, 2), **kwargs)


def test_more_regions_than_there_are():
    with pytest.raises(ValueError, match="between 1 and 4, the number of regions, got 5"):
        route_regions(normal(1, 4, 8), normal(1, 4, 8), k=5)


def test_size_of_pooled_regions():
    assert pooled_region((6, 5)) == (6, 5)
    assert pooled_region((6, 5), "avgpool", kv_downsample_ratio=2) == (3, 2)
    assert pooled_region((6, 5), "ada_maxpool", kv_per_win=4) == (4, 4)


def test_router_is_exact_for_bfloat16():
    """Descriptors and logits are float32 whatever the dtype of what goes in: the same choice as from float32."""
    x = normal(1, 12, 12, 64).astype(jnp.bfloat16)
    narrow, wide = (
        route_regions(*jnp.split(region_descriptors(part, (2, 2)), 2, axis=-1), k=5)
        for part in (x, x.astype(jnp.float32))
    )
    jax.tree.map(np.testing.assert_array_equal, narrow, wide)
    assert narrow[1].dtype == jnp.float32


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(diff_routing=True), "set soft_routing=True"),
        (dict(param_routing=True), "set diff_routing=True and soft_routing=True"),
        (dict(topks=(1, 4, 50, -2)), "must not exceed n_win"),
        (dict(topks=(1, 4, 16, -3)), "positive, 0, -1 or -2"),
        (dict(code="nchw"), "positive or -1 for code='nchw', got -2"),
        (dict(code="nchw", topks=(1, 4, 16, -1), auto_pad=True), "which pads by itself"),
        (dict(code="nchw", topks=(1, 4, 16, -1), soft_routing=True), "use code='legacy'"),
        (dict(head_dim=48), "multiples of head_dim=48"),
        (dict(depths=(1, 1)), "as long as one another"),
        (dict(kv_downsample_mode="avgpool"), "needs a positive kv_downsample_ratio"),
    ],
)
def test_models_that_make_no_sense(fields, words):
    model = zoo.create_model("biformer_tiny", **fields)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))


@pytest.mark.parametrize(
    ("name", "fields", "size", "nearest"),
    [
        ("biformer_tiny", {}, (256, 225), "224x224"),
        ("biformer_tiny", {}, (448, 300), "448x336"),
        ("biformer_tiny", dict(n_win=8), (224, 224), "256x256"),
        ("biformer_stl_nchw", {}, (100, 300), "112x300"),
        ("biformer_stl", dict(auto_pad=True), (20, 40), "32x40"),
        ("biformer_nano", {}, (10, 8), "8x8"),
    ],
)
def test_sizes_that_do_not_fit(name, fields, size, nearest):
    with pytest.raises(ValueError, match=f"the nearest that fits is {nearest}"):
        zoo.create_model(name, image_size=size, **fields)


def test_sizes_that_fit():
    zoo.create_model("biformer_tiny", image_size=(224, 448))
    zoo.create_model("biformer_tiny", image_size=(5, 6), auto_pad=True)
    zoo.create_model("biformer_stl_nchw", image_size=(157, 120))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("biformer_tiny", 13_142_760),
        ("biformer_small", 25_536_232),
        ("biformer_base", 56_804_968),
        ("biformer_stl", 28_372_552),
        ("biformer_stl_nchw", 28_372_552),
    ],
)
def test_parameter_counts(name, count):
    model = zoo.create_model(name)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count
