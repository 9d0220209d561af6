"""One training step and one evaluation step, as pure functions."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from train.optim import ema_update, gradient_norm
from train.tasks import TASK, Batch, Task


@flax.struct.dataclass
class TrainState:
    """All that changes from step to step, and all that a checkpoint must hold; also of shapes or shardings.

    Attributes:
        step: int32, steps done.
        params: the parameters.
        model_state: the model's other collections, such as `batch_stats`; `{}` where it has none.
        opt_state: the optimizer's state.
        ema: running average of `params` and `model_state`, `{}` where it is off.
        nonfinite_step: int32, the first step whose loss or gradient was not finite, -1 while there is none.
        task: what the task has beside the model (`Task.init`), `params` and `state`; `{}` where it has nothing. Never
            averaged, and no part of a model that is saved for use.
    """

    step: Any
    params: Any
    model_state: Any
    opt_state: Any
    ema: Any
    nonfinite_step: Any
    task: Any = flax.struct.field(default_factory=dict)

    def variables(self, averaged: bool = False) -> dict[str, Any]:
        """What `model.apply` takes; with `averaged` the running averages where they are kept."""
        if averaged and self.ema:
            return self.ema
        return {"params": self.params, **self.model_state}

    def training_variables(self) -> dict[str, Any]:
        """What `Task.loss` takes: `variables()`, and what the task has itself under the name `TASK`."""
        if not self.task:
            return self.variables()
        params = trained(self.params, self.task)
        return {"params": params, **self.model_state, TASK: self.task["state"]}


def trained(params: Any, task: Any) -> Any:
    """All that the optimizer moves: the model's parameters and, under the name `TASK`, those of the task."""
    return {**params, TASK: task["params"]} if task else params


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    inputs: dict[str, Any],
    *,
    seed: int,
    ema: bool,
    task: Task | None = None,
):
    """The state before the first step; a pure function of its arguments, to be jitted with shardings.

    Args:
        model: the model.
        optimizer: its optimizer.
        inputs: arguments of the model by name (shapes and dtypes matter, values do not).
        seed: of the initial parameters.
        ema: whether running averages are kept.
        task: what is trained; None for one that has nothing beside the model.
    """
    model_state = dict(model.init(jax.random.key(seed), **inputs))
    params = model_state.pop("params")
    beside = {} if task is None else task.init(jax.random.fold_in(jax.random.key(seed), 1))
    # A copy, lest two leaves of a donated state share a buffer.
    average = jax.tree.map(jnp.copy, {"params": params, **model_state}) if ema else {}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=optimizer.init(trained(params, beside)),
        ema=average,
        nonfinite_step=jnp.full((), -1, jnp.int32),
        task=beside,
    )


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    accum_steps: int = 1,
    ema_decay: float = 0.0,
    gathered: Callable[[Any], Any] = lambda params: params,
) -> Callable[[TrainState, Batch, Key[Array, ""], Task], tuple[TrainState, dict[str, Array]]]:
    """The function `(state, batch, key, task) -> (state, metrics)`.

    All randomness of a step derives from `key` and the step's number, so that a resumed run draws the same.
    With `accum_steps` the batch is cut into that many parts whose gradients are averaged; what the model keeps
    besides its parameters (batch statistics) is carried from part to part. `gathered` places the parameters for use.
    """

    def gradients(task, params, model_state, batch, key):
        def loss(params):
            return task.loss(model, {"params": gathered(params), **model_state}, batch, key)

        (_, (metrics, model_state)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return grads, metrics, model_state

    def accumulated(task, params, model_state, batch, key):
        # Every part takes each k-th example, so that all devices stay busy and no example moves.
        parts = jax.tree.map(lambda x: x.reshape(-1, accum_steps, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(carry, part):
            total, model_state = carry
            index, rows = part
            grads, metrics, model_state = gradients(task, params, model_state, rows, jax.random.fold_in(key, index))
            return (jax.tree.map(jnp.add, total, grads), model_state), metrics

        zeros = jax.tree.map(jnp.zeros_like, params)
        (total, model_state), metrics = jax.lax.scan(add, (zeros, model_state), (jnp.arange(accum_steps), parts))
        mean = jax.tree.map(lambda g: g / accum_steps, total)
        return mean, jax.tree.map(lambda m: m.mean(0), metrics), model_state

    def train_step(state: TrainState, batch: Batch, key: Key[Array, ""], task: Task):
        prepare_key, model_key = jax.random.split(jax.random.fold_in(key, state.step))
        batch = task.prepare(batch, prepare_key)
        compute = gradients if accum_steps == 1 else accumulated
        model_state = state.training_variables()
        params = model_state.pop("params")
        grads, metrics, model_state = compute(task, params, model_state, batch, model_key)
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        params = optax.apply_updates(params, updates)
        grad_norm = gradient_norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        step = state.step + 1
        beside = {"params": params.pop(TASK), "state": model_state.pop(TASK)} if state.task else {}
        metrics = {**metrics, "grad_norm": grad_norm, "lr": schedule(state.step)}
        ema = state.ema
        if ema_decay:
            ema = ema_update(ema, {"params": params, **model_state}, ema_decay, state.step)
        first = jnp.where((state.nonfinite_step < 0) & ~finite, step, state.nonfinite_step)
        metrics["nonfinite_step"] = first
        return TrainState(step, params, model_state, opt_state, ema, first, beside), metrics

    return train_step
