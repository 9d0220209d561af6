"""Writes the CARE parity references: outputs, statistics and gradients of the authors' code in float64.

    pip install -e '.[parity]'
    git clone https://github.com/zhouyuan888888/CARE-Transformer official
    python -m tests.reference.make_care --official official

Weights and images come from `weights.py`, so the files hold outputs only: both heads' logits whole, stage outputs,
running statistics and gradients as norms and samples. Written with torch 2.13.0, timm 1.0.31 in place of the old one
that the code imports, and zhouyuan888888/CARE-Transformer at 400bf94.
"""

import argparse
import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import timm
import torch

from tests.reference.weights import pseudo_images, pseudo_normal, pseudo_weights, sample

HERE = Path(__file__).parent
SIZES = {
    "CARETrans_S0": ((224, 224), (96, 64), (225, 97)),
    "CARETrans_S1": ((96, 64),),
    "CARETrans_S2": ((96, 64),),
}
STAGE_SAMPLES, GRADIENT_SAMPLES = 256, 64
# A hundred will do, and make the files small.
CLASSES = 100

# A network with a block of every kind, small enough to differentiate in every run of the tests.
SMALL = dict(
    depths=(1, 1, 1, 1),
    mem_dims=(8, 16, 32, 64),
    feat_dims=(24, 48, 96, 192),
    ratios=((2, 2), (2, 4), (4, 4), (4, 4)),
    cls_dim=1024,
)

# Of these parameters ({last} is the last block) single gradient entries are stored, of all others the norm only.
SAMPLED_GRADIENTS = (
    "stem.0.weight",
    "stem.1.bias",
    "stages.0.blocks.0.gamma",
    "stages.0.blocks.0.token_mixer.dwconvatt_1.weight",
    "stages.0.blocks.0.token_mixer.dwconvatt_2.weight",
    "stages.0.blocks.0.token_mixer.dwconv1.weight",
    "stages.0.blocks.0.token_mixer.dwconv2.weight",
    "stages.1.downsample.0.weight",
    "stages.1.downsample.1.weight",
    "stages.1.blocks.0.inter_layer.inter1_norm.bias",
    "stages.1.blocks.0.inter_layer.inter1_fc1.weight",
    "stages.2.blocks.0.token_mixer.qk.weight",
    "stages.2.blocks.0.token_mixer.qk.bias",
    "stages.2.blocks.0.token_mixer.dwconv2.weight",
    "stages.2.blocks.0.inter_layer.inter2_conv.weight",
    "stages.2.blocks.0.inter_layer.inter2_fc2.weight",
    "stages.2.blocks.0.gamma",
    "stages.3.downsample.1.bias",
    "stages.3.blocks.0.token_mixer.qk.weight",
    "stages.3.blocks.{last}.token_mixer.qk.bias",
    "stages.3.blocks.{last}.inter_layer.inter2_norm.weight",
    "stages.3.blocks.{last}.inter_layer.inter2_fc1.weight",
    "stages.3.blocks.{last}.inter_layer.inter2_conv.weight",
    "head.norm.weight",
    "head.fc.weight",
    "dist_head.norm.bias",
    "dist_head.fc.bias",
)


def official_models(checkout: Path) -> types.ModuleType:
    """The authors' module, with today's timm in place of the old one that it imports."""
    stand_ins = {
        "timm.models.helpers": dict(checkpoint_seq=None),
        "timm.models.layers": dict(trunc_normal_=timm.layers.trunc_normal_, DropPath=timm.layers.DropPath),
        "timm.models.layers.helpers": dict(to_2tuple=timm.layers.to_2tuple),
        "timm.models.registry": dict(register_model=lambda function: function),
    }
    for name, attributes in stand_ins.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        sys.modules[name] = module
    sys.path.insert(0, str(checkout / "models"))
    return importlib.import_module("CARETrans")


def nhwc(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().permute(0, 2, 3, 1).numpy()


def measured_forward(model: torch.nn.Module, images: torch.Tensor) -> tuple[dict[str, np.ndarray], tuple]:
    """Both heads' logits and the outputs of stem and stages, and the logits as tensors."""
    features, logits = [], []
    parts, heads = (model.stem, *model.stages), (model.head, model.dist_head)
    hooks = [part.register_forward_hook(lambda _, __, out: features.append(nhwc(out))) for part in parts]
    hooks += [head.register_forward_hook(lambda _, __, out: logits.append(out)) for head in heads]
    output = model(images)
    for hook in hooks:
        hook.remove()
    if not model.training and not torch.equal(output, sum(logits) / 2):
        raise SystemExit("the output in evaluation is not the mean of the two heads'")
    record = {"head": logits[0].detach().numpy(), "dist_head": logits[1].detach().numpy()}
    for index, feature in enumerate(features):
        key = f"features{index}"
        record[f"{key}/shape"] = np.asarray(feature.shape)
        record[f"{key}/mean_rms"] = np.asarray([feature.mean(), np.sqrt(np.square(feature).mean())])
        record[f"{key}/sample"] = sample(key, feature, STAGE_SAMPLES).astype(np.float32)
    spread = ", ".join(f"{part.std():.2f}" for part in (*features, output if not model.training else output[0]))
    print(f"standard deviations of stem, stages, logits: {spread}", file=sys.stderr)
    return record, (output, *logits)


def measured_gradients(model: torch.nn.Module) -> dict[str, np.ndarray]:
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    record = {"gradient_norms": np.asarray([gradients[name].norm().item() for name in sorted(gradients)])}
    for name in SAMPLED_GRADIENTS:
        name = name.format(last=len(model.stages[3].blocks) - 1)
        record[f"gradient/{name}"] = sample(name, gradients[name].numpy(), GRADIENT_SAMPLES).astype(np.float32)
    return record


def torch_images(*shape: int) -> torch.Tensor:
    return torch.from_numpy(pseudo_images(shape)).double().permute(0, 3, 1, 2)


def direction(like: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(pseudo_normal("direction", tuple(like.shape), seed))


def evaluation(model: torch.nn.Module, height: int, width: int) -> dict[str, np.ndarray]:
    """Outputs, and gradients of sum(logits * direction), batch 2."""
    model.zero_grad()
    record, (output, *_) = measured_forward(model.eval(), torch_images(2, height, width, 3))
    (output * direction(output)).sum().backward()
    return record | measured_gradients(model)


def training(model: torch.nn.Module, height: int, width: int) -> dict[str, np.ndarray]:
    """The same with the statistics of a batch of 3, where each head has a direction of its own, and the running
    statistics after this step from 0, with the biased variance in place of the unbiased one that torch keeps."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    counts = {}
    for name, norm in norms.items():
        norm.running_mean.zero_()
        norm.running_var.zero_()
        norm.register_forward_pre_hook(lambda _, x, name=name: counts.update({name: x[0].numel() / x[0].shape[1]}))
    model.zero_grad()
    record, (_, *logits) = measured_forward(model.train(), torch_images(3, height, width, 3))
    sum((out * direction(out, seed)).sum() for seed, out in enumerate(logits)).backward()
    biased = {name: norm.running_var * (1 - 1 / counts[name]) for name, norm in norms.items()}
    record["statistics/mean"] = np.asarray([norms[name].running_mean.norm().item() for name in sorted(norms)])
    record["statistics/var"] = np.asarray([biased[name].norm().item() for name in sorted(norms)])
    return record | measured_gradients(model)


def with_weights(model: torch.nn.Module) -> tuple[torch.nn.Module, dict[str, np.ndarray]]:
    """The model in float64 with the pseudo-random weights, and the start of its record: their names and shapes."""
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    weights = pseudo_weights(shapes)
    model.load_state_dict({key: torch.from_numpy(np.asarray(value)) for key, value in weights.items()})
    return model.double(), {"shapes": np.asarray(json.dumps(shapes))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", type=Path, required=True, help="a checkout of the authors' repository")
    official = official_models(parser.parse_args().official)
    for name, sizes in SIZES.items():
        model, record = with_weights(getattr(official, name)(num_classes=CLASSES))
        for height, width in sizes:
            values = evaluation(model, height, width)
            record |= {f"{height}x{width}/{key}": value for key, value in values.items()}
        np.savez_compressed(HERE / f"care_{name[-2:].lower()}_official.npz", **record)
    model, record = with_weights(official.CARENets(num_classes=CLASSES, **SMALL))
    for mode in (evaluation, training):
        record |= {f"{mode.__name__}/{key}": value for key, value in mode(model, 96, 64).items()}
    np.savez_compressed(HERE / "care_small_official.npz", **record)


if __name__ == "__main__":
    main()
