"""BiFormer's published weights: the tags, and what the official code calls each parameter."""

from typing import Any

import flax.linen as nn

from zoo.keymap import KeyMap, Rule, torch_batch_norm, torch_conv, torch_layer_norm, torch_linear, torch_pointwise
from zoo.registry import PretrainedCfg


def _in1k(name: str, weights: str = "in1k", **fields: Any) -> PretrainedCfg:
    return PretrainedCfg(
        tag=f"{name}.{weights}",
        image_size=224,
        num_classes=1000,
        naming="official",
        # The short side is resized to 256, of which 224 are kept.
        crop_pct=0.875,
        license="mit",
        source="https://github.com/rayleizhu/BiFormer",
        **fields,
    )


# The files lie behind the links of the repository's README. Weights trained with token labels are in the paper only.
PRETRAINED = {
    cfg.tag: cfg
    for cfg in (
        _in1k("biformer_tiny"),
        _in1k("biformer_small"),
        _in1k("biformer_base"),
        _in1k("biformer_stl"),
        _in1k("biformer_stl_nchw"),
        _in1k("biformer_small", "token_labeling_in1k", availability="never released"),
        _in1k("biformer_base", "token_labeling_in1k", availability="never released"),
    )
}


def _attention_rules(model: nn.Module, topk: int, source: str, target: str, **where: Any) -> tuple[Rule, ...]:
    """The rules of the attention modules of one stage."""
    lepe = torch_conv(f"{source}.lepe", f"{target}/lepe", **where)
    if topk == 0:
        return (
            *torch_pointwise(f"{source}.1", f"{target}/qkv", **where),
            *torch_conv(f"{source}.2", f"{target}/mix", **where),
            *torch_pointwise(f"{source}.3", f"{target}/proj", **where),
        )
    linear, names = torch_linear, ("qkv.qkv", "wo")
    if model.code == "nchw":
        linear, names = torch_pointwise, ("qkv_linear", "output_linear")
    if topk < 0:
        names = ("qkv", "proj")
    rules = (
        *linear(f"{source}.{names[0]}", f"{target}/qkv", bias=topk > 0, **where),
        *linear(f"{source}.{names[1]}", f"{target}/proj", **where),
    )
    if model.side_dwconv and (topk != -1 or model.code == "nchw"):
        rules = (*rules, *lepe)
    if model.param_routing and topk > 0:
        rules = (*rules, *torch_linear(f"{source}.router.emb", f"{target}/router", **where))
    return rules


def _official(model: nn.Module) -> KeyMap:
    """Names of github.com/rayleizhu/BiFormer, which has three schemes: T, S and B; STL; STL-nchw."""
    target = "stages_{i}_{j}"
    linear = torch_pointwise if model.code == "nchw" else torch_linear
    if model.swin_layout:
        block, second = "stages.{i}.blocks.{j}", 2
        patches = (
            *torch_conv("downsample_layers.0.0", "stem/conv"),
            *torch_batch_norm("downsample_layers.0.1", "stem/norm"),
            *torch_batch_norm("downsample_layers.{i+1}.0", "downsamples_{i}/norm"),
            *torch_conv("downsample_layers.{i+1}.1", "downsamples_{i}/conv"),
        )
    else:
        block, second = "stages.{i}.{j}", 3
        patches = (
            *torch_conv("downsample_layers.0.0", "stem/conv1"),
            *torch_batch_norm("downsample_layers.0.1", "stem/norm1"),
            *torch_conv("downsample_layers.0.3", "stem/conv2"),
            *torch_batch_norm("downsample_layers.0.4", "stem/norm2"),
            *torch_conv("downsample_layers.{i+1}.0", "downsamples_{i}/conv"),
            *torch_batch_norm("downsample_layers.{i+1}.1", "downsamples_{i}/norm"),
            *torch_conv(f"{block}.pos_embed", f"{target}/pos_embed"),
        )
    rules = (
        *patches,
        *torch_layer_norm(f"{block}.norm1", f"{target}/norm1"),
        *torch_layer_norm(f"{block}.norm2", f"{target}/norm2"),
        *linear(f"{block}.mlp.0", f"{target}/mlp/fc1"),
        *linear(f"{block}.mlp.{second}", f"{target}/mlp/fc2"),
        *torch_batch_norm("norm", "head_norm"),
        *torch_linear("head", "head"),
    )
    for i, topk in enumerate(model.topks):
        where = dict(i=range(i, i + 1))
        rules = (*rules, *_attention_rules(model, topk, f"{block}.attn", f"{target}/attention", **where))
    return KeyMap(
        rules,
        ignore={"*.num_batches_tracked": "a counter of training steps"},
        classifier=("params/head/kernel", "params/head/bias"),
        input_conv=("params/stem/conv/kernel", "params/stem/conv1/kernel"),
    )


KEY_MAPS = {"official": _official}
