"""MaxViT's published weights: the tags, and what timm and the official code call each parameter."""

from typing import Any

import flax.linen as nn

from zoo.keymap import (
    KeyMap,
    Rule,
    torch_batch_norm,
    torch_conv,
    torch_layer_norm,
    torch_linear,
    torch_pointwise,
)
from zoo.registry import IMAGENET_MEAN, IMAGENET_STD, PretrainedCfg
from zoo.relative_bias import resize_table
from zoo.transforms import Axes, head_interleaved, identity


def _cfg(tag: str, *, num_classes: int = 1000, legacy: bool = False, crop_pct: float = 0.95) -> PretrainedCfg:
    """`legacy`: ImageNet's mean and deviation, else the range from -1 to 1; a `crop_pct` of 1 squashes the image."""
    return PretrainedCfg(
        tag=tag,
        image_size=int(tag.partition(".")[0][-3:]),
        num_classes=num_classes,
        naming="timm",
        license="apache-2.0",
        source=f"https://huggingface.co/timm/{tag}",
        hub_id=f"timm/{tag}",
        mean=IMAGENET_MEAN if legacy else (0.5, 0.5, 0.5),
        std=IMAGENET_STD if legacy else (0.5, 0.5, 0.5),
        crop_pct=crop_pct,
        crop_mode="squash" if crop_pct == 1 else "center",
    )


def _official_cfgs(size: str) -> tuple[PretrainedCfg, ...]:
    """The weights of one size. The official code calls the mean and deviation of the first `legacy_preprocessing`."""
    names = {side: f"maxvit_{size}_tf_{side}" for side in (224, 384, 512)}
    large = (384, 512)
    in1k = (
        _cfg(f"{names[224]}.in1k", legacy=True),
        *(_cfg(f"{names[side]}.in1k", crop_pct=1.0) for side in large),
    )
    in21k = (
        _cfg(f"{names[224]}.in21k", num_classes=21843),
        *(_cfg(f"{names[side]}.in21k_ft_in1k", crop_pct=1.0) for side in large),
    )
    return {"tiny": in1k, "small": in1k, "xlarge": in21k}.get(size, in1k + in21k)


PRETRAINED = {
    cfg.tag: cfg
    for cfg in (
        *(cfg for size in ("tiny", "small", "base", "large", "xlarge") for cfg in _official_cfgs(size)),
        _cfg("maxvit_nano_rw_256.sw_in1k"),
        _cfg("maxvit_tiny_rw_224.sw_in1k"),
        _cfg("maxvit_rmlp_pico_rw_256.sw_in1k"),
        _cfg("maxvit_rmlp_nano_rw_256.sw_in1k"),
        _cfg("maxvit_rmlp_tiny_rw_256.sw_in1k"),
        _cfg("maxvit_rmlp_small_rw_224.sw_in1k", crop_pct=0.9),
        _cfg("maxvit_rmlp_base_rw_224.sw_in12k", num_classes=11821),
        _cfg("maxvit_rmlp_base_rw_224.sw_in12k_ft_in1k"),
        _cfg("maxvit_rmlp_base_rw_384.sw_in12k_ft_in1k", crop_pct=1.0),
    )
}

_SPECIAL = dict(classifier=("params/head/kernel", "params/head/bias"), input_conv=("params/stem/conv1/kernel",))


def _timm(model: nn.Module) -> KeyMap:
    """Names of timm's `maxxvit.py`."""
    conv, mbconv = "stages.{i}.blocks.{j}.conv", "stages_{i}_{j}/mbconv"
    attend, block = "stages.{i}.blocks.{j}.{t}", "stages_{i}_{j}/{t}"
    where = dict(t={"attn_block": "block", "attn_grid": "grid"})
    bias = model.design == "official"
    rules = (
        *torch_conv("stem.conv1", "stem/conv1", bias=bias),
        *torch_batch_norm("stem.norm1", "stem/norm1"),
        *torch_conv("stem.conv2", "stem/conv2", bias=bias),
        *torch_pointwise(f"{conv}.shortcut.expand", f"{mbconv}/shortcut", bias=bias),
        *torch_batch_norm(f"{conv}.pre_norm", f"{mbconv}/pre_norm"),
        *torch_pointwise(f"{conv}.conv1_1x1", f"{mbconv}/expand", bias=False),
        *torch_batch_norm(f"{conv}.norm1", f"{mbconv}/expand_norm"),
        *torch_conv(f"{conv}.conv2_kxk", f"{mbconv}/depthwise", bias=False),
        *torch_batch_norm(f"{conv}.norm2", f"{mbconv}/depthwise_norm"),
        *torch_pointwise(f"{conv}.se.fc1", f"{mbconv}/se/fc1"),
        *torch_pointwise(f"{conv}.se.fc2", f"{mbconv}/se/fc2"),
        *torch_pointwise(f"{conv}.conv3_1x1", f"{mbconv}/project", bias=bias),
        *torch_layer_norm(f"{attend}.norm1", f"{block}/norm1", **where),
        *_timm_attention(model, f"{attend}.attn", f"{block}/attention", where),
        *torch_layer_norm(f"{attend}.norm2", f"{block}/norm2", **where),
        *torch_linear(f"{attend}.mlp.fc1", f"{block}/mlp/fc1", **where),
        *torch_linear(f"{attend}.mlp.fc2", f"{block}/mlp/fc2", **where),
        *torch_linear("head.fc", "head"),
    )
    if model.layer_scale is not None:
        rules += tuple(Rule(f"{attend}.ls{n}.gamma", f"params/{block}/layer_scale{n}", where=where) for n in (1, 2))
    if model.hidden_head:
        rules += (*torch_layer_norm("head.norm", "head_norm"), *torch_linear("head.pre_logits.fc", "pre_logits"))
    else:
        rules += torch_layer_norm("norm", "head_norm")
    ignore = {
        "*.num_batches_tracked": "a counter of training steps",
        "*.relative_position_index": "a constant table",
        "*.rel_coords_log": "a constant table",
    }
    return KeyMap(rules, ignore=ignore, **_SPECIAL)


def _timm_attention(model: nn.Module, source: str, target: str, where: dict[str, Any]) -> tuple[Rule, ...]:
    """The official models pack queries, keys and values one after the other, timm's own head by head."""
    if model.design == "official":
        rules = torch_linear(f"{source}.qkv", f"{target}/qkv", **where)
    else:
        rules = tuple(
            Rule(f"{source}.qkv.{name}", f"params/{target}/qkv/{leaf}", how, dict(where, i=range(i, i + 1)))
            for i, heads in enumerate(dim // model.head_dim for dim in model.dims)
            for name, leaf, how in (
                ("weight", "kernel", head_interleaved(heads)),
                ("bias", "bias", head_interleaved(heads, bias=True)),
            )
        )
    rules += torch_linear(f"{source}.proj", f"{target}/proj", **where)
    if model.relative_bias == "mlp":
        return (
            *rules,
            *torch_linear(f"{source}.rel_pos.mlp.fc1", f"{target}/relative_bias/fc1", **where),
            *torch_linear(f"{source}.rel_pos.mlp.fc2", f"{target}/relative_bias/fc2", **where),
        )
    # timm's own have Swin's table: flat, heads last, offsets from the key to the query.
    height, width = model.window_size
    sides = dict(y="x") if height == width else dict(y=2 * height - 1, x=2 * width - 1)
    flat = Axes("(y x) h -> h y x", flip=("y", "x"), **sides)
    table = Rule(
        f"{source}.rel_pos.relative_position_bias_table",
        f"params/{target}/relative_position_bias_table",
        identity if model.design == "official" else flat,
        where,
        resize=resize_table,
    )
    return (*rules, table)


# Slots of TensorFlow's optimizers stand behind the variable's name, step counts by themselves.
_OPTIMIZER = ("*/m", "*/v", "*/adam_m", "*/adam_v", "*/Adam*", "*/Momentum", "*/RMSProp*", "beta1_power", "beta2_power")


def _tensorflow(model: nn.Module) -> KeyMap:
    """Variables of github.com/google-research/maxvit; at 384 and 512 pixels its tables are those of 224."""
    mbconv, ours = "block_{i:02}_{j:02}/mbconv", "stages_{i}_{j}/mbconv"
    block, there = "block_{i:02}_{j:02}", "stages_{i}_{j}/{t}"
    # What belongs to the grid is called as in the window with a 1 behind.
    where = dict(t={"": "block", "_1": "grid"})
    one, merged = Axes("1 1 i o -> i o"), Axes("h d o -> (h d) o", d=model.head_dim)

    def pair(source, target, names, leaves, transform=identity, **where):
        transforms = (transform, identity)
        return tuple(
            Rule(f"{source}/{name}", f"params/{target}/{leaf}", how, where)
            for name, leaf, how in zip(names, leaves, transforms)
        )

    def conv(source, target, transform=identity):
        return pair(source, target, ("kernel", "bias"), ("kernel", "bias"), transform)

    def dense(source, target, transform=identity, **where):
        return pair(source, target, ("weight", "bias"), ("kernel", "bias"), transform, **where)

    def norm(source, target, **where):
        return pair(source, target, ("gamma", "beta"), ("scale", "bias"), **where)

    def batch_norm(source, target):
        return (
            *norm(source, target),
            Rule(f"{source}/moving_mean", f"batch_stats/{target}/mean"),
            Rule(f"{source}/moving_variance", f"batch_stats/{target}/var"),
        )

    def packed(leaf, name, pattern):
        sources = tuple(f"{block}/attention{{t}}/{x}/{name}" for x in "qkv")
        return Rule(sources, f"params/{there}/attention/qkv/{leaf}", Axes(pattern, t=3, d=model.head_dim), where)

    rules = (
        *conv("stem/conv_0", "stem/conv1"),
        *batch_norm("stem/norm_0", "stem/norm1"),
        *conv("stem/conv_1", "stem/conv2"),
        *conv(f"{mbconv}/shortcut_conv", f"{ours}/shortcut", one),
        *batch_norm(f"{mbconv}/pre_norm", f"{ours}/pre_norm"),
        Rule(f"{mbconv}/expand_conv/kernel", f"params/{ours}/expand/kernel", one),
        *batch_norm(f"{mbconv}/expand_norm", f"{ours}/expand_norm"),
        Rule(
            f"{mbconv}/depthwise_conv/depthwise_kernel",
            f"params/{ours}/depthwise/kernel",
            Axes("h w c 1 -> h w 1 c"),
        ),
        *batch_norm(f"{mbconv}/depthwise_norm", f"{ours}/depthwise_norm"),
        *conv(f"{mbconv}/se/reduce_conv2d", f"{ours}/se/fc1", one),
        *conv(f"{mbconv}/se/expand_conv2d", f"{ours}/se/fc2", one),
        *conv(f"{mbconv}/shrink_conv", f"{ours}/project", one),
        *norm(f"{block}/attn_layer_norm{{t}}", f"{there}/norm1", **where),
        packed("kernel", "weight", "t | i h d -> i (t h d)"),
        packed("bias", "bias", "t | h d -> (t h d)"),
        Rule(
            f"{block}/attention{{t}}/relative_bias",
            f"params/{there}/attention/relative_position_bias_table",
            where=where,
            resize=resize_table,
        ),
        *dense(f"{block}/attention{{t}}/o", f"{there}/attention/proj", merged, **where),
        *norm(f"{block}/ffn_layer_norm{{t}}", f"{there}/norm2", **where),
        *dense(f"{block}/ffn{{t}}/expand_dense", f"{there}/mlp/fc1", **where),
        *dense(f"{block}/ffn{{t}}/shrink_dense", f"{there}/mlp/fc2", **where),
        *norm("final_layer_norm", "head_norm"),
        *dense("cls_head/inner_dense", "pre_logits"),
        *dense("cls_head/logit_dense", "head"),
    )
    ignore = {name: "the optimizer's" for name in _OPTIMIZER}
    ignore["global_step"] = "a counter of training steps"
    return KeyMap(rules, ignore=ignore, prefix="maxvit/", ema_suffix="/ExponentialMovingAverage", **_SPECIAL)


# The first is the one that `save_pretrained` writes unless told otherwise.
KEY_MAPS = {"timm": _timm, "tensorflow": _tensorflow}
