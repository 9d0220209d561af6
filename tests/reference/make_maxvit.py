"""Writes the MaxViT parity references: outputs, gradients and batch statistics of timm's code in float64.

    pip install -e '.[parity]'
    python -m tests.reference.make_maxvit

Weights and images come from `weights.py`, so the files hold outputs only. timm's `maxvit_*_tf_*` models were compared
with github.com/google-research/maxvit at 70a4707 under TensorFlow 2.15: logits within 2e-6, at 384 pixels only with
the official graph's bilinear resize of the 13 x 13 bias tables, which `enlarged` stands for. Written with timm 1.0.31
and torch 2.13.0.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import timm
import torch
from timm.layers.pos_embed_rel import RelPosMlp, resize_rel_pos_bias_table

from tests.reference.make_davit import measured_gradients, measured_stages, shapes_of, tensors, timm_tap
from tests.reference.weights import pseudo_images, pseudo_normal, pseudo_weights

HERE = Path(__file__).parent
GRADIENT_SAMPLES = 64
# Small enough for quick tests, with every kind of block: with and without stride, with and without a change of width.
REDUCED = dict(
    depths=(1, 2),
    embed_dim=(32, 64),
    stem_width=32,
    head_hidden_size=64,
    num_classes=50,
    transformer_partition_ratio=8,
)

SAMPLED_GRADIENTS = (
    "stem.conv1.weight",
    "stem.conv1.bias",
    "stem.norm1.weight",
    "stem.norm1.bias",
    "stem.conv2.weight",
    "stages.0.blocks.0.conv.pre_norm.weight",
    "stages.0.blocks.0.conv.conv1_1x1.weight",
    "stages.0.blocks.0.conv.norm1.bias",
    "stages.0.blocks.0.conv.conv2_kxk.weight",
    "stages.0.blocks.0.conv.norm2.weight",
    "stages.0.blocks.0.conv.se.fc1.weight",
    "stages.0.blocks.0.conv.se.fc2.bias",
    "stages.0.blocks.0.conv.conv3_1x1.weight",
    "stages.0.blocks.0.attn_block.norm1.weight",
    "stages.0.blocks.0.attn_block.attn.qkv.weight",
    "stages.0.blocks.0.attn_block.attn.qkv.bias",
    "stages.0.blocks.0.attn_block.attn.rel_pos.relative_position_bias_table",
    "stages.0.blocks.0.attn_block.mlp.fc1.weight",
    "stages.0.blocks.0.attn_grid.attn.rel_pos.relative_position_bias_table",
    "stages.0.blocks.0.attn_grid.attn.proj.weight",
    "stages.1.blocks.0.conv.shortcut.expand.weight",
    "stages.1.blocks.0.conv.shortcut.expand.bias",
    "stages.1.blocks.1.attn_block.attn.qkv.weight",
    "stages.1.blocks.1.attn_grid.mlp.fc2.bias",
    "stages.1.blocks.1.attn_block.attn.rel_pos.relative_position_bias_table",
    "stages.1.blocks.1.attn_grid.attn.rel_pos.relative_position_bias_table",
    "stages.1.blocks.1.attn_grid.attn.qkv.weight",
    "stages.0.blocks.0.attn_block.attn.rel_pos.mlp.fc1.weight",
    "stages.1.blocks.0.attn_grid.attn.rel_pos.mlp.fc2.weight",
    "stages.1.blocks.0.attn_grid.ls1.gamma",
    "norm.weight",
    "head.norm.weight",
    "head.pre_logits.fc.weight",
    "head.fc.weight",
    "head.fc.bias",
)


def enlarged(weights: Mapping[str, np.ndarray], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights with every bias table resized to the model's, as the official graph does it."""
    shapes = shapes_of(model)
    state = tensors(weights)
    for name, value in state.items():
        if value.shape != shapes[name]:
            side = shapes[name][1:]
            state[name] = torch.nn.functional.interpolate(
                value[None].double(), size=side, mode="bilinear", align_corners=False
            )[0]
    return state


def prepared(
    image_size, weights: Mapping[str, np.ndarray], name: str = "maxvit_tiny_tf_224", **fields
) -> torch.nn.Module:
    """The model for an image size with these weights, in float64 and evaluation mode."""
    model = timm.create_model(name, img_size=image_size, **fields).double().eval()
    model.load_state_dict(enlarged(weights, model))
    for module in model.modules():
        if isinstance(module, RelPosMlp):
            # timm takes these logarithms in float32.
            offsets = module.rel_coords_log.abs().expm1().round() * module.rel_coords_log.sign()
            module.rel_coords_log.copy_(offsets.sign() * offsets.abs().log1p())
    return model


def nchw(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(pseudo_images((2, height, width, 3))).double().permute(0, 3, 1, 2)


def outputs(model: torch.nn.Module, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Logits and features."""
    features = timm_tap(model)
    with torch.no_grad():
        logits = model(nchw(*size))
    spread = ", ".join(f"{feature.std():.2f}" for feature in (*features, logits))
    print(f"{size}: standard deviations of stem, stages, logits: {spread}", file=sys.stderr)
    return {"logits": logits.numpy(), **measured_stages(features)}


def gradients(model: torch.nn.Module, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Of sum(logits * direction), single entries of those of `SAMPLED_GRADIENTS` that the model has."""
    model.zero_grad()
    logits = model(nchw(*size))
    (logits * torch.from_numpy(pseudo_normal("direction", tuple(logits.shape)))).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    sampled = tuple(name for name in SAMPLED_GRADIENTS if name in found)
    return measured_gradients(found, sampled, GRADIENT_SAMPLES)


def training(model: torch.nn.Module, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Logits with the batch's statistics, and the means and (biased) variances of the batch at every norm."""
    statistics = {}

    def note(name):
        def hook(_, inputs):
            x = inputs[0]
            statistics[f"batch/{name}.mean"] = x.mean((0, 2, 3)).numpy()
            statistics[f"batch/{name}.var"] = x.var((0, 2, 3), unbiased=False).numpy()

        return hook

    model.train()
    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.BatchNorm2d)
    ]
    with torch.no_grad():
        logits = model(nchw(*size))
    for hook in hooks:
        hook.remove()
    model.eval()
    return {"logits": logits.numpy(), **statistics}


def under(prefix: str, record: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{prefix}/{key}": value for key, value in record.items()}


def shapes_and_weights(
    name: str = "maxvit_tiny_tf_224", **fields
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What the record says of the weights, and the weights."""
    shapes = shapes_of(timm.create_model(name, **fields))
    return {"shapes": np.asarray(json.dumps(shapes))}, pseudo_weights(shapes)


def main() -> None:
    record, weights = shapes_and_weights()
    square = prepared(224, weights)
    record |= under("224x224", outputs(square, (224, 224)) | gradients(square, (224, 224)))
    record |= under("224x448", outputs(square, (224, 448)))
    record |= under("384x384", outputs(prepared(384, weights), (384, 384)))
    np.savez_compressed(HERE / "maxvit_tiny_timm.npz", **record)

    # Tables for windows of 7 x 7 again, resized for 6 x 6 and 12 x 12.
    record, weights = shapes_and_weights(img_size=56, **REDUCED)
    for side in (48, 96):
        record |= under(f"{side}x{side}", outputs(prepared(side, weights, **REDUCED), (side, side)))
    np.savez_compressed(HERE / "maxvit_reduced_timm.npz", **record)

    # Windows of 2 x 3 tokens.
    record, weights = shapes_and_weights(img_size=(16, 24), **REDUCED)
    model = prepared((16, 24), weights, **REDUCED)
    record |= under("32x24", outputs(model, (32, 24)) | gradients(model, (32, 24)))
    record |= under("training", training(model, (32, 24)))
    np.savez_compressed(HERE / "maxvit_oblong_timm.npz", **record)

    # timm's own design: Swin's tables, then computed tables, layer scale and a hidden layer in the head.
    own = {key: value for key, value in REDUCED.items() if key not in ("stem_width", "head_hidden_size")}
    own |= dict(stem_width=(16, 32))
    for key, name, more in (
        ("rw", "maxvit_tiny_rw_224", dict()),
        ("rmlp", "maxvit_rmlp_small_rw_224", dict(head_hidden_size=64)),
    ):
        record, weights = shapes_and_weights(name, img_size=(16, 24), **own, **more)
        model = prepared((16, 24), weights, name, **own, **more)
        record |= under("32x24", outputs(model, (32, 24)) | gradients(model, (32, 24)))
        np.savez_compressed(HERE / f"maxvit_{key}_timm.npz", **record)

    table = pseudo_normal("table", (2, 13, 13))
    resized = {}
    for window in ((12, 12), (16, 16), (4, 4), (7, 14)):
        sides = tuple(2 * side - 1 for side in window)
        key = "x".join(map(str, sides))
        for method in ("bilinear", "bicubic"):
            how = dict(size=sides, mode=method, align_corners=False)
            resized[f"{method}/{key}"] = torch.nn.functional.interpolate(torch.from_numpy(table)[None], **how)[0]
        resized[f"geometric/{key}"] = resize_rel_pos_bias_table(torch.from_numpy(table).float(), window, (2, *sides))
    np.savez_compressed(HERE / "tables.npz", **{key: value.numpy() for key, value in resized.items()})


if __name__ == "__main__":
    main()
