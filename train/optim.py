"""Optimizers, learning-rate schedules and the moving average of the parameters."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
import optax.contrib
from jaxtyping import Array, Float, Int

from train.sharding import path_of

# The way from 1 (optim.lr) to 0 (optim.end_lr): a function of the step t counted from the start of the run,
# the number of steps n before the cool-down, and the warm-up w.
SCHEDULES: dict[str, Callable[[Float[Array, "*n"], int, int], Float[Array, "*n"]]] = {
    "cosine": lambda t, n, w: 0.5 * (1 + jnp.cos(math.pi * t / n)),
    "linear": lambda t, n, w: 1 - t / n,
    "constant": lambda t, n, w: jnp.ones_like(t),
    "rsqrt": lambda t, n, w: jnp.sqrt(max(w, 1) / jnp.maximum(t, max(w, 1))),
}

# The direction of a step, before weight decay and learning rate; what comes after the decay.
OPTIMIZERS: dict[str, Callable[[ml_collections.ConfigDict], tuple[optax.GradientTransformation, ...]]] = {
    "adam": lambda c: (optax.scale_by_adam(c.b1, c.b2, c.eps), optax.identity()),
    "adamw": lambda c: (optax.scale_by_adam(c.b1, c.b2, c.eps), optax.identity()),
    "lamb": lambda c: (optax.scale_by_adam(c.b1, c.b2, c.eps), optax.scale_by_trust_ratio()),
    "muon": lambda c: (_muon(c), optax.identity()),
    "sgd": lambda c: (optax.trace(c.momentum), optax.identity()),
}
# Names of what is a vector for every layer, however many layers an array holds.
VECTORS = ("bias", "scale")
# With it a step of Muon is about as large, entry by entry, as one of Adam: both share learning rate and decay.
MUON_RMS = 0.2


def make(
    config: ml_collections.ConfigDict,
    total_steps: int,
    params: Any,
    *,
    layer_id: Callable[[str], int] | None = None,
    num_layers: int = 0,
    no_decay: Sequence[str] = (),
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer that a config describes: clip, direction, weight decay, learning rate.

    One step is `p -= lr_t * s * (d + weight_decay * p)`, where d is the direction (Adam's, LAMB's before its
    trust ratio, Muon's, or the momentum of the clipped gradient) and `s = layer_decay ** (num_layers - layer)`: the
    decay is decoupled. The one of `adam` alone is not: `weight_decay * p` is added to the clipped gradient, as in
    torch's Adam. The decay of `sgd` is decoupled too, unlike torch's, and its momentum is the plain one. LAMB scales
    every parameter by its trust ratio, those without decay too.

    Muon moves the kernels of two dimensions but those of heads (a part of their path begins with "head") by
    `0.2 * sqrt(max(shape))` times the orthogonal factor of their Nesterov momentum, which five Newton-Schulz
    steps approximate; a kernel that makes query, key and value at once is one matrix, one of three dimensions is a
    stack of matrices, one for every group. Adam moves all others.
    Source: Jordan et al., https://kellerjordan.github.io/posts/muon; the scale: arXiv:2502.16982, section 2.2.

    The state is a tree of tuples: int32 counts, Muon's three coefficients, and trees of the structure, shapes and
    dtype of `params`, whose paths end with those of the parameters. It is stored as it is, and laid out on a mesh
    by the same rules.

    Args:
        config: `config.optim`.
        total_steps: steps of the run; the schedule ends there.
        params: the parameters or their shapes.
        layer_id: the layer, 0 (input) to `num_layers` (head), of the parameter at a path such as
            `"stages_0/blocks_1/kernel"`; wanted where `config.layer_decay` is not 1.
        num_layers: the layer of the head, whose learning rate is not reduced.
        no_decay: regexes for paths that the model's paper does not decay, beside `config.no_decay`.

    Returns:
        The transformation of gradients into updates, and the schedule: step -> learning rate.

    Raises:
        ValueError: if `layer_decay` has no `layer_id` or that returns a layer out of range, or if a regex of
            `config.no_decay` matches no parameter.
    """
    direction, finish = OPTIMIZERS[config.name](config)
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in config.no_decay:
        if not any(re.search(pattern, path) for path in paths):
            raise ValueError(f"optim.no_decay: {pattern!r} matches no parameter, such as {paths[0]!r}")
    rate = schedule(config, total_steps)
    decay = optax.add_decayed_weights(config.weight_decay, decay_mask(params, (*config.no_decay, *no_decay)))
    transformation = optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        *((decay, direction) if config.name == "adam" else (direction, decay)),
        finish,
        _scale_layers(config.layer_decay, params, layer_id, num_layers),
        optax.scale_by_learning_rate(rate),
    )
    return transformation, rate


def _muon(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    def mover(path, leaf):
        parts = path_of(path).split("/")
        hidden = parts[-1] == "kernel" and not any(part.startswith("head") for part in parts)
        return "muon" if leaf.ndim in (2, 3) and hidden else "adam"

    def axes(params):
        return jax.tree.map(lambda leaf: optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1), params)

    def rescale(updates, params):
        return jax.tree.map(lambda update: MUON_RMS * math.sqrt(max(update.shape[-2:])) * update, updates)

    orthogonal = optax.contrib.scale_by_muon(beta=config.momentum, weight_dimension_numbers=axes)
    return optax.partition(
        {
            "muon": optax.chain(orthogonal, optax.stateless(rescale)),
            "adam": optax.scale_by_adam(config.b1, config.b2, config.eps),
        },
        lambda params: jax.tree_util.tree_map_with_path(mover, params),
    )


def schedule(config: ml_collections.ConfigDict, total_steps: int) -> optax.Schedule:
    """The learning rate of each step, 0 for the first one.

    Linear from `warmup_lr` to `lr` over `warmup_steps`, then `end_lr + (lr - end_lr) * f`, then `end_lr` for
    the last `cooldown_steps`. With t counted from the start of the run and n = total_steps - cooldown_steps,
    f is `(1 + cos(pi t / n)) / 2` for cosine, `1 - t / n` for linear, 1 for constant and
    `sqrt(warmup_steps / t)` for rsqrt. That t does not restart after the warm-up is timm's default
    (`warmup_prefix=False`), with which the published recipes were run: the rate after the warm-up is a little
    below `lr`.

    Source: cosine: Loshchilov & Hutter, arXiv 1608.03983; rsqrt: Vaswani et al., arXiv 1706.03762, section
    5.3.
    """
    decay = SCHEDULES[config.schedule]
    warmup, main = config.warmup_steps, total_steps - config.cooldown_steps
    peak, low, floor = config.lr, config.warmup_lr, config.end_lr

    def rate(step):
        t = jnp.asarray(step, float)
        after = floor + (peak - floor) * decay(t, main, warmup)
        before = low + (peak - low) * t / max(warmup, 1)
        return jnp.where(t < warmup, before, jnp.where(t < main, after, floor))

    return rate


def decay_mask(params: Any, no_decay: Sequence[str] = ()) -> Any:
    """True for the parameters that weight decay shrinks: kernels and tables with no regex found in their path.

    What has one dimension is not decayed, nor biases and scales of several layers that are stacked into one array.
    """

    def decays(path, leaf):
        name = path_of(path)
        vector = leaf.ndim < 2 or name.rsplit("/", 1)[-1] in VECTORS
        return not vector and not any(re.search(pattern, name) for pattern in no_decay)

    return jax.tree_util.tree_map_with_path(decays, params)


def _scale_layers(layer_decay, params, layer_id, num_layers) -> optax.GradientTransformation:
    """Layer-wise learning-rate decay; source: Clark et al. (ELECTRA), arXiv 2003.10555, section 3.1."""
    if layer_decay == 1:
        return optax.identity()
    if layer_id is None:
        raise ValueError(f"optim.layer_decay {layer_decay} needs a layer_id, which was not given; set it to 1")

    def factor(path, leaf):
        layer = layer_id(path_of(path))
        if not 0 <= layer <= num_layers:
            raise ValueError(f"layer_id({path_of(path)!r}) must be in [0, {num_layers}], got {layer}")
        return layer_decay ** (num_layers - layer)

    factors = jax.tree_util.tree_map_with_path(factor, params)
    return optax.stateless(lambda updates, params: jax.tree.map(lambda u, f: u * f, updates, factors))


def gradient_norm(grads: Any) -> Float[Array, ""]:
    """The 2-norm of all gradients taken as one vector, which is what `clip_norm` limits."""
    return optax.tree.norm(grads)


def ema_init(tree: Any) -> Any:
    """The moving average before the first update: copies, lest a donated state hold one buffer twice."""
    return jax.tree.map(jnp.copy, tree)


def ema_update(ema: Any, tree: Any, decay: float, step: Int[Array, ""] | int) -> Any:
    """Moves the average towards `tree`: `ema = d * ema + (1 - d) * tree`.

    The decay is warmed up, `d = min(decay, (1 + step) / (10 + step))`, so that the random start is forgotten
    however short the run.

    Args:
        ema: the average, of the structure of `tree`.
        tree: parameters (and statistics) after the update.
        decay: its limit, in [0, 1).
        step: updates done before this one.
    """
    rest = jnp.maximum(1 - decay, 9 / (10 + jnp.asarray(step, float)))
    return jax.tree.map(lambda e, p: e + (rest * (p - e)).astype(e.dtype), ema, tree)
