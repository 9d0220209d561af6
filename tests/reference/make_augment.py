"""Writes the augmentation references: what timm makes of small images, given the same random numbers.

    pip install -e '.[parity]' torchvision
    python -m tests.reference.make_augment

Everything random in timm's transforms is made to come from one numpy generator per case, so that pixels and
boxes can be compared whole. Inputs and case tables (JSON) are stored beside the outputs. Written with timm
1.0.31, torch 2.13.0, torchvision 0.29.2, Pillow 13.0.0 and numpy 2.4.6.
"""

import contextlib
import itertools
import json
import math
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, mixup, random_erasing, transforms, transforms_factory
from torchvision.transforms import transforms as torchvision_transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECIPE = "rand-m9-mstd0.5-inc1"


def picture(height: int, width: int, channels: int, seed: int) -> np.ndarray:
    """Waves, an edge and some noise: every histogram level in use, nothing symmetric."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    phase = rng.uniform(0, 6, channels)
    waves = np.sin(9 * x[..., None] + 5 * y[..., None] ** 2 + phase) * 90 + 120
    waves[height // 3 :, : width // 4] += 40
    return np.clip(waves + rng.normal(0, 6, waves.shape), 0, 255).astype(np.uint8)


PICTURES = {
    "landscape": picture(41, 67, 3, 0),
    "portrait": picture(70, 33, 3, 1),
    "square": picture(48, 48, 3, 2),
    "panorama": picture(12, 95, 3, 3),
    "tiny": picture(9, 7, 3, 4),
    "grey": picture(45, 38, 1, 5),
    "patch": picture(13, 11, 3, 6),
    "grey_patch": picture(13, 11, 1, 7),
}


def pil(name: str) -> Image.Image:
    return Image.fromarray(PICTURES[name].squeeze())


def pixels(image: Image.Image | torch.Tensor) -> np.ndarray:
    if isinstance(image, torch.Tensor):
        return image.permute(1, 2, 0).numpy()
    array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]


class Stream:
    """Stands for the modules `random` and `np.random` in timm's code."""

    def __init__(self, rng: np.random.Generator):
        self.random, self.gauss = rng.random, rng.normal
        self.rng = rng

    def uniform(self, low, high):
        return low + (high - low) * self.random()

    def randint(self, low, high):
        return low + int(self.random() * (high - low + 1))

    def choice(self, options, count=None, replace=True, p=None):
        if count is None:
            return options[int(self.random() * len(options))]
        return [self.choice(options) for _ in range(count)]

    def jitter_params(self, *ranges):
        order = [*self.rng.permutation(3).tolist(), 3]
        return order, *(None if r is None else self.uniform(*r) for r in ranges)


@contextlib.contextmanager
def seeded(seed: int):
    stream = Stream(np.random.default_rng(seed))
    jitter = torchvision_transforms.ColorJitter
    with contextlib.ExitStack() as stack:
        for module in (transforms, auto_augment, random_erasing):
            stack.enter_context(mock.patch.object(module, "random", stream))
        stack.enter_context(mock.patch.object(auto_augment, "np", types.SimpleNamespace(random=stream)))
        stack.enter_context(mock.patch.object(torch, "rand", lambda _: torch.tensor([stream.random()]).double()))
        stack.enter_context(mock.patch.object(jitter, "get_params", staticmethod(stream.jitter_params)))
        yield


def eval_cases() -> tuple[list[dict], list[np.ndarray]]:
    cases = [
        {
            "image": image,
            "size": size,
            "crop_pct": crop_pct,
            "interpolation": "bicubic",
            "crop_mode": "center",
        }
        for image in ("landscape", "portrait", "square", "panorama", "tiny", "grey")
        for size, crop_pct in ((22, 0.95), (23, 0.875), ((20, 27), 0.9))
    ]
    cases += [
        {"image": "landscape", "size": 21, "crop_pct": 0.9, "interpolation": name, "crop_mode": "center"}
        for name in ("nearest", "bilinear", "box", "hamming", "lanczos")
    ]
    cases += [
        {"image": image, "size": size, "crop_pct": crop_pct, "interpolation": "bilinear", "crop_mode": mode}
        for image in ("landscape", "portrait")
        for size, crop_pct in ((20, 1.0), (20, 1.15), ((19, 26), 0.9))
        for mode in ("center", "squash", "border")
    ]
    results = []
    for case in cases:
        transform = transforms_factory.transforms_imagenet_eval(
            img_size=case["size"],
            crop_pct=case["crop_pct"],
            crop_mode=case["crop_mode"],
            interpolation=case["interpolation"],
            mean=MEAN,
            normalize=False,
        )
        results.append(pixels(transform(pil(case["image"]))))
    return cases, results


def op_cases() -> tuple[list[dict], list[np.ndarray]]:
    names = sorted({*auto_augment._RAND_TRANSFORMS, *auto_augment._RAND_INCREASING_TRANSFORMS})
    cases, results = [], []
    for name, image, level, sign in itertools.product(names, ("patch", "grey_patch"), (0.0, 3.7, 9.0, 10.0), (1, -1)):
        if (name, level) in (("Posterize", 0.0), ("PosterizeIncreasing", 10.0)):
            continue  # 0 bits, which Pillow 13 refuses; the test has the closed form
        fill = (124, 116, 104) if image == "patch" else (110,)
        hparams = {"img_mean": fill if len(fill) > 1 else fill[0], "interpolation": Image.Resampling.BICUBIC}
        op = auto_augment.AugmentOp(name, prob=1.0, magnitude=level, hparams=hparams)
        with mock.patch.object(auto_augment.random, "random", lambda sign=sign: 0.5 - 0.25 * sign):
            result = pixels(op(pil(image)))
        if sign < 0 and np.array_equal(result, results[-1]):
            continue
        cases.append({"name": name, "image": image, "level": level, "sign": sign, "fill": fill})
        results.append(result)
    return cases, results


def train_cases() -> tuple[list[dict], list[np.ndarray], list[list[int]]]:
    settings = [
        {"interpolation": "bicubic", "auto_augment": RECIPE, "hflip": 0.5, "vflip": 0.3, "erase_prob": 0.7},
        {"interpolation": "random", "auto_augment": "rand-n3-m7-p0.8", "hflip": 0.5, "erase_prob": 0.5},
        {"interpolation": "random", "auto_augment": "rand-mstd101-m10-mmax20-inc1", "hflip": 0.0},
        {"interpolation": "bilinear", "color_jitter": 0.4, "hflip": 0.5, "erase_prob": 0.5},
        {
            "interpolation": "bicubic",
            "color_jitter": [0.4, 0.0, 0.8],
            "scale": [0.4, 0.9],
            "ratio": [0.5, 3.0],
        },
    ]
    images = ("landscape", "portrait", "square", "panorama")
    cases = [
        {
            "image": images[seed % 4],
            "size": 14 if seed % 2 else (11, 16),
            "seed": seed,
            "settings": settings[seed % 5],
        }
        for seed in range(60)
    ]
    results, boxes = [], []
    for case in cases:
        settings = dict(case["settings"])
        erase = random_erasing.RandomErasing(settings.pop("erase_prob", 0.0), device="cpu")
        transform = transforms_factory.transforms_imagenet_train(
            img_size=case["size"], mean=MEAN, normalize=False, **settings
        )
        with seeded(case["seed"]):
            results.append(pixels(transform(pil(case["image"]))))
            boxes.append(erased_box(erase, *results[-1].shape[:2]))
    return cases, results, boxes


def erased_box(erase: random_erasing.RandomErasing, height: int, width: int) -> list[int]:
    rows, columns = np.nonzero(erase(torch.ones(1, height, width))[0].numpy() == 0)
    if not rows.size:
        return [0, 0, 0, 0]
    return [int(v) for v in (rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1)]


def crop_boxes() -> tuple[list[dict], list[list[int]]]:
    cases, results = [], []
    shapes = ((41, 67), (9, 200), (300, 20), (5, 6))
    ranges = (((0.08, 1.0), (3 / 4, 4 / 3)), ((0.5, 1.5), (0.9, 1.1)))
    for seed, ((height, width), (scale, ratio)) in enumerate([*itertools.product(shapes, ranges)] * 6):
        image = Image.new("L", (width, height))
        with seeded(seed):
            box = transforms.RandomResizedCropAndInterpolation.get_params(image, scale, ratio)
        cases.append({"shape": (height, width), "scale": scale, "ratio": ratio, "seed": seed})
        results.append(list(box))
    return cases, results


def erase_boxes() -> tuple[list[dict], list[list[int]]]:
    cases, results = [], []
    for seed, (height, width) in enumerate([(32, 32), (8, 8), (20, 50), (3, 40)] * 10):
        with seeded(seed):
            results.append(erased_box(random_erasing.RandomErasing(0.8, device="cpu"), height, width))
        cases.append({"shape": (height, width), "seed": seed})
    return cases, results


def cutmix_boxes() -> tuple[list[dict], list[list[float]]]:
    rng = np.random.default_rng(0)
    cases, results = [], []
    for height, width in [(32, 32), (8, 8), (24, 40), (17, 13)] * 10:
        lam, y, x = float(np.float32(rng.beta(1, 1))), int(rng.integers(height)), int(rng.integers(width))
        with mock.patch.object(mixup.np.random, "randint", mock.Mock(side_effect=[y, x])):
            box, left = mixup.cutmix_bbox_and_lam((3, height, width), lam)
        cases.append({"shape": (height, width), "lam": lam, "center": (y, x)})
        results.append([*map(int, box), float(left)])
    return cases, results


def main() -> None:
    arrays, tables = {f"picture/{name}": array for name, array in PICTURES.items()}, {}
    *train, arrays["train_boxes"] = train_cases()
    for kind, (cases, results) in {"eval": eval_cases(), "op": op_cases(), "train": train}.items():
        tables[kind] = [{**case, "shape": result.shape} for case, result in zip(cases, results)]
        arrays[f"{kind}_pixels"] = np.concatenate([result.ravel() for result in results])
    tables["crop_box"], arrays["crop_boxes"] = crop_boxes()
    tables["erase_box"], arrays["erase_boxes"] = erase_boxes()
    tables["cutmix_box"], arrays["cutmix_boxes"] = cutmix_boxes()
    to_tensor = torchvision_transforms.Compose(
        [torchvision_transforms.ToTensor(), torchvision_transforms.Normalize(MEAN, STD)]
    )
    arrays["normalized"] = pixels(to_tensor(pil("patch")))
    arrays["smooth_targets"] = mixup.mixup_target(torch.tensor([2, 0, 4, 2]), 5, 1.0, 0.1).numpy()
    assert math.isclose(arrays["smooth_targets"].sum(), 4, rel_tol=1e-6)
    path = Path(__file__).parent / "augment.npz"
    np.savez_compressed(path, tables=json.dumps(tables), **arrays)
    print(path, path.stat().st_size, {kind: len(cases) for kind, cases in tables.items()})


if __name__ == "__main__":
    main()
