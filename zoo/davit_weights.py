"""DaViT's published weights: the tags, and what timm, the official code and Florence-2 call each parameter."""

import flax.linen as nn

from zoo.keymap import KeyMap, Rule, torch_conv, torch_layer_norm, torch_linear
from zoo.registry import PretrainedCfg


def _in1k(name: str) -> PretrainedCfg:
    return PretrainedCfg(
        tag=f"{name}.msft_in1k",
        image_size=224,
        num_classes=1000,
        naming="timm",
        license="apache-2.0",
        source="https://huggingface.co/timm/" + f"{name}.msft_in1k",
        hub_id=f"timm/{name}.msft_in1k",
    )


def _florence2(name: str, hub_id: str) -> PretrainedCfg:
    return PretrainedCfg(
        tag=f"{name}.msft_florence2",
        image_size=768,
        num_classes=0,
        naming="florence2",
        license="mit",
        source=f"https://huggingface.co/{hub_id}",
        hub_id=hub_id,
        filenames=("model.safetensors", "pytorch_model.bin"),
    )


PRETRAINED = {
    cfg.tag: cfg
    for cfg in (
        _in1k("davit_tiny"),
        _in1k("davit_small"),
        _in1k("davit_base"),
        _florence2("davit_base_fl", "microsoft/Florence-2-base"),
        _florence2("davit_huge_fl", "microsoft/Florence-2-large"),
    )
}


_SPECIAL = dict(classifier=("params/head/kernel", "params/head/bias"), input_conv=("params/stem/conv/kernel",))


def _block_rules(source: str, parts: dict[str, str], **where) -> tuple[Rule, ...]:
    """The rules of one block; `parts` says what its members are called in the source."""
    target = "stages_{i}_{j}/{t}"
    return (
        *torch_conv(f"{source}.{parts['cpe1']}", f"{target}/cpe1", **where),
        *torch_layer_norm(f"{source}.{parts['norm1']}", f"{target}/norm1", **where),
        *torch_linear(f"{source}.{parts['attn']}.qkv", f"{target}/attention/qkv", **where),
        *torch_linear(f"{source}.{parts['attn']}.proj", f"{target}/attention/proj", **where),
        *torch_conv(f"{source}.{parts['cpe2']}", f"{target}/cpe2", **where),
        *torch_layer_norm(f"{source}.{parts['norm2']}", f"{target}/norm2", **where),
        *torch_linear(f"{source}.{parts['mlp']}.fc1", f"{target}/mlp/fc1", **where),
        *torch_linear(f"{source}.{parts['mlp']}.fc2", f"{target}/mlp/fc2", **where),
    )


def _patch_rules(stem: str, down: str, conv: str) -> tuple[Rule, ...]:
    """The rules of the stem and the downsampling; `conv` is what they call their convolution."""
    return (
        *torch_conv(f"{stem}.{conv}", "stem/conv"),
        *torch_layer_norm(f"{stem}.norm", "stem/norm"),
        *torch_conv(f"{down}.{conv}", "downsamples_{i}/conv"),
        *torch_layer_norm(f"{down}.norm", "downsamples_{i}/norm"),
    )


def _timm(model: nn.Module) -> KeyMap:
    """Names of timm's `davit.py`; Florence-2's towers name the two halves of a dual block there."""
    halves = ("spatial_block", "channel_block") if model.channel_attention == "florence2" else ("0", "1")
    parts = dict(cpe1="cpe1.proj", norm1="norm1", attn="attn", cpe2="cpe2.proj", norm2="norm2", mlp="mlp")
    rules = (
        *_patch_rules("stem", "stages.{i+1}.downsample", "conv"),
        *_block_rules("stages.{i}.blocks.{j}.{t}", parts, t=dict(zip(halves, ("spatial", "channel")))),
        *torch_layer_norm("head.norm", "head_norm"),
        *torch_linear("head.fc", "head"),
    )
    return KeyMap(rules, **_SPECIAL)


def _official(model: nn.Module) -> KeyMap:
    """Names of github.com/dingmyu/davit."""
    parts = dict(cpe1="cpe.0.proj", norm1="norm1", attn="attn", cpe2="cpe.1.proj", norm2="norm2", mlp="mlp")
    rules = (
        *_patch_rules("patch_embeds.0", "patch_embeds.{i+1}", "proj"),
        *_block_rules("main_blocks.{i}.{j}.{t}", parts, t={"0": "spatial", "1": "channel"}),
        *torch_layer_norm("norms", "head_norm"),
        *torch_linear("head", "head"),
    )
    return KeyMap(rules, **_SPECIAL)


def _florence2_tower(model: nn.Module) -> KeyMap:
    """Names of Florence-2's own checkpoints, whose image tower has neither head nor head norm."""
    common = dict(cpe1="conv1.fn.dw", cpe2="conv2.fn.dw", norm2="ffn.norm", mlp="ffn.fn.net")
    window = dict(common, norm1="window_attn.norm", attn="window_attn.fn")
    channel = dict(common, norm1="channel_attn.norm", attn="channel_attn.fn")
    rules = (
        *_patch_rules("convs.0", "convs.{i+1}", "proj"),
        *_block_rules("blocks.{i}.{j}.{t}", window, t={"spatial_block": "spatial"}),
        *_block_rules("blocks.{i}.{j}.{t}", channel, t={"channel_block": "channel"}),
    )
    absent = {"params/head_norm/scale": 1.0, "params/head_norm/bias": 0.0}
    return KeyMap(rules, prefix="vision_tower.", absent_in_source=absent, **_SPECIAL)


# The first is the one that `save_pretrained` writes unless told otherwise.
KEY_MAPS = {"timm": _timm, "official": _official, "florence2": _florence2_tower}
