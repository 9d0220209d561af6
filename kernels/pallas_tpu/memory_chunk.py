"""A chunk of a head of a memory in fast memory: the op's own equations, in matrices of two axes.

Tokens are rows. What a rule is made of (`kernels.memory`: the bias's error, the memory's reading, the gate's links) is
the op's own code. Here are the sums over a chunk's tokens, without a tensor of tokens by tokens by channels: between
the halves of blocks of 1, 2, 4, ... tokens the decay is a product of what is left at the place between them, of both
tokens, and neither factor is above 1.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from kernels.memory.rule import MemoryRule
from kernels.pallas_tpu.scan_parts import NN, NT, TN, places

State = dict[str, jax.Array]
CONTRACT = {"NN": NN, "NT": NT, "TN": TN}


class Chunk(NamedTuple):
    """Operands of a chunk of b tokens, float32.

    Attributes:
        query, key: `(b, D)`.
        value: `(b, E)`.
        step, log_retention: `(b, D)`.
        threshold: `(b, 1)`, `(b, E)` or None.
        start: `(b, 1)`, above 0 all through a chunk that begins a document, or None.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    step: jax.Array
    log_retention: jax.Array
    threshold: jax.Array | None
    start: jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(narrow: bool, form: str, left, right):
    """A matrix product with float32 sums; `narrow` rounds its operands to bfloat16, as XLA does by default on a TPU."""
    dtype, precision = (jnp.bfloat16, None) if narrow else (jnp.float32, jax.lax.Precision.HIGHEST)
    operands = left.astype(dtype), right.astype(dtype)
    return jax.lax.dot_general(
        *operands, (CONTRACT[form], ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _product_forward(narrow, form, left, right):
    # Of each operand what the other one's gradient needs, if it has one.
    kept = left.value if right.perturbed else None, right.value if left.perturbed else None
    return product(narrow, form, left.value, right.value), kept


def _product_backward(narrow, form, kept, d):
    if isinstance(d, SymbolicZero):
        return None, None
    left, right = kept
    first, second = {
        "NN": (lambda: product(narrow, "NT", d, right), lambda: product(narrow, "TN", left, d)),
        "NT": (lambda: product(narrow, "NN", d, right), lambda: product(narrow, "TN", d, left)),
        "TN": (lambda: product(narrow, "NT", right, d), lambda: product(narrow, "NN", left, d)),
    }[form]
    return None if right is None else first(), None if left is None else second()


product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def _sums(log_retention, which):
    """Sums over the tokens that `which (b, b)` says."""
    return product(False, "NN", which.astype(jnp.float32), log_retention)


def _levels(log_retention, before: bool):
    """For each level the pairs of a later and an earlier token, `(b, b)`, and what is left between them, `(b, D)`.

    That is at a token of a block's second half since the place between the halves, before its own decay if reads come
    before; and at the place between of a token of the first half.
    """
    rows, columns = places(len(log_retention), len(log_retention))
    for level in range(len(log_retention).bit_length() - 1):
        size = 1 << level
        later = jnp.bitwise_and(rows, size) > 0
        middle = rows - jnp.bitwise_and(rows, 2 * size - 1) + size
        since = (columns >= middle) & ((columns < rows) if before else (columns <= rows))
        until = (columns > rows) & (columns < middle)
        apart = jnp.bitwise_xor(rows, columns)
        pairs = (rows > columns) & (apart >= size) & (apart < 2 * size)
        yield pairs, jnp.exp(_sums(log_retention, jnp.where(later, since, until)))


def _diagonal(square):
    rows, columns = places(len(square), len(square))
    return jnp.where(rows == columns, square, 0.0).sum(1, keepdims=True)


def _by_inputs(narrow, before, log_retention, x, y):
    """sum_c kernel_tic x_tc y_ic, `(b, b)`."""
    rows, columns = places(len(x), len(x))
    own = 0.0 if before else jnp.where(rows == columns, (x * y).sum(1, keepdims=True), 0.0)
    for pairs, left in _levels(log_retention, before):
        own += jnp.where(pairs, product(narrow, "NT", x * left, y * left), 0.0)
    return own


def _by_outputs(narrow, before, log_retention, weights, y, form="NN"):
    """sum_i kernel_tic weights_ti y_ic, `(b, D)`; with `"TN"` sum_t kernel_tic weights_ti y_tc."""
    own = 0.0 if before else _diagonal(weights) * y
    for pairs, left in _levels(log_retention, before):
        own += left * product(narrow, form, jnp.where(pairs, weights, 0.0), y * left)
    return own


def _d_log_retention(before, later, earlier):
    """From the gradients of the decay up to a later token and, with the other sign, from an earlier one."""
    rows, columns = places(len(later), len(later))
    reached = _sums(later, (rows < columns) if before else (rows <= columns))
    return reached - _sums(earlier, rows <= columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def by_inputs(narrow, before, log_retention, x, y):
    """See `kernels.memory.interior.by_inputs`."""
    return _by_inputs(narrow, before, log_retention, x, y)


def _by_inputs_backward(narrow, before, kept, d):
    log_retention, x, y = kept
    d_x = _by_outputs(narrow, before, log_retention, d, y)
    d_y = _by_outputs(narrow, before, log_retention, d, x, "TN")
    return _d_log_retention(before, x * d_x, y * d_y), d_x, d_y


by_inputs.defvjp(lambda *given: (by_inputs(*given), given[2:]), _by_inputs_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def by_outputs(narrow, before, log_retention, weights, y):
    """See `kernels.memory.interior.by_outputs`."""
    return _by_outputs(narrow, before, log_retention, weights, y)


def _by_outputs_backward(narrow, before, kept, d):
    log_retention, weights, y = kept
    d_weights = _by_inputs(narrow, before, log_retention, d, y)
    d_y = _by_outputs(narrow, before, log_retention, weights, d, "TN")
    out = _by_outputs(narrow, before, log_retention, weights, y)
    return _d_log_retention(before, d * out, y * d_y), d_weights, d_y


by_outputs.defvjp(lambda *given: (by_outputs(*given), given[2:]), _by_outputs_backward)


def forward(
    rule: MemoryRule, narrow: bool, state: State, fresh: State | None, chunk: Chunk, read: bool = True
) -> tuple[State, State, jax.Array | None]:
    """Runs a chunk.

    Args:
        rule, narrow: static; see `product`.
        state: before the chunk.
        fresh: what a document starts from, or None without documents.
        chunk: its tokens.
        read: whether the outputs are wanted.

    Returns:
        The anchor, at which gradients were taken, the state after the chunk, and the outputs `(b, E)` or None.
    """
    sides = rule.memory.sides
    if chunk.start is not None:
        begins = _first(chunk.start) > 0
        state = {n: jnp.where(begins, fresh[n], state[n]) for n in sides}
    if rule.retention.lags:
        state, chunk = _lag(rule, narrow, state, chunk)
    factors = {n: rule.retention.frozen(state[n], sides[n], len(chunk.key)) for n in sides}
    surprise = _surprise(rule, narrow, {n: _scaled(factors[n], state[n]) for n in sides}, chunk)
    log_retention = {n: _channels(rule, chunk.log_retention, sides[n]) for n in sides}
    stepped = {n: (e, chunk.step * x) if sides[n] == "in" else (chunk.step * e, x) for n, (e, x) in surprise.items()}
    after = {n: _after(narrow, sides[n], state[n], log_retention[n], *stepped[n]) for n in sides}
    if not read:
        return state, after, None
    before = rule.read == "before"
    rows, columns = places(len(chunk.key), len(chunk.key))
    seen = (columns < rows) if before else (columns <= rows)

    def linear(name, x):
        (error, given), kept = stepped[name], jnp.exp(_sums(log_retention[name], seen))
        if sides[name] == "in":
            written = product(narrow, "NN", by_inputs(narrow, before, log_retention[name], x, given), error)
            return _scaled(factors[name], product(narrow, "NT", kept * x, state[name]) - written)
        written = by_outputs(narrow, before, log_retention[name], product(narrow, "NT", x, given), error)
        return _scaled(factors[name], kept * product(narrow, "NT", x, state[name]) - written)

    return state, after, rule.memory.read(linear, chunk.query, rule.retention.balanced)


def _scaled(factor, x):
    return x if isinstance(factor, float) else factor * x


def _first(x):
    """The first row, without a slice, whose gradient would be one."""
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row == 0, x, 0.0).sum(0, keepdims=True)


def _channels(rule, log_retention, side):
    return jnp.broadcast_to(rule.retention.channels(log_retention, side), log_retention.shape)


def _surprise(rule, narrow, weights, chunk):
    """As in `kernels.memory.block`: of each weight the errors at its output and its inputs."""

    def output(shifts):
        inputs = {}

        def linear(name, x):
            inputs[name] = x
            return product(narrow, "NT", x, weights[name]) + shifts[name]

        return rule.memory.read(linear, chunk.key, rule.retention.balanced), inputs

    shifts = {n: jnp.zeros((len(chunk.key), len(w)), jnp.float32) for n, w in weights.items()}
    out, pull, inputs = jax.vjp(output, shifts, has_aux=True)
    (errors,) = pull(rule.bias.error(out, chunk.value, chunk.threshold))
    return {n: (errors[n], inputs[n]) for n in weights}


def _after(narrow, side, state, log_retention, error, given):
    """The state after the chunk."""
    rows, columns = places(len(given), len(given))
    kept = jnp.exp(_sums(log_retention, rows < columns))
    if side == "in":
        decay = jnp.exp(log_retention.sum(0, keepdims=True))
        return decay * state - product(narrow, "TN", error, kept * given)
    return jnp.exp(_column(log_retention)) * state - product(narrow, "TN", kept * error, given)


def _column(x):
    """The sum over rows `(b, D)`, as a column."""
    return product(False, "TN", x, jnp.ones((len(x), 1), jnp.float32))


def _lag(rule, narrow, state, chunk):
    """The exact step of the first token, after which its part in the chunk is to read."""
    first = jax.lax.broadcasted_iota(jnp.int32, chunk.step.shape, 0) == 0
    surprise = _surprise(rule, narrow, state, chunk)
    moved = {}
    for name, side in rule.memory.sides.items():
        error, given = surprise[name]
        log_retention = jnp.where(first, _channels(rule, chunk.log_retention, side), 0.0)
        # The step acts on the side of the gates, and all but the first are 0.
        step = jnp.where(first, chunk.step, 0.0)
        if side == "in":
            decay, change = log_retention.sum(0, keepdims=True), product(narrow, "TN", error, step * given)
        else:
            decay, change = _column(log_retention), product(narrow, "TN", step * error, given)
        moved[name] = rule.retention.lag(state[name], decay, change, side)
    spared = (jnp.where(first, 0.0, x) for x in (chunk.step, chunk.log_retention))
    return moved, chunk._replace(**dict(zip(("step", "log_retention"), spared)))
