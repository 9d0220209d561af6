"""CARE's published weights: the tags, and what the official code calls each parameter."""

import flax.linen as nn

from zoo.keymap import KeyMap, Rule, torch_batch_norm, torch_conv, torch_layer_norm, torch_linear, torch_pointwise
from zoo.registry import PretrainedCfg


def _in1k(size: str) -> PretrainedCfg:
    return PretrainedCfg(
        tag=f"care_{size.lower()}.in1k",
        image_size=224,
        num_classes=1000,
        naming="official",
        crop_pct=0.875,
        license="none stated",
        source="https://github.com/zhouyuan888888/CARE-Transformer",
        hub_id="YuanZ1995/CARE-Transformer",
        # The list of files has not been seen: the names of the official scripts, bare and in their folder.
        filenames=(f"CARETrans_{size}.pth.tar", f"ckpt/CARETrans_{size}.pth.tar"),
    )


PRETRAINED = {cfg.tag: cfg for cfg in map(_in1k, ("S0", "S1", "S2"))}


def _interaction(which: str) -> tuple[Rule, ...]:
    source, target = f"stages.{{i}}.blocks.{{j}}.inter_layer.{which}", f"stages_{{i}}_{{j}}/{which}"
    return (
        *torch_batch_norm(f"{source}_norm", f"{target}/norm"),
        *torch_pointwise(f"{source}_fc1", f"{target}/fc1"),
        *torch_conv(f"{source}_conv", f"{target}/conv"),
        *torch_pointwise(f"{source}_fc2", f"{target}/fc2"),
    )


def _official(model: nn.Module) -> KeyMap:
    """Names of github.com/zhouyuan888888/CARE-Transformer."""
    source, target = "stages.{i}.blocks.{j}", "stages_{i}_{j}"
    heads = ("head", "dist_head") if model.distilled else ("head",)
    ignore = {"*.num_batches_tracked": "a counter that evaluation does not read"}
    if not model.distilled:
        ignore["dist_head.*"] = "the distillation head, which distilled=False leaves out"
    rules = (
        *torch_conv("stem.0", "stem/conv"),
        *torch_batch_norm("stem.1", "stem/norm"),
        *torch_batch_norm("stages.{i+1}.downsample.0", "downsamples_{i}/norm"),
        *torch_conv("stages.{i+1}.downsample.1", "downsamples_{i}/conv"),
        Rule(f"{source}.gamma", f"params/{target}/gamma"),
        *torch_conv(f"{source}.token_mixer.dwconvatt_1", f"{target}/tall"),
        *torch_conv(f"{source}.token_mixer.dwconvatt_2", f"{target}/wide"),
        *torch_pointwise(f"{source}.token_mixer.qk", f"{target}/attention/qk"),
        *torch_conv(f"{source}.token_mixer.dwconv1", f"{target}/local3"),
        *torch_conv(f"{source}.token_mixer.dwconv2", f"{target}/local7"),
        *_interaction("inter1"),
        *_interaction("inter2"),
        *(rule for head in heads for rule in torch_layer_norm(f"{head}.norm", f"{head}_norm")),
        *(rule for head in heads for rule in torch_linear(f"{head}.fc", head)),
    )
    classifier = tuple(f"params/{head}/{leaf}" for head in heads for leaf in ("kernel", "bias"))
    return KeyMap(rules, ignore=ignore, classifier=classifier, input_conv=("params/stem/conv/kernel",))


KEY_MAPS = {"official": _official}
