"""The state before the first step when a run starts from trained weights."""

import sys

import jax
import ml_collections

import zoo
from train.program import Program
from train.step import TrainState


def from_weights(program: Program, state: TrainState, config: ml_collections.FrozenConfigDict) -> TrainState:
    """The state with the parameters and statistics of `config.model.weights`; as it is where there are none.

    Only a classifier of another number of classes stays as it was drawn. The report of what was loaded goes to
    stderr.

    Raises:
        WeightsError: if the weights do not fit the model.
    """
    if not config.model.weights:
        return state
    model = program.model
    fields = dict(
        num_classes=model.num_classes,
        in_chans=model.in_chans,
        image_size=model.image_size,
        dtype=model.dtype,
        param_dtype=model.param_dtype,
    )
    _, variables, report = zoo.load_pretrained(
        config.model.name,
        config.model.weights,
        resize=config.model.resize,
        seed=config.seed,
        **{**fields, **config.model.overrides},
    )
    if jax.process_index() == 0:
        print(report, file=sys.stderr)
    placed = jax.tree.map(lambda value, like: jax.device_put(value, like.sharding), variables, state.variables())
    params = placed.pop("params")
    # The averages are copies, lest two leaves of a donated state share a buffer.
    ema = jax.tree.map(jax.numpy.copy, {"params": params, **placed}) if state.ema else {}
    return state.replace(params=params, model_state=placed, ema=ema)
