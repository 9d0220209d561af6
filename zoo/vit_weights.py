"""ViT's and DeiT's published weights: the tags, and what timm and the official codes call each parameter."""

import functools

import flax.linen as nn

from zoo.keymap import KeyMap, Rule, torch_conv, torch_layer_norm, torch_linear
from zoo.position_embedding import Positions, resize_positions
from zoo.registry import IMAGENET_MEAN, IMAGENET_STD, PretrainedCfg
from zoo.transforms import Axes

_HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
# Of the weights that were trained with ImageNet's mean and deviation, all others with the range from -1 to 1.
_WITH_IMAGENET = ("fb_in1k", "fb_in22k_ft_in1k", "dino", "mae")
# In the files of weights that were trained on ImageNet-21k, or without labels and so without classes.
_CLASSES = {"augreg_in21k": 21843, "orig_in21k": 0, "dino": 0, "mae": 0}


def _cfg(name: str, weights: str) -> PretrainedCfg:
    side = int(name[-3:])
    mean, std = _IMAGENET if weights in _WITH_IMAGENET else _HALVES
    return PretrainedCfg(
        tag=f"{name}.{weights}",
        image_size=side,
        num_classes=_CLASSES.get(weights, 1000),
        naming="timm",
        license="cc-by-nc-4.0" if weights == "mae" else "apache-2.0",
        source=f"https://huggingface.co/timm/{name}.{weights}",
        hub_id=f"timm/{name}.{weights}",
        mean=mean,
        std=std,
        crop_pct=1.0 if side == 384 or weights == "fb_in22k_ft_in1k" else 0.9,
    )


_AUGREG = ("augreg_in21k_ft_in1k", "augreg_in21k")
_WEIGHTS = {
    "vit_tiny_patch16_224": _AUGREG,
    "vit_tiny_patch16_384": ("augreg_in21k_ft_in1k",),
    "vit_small_patch16_224": (*_AUGREG, "augreg_in1k", "dino"),
    "vit_small_patch16_384": ("augreg_in21k_ft_in1k", "augreg_in1k"),
    "vit_base_patch16_224": (
        "augreg2_in21k_ft_in1k",
        *_AUGREG,
        "augreg_in1k",
        "orig_in21k_ft_in1k",
        "orig_in21k",
        "sam_in1k",
        "dino",
        "mae",
    ),
    "vit_base_patch16_384": ("augreg_in21k_ft_in1k", "orig_in21k_ft_in1k", "augreg_in1k"),
    "vit_base_patch32_224": (*_AUGREG, "augreg_in1k", "orig_in21k", "sam_in1k"),
    "vit_base_patch32_384": ("augreg_in21k_ft_in1k", "augreg_in1k"),
    "vit_large_patch16_224": (*_AUGREG, "orig_in21k", "mae"),
    "vit_large_patch16_384": ("augreg_in21k_ft_in1k",),
    **{
        f"deit_{size}{kind}_patch16_{side}": ("fb_in1k",)
        for size, side in (("tiny", 224), ("small", 224), ("base", 224), ("base", 384))
        for kind in ("", "_distilled")
    },
    **{
        f"deit3_{size}": ("fb_in22k_ft_in1k", "fb_in1k")
        for size in (
            "small_patch16_224",
            "small_patch16_384",
            "medium_patch16_224",
            "base_patch16_224",
            "base_patch16_384",
            "large_patch16_224",
            "large_patch16_384",
            "huge_patch14_224",
        )
    },
}

PRETRAINED = {cfg.tag: cfg for name, found in _WEIGHTS.items() for cfg in (_cfg(name, weights) for weights in found)}


def _timm(model: nn.Module, layer_scale: str = "ls{n}.gamma") -> KeyMap:
    """Names of timm's `vision_transformer.py` and `deit.py`; `layer_scale` is what they call its factors."""
    tokens = ("cls_token", "dist_token") if model.distilled else ("cls_token",)
    resize = functools.partial(
        resize_positions, grid=model.grid, prefix=model.prefix_tokens if model.embed_class else 0
    )
    rules = (
        *torch_conv("patch_embed.proj", "stem/conv"),
        *(Rule(token, f"params/stem/{token}", Axes("1 1 d -> d")) for token in tokens),
        Rule(
            "pos_embed",
            "params/stem/pos_embed",
            Positions(model.grid),
            resize=resize,
            resize_method="bicubic",
        ),
        *torch_layer_norm("norm", "head_norm"),
        *torch_linear("head", "head"),
    )
    if model.distilled:
        rules += torch_linear("head_dist", "dist_head")
    before = 0
    for stage, depth in enumerate(model.depths):
        source = f"blocks.{{j+{before}}}" if before else "blocks.{j}"
        target, where = f"stages_{stage}_{{j}}", dict(j=range(depth))
        rules += (
            *torch_layer_norm(f"{source}.norm1", f"{target}/norm1", **where),
            *torch_linear(f"{source}.attn.qkv", f"{target}/attention/qkv", bias=model.qkv_bias, **where),
            *torch_linear(f"{source}.attn.proj", f"{target}/attention/proj", **where),
            *torch_layer_norm(f"{source}.norm2", f"{target}/norm2", **where),
            *torch_linear(f"{source}.mlp.fc1", f"{target}/mlp/fc1", **where),
            *torch_linear(f"{source}.mlp.fc2", f"{target}/mlp/fc2", **where),
        )
        if model.layer_scale is not None:
            name = f"{source}.{layer_scale}"
            rules += tuple(
                Rule(name.replace("{n}", str(n)), f"params/{target}/layer_scale{n}", where=where) for n in (1, 2)
            )
        before += depth
    return KeyMap(
        rules,
        ignore={"pre_logits.*": "a layer before the classifier that timm leaves out as well"},
        classifier=tuple(f"params/{head}/{leaf}" for head in ("head", "dist_head") for leaf in ("kernel", "bias")),
        input_conv=("params/stem/conv/kernel",),
    )


def _official(model: nn.Module) -> KeyMap:
    """Names of github.com/facebookresearch/deit, timm's but for DeiT III's layer scale."""
    return _timm(model, layer_scale="gamma_{n}")


# The first is the one that `save_pretrained` writes unless told otherwise.
KEY_MAPS = {"timm": _timm, "official": _official}
