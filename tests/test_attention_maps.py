"""What a token attends to, against the definition written out token by token, and against the models' outputs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from kernels import bilevel_attention, linear_attention, route_regions, window_attention
from kernels.bilevel import pooled_region
from zoo.layers import DepthwiseConv, LayerNorm
from zoo.watch import (
    ChannelMap,
    DenseMap,
    LinearMap,
    RoutedMap,
    WindowMap,
    attention_maps,
    run_watched,
)

BATCH = 2
TOLERANCE = dict(rtol=1e-5, atol=1e-7)


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def run(primitive, *arrays, **options):
    """A primitive as one compiled program."""
    return jax.jit(functools.partial(primitive, **options))(*arrays)


def all_heat(found):
    """`(B, h * w, h * w)`: the heat of every token, after checking it against what the map says of itself."""
    tokens = list(itertools.product(*map(range, found.shape)))
    heat = np.stack([found.heat(token) for token in tokens], axis=1)
    reach = np.stack([found.reach(token) for token in tokens], axis=1)
    np.testing.assert_array_equal(heat > 0, reach)
    np.testing.assert_allclose(found.received(), heat.mean(1), **TOLERANCE)
    return heat.reshape(*heat.shape[:2], -1)


def softmax_weights(queries, keys, bias=0.0):
    """`(queries, keys)`, the mean over heads of the softmax for lists of `(heads, d)` tokens."""
    logits = np.einsum("qhd,khd->hqk", queries, keys) * keys.shape[-1] ** -0.5 + bias
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).mean(0)


def same_window(shape, window, partition):
    """Which tokens, on the padded map, are in one window: every token's own window by name."""
    padded = [side + -side % step for side, step in zip(shape, window)]
    names = {}
    for row, column in itertools.product(*map(range, padded)):
        if partition == "block":
            names[row, column] = (row // window[0], column // window[1])
        else:
            names[row, column] = (row % (padded[0] // window[0]), column % (padded[1] // window[1]))
    return names


@pytest.mark.parametrize(
    "shape, window, partition, pad",
    [
        ((6, 8), (3, 4), "block", None),
        ((6, 8), (3, 2), "grid", None),
        ((5, 7), (3, 4), "block", "mask"),
        ((5, 7), (2, 3), "grid", "value"),
        ((3, 5), (4, 4), "block", "value"),
    ],
)
def test_windows(shape, window, partition, pad):
    heads, d = 2, 3
    n = window[0] * window[1]
    qkv, bias = normal(BATCH, *shape, 3 * heads * d), normal(heads, n, n)
    value = normal(3 * heads * d)
    options = dict(num_heads=heads, window=window, partition=partition, return_weights=True)

    def primitive(qkv, bias, value):
        return window_attention(qkv, bias=bias, pad=value if pad == "value" else pad, **options)

    _, weights = run(primitive, qkv, bias, value)
    found = WindowMap(weights, shape, window, partition)
    assert found.heads == heads
    heat = all_heat(found)

    names = same_window(shape, window, partition)
    expected = np.zeros((BATCH, *shape, *shape), np.float32)
    for image, name in itertools.product(range(BATCH), set(names.values())):
        # Row-major in the window, which is how the bias counts.
        members = [token for token in names if names[token] == name]
        real = [token for token in members if token[0] < shape[0] and token[1] < shape[1]]
        kept = members if pad == "value" else real
        tokens = np.stack([qkv[image][t] if t in real else value for t in kept]).reshape(len(kept), 3, heads, d)
        places = [members.index(token) for token in kept]
        rows = softmax_weights(tokens[:, 0], tokens[:, 1], bias[:, places][:, :, places])
        for query, key in itertools.product(real, real):
            expected[image][query + key] = rows[kept.index(query), kept.index(key)]
    np.testing.assert_allclose(heat, expected.reshape(heat.shape), **TOLERANCE)
    if pad != "value":
        np.testing.assert_allclose(heat.sum(-1), 1, rtol=1e-5)
    else:
        assert (heat.sum(-1) < 0.999).any()


def test_windows_give_the_output():
    """With one head, the values weighed by the heat are what the primitive returns."""
    shape, window = (6, 4), (3, 2)
    qkv = normal(BATCH, *shape, 12)
    for partition in ("block", "grid"):
        options = dict(num_heads=1, window=window, partition=partition, return_weights=True)
        out, weights = run(window_attention, qkv, **options)
        heat = all_heat(WindowMap(weights, shape, window, partition))
        values = qkv[..., 8:].reshape(BATCH, -1, 4)
        np.testing.assert_allclose(heat @ values, np.reshape(out, (BATCH, -1, 4)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "shape, region, k, pool",
    [
        ((4, 6), (2, 3), 1, {}),
        ((6, 8), (2, 2), 3, {}),
        ((8, 12), (4, 4), 2, dict(kv_downsample_mode="ada_avgpool", kv_per_win=2)),
        ((8, 12), (4, 6), 3, dict(kv_downsample_mode="maxpool", kv_downsample_ratio=2)),
        ((5, 7), (2, 3), 2, {}),
    ],
)
def test_routed_regions(shape, region, k, pool):
    heads, d = 2, 4
    c = heads * d
    regions = tuple(-(-side // step) for side, step in zip(shape, region))
    padded = tuple(count * step for count, step in zip(regions, region))
    qkv = normal(BATCH, *shape, 3 * c)
    descriptors = normal(BATCH, regions[0] * regions[1], 2 * c, seed=1)
    indices, _ = run(route_regions, descriptors[..., :c], descriptors[..., c:], k=k)
    options = dict(num_heads=heads, region=region, pad="zeros", return_weights=True, **pool)
    _, weights = run(bilevel_attention, qkv, indices, **options)
    keys = pooled_region(region, **pool)
    found = RoutedMap(weights, indices, shape, regions, region, keys)
    assert found.heads == heads
    heat = all_heat(found)

    filled = np.zeros((BATCH, *padded, 3, heads, d), np.float32)
    filled[:, : shape[0], : shape[1]] = qkv.reshape(BATCH, *shape, 3, heads, d)
    bins = [side // count for side, count in zip(region, keys)]
    reduce = np.max if "max" in pool.get("kv_downsample_mode", "") else np.mean
    expected = np.zeros((BATCH, *shape, *padded), np.float32)
    for image, row, column in itertools.product(range(BATCH), *map(range, shape)):
        own = row // region[0] * regions[1] + column // region[1]
        corners, tokens = [], []
        for chosen in np.asarray(indices)[image, own]:
            top, left = chosen // regions[1] * region[0], chosen % regions[1] * region[1]
            for down, right in itertools.product(*map(range, keys)):
                corner = top + down * bins[0], left + right * bins[1]
                square = filled[image, corner[0] : corner[0] + bins[0], corner[1] : corner[1] + bins[1], 1]
                corners.append(corner)
                tokens.append(reduce(square, axis=(0, 1)))
        # The scale is that of all heads' channels together.
        query = filled[image, row, column, 0][None] * (d / c) ** 0.5
        for (top, left), weight in zip(corners, softmax_weights(query, np.stack(tokens))[0]):
            expected[image, row, column, top : top + bins[0], left : left + bins[1]] += weight / (bins[0] * bins[1])
    expected = expected[..., : shape[0], : shape[1]]
    np.testing.assert_allclose(heat, expected.reshape(heat.shape), **TOLERANCE)
    if padded == shape:
        np.testing.assert_allclose(heat.sum(-1), 1, rtol=1e-5)


def test_pooled_keys_that_end_between_tokens():
    """Two keys for five tokens: each stands for two tokens and a half."""
    found = RoutedMap(np.array([[[[[0.8, 0.2]] * 5]]]), np.zeros((1, 1, 1), int), (1, 5), (1, 1), (1, 5), (1, 2))
    np.testing.assert_allclose(found.heat((0, 3)), [[[0.32, 0.32, 0.2, 0.08, 0.08]]])
    np.testing.assert_allclose(found.received(), [[[0.32, 0.32, 0.2, 0.08, 0.08]]])


def test_linear_attention():
    shape, heads, d = (3, 5), 2, 4
    n = shape[0] * shape[1]
    query, key, value = (normal(BATCH, n, heads, d, seed=seed) for seed in range(3))

    def phi(x):
        return np.where(x > 0, x + 1, np.exp(x))

    found = LinearMap(phi(query), phi(key), shape)
    assert found.heads == heads
    heat = all_heat(found)
    products = np.einsum("bnhd,bmhd->bhnm", phi(query), phi(key))
    weights = products / products.sum(-1, keepdims=True)
    np.testing.assert_allclose(heat, weights.mean(1), **TOLERANCE)
    np.testing.assert_allclose(heat.sum(-1), 1, rtol=1e-5)
    out = run(linear_attention, query, key, value, epsilon=0.0)
    np.testing.assert_allclose(np.einsum("bhnm,bmhd->bnhd", weights, value), out, rtol=1e-4, atol=1e-5)


def test_dense_attention():
    shape = (2, 3)
    weights = np.random.default_rng(0).dirichlet(np.ones(6), (BATCH, 4, 6)).astype(np.float32)
    found = DenseMap(weights, shape)
    assert found.heads == 4
    np.testing.assert_allclose(all_heat(found), weights.mean(1), **TOLERANCE)


def test_sixteen_bit_arrays():
    query, key = (jnp.asarray(1 + normal(1, 6, 2, 4, seed=seed) ** 2, jnp.bfloat16) for seed in (0, 1))
    exact = LinearMap(*(np.asarray(x, np.float64) for x in (query, key)), (2, 3))
    heat = LinearMap(query, key, (2, 3)).heat((1, 1))
    assert heat.dtype == np.float32
    np.testing.assert_allclose(heat, exact.heat((1, 1)), rtol=1e-5)


@pytest.mark.parametrize("token", [(-1, 0), (2, 0), (0, 3), (0, -1)])
def test_a_token_outside(token):
    weights = np.full((1, 1, 6, 6), 1 / 6)
    for found in (DenseMap(weights, (2, 3)), WindowMap(weights[:, None], (2, 3), (2, 3), "block")):
        for method in (found.heat, found.reach):
            with pytest.raises(ValueError, match=r"token must be .* from \(0, 0\) to \(1, 2\), got"):
                method(token)


@pytest.fixture(scope="module")
def watched():
    """A small model that pads in both stages, its variables, images, output and maps."""
    model = zoo.create_model("davit_nano", in_chans=1, dims=(8, 16), num_classes=3)
    images = jnp.asarray(normal(BATCH, 10, 6, 1))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    assert "attention" not in shapes
    variables = jax.tree.map(lambda leaf: jnp.asarray(0.3 * normal(*leaf.shape)), shapes)
    return model, variables, images, *run_watched(model, variables, images)


def test_maps_of_a_model(watched):
    model, variables, images, _, _ = watched
    maps = attention_maps(model, variables, images)
    assert list(maps) == [
        f"{block}/{kind}/attention" for block in ("stages_0_0", "stages_1_0") for kind in ("spatial", "channel")
    ]
    first, channels = maps["stages_0_0/spatial/attention"], maps["stages_0_0/channel/attention"]
    assert (first.shape, first.window, first.partition, first.heads) == ((10, 6), (4, 4), "block", 1)
    assert maps["stages_1_0/spatial/attention"].shape == (5, 3)
    assert isinstance(channels, ChannelMap) and channels.shape == (10, 6)
    np.testing.assert_allclose(np.asarray(channels.weights).sum(-1), 1, rtol=1e-5)


def test_being_watched_changes_nothing(watched):
    model, variables, images, output, maps = watched
    np.testing.assert_allclose(output, jax.jit(model.apply)(variables, images), rtol=1e-5, atol=1e-6)
    assert len(maps) == 4


def test_maps_reproduce_a_modules_output(watched):
    """The values of the first block, computed from its layers, weighed by the heat."""
    model, variables, images, _, maps = watched

    @jax.jit
    def run_block(variables, images):
        bound = model.bind(variables)
        block = bound.stages[0][0].spatial
        inner = variables["params"]["stages_0_0"]["spatial"]
        x = bound.stem(images, False)
        x = x + DepthwiseConv(3).apply({"params": inner["cpe1"]}, x)
        x = LayerNorm().apply({"params": inner["norm1"]}, x)
        return x, block.attention(x)

    x, expected = run_block(variables, images)
    params = jax.tree.map(np.asarray, variables["params"]["stages_0_0"]["spatial"]["attention"])
    # What padding is attended to takes values of the projection's bias alone.
    kernel, bias = params["qkv"]["kernel"][:, 16:], params["qkv"]["bias"][16:]
    heat = all_heat(maps["stages_0_0/spatial/attention"])
    attended = heat @ np.reshape(x @ kernel + bias, (BATCH, 60, 8)) + (1 - heat.sum(-1))[..., None] * bias
    attended = attended.reshape(BATCH, 10, 6, 8) @ params["proj"]["kernel"] + params["proj"]["bias"]
    np.testing.assert_allclose(attended, expected, rtol=1e-4, atol=1e-6)
