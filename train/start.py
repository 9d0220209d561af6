"""The state before the first step when a run starts from trained weights."""

import sys

import jax
import ml_collections

import zoo
from train.program import Program
from train.step import TrainState
from zoo import registry
from zoo.backbone import with_backbone


def from_weights(program: Program, state: TrainState, config: ml_collections.FrozenConfigDict) -> TrainState:
    """The state with the parameters and statistics of `config.model.weights`; as it is where there are none.

    Only a classifier of another number of classes stays as it was drawn. With `config.model.backbone` the weights are
    those of a ViT, and all that the model has beside stays as it was drawn. The report of what was loaded goes to
    stderr.

    Raises:
        WeightsError: if the weights do not fit the model.
    """
    backbone = config.model.backbone
    if not (backbone or config.model.weights):
        return state
    model = program.model
    fields = dict(
        num_classes=0 if backbone else model.num_classes,
        in_chans=model.in_chans,
        image_size=model.image_size,
        dtype=model.dtype,
        param_dtype=model.param_dtype,
        resize=config.model.resize,
        seed=config.seed,
    )
    if backbone:
        known = registry.family_of(registry.split_tag(backbone)[0]).module.__dataclass_fields__.keys()
        own = known - {"name", "parent"} - set(fields)
        fields |= {name: getattr(model, name) for name in own if hasattr(model, name)}
    else:
        fields |= config.model.overrides
    _, variables, report = zoo.load_pretrained(backbone or config.model.name, config.model.weights, **fields)
    if backbone:
        variables = with_backbone(state.variables(), variables)
    if jax.process_index() == 0:
        print(report, file=sys.stderr)
    placed = jax.tree.map(lambda value, like: jax.device_put(value, like.sharding), variables, state.variables())
    params = placed.pop("params")
    # The averages are copies, lest two leaves of a donated state share a buffer.
    ema = jax.tree.map(jax.numpy.copy, {"params": params, **placed}) if state.ema else {}
    return state.replace(params=params, model_state=placed, ema=ema)
