"""Host-side augmentation against timm's pixels and boxes for the same random numbers, and against closed forms."""

import collections
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.augment import IMAGENET_MEAN, random_crop_pad, train_transform
from train.crops import RandomErasing, RandomResizedCrop
from train.randaugment import INCREASING_OPS, OPS, RandAugment, apply_op, rand_augment
from zoo.preprocess import eval_transform

REFERENCE = np.load(Path(__file__).parent / "reference" / "augment.npz")
TABLES = json.loads(str(REFERENCE["tables"]))
GREY = (0.5,)


def picture(name: str) -> np.ndarray:
    return REFERENCE[f"picture/{name}"]


def pil(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def example(pixels: np.ndarray) -> dict:
    return {"image": pixels, "label": 3, "index": 70}


def expected_pixels(kind: str):
    """The cases of a kind, each with its reference pixels."""
    cases = TABLES[kind]
    ends = np.cumsum([math.prod(case["shape"]) for case in cases])
    for case, flat in zip(cases, np.split(REFERENCE[f"{kind}_pixels"], ends[:-1])):
        yield case, flat.reshape(case["shape"])


def pair(value):
    return tuple(value) if isinstance(value, list) else value


def test_eval_pixels_equal_timm():
    for case, expected in expected_pixels("eval"):
        image = picture(case["image"])
        transform = eval_transform(
            pair(case["size"]),
            case["crop_pct"],
            case["interpolation"],
            case["crop_mode"],
            mean=IMAGENET_MEAN[: image.shape[-1]],
        )
        np.testing.assert_array_equal(transform.pixels(image), expected, err_msg=str(case))


def test_operations_equal_timm():
    seen = set()
    for case, expected in expected_pixels("op"):
        image = pil(picture(case["image"]))
        result = apply_op(case["name"], image, case["level"], case["sign"], tuple(case["fill"]))
        np.testing.assert_array_equal(np.asarray(result).reshape(expected.shape), expected, err_msg=str(case))
        seen.add(case["name"])
    assert seen == {*OPS, *INCREASING_OPS}


@pytest.mark.parametrize("name, level", [("Posterize", 0.0), ("PosterizeIncreasing", 10.0)])
def test_posterize_to_no_bits_is_black(name, level):
    assert not np.asarray(apply_op(name, pil(picture("patch")), level)).any()


def test_train_pixels_and_boxes_equal_timm():
    for (case, expected), box in zip(expected_pixels("train"), REFERENCE["train_boxes"]):
        settings = {name: pair(value) for name, value in case["settings"].items()}
        transform = train_transform(pair(case["size"]), **settings)
        result = transform(example(picture(case["image"])), np.random.default_rng(case["seed"]))
        np.testing.assert_array_equal(result["image"], expected, err_msg=str(case))
        np.testing.assert_array_equal(result["erase_box"], box, err_msg=str(case))


def test_crop_boxes_equal_timm():
    for case, expected in zip(TABLES["crop_box"], REFERENCE["crop_boxes"]):
        crop = RandomResizedCrop((8, 8), pair(case["scale"]), pair(case["ratio"]), ())
        assert crop.box(np.random.default_rng(case["seed"]), *case["shape"]) == tuple(expected), case


def test_erase_boxes_equal_timm():
    for case, expected in zip(TABLES["erase_box"], REFERENCE["erase_boxes"]):
        box = RandomErasing(0.8).box(np.random.default_rng(case["seed"]), *case["shape"])
        assert box == tuple(expected), case


def test_erase_boxes_follow_their_ranges():
    rng, n = np.random.default_rng(0), 4000
    boxes = np.array([RandomErasing(0.25).box(rng, 100, 100) for _ in range(n)])
    hit = boxes[boxes[:, 2] > 0]
    assert abs(len(hit) / n - 0.25) < 0.03
    top, left, h, w = hit.T
    assert (top + h <= 100).all() and (left + w <= 100).all() and hit.min() >= 0
    area, aspect = h * w / 1e4, h / w
    assert 0.015 < area.min() < 0.03 and 0.3 < area.max() < 0.345
    # The few boxes that are too long to fit, and drawn again, hardly change the mean of the range.
    assert abs(area.mean() - (0.02 + 1 / 3) / 2) < 0.008
    assert abs(np.log(aspect).mean()) < 0.1 and aspect.min() > 0.25 and aspect.max() < 4


def test_flips_occur_at_their_rates():
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6, 1)
    transform = random_crop_pad((4, 6), pad=0, hflip=0.5, vflip=0.2, mean=GREY)
    rng, n = np.random.default_rng(0), 4000
    counts = collections.Counter(transform(example(pixels), rng)["image"].tobytes() for _ in range(n))
    rates = {
        pixels.tobytes(): 0.5 * 0.8,
        pixels[:, ::-1].tobytes(): 0.5 * 0.8,
        pixels[::-1].tobytes(): 0.5 * 0.2,
        pixels[::-1, ::-1].tobytes(): 0.5 * 0.2,
    }
    assert counts.keys() == rates.keys()
    assert all(abs(counts[key] / n - rate) < 0.03 for key, rate in rates.items())


def test_shift_is_a_crop_of_the_padded_image():
    pixels = picture("tiny")
    transform = random_crop_pad(pixels.shape[:2], pad=2, fill=9)
    padded = np.pad(pixels, ((2, 2), (2, 2), (0, 0)), constant_values=9)
    h, w, _ = pixels.shape
    offsets = {padded[y : y + h, x : x + w].tobytes(): (y, x) for y in range(5) for x in range(5)}
    rng, n = np.random.default_rng(0), 5000
    counts = collections.Counter(offsets[transform(example(pixels), rng)["image"].tobytes()] for _ in range(n))
    assert len(counts) == 25 and all(abs(count / n - 1 / 25) < 0.015 for count in counts.values())


def test_rotation_and_zoom_about_the_shifted_centre():
    size, pad, rotate, zoom = 16, 2, 30.0, (0.8, 1.25)
    ramp = np.add.outer(5.0 * np.arange(size), 8.0 * np.arange(size))
    transform = random_crop_pad(size, pad=pad, rotate=rotate, zoom=zoom, mean=GREY)
    result = transform(example(ramp.astype(np.uint8)[..., None]), np.random.default_rng(3))["image"][..., 0]

    draw = np.random.default_rng(3).random
    shift = 1j * (2 * draw() - 1) * pad + (2 * draw() - 1) * pad
    turn = np.exp(-1j * np.radians((2 * draw() - 1) * rotate))
    magnification = math.exp(math.log(zoom[0]) + math.log(zoom[1] / zoom[0]) * draw())
    y, x = np.mgrid[:size, :size]
    middle = (size - 1) / 2
    source = (x - middle + 1j * (y - middle)) * turn / magnification + shift + middle * (1 + 1j)
    inside = (abs(source.real - middle) < middle) & (abs(source.imag - middle) < middle)
    outside = (abs(source.real - middle) > middle + 0.5) | (abs(source.imag - middle) > middle + 0.5)
    # Bilinear interpolation of a linear ramp is the ramp itself, to within rounding.
    assert inside.sum() > 100
    assert abs(result - (5 * source.imag + 8 * source.real))[inside].max() <= 1
    assert outside.any() and not result[outside].any()


def test_other_sizes_are_resized_before_the_shift():
    pixels = picture("landscape")
    expected = eval_transform((20, 24), 1.0, "bilinear").pixels(pixels)
    result = random_crop_pad((20, 24), pad=0)(example(pixels), np.random.default_rng(0))["image"]
    np.testing.assert_array_equal(result, expected)


def test_colour_jitter_is_off_under_randaugment():
    jittered = train_transform(8, color_jitter=0.4)
    assert jittered.color.strength == (0.4, 0.4, 0.4)
    policy = train_transform(8, color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1")
    assert isinstance(policy.color, RandAugment)
    assert train_transform(8, color_jitter=0.0).color is None


def test_policy_notation():
    resample = (Image.Resampling.BICUBIC,)
    policy = rand_augment("rand-m9-mstd0.5-inc1", (1, 2, 3), resample)
    assert policy == RandAugment((1, 2, 3), resample, INCREASING_OPS, 2, 0.5, 9.0, 0.5, 10.0)
    policy = rand_augment("rand-n3-p0.8-mstd101-mmax20", (1,), resample)
    assert policy == RandAugment((1,), resample, OPS, 3, 0.8, 10.0, math.inf, 20.0)
    assert train_transform(8, auto_augment="rand").color.fill == (124, 116, 104)


def test_policy_chooses_all_operations_equally_and_applies_half(monkeypatch):
    applied = collections.Counter()
    levels = []

    def record(name, image, level, sign, fill, resample):
        applied[name] += 1
        levels.append(level)
        return image

    monkeypatch.setattr("train.randaugment.apply_op", record)
    policy = rand_augment("rand-m9-mstd0.5-inc1", (0,), (Image.Resampling.BICUBIC,))
    rng, image, n = np.random.default_rng(0), pil(picture("grey_patch")), 6000
    for _ in range(n):
        policy(image, rng)
    assert abs(applied.total() / n - 1.0) < 0.03
    assert applied.keys() == set(INCREASING_OPS)
    assert all(abs(count / applied.total() - 1 / 15) < 0.01 for count in applied.values())
    # N(9, 0.5) clipped at 10, two standard deviations up.
    assert abs(np.mean(levels) - 9.0) < 0.03 and abs(np.std(levels) - 0.49) < 0.03
    assert max(levels) == 10.0 and abs(levels.count(10.0) / len(levels) - 0.0228) < 0.01


def test_everything_works_on_grey_images():
    transform = train_transform(12, auto_augment="rand-n15-p1-inc1", erase_prob=1.0, mean=GREY)
    for seed in range(20):
        result = transform(example(picture("grey")), np.random.default_rng(seed))
        assert result["image"].shape == (12, 12, 1)
    saturated = train_transform(12, color_jitter=(0.0, 0.0, 0.9), mean=GREY)
    plain = train_transform(12, color_jitter=0.0, mean=GREY)
    for seed in range(5):
        rngs = (np.random.default_rng(seed), np.random.default_rng(seed))
        images = (t(example(picture("grey")), rng)["image"] for t, rng in zip((saturated, plain), rngs))
        np.testing.assert_array_equal(*images)


TRANSFORMS = {
    "imagenet": train_transform(16, interpolation="bicubic", auto_augment="rand-m9-mstd0.5-inc1", erase_prob=0.5),
    "jitter": train_transform((16, 12), vflip=0.5),
    "small": random_crop_pad(48, pad=4, hflip=0.5, erase_prob=0.5),
    "turned": random_crop_pad(48, pad=4, rotate=10.0, zoom=(0.9, 1.1)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_generator_alone_decides(name):
    transform, item = TRANSFORMS[name], example(picture("square"))
    copy = pickle.loads(pickle.dumps(transform))
    assert copy == transform
    results = [transform(item, np.random.default_rng(seed)) for seed in range(8)]
    again = [copy(item, np.random.default_rng(seed)) for seed in range(8)]
    for one, other in zip(results, again):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])
    assert len({one["image"].tobytes() for one in results}) > 1
    np.testing.assert_array_equal(item["image"], picture("square"))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_entries_of_a_training_example(name):
    transform = TRANSFORMS[name]
    for seed in range(10):
        result = transform(example(picture("square")), np.random.default_rng(seed))
        assert {key: value.dtype for key, value in result.items()} == {
            "image": np.uint8,
            "label": np.int32,
            "index": np.int32,
            "erase_box": np.int32,
            "erase_seed": np.uint32,
        }
        assert result["image"].shape == (*transform.crop.size, 3)
        assert result["label"] == 3 and result["index"] == 70 and result["erase_box"].shape == (4,)
        assert bool(result["erase_seed"]) == bool(result["erase_box"].any())


def test_entries_of_an_evaluation_example():
    result = eval_transform(16)(example(picture("square")), np.random.default_rng(0))
    assert result.keys() == {"image", "label"}
    assert result["image"].dtype == np.uint8 and result["label"].dtype == np.int32


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: eval_transform(8, interpolation="bicubik"),
            "interpolation.*'bicubik'.*did you mean 'bicubic'",
        ),
        (lambda: eval_transform(8, interpolation="random"), "interpolation.*'random'"),
        (lambda: train_transform(8, interpolation="randon"), "interpolation.*did you mean 'random'"),
        (
            lambda: train_transform(8, interpolation="lanczos", auto_augment="rand"),
            "'lanczos' can only resize; with auto_augment take one of 'nearest', 'bilinear', 'bicubic'",
        ),
        (
            lambda: random_crop_pad(8, pad=1, rotate=5.0, interpolation="box"),
            "'box' can only resize; with rotate",
        ),
        (lambda: eval_transform(8, crop_mode="centre"), "crop_mode.*'centre'.*did you mean 'center'"),
        (lambda: eval_transform(8, 0.0), "crop_pct.*above 0.*got 0"),
        (lambda: eval_transform((8, 0)), r"size.*at least 1 pixel.*got \(8, 0\)"),
        (lambda: train_transform(8, scale=(1.0, 0.5)), r"scale.*low <= high.*got \(1.0, 0.5\)"),
        (lambda: train_transform(8, ratio=(0.0, 0.5)), "ratio.*0 < low"),
        (lambda: train_transform(8, hflip=1.5), "hflip.*from 0 to 1, got 1.5"),
        (lambda: train_transform(8, erase_prob=-0.1), "erase_prob.*from 0 to 1"),
        (lambda: train_transform(8, color_jitter=(0.4, 0.4)), "color_jitter.*three"),
        (lambda: train_transform(8, mean=(0.5, 0.5)), "mean.*three"),
        (lambda: train_transform(8, auto_augment="augmix-m5"), "auto_augment.*'augmix'.*known: rand"),
        (lambda: train_transform(8, auto_augment="rand-mst0.5"), "section 'mst0.5'.*did you mean 'mstd'"),
        (lambda: train_transform(8, auto_augment="rand-q7"), "section 'q7'.*known: inc, m, mmax"),
        (lambda: train_transform(8, auto_augment="rand-n2.5"), "section 'n2.5'.*whole number"),
        (lambda: train_transform(8, auto_augment="rand-p7"), "p in 'rand-p7'.*from 0 to 1"),
        (lambda: RandAugment((0,), (), ("Rotat",)), "ops.*'Rotat'.*did you mean 'Rotate'"),
        (lambda: random_crop_pad(8, pad=8), r"pad.*less than size=\(8, 8\), got 8"),
        (lambda: random_crop_pad(8, pad=1, rotate=-3.0), "rotate.*got -3"),
        (lambda: random_crop_pad(8, pad=1, zoom=(0.0, 1.0)), "zoom.*0 < low"),
        (lambda: random_crop_pad(8, pad=1, fill=300), "fill.*0 to 255, got 300"),
        (lambda: eval_transform(8).pixels(np.zeros((8, 8, 3))), "image.*uint8.*got float64"),
        (
            lambda: eval_transform(8).pixels(picture("grey")),
            r"image.*, 3\), as `mean`.*uint8 of shape \(45, 38, 1",
        ),
        (
            lambda: TRANSFORMS["small"](example(picture("grey")), np.random.default_rng(0)),
            r"image.*\(45, 38, 1",
        ),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
