"""Writes the BiFormer parity references: outputs, gradients and routes of the authors' code in float64.

    pip install -e '.[parity]' einops
    git clone https://github.com/rayleizhu/BiFormer official
    python -m tests.reference.make_biformer --official official

Weights and images come from `weights.py`, so the files hold outputs only: logits whole, stage outputs and gradients as
norms and samples, of every routed block the sets of chosen regions and how far the last of them is from the next best.
Written with torch 2.13.0, timm 1.0.31 in place of the old one that the code imports, and rayleizhu/BiFormer at
1697bbb.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from tests.reference.weights import pseudo_images, pseudo_normal, pseudo_weights, sample

HERE = Path(__file__).parent
STAGE_SAMPLES, GRADIENT_SAMPLES, OP_SAMPLES = 256, 64, 256
# Images are those of the first seed whose closest choice is no closer than this: float32 then chooses the same.
LEAST_GAP = 2e-5
# Regions that are all padding are the same, and equally good choices.
TIE = 1e-12

SHORT = dict(depth=[1, 1, 2, 1], num_classes=10, embed_dim=[32, 64, 128, 256])
LEGACY = dict(
    n_win=7,
    kv_downsample_mode="identity",
    topks=[1, 4, 16, -2],
    qk_dims=SHORT["embed_dim"],
    head_dim=32,
    mlp_ratios=[3] * 4,
)
STL = dict(mlp_ratios=[4] * 4, head_dim=32, norm_layer=torch.nn.BatchNorm2d, n_wins=[7] * 4)
# Module, class, its arguments, and the sizes of the images; gradients are stored for the first.
MODELS: dict[str, tuple[str, str, dict[str, Any], tuple[tuple[int, int], ...]]] = {
    "auto_pad": ("biformer", "BiFormer", {**LEGACY, **SHORT, "auto_pad": True}, ((64, 64), (225, 257), (5, 6))),
    "codes": (
        "biformer",
        "BiFormer",
        {
            **LEGACY,
            **SHORT,
            "topks": [0, 4, -1, -2],
            "kv_downsample_mode": "ada_avgpool",
            "kv_per_wins": [2, 2, 2, 2],
            "soft_routing": True,
            "diff_routing": True,
            "param_routing": True,
        },
        ((224, 112),),
    ),
    "stl": ("biformer_stl", "BiFormerSTL", {**STL, **SHORT, "topks": [1, 4, 16, -2]}, ((112, 112),)),
    "stl_nchw": (
        "biformer_stl_nchw",
        "nchwBiFormerSTL",
        {**STL, **SHORT, "topks": [1, 4, 16, -1]},
        ((157, 120), (112, 112)),
    ),
}
# Arguments of the attention module, and the map: 42 x 35 tokens are 49 regions of 6 x 5.
MODULES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "identity": (dict(), (42, 35)),
    "ada_avgpool": (dict(kv_downsample_mode="ada_avgpool", kv_per_win=4), (42, 35)),
    "ada_maxpool": (dict(kv_downsample_mode="ada_maxpool", kv_per_win=4), (42, 35)),
    "avgpool": (dict(kv_downsample_mode="avgpool", kv_downsample_ratio=2), (42, 35)),
    "maxpool": (dict(kv_downsample_mode="maxpool", kv_downsample_ratio=2), (42, 35)),
    "soft": (dict(soft_routing=True), (42, 35)),
    "soft_diff": (dict(soft_routing=True, diff_routing=True), (42, 35)),
    "soft_diff_param": (dict(soft_routing=True, diff_routing=True, param_routing=True), (42, 35)),
    "all_regions": (dict(topk=49), (42, 35)),
    "auto_pad": (dict(auto_pad=True), (40, 31)),
    "nchw": (dict(), (42, 35)),
    "nchw_ragged": (dict(), (44, 39)),
}


def official_modules(checkout: Path) -> dict[str, types.ModuleType]:
    """The authors' modules, with today's timm in place of the old one, and nothing in place of fairscale."""
    stand_ins = {
        "fairscale": {},
        "fairscale.nn": {},
        "fairscale.nn.checkpoint": dict(checkpoint_wrapper=None),
        "timm.models.layers": {
            name: getattr(timm.layers, name) for name in ("DropPath", "LayerNorm2d", "to_2tuple", "trunc_normal_")
        },
    }
    for name, attributes in stand_ins.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        sys.modules[name] = module
    sys.path.insert(0, str(checkout))
    names = ("models.biformer", "models.biformer_stl", "models.biformer_stl_nchw", "ops.bra_legacy", "ops.bra_nchw")
    return {name.split(".")[1]: importlib.import_module(name) for name in names}


@contextlib.contextmanager
def recorded_routes() -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Collects, of every choice made inside the block, the set chosen by each region and its gap to the next best."""
    routes, topk = [], torch.topk

    def recording(logits: torch.Tensor, k: int, dim: int):
        ordered = logits.detach().sort(dim, descending=True).values
        if k < logits.shape[dim]:
            gap = ordered[..., k - 1] - ordered[..., k]
        else:
            gap = torch.full(logits.shape[:-1], np.inf)
        values, chosen = topk(logits, k=k, dim=dim)
        routes.append((chosen.sort(dim).values.numpy().astype(np.uint8), gap.numpy().astype(np.float32)))
        return values, chosen

    torch.topk = recording
    try:
        yield routes
    finally:
        torch.topk = topk


def fill(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Gives a module its pseudo-random weights, in double precision and for evaluation; the shapes by name."""
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    weights = {name: torch.as_tensor(np.asarray(value)) for name, value in pseudo_weights(shapes).items()}
    module.load_state_dict(weights)
    module.double().eval()
    return shapes


def find_seed(run, shape: tuple[int, ...]) -> tuple[int, list[tuple[np.ndarray, np.ndarray]]]:
    """The first seed of images with which `run` makes no choice that is closer than `LEAST_GAP`, and its choices."""
    for seed in itertools.count():
        images = torch.from_numpy(pseudo_images(shape, seed)).double()
        with recorded_routes() as routes, torch.no_grad():
            run(images)
        gap = min((gap[gap > TIE].min(initial=np.inf) for _, gap in routes), default=np.inf)
        print(f"  seed {seed}: smallest gap {gap:.1e}", file=sys.stderr)
        if gap > LEAST_GAP:
            return seed, routes


def measured_routes(routes) -> dict[str, np.ndarray]:
    record = {}
    for index, (chosen, gap) in enumerate(routes):
        record |= {f"routes{index}/chosen": chosen, f"routes{index}/gap": gap}
    return record


def measured_gradients(gradients: dict[str, torch.Tensor], sampled, count: int) -> dict[str, np.ndarray]:
    record = {"gradient_norms": np.asarray([gradients[name].norm().item() for name in sorted(gradients)])}
    for name in sampled:
        record[f"gradient/{name}"] = sample(name, gradients[name].numpy(), count).astype(np.float32)
    return record


def model_record(model: torch.nn.Module, sizes, every: int) -> dict[str, np.ndarray]:
    """Logits, features, routes at every size; at the first also gradients, of each `every`-th parameter entries."""
    record = {"shapes": np.asarray(json.dumps(fill(model)))}
    features: list[np.ndarray] = []
    for module in (model.downsample_layers[0], *model.stages):
        module.register_forward_hook(lambda _, __, output: features.append(output.detach().permute(0, 2, 3, 1).numpy()))
    for height, width in sizes:
        shape = (1, height, width, 3)
        seed, routes = find_seed(lambda images: model(images.permute(0, 3, 1, 2)), shape)
        features.clear()
        images = torch.from_numpy(pseudo_images(shape, seed)).double()
        logits = model(images.permute(0, 3, 1, 2))
        values = {"seed": np.asarray(seed), "logits": logits.detach().numpy(), **measured_routes(routes)}
        for index, feature in enumerate(features):
            key = f"features{index}"
            values[f"{key}/shape"] = np.asarray(feature.shape)
            values[f"{key}/mean_rms"] = np.asarray([feature.mean(), np.sqrt(np.square(feature).mean())])
            values[f"{key}/sample"] = sample(key, feature, STAGE_SAMPLES).astype(np.float32)
        if (height, width) == sizes[0]:
            (logits * torch.from_numpy(pseudo_normal("direction", tuple(logits.shape)))).sum().backward()
            gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
            values |= measured_gradients(gradients, sorted(gradients)[::every], GRADIENT_SAMPLES)
        record |= {f"{height}x{width}/{key}": value for key, value in values.items()}
        spread = ", ".join(f"{part.std():.2f}" for part in (*features, logits))
        print(f"{height}x{width}: standard deviations of stem, stages, logits: {spread}", file=sys.stderr)
    return record


def module_record(module: torch.nn.Module, size: tuple[int, int], channels_first: bool) -> dict[str, np.ndarray]:
    """Output, routes and gradients of an attention module alone."""
    shapes = fill(module)
    shape = (2, *size, 64)

    def run(images: torch.Tensor) -> torch.Tensor:
        return module(images.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if channels_first else module(images)

    seed, routes = find_seed(run, shape)
    images = torch.from_numpy(pseudo_images(shape, seed)).double().requires_grad_()
    output = run(images)
    (output * torch.from_numpy(pseudo_normal("direction", shape))).sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    gradients["input"] = images.grad
    return {
        "shapes": np.asarray(json.dumps(shapes)),
        "size": np.asarray(size),
        "seed": np.asarray(seed),
        "output": sample("output", output.detach().numpy(), OP_SAMPLES),
        **measured_routes(routes),
        **measured_gradients(gradients, gradients, GRADIENT_SAMPLES),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", type=Path, required=True, help="a checkout of github.com/rayleizhu/BiFormer")
    official = official_modules(parser.parse_args().official)

    record = {}
    for name, (options, size) in MODULES.items():
        print(name, file=sys.stderr)
        channels_first = name.startswith("nchw")
        code = official["bra_nchw"].nchwBRA if channels_first else official["bra_legacy"].BiLevelRoutingAttention
        module = code(64, num_heads=2, n_win=7, **{"topk": 4, "side_dwconv": 5, **options})
        record |= {f"{name}/{key}": value for key, value in module_record(module, size, channels_first).items()}
    np.savez_compressed(HERE / "biformer_ops.npz", **record)

    record = {}
    for name, (module, code, options, sizes) in MODELS.items():
        print(name, file=sys.stderr)
        model = getattr(official[module], code)(**options)
        record |= {f"{name}/{key}": value for key, value in model_record(model, sizes, every=4).items()}
    np.savez_compressed(HERE / "biformer_short.npz", **record)

    print("biformer_tiny", file=sys.stderr)
    record = model_record(official["biformer"].biformer_tiny(num_classes=100), ((224, 224), (224, 448)), every=10)
    np.savez_compressed(HERE / "biformer_tiny_official.npz", **record)


if __name__ == "__main__":
    main()
