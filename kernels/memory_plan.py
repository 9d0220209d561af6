"""What kernels of memories share whatever they run on: calls served, operands, gradients, costs.

A kernel walks through the whole chunks of `kernels.memory.miras`, with the state of each head in fast memory, for rules
whose weights are the state times a factor all through a chunk. It is two functions of a module, see `Backend`:

    forward(call, operands, begin, fresh, keep) -> out (B, N, H, E), end, anchor or None, states or None
    backward(call, operands, fresh, states, d_out, d_end, d_anchor) -> d_operands, d_begin, d_fresh or None

`operands` are `query` and `key` `(B, N, H, D)` and `value` `(B, N, H, E)`, all bfloat16 or all float32, and in float32
`step` and `log_retention` (absent where nothing decays) `(B, N, H, 1 or D)` and `threshold` (absent where the rule has
none) `(B, N, H, 1 or E)`; `start` `(B, N, 1, 1)`, above 0 in a chunk that begins a document, absent without documents.
N is a multiple of the backend's block, of which the first `call.tokens`, whole chunks, count. States are dicts of
float32 arrays `(B, H, R, C)`: `begin` before the first chunk, `fresh` at a document's start (None without documents),
`end`, and with `call.anchored` `anchor`, where the last chunk's gradients were taken. With `keep` some of the states
between chunks come back for the backward pass, in any layout. Gradients have the dtypes of their operands.

On a GPU the memory is not kept on the chip, and XLA's form serves: padded to powers of two, as Triton's tiles are, the
two layers of a head of 48 channels are 128 KiB, and their gradients as much again, of 256 KiB of registers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import compat
from kernels.cost import tree_bytes
from kernels.dispatch import Implementation
from kernels.memory.block import State, Tokens, Weights
from kernels.memory.modules import MLP, Vector
from kernels.memory.rule import MemoryRule

DTYPES = ("bfloat16", "float32")
WIDE = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class Backend:
    """What walks through chunks on one kind of device.

    Attributes:
        name, platforms: as in `kernels.dispatch.Implementation`.
        forward, backward: see above.
        block: `block(chunk)`, of which the tokens are a multiple.
        unsupported: `unsupported(chunk, shapes)` says why states of these shapes, by name, cannot be served, or None.
    """

    name: str
    platforms: tuple[str, ...]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    block: Callable[[int], int]
    unsupported: Callable[[int, dict[str, tuple[int, int]]], str | None]


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static of a call; `tokens` are those of whole chunks, without what fills the last block up."""

    backend: Backend
    rule: MemoryRule
    chunk: int
    tokens: int
    anchored: bool


def implementation(run: Callable[..., Any], backend: Backend) -> Implementation:
    """The backend as an implementation of `kernels.memory.miras`, whose `run` takes a kernel."""
    return Implementation(
        backend.name,
        functools.partial(run, kernel=backend),
        functools.partial(_refusal, backend=backend),
        platforms=backend.platforms,
        batched=(True, True, True, False, True, True, True, True, True, True),
    )


def _refusal(query, key, value, weights, *gates, backend, rule, chunk_size, form, aligned, return_state):
    *_, segments, _ = gates
    if form != "chunk":
        return f"form={form!r} is not that of the kernel, which is form='chunk'"
    if rule.algorithm != "gradient":
        return f"algorithm={rule.algorithm!r} is not that of the kernel, which is 'gradient'"
    if isinstance(rule.memory, Vector):
        return "the kernel is for the memories 'mlp' and 'matrix', not for 'vector'"
    if isinstance(rule.memory, MLP) and rule.memory.gelu == "erf":
        return "MLP(gelu='erf') is left to implementation='xla', as a TPU's kernel has no erfc; gelu='tanh' would do"
    if getattr(rule.retention, "first", False):
        return "Decay(first=True) is left to implementation='xla'"
    if segments is not None and not aligned:
        return "documents may start inside a chunk; the kernel takes segments with aligned=True"
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.dtype.name not in DTYPES:
            return f"{name} is {array.dtype.name}; the kernel takes {' and '.join(DTYPES)}"
    if 0 in key.shape:
        return f"there is nothing to compute for key {key.shape}"
    sides = rule.memory.sides
    structs = {name: jax.ShapeDtypeStruct(weights[name].shape, jnp.float32) for name in sides}

    def frozen(states):
        return {name: rule.retention.frozen(states[name], sides[name], chunk_size) for name in sides}

    if not rule.retention.additive or None in jax.eval_shape(frozen, structs).values():
        return f"with {rule.retention} the weights are not the state times a factor all through a chunk"
    return backend.unsupported(chunk_size, {name: weights[name].shape[1:] for name in sides})


def walk(
    backend: Backend,
    rule: MemoryRule,
    chunk: int,
    fresh: State,
    anchored: bool,
    begin: Weights,
    tokens: Tokens,
) -> tuple[Weights, jax.Array]:
    """Runs whole chunks.

    Args:
        backend, rule, chunk, anchored: static; see `Call`.
        fresh: the state that a document starts from, of each head of each sample, `(B * H, R, C)`.
        begin: where the memory stands, likewise; a chunk begins.
        tokens: operands `(B, N, H, c)`, N a multiple of `chunk`; `live` is not looked at, as the gates of fillers
            are neutral.

    Returns:
        Where the memory stands after them, and the outputs `(B, N, H, E)`.
    """
    b, n, h, _ = tokens.query.shape
    dtype = jnp.result_type(*(getattr(tokens, name) for name in WIDE))

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, -n % backend.block(chunk)), *((0, 0),) * (x.ndim - 2)))

    operands = {name: padded(getattr(tokens, name).astype(dtype)) for name in WIDE}
    for name in ("step", "log_retention", "threshold"):
        if getattr(tokens, name) is not None:
            operands[name] = padded(getattr(tokens, name).astype(jnp.float32))
    documents = tokens.starts is not None
    if documents:
        opening = jnp.repeat(tokens.starts[:, ::chunk], chunk, axis=1)
        operands["start"] = padded(opening[:, :, None, None].astype(jnp.float32))

    def by_head(state):
        return {name: x.astype(jnp.float32).reshape(b, h, *x.shape[1:]) for name, x in state.items()}

    states = by_head(begin.running), by_head(fresh) if documents else None
    leaves, structure = jax.tree.flatten((operands, *states))
    operands, *states = jax.tree.unflatten(structure, compat.match_varying(*leaves))
    call = Call(backend, rule, chunk, n, anchored)
    out, end, anchor = compat.traced_once(recurrence, dict(call=call), operands, *states)
    running, anchor = ({name: x.reshape(b * h, *x.shape[2:]) for name, x in s.items()} for s in (end, anchor or end))
    return Weights(anchor, running, None), out[:, :n].astype(tokens.value.dtype)


def recurrence(operands, begin, fresh, *, call: Call):
    """Outputs, end and anchor; the gradient keeps the operands and some of the states."""
    return _recurrence(call, operands, begin, fresh)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(call, operands, begin, fresh):
    return call.backend.forward(call, operands, begin, fresh, False)[:3]


def _recurrence_forward(call, operands, begin, fresh):
    *results, states = call.backend.forward(call, operands, begin, fresh, True)
    return tuple(results), (operands, fresh, states)


def _recurrence_backward(call, kept, cotangents):
    return call.backend.backward(call, *kept, *cotangents)


_recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def products(rule: MemoryRule, chunk: int, shapes: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Operations of the matrix products of a chunk of a head: of recalling and writing, and of reading.

    Products of tokens with tokens count whole, those that a level of `kernels.pallas_tpu.memory_chunk` takes as one.
    """
    writing = reading = 0
    for name, (rows, columns) in shapes.items():
        each = 2 * chunk * rows * columns
        # What it says of the keys, the write, and where there are layers behind, their error.
        writing += 2 * each + (each if rule.memory.sides[name] == "out" else 0)
        if rule.retention.lags:
            writing += 2 * each + (each if rule.memory.sides[name] == "out" else 0)
        reading += each + 2 * chunk * chunk * (rows + columns)
    return writing, reading


def transcendentals(rule: MemoryRule, chunk: int, shapes: dict[str, tuple[int, int]]) -> int:
    """Exponentials of a chunk of a head: the decay of each token, up to it and from it; tanh of each hidden unit."""
    channels = shapes["w" if "w" in shapes else "w2"][1]
    found = 2 * chunk * channels * len(shapes)
    return found + (2 * chunk * shapes["w2"][0] if isinstance(rule.memory, MLP) else 0)


def estimate(flops: int, transcendentals: int, operands: Any, results: Any) -> pl.CostEstimate:
    """The cost of a kernel that reads its operands and writes its results once."""
    moved = tree_bytes((operands, results))
    return pl.CostEstimate(flops=flops, transcendentals=transcendentals, bytes_accessed=moved)
