"""Writes the ViT parity references: outputs, gradients and attention weights of timm's ViT and DeiT in float64.

    pip install -e '.[parity]'
    python -m tests.reference.make_vit

Weights and images come from `weights.py`, so the files hold outputs only. Written with timm 1.0.31 and torch 2.13.0.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import timm
import torch
from timm.layers import resample_abs_pos_embed, set_fused_attn
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from tests.reference.make_davit import measured_gradients, measured_stages, shapes_of, tensors
from tests.reference.weights import pseudo_images, pseudo_normal, pseudo_weights, sample

HERE = Path(__file__).parent
GRADIENT_SAMPLES, POSITION_SAMPLES = 64, 256
# Small enough for quick tests. The middle one has no bias on queries, keys and values.
REDUCED = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=20)
MODELS = {
    "plain": (VisionTransformer, dict(REDUCED)),
    "distilled": (VisionTransformerDistilled, dict(REDUCED, qkv_bias=False)),
    "deit3": (VisionTransformer, dict(REDUCED, no_embed_class=True, init_values=1e-6)),
}
# Patches of other grids than the 4 x 4 that the weights are for.
OTHER_SIZE = (24, 56)

SAMPLED_GRADIENTS = (
    "cls_token",
    "dist_token",
    "pos_embed",
    "patch_embed.proj.weight",
    "patch_embed.proj.bias",
    "blocks.0.norm1.weight",
    "blocks.0.attn.qkv.weight",
    "blocks.0.attn.qkv.bias",
    "blocks.0.ls1.gamma",
    "blocks.1.attn.proj.weight",
    "blocks.1.norm2.bias",
    "blocks.1.ls2.gamma",
    "blocks.2.mlp.fc1.weight",
    "blocks.2.mlp.fc2.bias",
    "blocks.11.attn.qkv.weight",
    "norm.weight",
    "norm.bias",
    "head.weight",
    "head_dist.weight",
    "head_dist.bias",
)


def resampled(positions: torch.Tensor, grid: tuple[int, int], prefix: int, mode: str = "bicubic") -> torch.Tensor:
    """timm's resampling of `(1, prefix + side ** 2, D)` positions in float64; timm's own rounds to float32."""
    side = round((positions.shape[1] - prefix) ** 0.5)
    patches = positions[:, prefix:].double().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(patches, size=grid, mode=mode, antialias=True)
    found = torch.cat([positions[:, :prefix].double(), patches.flatten(2).transpose(1, 2)], dim=1)
    theirs = resample_abs_pos_embed(positions, grid, num_prefix_tokens=prefix, interpolation=mode)
    torch.testing.assert_close(found.float(), theirs.float(), rtol=1e-5, atol=1e-5)
    return found


def nchw(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(pseudo_images((2, height, width, 3))).double().permute(0, 3, 1, 2)


def outputs(model: VisionTransformer, blocks: Iterable[int]) -> dict[str, np.ndarray]:
    """Logits, what the classifier sees, gradients, and the maps of the stem and these blocks."""
    features = []

    def keep(_, __, tokens):
        grid = model.patch_embed.grid_size
        features.append(tokens[:, model.num_prefix_tokens :].unflatten(1, grid))

    for module in (model.norm_pre, *(model.blocks[i] for i in blocks)):
        module.register_forward_hook(keep)
    images = nchw(*model.patch_embed.img_size)
    model.zero_grad()
    logits = model(images)
    measured = measured_stages(features)
    (logits * torch.from_numpy(pseudo_normal("direction", tuple(logits.shape)))).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    sampled = tuple(name for name in SAMPLED_GRADIENTS if name in gradients)
    spread = ", ".join(f"{feature.std():.2f}" for feature in (*features, logits))
    print(f"{tuple(images.shape)}: standard deviations of stem, stages, logits: {spread}", file=sys.stderr)
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    return {
        "logits": logits.detach().numpy(),
        "pre_logits": pooled.numpy(),
        **measured,
        **measured_gradients(gradients, sampled, GRADIENT_SAMPLES),
    }


def attention_weights(model: VisionTransformer) -> np.ndarray:
    """The weights of every block, `(blocks, B, heads, tokens, tokens)`."""
    found = []
    for block in model.blocks:
        block.attn.attn_drop.register_forward_hook(lambda _, __, weights: found.append(weights))
    with torch.no_grad():
        model(nchw(*model.patch_embed.img_size))
    return torch.stack(found).numpy()


def loaded(kind: str, weights: dict[str, np.ndarray], **fields) -> VisionTransformer:
    """A reduced model with these weights, resampled where the model is of another size."""
    cls, own = MODELS[kind]
    model = cls(**{**own, **fields}).double().eval()
    state = tensors(weights)
    if state["pos_embed"].shape != model.pos_embed.shape:
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        state["pos_embed"] = resampled(state["pos_embed"], model.patch_embed.grid_size, prefix)
    model.load_state_dict(state)
    return model


def reduced_record(kind: str) -> dict[str, np.ndarray]:
    cls, fields = MODELS[kind]
    shapes = shapes_of(cls(**fields))
    weights = pseudo_weights(shapes)
    record = {"shapes": np.asarray(json.dumps(shapes))}
    parts = {
        "32x32": outputs(loaded(kind, weights), range(3)),
        "x".join(map(str, OTHER_SIZE)): outputs(loaded(kind, weights, img_size=OTHER_SIZE), range(3)),
    }
    record |= {f"{size}/{key}": value for size, part in parts.items() for key, value in part.items()}
    record["weights"] = attention_weights(loaded(kind, weights))[:, 0].astype(np.float32)
    if kind == "distilled":
        model = loaded(kind, weights).train()
        model.set_distilled_training()
        record["training"] = torch.stack(model(nchw(32, 32))).detach().numpy()
    return record


def tiny_record() -> dict[str, np.ndarray]:
    """deit_tiny_patch16_224 whole, with the maps after every third block."""
    model = timm.create_model("deit_tiny_patch16_224")
    shapes = shapes_of(model)
    model.load_state_dict(tensors(pseudo_weights(shapes)))
    return {"shapes": np.asarray(json.dumps(shapes)), **outputs(model.double().eval(), range(2, 12, 3))}


def positions_record() -> dict[str, np.ndarray]:
    """14 x 14 positions of 16 channels on other grids, with 0, 1 or 2 positions outside of it."""
    record = {}
    for mode in ("bicubic", "bilinear"):
        for prefix, grid in ((0, (7, 7)), (1, (24, 24)), (2, (9, 20)), (1, (15, 13))):
            positions = pseudo_normal("positions", (1, prefix + 196, 16))
            found = resampled(torch.from_numpy(positions), grid, prefix, mode)[0].numpy()
            key = f"{mode}/{prefix}/{grid[0]}x{grid[1]}"
            record[key] = sample(key, found, POSITION_SAMPLES)
    return record


def main() -> None:
    set_fused_attn(False)
    np.savez_compressed(HERE / "vit_deit_tiny_timm.npz", **tiny_record())
    for kind in MODELS:
        np.savez_compressed(HERE / f"vit_{kind}_timm.npz", **reduced_record(kind))
    np.savez_compressed(HERE / "vit_positions.npz", **positions_record())


if __name__ == "__main__":
    main()
