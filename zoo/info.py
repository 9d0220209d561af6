"""What a model is made of, stage by stage, counted without making a single weight."""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from kernels.cost import cost
from zoo import registry
from zoo.image_model import ImageModel
from zoo.pretrained import abstract_variables
from zoo.tables import size, table

HEAD = "head"

# On a CPU some depthwise convolutions are sums of shifted products, which are no convolutions to the counter.
_PLATFORM = "tpu"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One row of `ModelInfo`: the stem, the blocks of a stage, a downsampling between two, or the head.

    Attributes:
        name: as in the variables' paths (`"stages_0"` for `params/stages_0_0/...`, `params/stages_0_1/...`,
            `"blocks"` for `params/blocks_0/...`); `"head"` for all that belongs to none, most of which comes last.
        blocks: of a stage, else None.
        shape: of its output, the batch first.
        parameters: numbers in the collection `params`.
        macs: multiply-adds, see `ModelInfo`.
    """

    name: str
    blocks: int | None
    shape: tuple[int, ...]
    parameters: int
    macs: int


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """A model's size; as a string, the table for a person.

    Attributes:
        name: of the model, or a full tag.
        family: name of the family's class.
        batch: images or rows of tokens at once.
        image_size: height and width of the images; in_chans: their channels. None for a sequence model.
        length: tokens in a row, None for an image model.
        num_classes: of the classifier, 0 without one; of a sequence model the size of its vocabulary.
        stages: in the order in which they run; they add up to the totals.
        parameters: numbers in the collection `params`.
        statistics: numbers in all other collections, such as the running statistics of batch norms.
        macs: multiply-adds of matrix products and convolutions in the forward pass of the whole batch, those with
            a convolution's padding left out, as `kernels.cost` counts them.
    """

    name: str
    family: str
    batch: int
    image_size: tuple[int, int] | None
    in_chans: int | None
    length: int | None
    num_classes: int
    stages: tuple[Stage, ...]
    parameters: int
    statistics: int
    macs: int

    def to_json(self) -> str:
        """All attributes as one JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        if self.image_size is None:
            one, many, sizes = "one row of tokens", "rows of tokens", f"{self.length:,} tokens"
            into = f"a vocabulary of {self.num_classes:,}"
        else:
            one, many, sizes = "one image", "images", size((*self.image_size, self.in_chans))
            into = f"{self.num_classes} classes"
        inputs = one if self.batch == 1 else f"a batch of {self.batch} {many}"
        into = into if self.num_classes else "features"
        rows = [("stage", "blocks", "output", "parameters", "share", "MACs", "share")]
        for stage in self.stages:
            shape = stage.shape[1:] if self.batch == 1 else stage.shape
            rows.append((stage.name, str(stage.blocks or ""), size(shape), *self._shares(stage)))
        rows.append(("total", "", "", f"{self.parameters:,}", "", f"{self.macs:,}", ""))
        lines = table(rows, "<><>>>>")
        rule = "-" * max(map(len, lines))
        notes = [
            f"MACs: multiply-adds of matrix products and convolutions in the forward pass of {inputs},",
            "those with the zeros of padding not among them.",
        ]
        if self.statistics:
            notes.append(f"Beside the parameters there are {self.statistics:,} running statistics.")
        head = f"{self.name} ({self.family}): {sizes} to {into}"
        return "\n".join([head, "", lines[0], rule, *lines[1:-1], rule, lines[-1], "", *notes])

    def _shares(self, stage: Stage) -> tuple[str, str, str, str]:
        counts = (stage.parameters, self.parameters), (stage.macs, self.macs)
        return tuple(cell for n, total in counts for cell in (f"{n:,}", f"{100 * n / (total or 1):.1f} %"))


def model_info(name: str, *, batch: int = 1, **overrides: Any) -> ModelInfo:
    """Counts a model stage by stage, by tracing alone: no weight is made, however large the model.

    Args:
        name: a model name or a full tag.
        batch: images or rows of tokens at once.
        **overrides: as in `create_model`. Without an `image_size` the images have the size that the model, or else
            its published weights, are made for.

    Raises:
        ValueError, TypeError: as `create_model`; for a `batch` below 1.
    """
    return traced(name, batch, overrides)[0]


def traced(name: str, batch: int, overrides: Mapping[str, Any]) -> tuple[ModelInfo, Mapping[str, Any]]:
    """What `model_info` returns, and the shapes and dtypes of the model's variables."""
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    model = _sized(name, overrides)
    inputs = model.example_inputs(batch)
    variables = abstract_variables(model)
    shapes: dict[str, tuple[int, ...]] = {}

    def note_shape(call, args, kwargs, context):
        output = call(*args, **kwargs)
        path = context.module.path
        arrays = jax.tree.leaves(output)
        # A stage's last block and the model itself return last. A block's weights come after its tokens; a model of
        # several outputs has no head.
        if context.method_name == "__call__" and (len(path) == 1 or (not path and len(arrays) == 1)):
            stage = _stage_of(path[0]) if path else HEAD
            # In the order of the last returns, so that what the head has in common with the embedding comes last.
            shapes.pop(stage, None)
            shapes[stage] = arrays[0].shape
        return output

    def forward(variables, inputs):
        with nn.intercept_methods(note_shape):
            return model.apply(variables, **inputs)

    counted = cost(forward, variables, inputs, platform=_PLATFORM)
    stages = _stages(shapes, variables, {scope: c.matmul_flops // 2 for scope, c in counted.by_scope.items()})
    of_images = isinstance(model, ImageModel)
    info = ModelInfo(
        name=name,
        family=type(model).__name__,
        batch=batch,
        image_size=model.input_size() if of_images else None,
        in_chans=model.in_chans if of_images else None,
        length=None if of_images else model.length,
        num_classes=(model.num_classes if of_images else model.vocab_size) if HEAD in shapes else 0,
        stages=stages,
        parameters=_numbers(variables["params"]),
        statistics=_numbers(variables) - _numbers(variables["params"]),
        macs=counted.matmul_flops // 2,
    )
    return info, variables


def sizes(model: nn.Module) -> tuple[int, int]:
    """How many parameters a model has, and how many numbers in its other collections."""
    variables = abstract_variables(model)
    parameters = _numbers(variables["params"])
    return parameters, _numbers(variables) - parameters


def weights_of(name: str) -> list[str]:
    """The full tags of a model's published weights; of a full tag, itself."""
    model, tag = registry.split_tag(name)
    return [tag] if tag else registry.list_models(f"{model}.*", pretrained=True)


def input_size(name: str, **overrides: Any) -> tuple[int, ...]:
    """What a model, or else its published weights, are made for: an image's height and width, or tokens in a row."""
    model = _sized(name, overrides)
    return tuple(model.input_size()) if isinstance(model, ImageModel) else (model.length,)


def _sized(name: str, overrides: Mapping[str, Any]) -> nn.Module:
    """The model, at the size of its published weights where neither it nor the caller has one; all of it in XLA."""
    model = registry.create_model(name, **overrides)
    if getattr(model, "image_size", 0) is None:
        if len(sizes := {registry.pretrained_cfg(tag).image_size for tag in weights_of(name)}) == 1:
            model = registry.create_model(name, **{**overrides, "image_size": sizes.pop()})
    return model.clone(implementation="xla")


def _stage_of(module: str) -> str:
    """The row of a module at the top of the model, or of a collection's first key."""
    if found := re.fullmatch(r"(stages_\d+|(?:[a-z]+_)?blocks)_\d+", module):
        return found[1]
    return module if re.fullmatch(r"stem|downsamples_\d+", module) else HEAD


def _numbers(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _stages(
    shapes: Mapping[str, tuple[int, ...]], variables: Mapping[str, Any], macs_of: Mapping[str, int]
) -> tuple[Stage, ...]:
    parameters, macs, blocks = Counter(), Counter(), Counter()
    for module, tree in variables["params"].items():
        parameters[_stage_of(module)] += _numbers(tree)
        blocks[_stage_of(module)] += 1
    for scope, count in macs_of.items():
        # Model/Model.method/.../module/...: the first name that is a stage's says which.
        found = (_stage_of(part.partition(".")[0]) for part in scope.split("/"))
        macs[next((stage for stage in found if stage != HEAD), HEAD)] += count
    return tuple(
        Stage(
            stage,
            blocks[stage] if re.match(r"stages_|(?:[a-z]+_)?blocks$", stage) else None,
            *(shape, parameters[stage], macs[stage]),
        )
        for stage, shape in shapes.items()
    )
