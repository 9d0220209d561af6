"""A block of tokens whose gradients are all taken at the same weights: what every form of a memory is made of.

Heads are folded into the batch: of each operand a block has `(G, b, ...)`, of each state `(G, ...)`. Every form is a
scan over blocks: of a chunk's tokens, or of one token, whose gradient is then taken at the weights of its chunk's start
all the same.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.memory.interior import by_inputs, by_outputs, interior
from kernels.memory.retention import gated_axis
from kernels.memory.rule import MemoryRule

State = dict[str, jax.Array]


class Tokens(NamedTuple):
    """Operands of a block; gates are `(G, b, 1)` or `(G, b, channels)`, or None where the rule has none.

    `live` is False for what merely fills a block up: such a token has a step of 0 and a retention of 1. `starts` is
    True where a token begins a new document, None where there are no documents.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    step: jax.Array
    log_retention: jax.Array | None
    threshold: jax.Array | None
    log_momentum: jax.Array | None
    live: jax.Array
    starts: jax.Array | None


class Weights(NamedTuple):
    """Where a memory stands: the state at its chunk's start, where gradients are taken, the state now, the momentum."""

    anchor: State
    running: State
    velocity: State | None


def advance(
    rule: MemoryRule,
    chunk_size: int,
    fresh: State,
    weights: Weights,
    tokens: Tokens,
    opens,
    one_by_one: bool,
    aligned: bool,
) -> tuple[Weights, jax.Array]:
    """Runs a block of tokens of one chunk.

    Args:
        rule, chunk_size: static.
        fresh: the state that a document starts from.
        weights: where the memory stands.
        tokens: at most what remains of the chunk.
        opens: whether the block is at its chunk's start, True or `(G,)`.
        one_by_one: step through the tokens with every weight written down, even where sums over tokens would do.
        aligned: no document starts after the block's first token.

    Returns:
        Where the memory stands after the block, and the outputs `(G, b, E)`.
    """
    anchor = weights.running if opens is True else _select(opens, weights.running, weights.anchor)
    weights = Weights(anchor, weights.running, weights.velocity)
    restarted = Weights(fresh, fresh, None if weights.velocity is None else jax.tree.map(jnp.zeros_like, fresh))
    if tokens.starts is not None:
        weights = _select(tokens.starts[:, 0], restarted, weights)
    if rule.retention.lags:
        weights, tokens = _lag(rule, weights, tokens, opens)

    if tokens.starts is None or tokens.key.shape[1] == 1 or aligned:
        return _run(rule, chunk_size, weights, tokens, None, one_by_one)
    # Of the documents in a block the first goes on from `weights`, and all others start anew. Both are computed
    # whatever there is: with the batch split over devices a branch would have to wait for all of them.
    starts = tokens.starts.at[:, 0].set(False)
    first, out = _run(rule, chunk_size, weights, tokens, starts, one_by_one)
    last, others = _run(rule, chunk_size, restarted, tokens, starts, one_by_one)
    later = jnp.cumsum(starts, 1) > 0
    return _select(later[:, -1], last, first), jnp.where(later[..., None], others, out)


def _select(which, yes, no):
    """Leaf by leaf and head by head, `yes` where `which (G,)` is True."""

    def one(y, n):
        return jnp.where(which.reshape(-1, *[1] * (n.ndim - 1)), y, n)

    return jax.tree.map(one, yes, no)


def _run(rule, chunk_size, weights, tokens, starts, one_by_one):
    sides = rule.memory.sides
    factors = {n: rule.retention.frozen(weights.anchor[n], sides[n], chunk_size) for n in sides}
    linked = {n: _link(rule, weights.anchor[n], sides[n], factors[n]) for n in sides}
    surprise = _surprise(rule, linked, tokens)
    summed = rule.retention.additive and not one_by_one
    if summed and all(factor is not None for factor in factors.values()):
        return _sums(rule, weights, factors, surprise, tokens, starts)
    return _steps(rule, weights, factors, surprise, tokens, starts)


def _link(rule, state, side, factor):
    return rule.retention.link(state, side) if factor is None else _scaled(factor, state)


def _scaled(factor, state):
    return state if isinstance(factor, float) else factor * state


def _over_tokens(factor):
    return factor if isinstance(factor, float) else factor[:, None]


def _apply(weights, x):
    """Weights `(G, R, C)` at x `(G, b, C)`, or `(G, D)`, a diagonal, at `(G, b, D)`."""
    return weights[:, None] * x if weights.ndim == 2 else jnp.matmul(x, weights.swapaxes(-1, -2))


def _surprise(rule: MemoryRule, linked: State, tokens: Tokens) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Of each weight the gradients of the loss, token by token, as pairs: the error at its output, and its input.

    The gradient of a token is the outer product of its pair, for a diagonal the elementwise product.
    """
    first = getattr(rule.retention, "first", False)
    alpha = jnp.exp(tokens.log_retention) if first else None
    key = tokens.key

    def output(shifts):
        inputs = {}

        def linear(name, x):
            inputs[name] = x
            inside = first and rule.memory.sides[name] != "out"
            y = _apply(linked[name], alpha * x if inside else x)
            return (alpha * y if first and not inside else y) + shifts[name]

        return rule.memory.read(linear, key, rule.retention.balanced), inputs

    rows = {n: w.shape[-1] if rule.memory.sides[n] == "diagonal" else w.shape[-2] for n, w in linked.items()}
    shifts = {n: jnp.zeros((*key.shape[:2], r), key.dtype) for n, r in rows.items()}
    out, pull, inputs = jax.vjp(output, shifts, has_aux=True)
    (errors,) = pull(rule.bias.error(out, tokens.value, tokens.threshold))
    return {n: (errors[n], inputs[n]) for n in linked}


def _lag(rule, weights, tokens, opens):
    """The exact step of a chunk's first token, after which its part in the block is to read."""
    at_start = jnp.full(tokens.key.shape[:1], True) if opens is True else opens
    first = Tokens(*(None if x is None else x[:, :1] for x in tokens))
    surprise = _surprise(rule, weights.anchor, first)
    moved = {}
    for name, side in rule.memory.sides.items():
        change = _on(first.step[:, 0], side) * _product(*(x[:, 0] for x in surprise[name]), side)
        decay = _decay(rule, first, side)
        decay = jnp.zeros(()) if decay is None else _on(decay[:, 0], side)
        moved[name] = rule.retention.lag(weights.anchor[name], decay, change, side)
    at_start = at_start & first.live[:, 0]
    weights = _select(at_start, Weights(moved, moved, None), weights)
    only_read = at_start[:, None, None] & (jnp.arange(tokens.key.shape[1]) == 0)[:, None]

    def spared(x):
        return None if x is None else jnp.where(only_read, 0, x)

    return weights, tokens._replace(step=spared(tokens.step), log_retention=spared(tokens.log_retention))


def _decay(rule, tokens, side):
    return None if tokens.log_retention is None else rule.retention.channels(tokens.log_retention, side)


def _product(error, x, side):
    """The gradient of one token, from its error `(G, R)` and its input `(G, C)`."""
    return error * x if side == "diagonal" else error[:, :, None] * x[:, None, :]


def _on(gate, side):
    """A gate of one token `(G, 1 or D)` as a factor on a state."""
    return gate if side == "diagonal" else jnp.expand_dims(gate, -3 - gated_axis(side))


def _sums(rule, weights, factors, surprise, tokens, starts):
    """The block at once, where weights are the state times a factor: no state between the ends is ever formed."""
    sides = rule.memory.sides
    before = rule.read == "before"
    inside = {}
    for name, side in sides.items():
        log_retention = _decay(rule, tokens, side)
        log_retention = jnp.zeros_like(tokens.step[..., :1]) if log_retention is None else log_retention
        inside[name] = interior(log_retention, tokens.log_momentum, tokens.live, starts, before)
    # The step acts on the side of the gates.
    stepped = {n: (e, tokens.step * x) if sides[n] == "in" else (tokens.step * e, x) for n, (e, x) in surprise.items()}

    def linear(name, x):
        (error, given), part, side = stepped[name], inside[name], sides[name]
        starting = [(part.base, weights.running[name])]
        if part.velocity is not None:
            starting.append((part.velocity, weights.velocity[name]))
        if side == "in":
            y = sum(_apply(state, c * x) for c, state in starting)
            y = y - jnp.matmul(by_inputs(part.kernel, x, given), error)
        elif side == "out":
            y = sum(c * _apply(state, x) for c, state in starting)
            y = y - by_outputs(part.kernel, jnp.matmul(x, given.swapaxes(-1, -2)), error)
        else:
            w = sum(c * state[:, None] for c, state in starting)
            w = w - by_outputs(part.kernel, jnp.ones((*x.shape[:2], x.shape[1]), x.dtype), error * given)
            return _scaled(_over_tokens(factors[name]), w) * x
        return _scaled(factors[name], y)

    out = rule.memory.read(linear, tokens.query, rule.retention.balanced)
    running = {n: _end(sides[n], *stepped[n], inside[n].last_kernel) for n in sides}
    for n, side in sides.items():
        part = inside[n]
        running[n] = _on(part.last_base[:, 0], side) * weights.running[n] - running[n]
        if part.velocity is not None:
            running[n] = running[n] + _on(part.last_velocity[:, 0], side) * weights.velocity[n]
    velocity = None
    if weights.velocity is not None:
        velocity = {
            n: _on(inside[n].momentum_base[:, 0], side) * weights.velocity[n]
            - _end(side, *stepped[n], inside[n].momentum_kernel)
            for n, side in sides.items()
        }
    return Weights(weights.anchor, running, velocity), out


def _end(side, error, given, kernel):
    """The sum over a block of its gradients times `kernel (G, b, c)`."""
    if side == "diagonal":
        return (kernel * error * given).sum(1)
    error, given = (error, kernel * given) if side == "in" else (kernel * error, given)
    return jnp.matmul(error.swapaxes(-1, -2), given)


def _steps(rule, weights, factors, surprise, tokens, starts):
    """The block token by token, with gradients known beforehand and every state written down."""
    sides, begin = rule.memory.sides, (weights.running, weights.velocity)

    def one(now, inputs):
        token, pairs, start = inputs
        if start is not None:
            now = _select(start, begin, now)
        was, velocity = now
        running, velocity = {}, None if velocity is None else dict(velocity)
        for name, side in sides.items():
            gradient, step = _product(*pairs[name], side), _on(token.step, side)
            if rule.retention.additive:
                decay = _decay(rule, token, side)
                change = -step * gradient
                if velocity is not None:
                    velocity[name] = _on(jnp.exp(token.log_momentum), side) * velocity[name] + change
                    change = velocity[name]
                kept = was[name] if decay is None else _on(jnp.exp(decay), side) * was[name]
                running[name] = kept + change
            else:
                running[name] = rule.retention.move(was[name], step, gradient, side)
        moved = _select(token.live, (running, velocity), now)
        state = moved[0] if rule.read == "after" else was

        def linear(name, x):
            w = _link(rule, state[name], sides[name], factors[name])
            return w * x if sides[name] == "diagonal" else jnp.einsum("grc,gc->gr", w, x)

        return moved, rule.memory.read(linear, token.query, rule.retention.balanced)

    in_time = jax.tree.map(lambda x: x.swapaxes(0, 1), (tokens._replace(starts=None), surprise, starts))
    (running, velocity), out = jax.lax.scan(jax.checkpoint(one), begin, in_time)
    return Weights(weights.anchor, running, velocity), out.swapaxes(0, 1)
