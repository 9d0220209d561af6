"""Device-side augmentation against timm's numbers, closed forms, and itself on another batch order or mesh."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from train.mixing import _cutmix_box, _share_left, mixup_cutmix, normalize, one_hot_smooth, random_erase

REFERENCE = np.load(Path(__file__).parent / "reference" / "augment.npz")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def keys(n: int):
    return jax.random.split(jax.random.key(0), n)


def test_normalize_equals_torchvision():
    images = REFERENCE["picture/patch"][None]
    result = jax.jit(lambda x: normalize(x, MEAN, STD))(images)
    np.testing.assert_allclose(result[0], REFERENCE["normalized"], atol=1e-6)
    half = normalize(jnp.asarray(images), MEAN, STD, jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, normalize(jnp.asarray(images), MEAN, STD).astype(jnp.bfloat16))


def test_one_mean_serves_all_channels():
    images = jnp.array([[[[0, 51, 255]]]], jnp.uint8)
    np.testing.assert_allclose(normalize(images, (0.2,), (0.4,))[0, 0, 0], [-0.5, 0.0, 2.0], atol=1e-7)


def test_smooth_targets_equal_timm():
    result = one_hot_smooth(jnp.array([2, 0, 4, 2]), 5, 0.1)
    np.testing.assert_allclose(result, REFERENCE["smooth_targets"], atol=1e-7)
    np.testing.assert_array_equal(one_hot_smooth(jnp.array([1]), 3), [[0, 1, 0]])


BOXES = jnp.array([[2, 3, 20, 25], [0, 0, 0, 0], [0, 0, 32, 1], [31, 31, 1, 1]], jnp.int32)
SEEDS = jnp.array([5, 6, 2**32 - 1, 5], jnp.uint32)


def boxes_mask() -> np.ndarray:
    mask = np.zeros((4, 32, 32), bool)
    for i, (y, x, h, w) in enumerate(BOXES.tolist()):
        mask[i, y : y + h, x : x + w] = True
    return mask


SEVENS = jnp.full((4, 32, 32, 3), 7.0)
erase = jax.jit(random_erase, static_argnames="mode")


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_erasing_changes_the_box_and_nothing_else(mode):
    changed = (np.asarray(erase(SEVENS, BOXES, SEEDS, mode=mode)) != 7.0).any(-1)
    np.testing.assert_array_equal(changed, boxes_mask())


def test_fills_of_erased_boxes():
    mask = boxes_mask()
    assert not np.asarray(erase(SEVENS, BOXES, SEEDS, mode="const"))[mask].any()
    pixels = np.asarray(erase(SEVENS, BOXES, SEEDS, mode="pixel"))[0][mask[0]]
    assert pixels.shape == (500, 3) and len(np.unique(pixels)) == 1500
    assert abs(pixels.mean()) < 0.1 and abs(pixels.std() - 1) < 0.07
    colours = np.asarray(erase(SEVENS, BOXES, SEEDS, mode="rand"))[0][mask[0]]
    assert (colours == colours[0]).all() and len(np.unique(colours[0])) == 3
    colour = jax.jit(lambda seeds: random_erase(jnp.zeros((4096, 1, 1, 1)), boxes, seeds, "rand"))
    boxes = jnp.tile(jnp.array([[0, 0, 1, 1]], jnp.int32), (4096, 1))
    values = np.asarray(colour(jnp.arange(4096, dtype=jnp.uint32)))
    assert abs(values.mean()) < 0.06 and abs(values.std() - 1) < 0.04
    assert jax.eval_shape(random_erase, SEVENS.astype(jnp.bfloat16), BOXES, SEEDS).dtype == jnp.bfloat16


@pytest.mark.parametrize("mode", ["pixel", "rand"])
def test_erase_noise_belongs_to_the_example_not_to_its_place(mode):
    whole = np.asarray(erase(SEVENS, BOXES, SEEDS, mode=mode))
    order = np.array([2, 3, 0, 1])
    moved = erase(SEVENS, BOXES[order], SEEDS[order], mode=mode)
    np.testing.assert_array_equal(moved, whole[order])
    alone = erase(SEVENS[:1], BOXES[:1], SEEDS[:1], mode=mode)
    np.testing.assert_array_equal(alone[0], whole[0])
    if mode == "pixel":  # the same seed: the same noise wherever both boxes look
        everywhere = jnp.tile(jnp.array([[0, 0, 32, 32]], jnp.int32), (4, 1))
        full = erase(SEVENS, everywhere, SEEDS, mode=mode)
        np.testing.assert_array_equal(full[0], full[3])
        assert (np.asarray(full[0]) != np.asarray(full[1])).all()


@pytest.mark.parametrize("mode, batch", [("batch", 8), ("pair", 7), ("elem", 8)])
def test_images_are_mixed_as_their_labels(mode, batch):
    # 512 pixels: every share of them is a float32 without rounding.
    images = jnp.broadcast_to(jnp.arange(batch, dtype=jnp.float32)[:, None, None, None], (batch, 16, 32, 2))
    labels = jnp.eye(batch)
    settings = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mode": mode}
    mix = jax.jit(jax.vmap(lambda key: mixup_cutmix(key, images, labels, **settings)))
    mixed, targets = (np.asarray(x) for x in mix(keys(50)))

    own = np.arange(batch, dtype=np.float32)
    other, pairs = own[::-1], own != own[::-1]
    weight = np.diagonal(targets, axis1=1, axis2=2)
    np.testing.assert_allclose((weight + targets[:, np.arange(batch), np.arange(batch)[::-1]])[:, pairs], 1, atol=1e-6)
    np.testing.assert_allclose(targets.sum(2), 1, atol=1e-6)
    level = (weight * own + (1 - weight) * other)[..., None, None, None]
    is_own, is_other = (mixed == x[:, None, None, None] for x in (own, other))
    blended = np.isclose(mixed, level, atol=1e-5).all((2, 3, 4))
    cut = (is_own | is_other).all((2, 3, 4)) & (is_own.mean((2, 3, 4)) == weight)
    assert (blended | cut)[:, pairs].all()
    assert 0.2 < blended[:, pairs].mean() < 0.8 and 0.2 < cut[:, pairs].mean() < 0.8

    # What cutmix replaced is one rectangle, the same in both channels.
    replaced = is_other[cut[:, 0], 0]
    rows, columns = replaced[..., 0].any(2), replaced[..., 0].any(1)
    np.testing.assert_array_equal(replaced[..., 0], rows[:, :, None] & columns[:, None, :])
    np.testing.assert_array_equal(replaced[..., 0], replaced[..., 1])

    shared = {"batch": 1, "pair": batch // 2, "elem": batch}[mode]
    assert max(len(np.unique(row)) for row in weight[:, pairs]) == shared
    if mode == "pair":
        np.testing.assert_array_equal(weight[:, pairs], weight[:, ::-1][:, pairs])


def test_cutmix_boxes_equal_timm():
    table = json.loads(str(REFERENCE["tables"]))["cutmix_box"]
    for case, expected in zip(table, REFERENCE["cutmix_boxes"]):
        y0, x0, y1, x1 = box = _cutmix_box(jnp.float32(case["lam"]), *map(jnp.int32, case["center"]), *case["shape"])
        assert (y0, y1, x0, x1) == tuple(expected[:4]), case
        np.testing.assert_allclose(_share_left(box, *case["shape"]), expected[4], atol=1e-6)


def draws(n: int, **settings):
    """Of n batches of black and white: the weight of the first label, and whether nothing was blended."""
    images, labels = jnp.broadcast_to(jnp.arange(2.0)[:, None, None, None], (2, 8, 8, 1)), jnp.eye(2)
    mix = jax.jit(jax.vmap(lambda key: mixup_cutmix(key, images, labels, **settings)))
    mixed, targets = mix(keys(n))
    return np.asarray(targets)[:, 0, 0], np.isin(np.asarray(mixed)[:, 0], (0, 1)).all(axis=(1, 2, 3))


def test_mixup_lambda_follows_the_beta_distribution():
    lam, _ = draws(4000, mixup_alpha=0.8, cutmix_alpha=0.0)
    assert abs(lam.mean() - 0.5) < 0.03
    assert abs(lam.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.01


def test_mixing_and_switching_occur_at_their_rates():
    lam, cut = draws(4000, mixup_alpha=2.0, cutmix_alpha=2.0, prob=0.6, switch_prob=0.25)
    assert abs(np.mean(~cut) - 0.6 * 0.75) < 0.03
    assert abs(np.mean(lam == 1) - 0.4) < 0.03  # an empty box is rare with this alpha
    assert abs(lam[~cut].mean() - 0.5) < 0.03 and abs(lam[~cut].var() - 1 / 20) < 0.01


def test_nothing_to_mix_returns_the_inputs():
    mixed, targets = mix(mixup_alpha=0.0, cutmix_alpha=0.0)
    assert mixed is IMAGES and targets is LABELS


def pipeline(key, batch):
    images = normalize(batch["image"], MEAN, STD)
    images = random_erase(images, batch["erase_box"], batch["erase_seed"], "pixel")
    targets = one_hot_smooth(batch["label"], 10, 0.1)
    return mixup_cutmix(key, images, targets, mixup_alpha=0.8, cutmix_alpha=1.0)


def train_batch(size: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (size, 12, 10, 3), dtype=np.uint8),
        "label": rng.integers(0, 10, size, dtype=np.int32),
        "erase_box": np.tile(np.array([[1, 2, 6, 5]], np.int32), (size, 1)),
        "erase_seed": rng.integers(0, 2**32, size, dtype=np.uint32),
    }


@pytest.mark.slow
def test_sharding_the_batch_changes_nothing():
    batch = train_batch()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    whole = jax.jit(pipeline)
    sharded = jax.jit(pipeline, out_shardings=split)
    for key in keys(6):  # both mixup and cutmix occur
        images, targets = whole(key, batch)
        parts = sharded(key, jax.device_put(batch, split))
        np.testing.assert_allclose(parts[0], images, atol=1e-6)
        np.testing.assert_allclose(parts[1], targets, atol=1e-6)
    assert sharded._cache_size() == whole._cache_size() == 1


def test_the_key_decides():
    batch = train_batch()
    run = jax.jit(pipeline)
    first, again, other = (run(jax.random.key(seed), batch)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()


IMAGES, LABELS = jnp.zeros((2, 4, 4, 3)), jnp.zeros((2, 5))


def mix(**settings):
    return mixup_cutmix(jax.random.key(0), IMAGES, LABELS, **{"mixup_alpha": 1.0, "cutmix_alpha": 1.0, **settings})


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: normalize(jnp.zeros((1, 2, 2, 3), jnp.uint8), (0.5, 0.5), STD),
            "mean: expected 1 or 3 values",
        ),
        (lambda: normalize(jnp.zeros((1, 2, 2, 1), jnp.uint8), (0.5,), STD), "std: expected 1 or 1 values"),
        (
            lambda: random_erase(IMAGES, BOXES[:2], SEEDS[:2], "pixels"),
            "mode.*'pixels'.*did you mean 'pixel'",
        ),
        (lambda: one_hot_smooth(jnp.zeros(2, jnp.int32), 5, 1.0), r"smoothing.*\[0, 1\), got 1.0"),
        (lambda: mix(mixup_alpha=-0.1), "mixup_alpha.*at least 0, got -0.1"),
        (lambda: mix(cutmix_alpha=-1.0), "cutmix_alpha.*at least 0"),
        (lambda: mix(prob=1.1), "prob.*from 0 to 1, got 1.1"),
        (lambda: mix(switch_prob=-0.1), "switch_prob.*from 0 to 1"),
        (lambda: mix(mode="elems"), "mode.*'elems'.*did you mean 'elem'"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
