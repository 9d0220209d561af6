"""A run before its first step: model, task, mesh, shapes and shardings, and the functions to be compiled."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

import zoo
from train import optim, sharding, step, tasks
from train.face_set import FaceSet
from train.sequences import SequenceSet
from train.sources import Dataset
from zoo import registry
from zoo.image_model import ImageModel
from zoo.pretrained import abstract_variables
from zoo.sequence.sequence_model import SequenceModel


@dataclasses.dataclass(frozen=True)
class Program:
    """What `build` makes; nothing is computed yet.

    Attributes:
        model, task, mesh: as the config asks for; of a planned program the task's arrays are shapes.
        abstract_state: shapes, dtypes and shardings of the train state.
        init: `() -> state`, jitted.
        train_step: `(state, batch, key, task) -> (state, metrics)`, jitted; donates the state.
        eval_step: `(variables, batch) -> sums`, jitted.
        rows: sharding of batches.
        replicated: sharding of what every device holds whole.
    """

    model: nn.Module
    task: tasks.Task
    mesh: Mesh | AbstractMesh
    abstract_state: step.TrainState
    init: Any
    train_step: Any
    eval_step: Any
    rows: NamedSharding
    replicated: NamedSharding


def build_model(config: ml_collections.ConfigDict, dataset: Dataset | SequenceSet) -> nn.Module:
    """The model that a config names, made for the data.

    An image model has the data's classes (none for verification) and image size, and the channels of `data.mean`; a
    sequence model the data's vocabulary and length.

    Raises:
        ValueError: for a model of images and data of sequences, or the other way round.
    """
    wanted = SequenceModel if isinstance(dataset, SequenceSet) else ImageModel
    if not issubclass(registry.family_of(config.model.name).module, wanted):
        takes, has = ("images", "tokens") if wanted is SequenceModel else ("tokens", "images")
        raise ValueError(
            f"config.model.name {config.model.name!r} takes {takes}, the {dataset.name} has {has}; "
            f"config.task {config.task!r} needs a model of {has}"
        )
    fields = dict(dtype=jnp.dtype(config.dtype), param_dtype=jnp.dtype(config.param_dtype), remat=config.remat)
    if isinstance(dataset, SequenceSet):
        fields |= dict(vocab_size=dataset.vocab_size, length=dataset.length)
        if dataset.source_length is not None:
            fields |= dict(source_vocab_size=dataset.vocab_size, source_length=dataset.source_length)
    else:
        shape = image_size(config, dataset)
        # Who is in training is no class of the model: it gives embeddings of anyone.
        classes = 0 if isinstance(dataset, FaceSet) else dataset.num_classes
        fields |= dict(image_size=shape, num_classes=classes, in_chans=len(config.data.mean))
    model = zoo.create_model(config.model.name, **{**fields, **config.model.overrides})
    if isinstance(dataset, SequenceSet) and dataset.packed and dataset.align % model.segment_multiple:
        raise ValueError(
            f"{config.model.name} keeps documents apart only where they begin at multiples of "
            f"{model.segment_multiple} tokens; set config.data.align to such a number, it is {dataset.align}"
        )
    return model


def image_size(config: ml_collections.ConfigDict, dataset: Dataset) -> tuple[int, int]:
    """Height and width that the model sees: `data.image_size`, or the size that all images have."""
    if config.data.image_size is not None:
        return config.data.image_size, config.data.image_size
    if dataset.image_shape is None:
        raise ValueError(f"the images of {dataset.name} differ in size; set config.data.image_size")
    return dataset.image_shape[:2]


def build(
    config: ml_collections.ConfigDict,
    dataset: Dataset | SequenceSet,
    devices: Sequence[jax.Device] | None = None,
    *,
    planned: Mesh | AbstractMesh | None = None,
) -> Program:
    """Builds a run's program.

    Args:
        config: a complete config (`train.config.load`).
        dataset: the training split; it tells the number of classes and the image size, or the vocabulary and length.
        devices: those of the mesh; None means all that there are.
        planned: a mesh to plan for, in place of `devices` and of the config's, of devices that need not exist: nothing
            is put on them, and a teacher's weights are not read.

    Raises:
        ValueError: for a model, a mesh or a batch size that does not fit; the message names the config's key.
        TypeError: for an unknown field in `model.overrides`.
    """
    mesh = planned or sharding.make_mesh(dict(config.mesh), devices)
    sharding.check_batch("config.data.batch_size", config.data.batch_size, mesh, config.accum_steps)
    _check_tokens(dataset, mesh)
    model = build_model(config, dataset)
    replicated = NamedSharding(mesh, PartitionSpec())
    task = tasks.make(config, model, dataset, planned=planned is not None)
    if planned is None:
        task = jax.device_put(task, replicated)
    family = registry.family_of(config.model.name)
    inputs = {name: jnp.zeros(like.shape, like.dtype) for name, like in model.example_inputs().items()}
    beside = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    params = step.trained(abstract_variables(model)["params"], beside)
    layer_of, last_layer = family.layers(model)
    optimizer, schedule = optim.make(
        config.optim,
        config.total_steps,
        params,
        layer_id=lambda path: last_layer if path.startswith(f"{tasks.TASK}/") else layer_of(path),
        num_layers=last_layer,
    )
    init = functools.partial(step.init_state, model, optimizer, inputs, seed=config.seed, ema=config.ema > 0, task=task)
    traced = functools.partial(_traced, config.matmul_precision, mesh)
    abstract = jax.eval_shape(init)
    places = sharding.state_shardings(abstract, family.sharding_rules, mesh)
    rows = sharding.batch_sharding(mesh)
    if planned is not None:
        task = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), task)
    gathered = functools.partial(sharding.gathered, places=step.trained(places.params, places.task))
    options = dict(accum_steps=config.accum_steps, ema_decay=config.ema, gathered=gathered)
    train_step = step.make_train_step(model, optimizer, schedule, **options)

    def eval_step(variables, batch):
        return task.evaluate(model, {**variables, "params": gathered(variables["params"])}, batch)

    return Program(
        model=model,
        task=task,
        mesh=mesh,
        abstract_state=jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract, places
        ),
        init=jax.jit(traced(init), out_shardings=places),
        train_step=jax.jit(
            traced(train_step),
            # Of sequences, what has tokens lies as `sharding.place_batch` puts it, what has none as rows.
            in_shardings=(places, rows if mesh.shape["sequence"] == 1 else None, replicated, replicated),
            out_shardings=(places, replicated),
            donate_argnums=0,
        ),
        eval_step=jax.jit(traced(eval_step), out_shardings=replicated),
        rows=rows,
        replicated=replicated,
    )


def _check_tokens(dataset: Dataset | SequenceSet, mesh: Mesh | AbstractMesh) -> None:
    """Raises `ValueError` for data whose rows do not split along the tokens as the mesh asks."""
    if not isinstance(dataset, SequenceSet):
        return sharding.check_tokens(f"the {dataset.name}", None, mesh)
    sharding.check_tokens("tokens (config.data.length)", dataset.length, mesh)
    if dataset.source_length is not None:
        sharding.check_tokens("tokens of a source", dataset.source_length, mesh)


def _traced(precision: str, mesh: Mesh | AbstractMesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, traced with this precision for matrix products of float32, and with its kernels over the mesh."""
    function = sharding.on_mesh(mesh, function)

    def traced(*args):
        with jax.default_matmul_precision(precision):
            return function(*args)

    return traced
