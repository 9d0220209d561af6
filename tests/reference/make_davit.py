"""Writes the DaViT parity references: outputs and gradients of timm's and of the authors' code in float64.

    pip install -e '.[parity]'
    git clone https://github.com/dingmyu/davit official
    python -m tests.reference.make_davit --official official

Weights and images come from `weights.py`, so the files hold outputs only: logits whole, stage outputs and
gradients as norms and samples. Written with timm 1.0.31, torch 2.13.0 and dingmyu/davit at fc79470.
"""

import argparse
import importlib
import json
import re
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import timm
import torch
from timm.models import davit as timm_davit

from tests.reference.weights import pseudo_images, pseudo_normal, pseudo_weights, sample

HERE = Path(__file__).parent
SIZES = ((224, 224), (225, 231), (230, 197))
DEPTHS = {"davit_tiny": (1, 1, 3, 1), "davit_small": (1, 1, 9, 1)}
DIMS, HEADS = (96, 192, 384, 768), (3, 6, 12, 24)
STAGE_SAMPLES, GRADIENT_SAMPLES, OP_SAMPLES = 256, 64, 512

# Of these parameters (timm's names; {last} is the last pair of stage 2) single gradient entries are stored,
# of all others the norm only.
SAMPLED_GRADIENTS = (
    "stem.conv.weight",
    "stem.conv.bias",
    "stem.norm.weight",
    "stages.0.blocks.0.0.cpe1.proj.weight",
    "stages.0.blocks.0.0.attn.qkv.weight",
    "stages.0.blocks.0.0.attn.qkv.bias",
    "stages.0.blocks.0.1.norm1.bias",
    "stages.0.blocks.0.1.attn.qkv.weight",
    "stages.0.blocks.0.1.attn.qkv.bias",
    "stages.1.downsample.norm.weight",
    "stages.1.downsample.conv.weight",
    "stages.1.blocks.0.1.attn.proj.weight",
    "stages.2.blocks.{last}.0.attn.qkv.weight",
    "stages.2.blocks.{last}.0.attn.qkv.bias",
    "stages.2.blocks.{last}.0.mlp.fc1.weight",
    "stages.2.blocks.{last}.1.cpe2.proj.weight",
    "stages.2.blocks.{last}.1.attn.qkv.weight",
    "stages.3.downsample.conv.weight",
    "stages.3.blocks.0.0.attn.qkv.bias",
    "stages.3.blocks.0.1.attn.qkv.weight",
    "stages.3.blocks.0.1.mlp.fc2.bias",
    "head.norm.weight",
    "head.fc.weight",
    "head.fc.bias",
)
OFFICIAL_NAMES = (
    (r"^stem\.conv", "patch_embeds.0.proj"),
    (r"^stem", "patch_embeds.0"),
    (r"^stages\.(\d)\.downsample\.conv", r"patch_embeds.\1.proj"),
    (r"^stages\.(\d)\.downsample", r"patch_embeds.\1"),
    (r"^stages\.(\d)\.blocks", r"main_blocks.\1"),
    (r"cpe1", "cpe.0"),
    (r"cpe2", "cpe.1"),
    (r"^head\.norm", "norms"),
    (r"^head\.fc", "head"),
)
FLORENCE_NAMES = (
    (r"^stem\.conv", "convs.0.proj"),
    (r"^stem", "convs.0"),
    (r"^stages\.(\d)\.downsample\.conv", r"convs.\1.proj"),
    (r"^stages\.(\d)\.downsample", r"convs.\1"),
    (r"^stages\.(\d)\.blocks", r"blocks.\1"),
    (r"spatial_block\.norm1", "spatial_block.window_attn.norm"),
    (r"spatial_block\.attn", "spatial_block.window_attn.fn"),
    (r"channel_block\.norm1", "channel_block.channel_attn.norm"),
    (r"channel_block\.attn", "channel_block.channel_attn.fn"),
    (r"norm2", "ffn.norm"),
    (r"mlp", "ffn.fn.net"),
    (r"cpe(\d)\.proj", r"conv\1.fn.dw"),
    (r"^", "vision_tower."),
)


def renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def official_class(checkout: Path) -> type[torch.nn.Module]:
    """The authors' DaViT, with today's timm in place of the old one in which their file lies."""
    package = types.ModuleType("official_davit")
    package.__path__ = [str(checkout / "timm" / "models")]
    stand_ins = {
        "helpers": dict(build_model_with_cfg=None, overlay_external_default_cfg=None),
        "layers": {name: getattr(timm.layers, name) for name in ("DropPath", "to_2tuple", "trunc_normal_")},
        "registry": dict(register_model=lambda function: function),
        "vision_transformer": dict(checkpoint_filter_fn=None, _init_vit_weights=lambda module: None),
    }
    sys.modules[package.__name__] = package
    for name, attributes in stand_ins.items():
        module = types.ModuleType(f"{package.__name__}.{name}")
        vars(module).update(attributes)
        sys.modules[module.__name__] = module
    return importlib.import_module(f"{package.__name__}.davit").DaViT


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def tensors(weights: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in weights.items()}


def tap(modules: Iterable[torch.nn.Module], to_nhwc: Callable) -> list[torch.Tensor]:
    """A list to which each later forward pass appends the outputs of `modules` as (B, H, W, C)."""
    features = []
    for module in modules:
        module.register_forward_hook(lambda _, __, output: features.append(to_nhwc(output)))
    return features


def timm_tap(model: torch.nn.Module) -> list[torch.Tensor]:
    return tap((model.stem, *model.stages), lambda output: output.permute(0, 2, 3, 1))


def official_tap(model: torch.nn.Module) -> list[torch.Tensor]:
    last_pairs = [pairs[-1] for pairs in model.main_blocks]
    return tap((model.patch_embeds[0], *last_pairs), lambda output: output[0].unflatten(1, output[1]))


def measured_stages(features: list[torch.Tensor]) -> dict[str, np.ndarray]:
    record = {}
    for index, feature in enumerate(features):
        array = feature.detach().numpy()
        key = f"features{index}"
        record[f"{key}/shape"] = np.asarray(array.shape)
        record[f"{key}/mean_rms"] = np.asarray([array.mean(), np.sqrt(np.square(array).mean())])
        record[f"{key}/sample"] = sample(key, array, STAGE_SAMPLES).astype(np.float32)
    return record


def measured_gradients(
    gradients: dict[str, torch.Tensor], sampled: tuple[str, ...], count: int
) -> dict[str, np.ndarray]:
    record = {"gradient_norms": np.asarray([gradients[name].norm().item() for name in sorted(gradients)])}
    for name in sampled:
        record[f"gradient/{name}"] = sample(name, gradients[name].numpy(), count).astype(np.float32)
    return record


def classifier_record(
    model: torch.nn.Module, features: list[torch.Tensor], sampled: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Logits, tapped features and gradients of sum(logits * direction) at every size, batch 2."""
    shapes = shapes_of(model)
    model.load_state_dict(tensors(pseudo_weights(shapes)))
    model.double().eval()
    record = {"shapes": np.asarray(json.dumps(shapes))}
    for height, width in SIZES:
        images = torch.from_numpy(pseudo_images((2, height, width, 3))).double().permute(0, 3, 1, 2)
        features.clear()
        model.zero_grad()
        logits = model(images)
        (logits * torch.from_numpy(pseudo_normal("direction", tuple(logits.shape)))).sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        values = {
            "logits": logits.detach().numpy(),
            **measured_stages(features),
            **measured_gradients(gradients, sampled, GRADIENT_SAMPLES),
        }
        record |= {f"{height}x{width}/{key}": value for key, value in values.items()}
        spread = ", ".join(f"{feature.std():.2f}" for feature in (*features, logits))
        print(f"{height}x{width}: standard deviations of stem, stages, logits: {spread}", file=sys.stderr)
    return record


def florence_record(size: tuple[int, int]) -> dict[str, np.ndarray]:
    """davit_base_fl under Florence-2's names; they hold no head norm, which stays at scale 1 and bias 0."""
    model = timm.create_model("davit_base_fl", num_classes=0)
    shapes = {
        renamed(name, FLORENCE_NAMES): shape
        for name, shape in shapes_of(model).items()
        if not name.startswith("head.norm")
    }
    loaded = timm_davit.checkpoint_filter_fn(tensors(pseudo_weights(shapes)), model)
    left = model.load_state_dict(loaded, strict=False)
    if left.unexpected_keys or left.missing_keys != ["head.norm.weight", "head.norm.bias"]:
        raise SystemExit(f"the Florence-2 names do not invert timm's renaming: {left}")
    model.double().eval()
    images = torch.from_numpy(pseudo_images((2, *size, 3))).double().permute(0, 3, 1, 2)
    with torch.no_grad():
        features = timm_tap(model)
        pooled = model(images)
    return {
        "shapes": np.asarray(json.dumps(shapes)),
        "size": np.asarray(size),
        "pooled": pooled.numpy(),
        **measured_stages(features),
    }


def attention_record(block: torch.nn.Module, height: int, width: int, input_scale: float) -> dict[str, np.ndarray]:
    """What timm's block adds to its input when all but its attention is put out of action.

    With the position convolutions and the last MLP layer zero and no norm, what is left is
    output = input + projection(attention(input)), padding and cropping included.
    """
    shapes = shapes_of(block.attn)
    block.attn.load_state_dict(tensors(pseudo_weights(shapes)))
    block.norm1 = torch.nn.Identity()
    for silent in (block.cpe1.proj, block.cpe2.proj, block.mlp.fc2):
        torch.nn.init.zeros_(silent.weight)
        torch.nn.init.zeros_(silent.bias)
    block.double().eval()
    channels = shapes["proj.bias"][0]
    images = torch.from_numpy(pseudo_images((1, height, width, channels)) * input_scale).double()
    images.requires_grad_()
    output = block(images.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) - images
    direction = torch.from_numpy(pseudo_normal("direction", tuple(output.shape)))
    (output * direction).sum().backward()
    gradients = {name: parameter.grad for name, parameter in block.attn.named_parameters()}
    gradients["input"] = images.grad
    array = output.detach().numpy()
    return {
        "shapes": np.asarray(json.dumps(shapes)),
        "input_shape": np.asarray(images.shape),
        "input_scale": np.asarray(input_scale),
        "output": sample("output", array, OP_SAMPLES),
        **measured_gradients(gradients, tuple(gradients), OP_SAMPLES),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", type=Path, required=True, help="a checkout of github.com/dingmyu/davit")
    official = official_class(parser.parse_args().official)

    for variant, depths in DEPTHS.items():
        sampled = tuple(name.format(last=depths[2] - 1) for name in SAMPLED_GRADIENTS)
        model = timm.create_model(variant)
        record = classifier_record(model, timm_tap(model), sampled)
        np.savez_compressed(HERE / f"{variant}_timm.npz", **record)
        sampled = tuple(renamed(name, OFFICIAL_NAMES) for name in sampled)
        model = official(depths=depths, embed_dims=DIMS, num_heads=HEADS)
        record = classifier_record(model, official_tap(model), sampled)
        np.savez_compressed(HERE / f"{variant}_official.npz", **record)

    np.savez_compressed(HERE / "davit_base_fl_florence2.npz", **florence_record((100, 75)))
    spatial_block = timm_davit.SpatialBlock(96, num_heads=3, window_size=7)
    channel_block = timm_davit.ChannelBlock(96, num_heads=3, qkv_bias=True)
    window = attention_record(spatial_block, 17, 23, input_scale=1)
    # The logits are sums over 3136 tokens: at scale 1 the softmax would only ever pick one channel.
    channel = attention_record(channel_block, 56, 56, input_scale=0.2)
    np.savez_compressed(
        HERE / "davit_ops.npz",
        **{f"window/{key}": value for key, value in window.items()},
        **{f"channel/{key}": value for key, value in channel.items()},
    )


if __name__ == "__main__":
    main()
