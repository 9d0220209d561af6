"""What kernels of chunked recurrences share whatever they run on: calls served, operands, gradients, costs.

Per head, with a state S of D x E, before the first token the initial state or zeros:

    "scalar", "channel":  S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T
    "delta":              R_t = exp(g_t) S_{t-1},  S_t = R_t + beta_t k_t (v_t - R_t^T k_t)^T
    all:                  out_t = scale * q_t S_t

A backend is two functions of a module, described by `Backend`:

    forward(kind, query, key, value, beta, log_decay, initial_state, *, chunk, scale, keep)
        -> out (B, N, H, E), final_state (B, H, D, E) float32, states or None
    backward(kind, query, key, value, beta, log_decay, initial_state, states, d_out, d_final_state, *, chunk, scale)
        -> d_query, d_key, d_value, d_beta or None, d_log_decay or None, d_initial_state

`query` and `key` are `(B, N, H, D)`, `value` `(B, N, H, E)`, all bfloat16 or all float32, N a multiple of `chunk`.
`beta` `(B, N, H)` is float32, None but for `"delta"`. `log_decay` is float32 and at least `FLOOR`, whose exponential
is 0 in float32: `(B, N, H, D)` for `"channel"`, else `(B, N, H)` or None. A token that begins a document has `FLOOR`:
a kernel knows no documents. `initial_state` `(B, H, D, E)` is float32 or None, which means zeros. With `keep` the
states before each chunk come back for the backward pass, in any layout and dtype. Gradients have the dtypes of their
operands, but for `d_log_decay` and `d_beta`, float32; `d_initial_state` is always there. Tokens of zeros with no
decay, which fill the last chunk, leave the state as it is.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import compat
from kernels.chunks import document_starts
from kernels.cost import tree_bytes
from kernels.dispatch import Implementation

# exp(FLOOR) is less than half the smallest float32 there is; 128 of them are a sum that `decay_sums` still has exact.
FLOOR = -110.0
DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Backend:
    """What computes recurrences on one kind of device.

    Attributes:
        name, platforms: as in `kernels.dispatch.Implementation`.
        forward, backward: see above.
        chunk: `chunk(kind, tokens, heads, channels, values, dtype)`, the tokens that are computed at once.
        unsupported: `unsupported(kind, heads, channels, values, dtype)` says why sizes cannot be served, or None.
    """

    name: str
    platforms: tuple[str, ...]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    chunk: Callable[..., int]
    unsupported: Callable[..., str | None]


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static of a call."""

    backend: Backend
    kind: str
    chunk: int
    scale: float


def implementation(backend: Backend, *, beta: bool) -> Implementation:
    """The backend as an implementation of `kernels.delta.delta_rule`, whose operands have a `beta`, or without it of
    `kernels.gated_linear.gated_linear_attention`."""
    return Implementation(
        backend.name,
        functools.partial(_served, backend=backend),
        functools.partial(_refusal, backend=backend),
        platforms=backend.platforms,
        batched=(True,) * (7 if beta else 6),
    )


def _refusal(query, key, value, *gates, backend, form, return_weights=False, **options):
    if return_weights:
        return "return_weights=True needs the weights that a kernel never writes; use implementation='xla'"
    return _unsupported(backend, _kind(*_beta_and_decay(gates)), query, key, value, form)


def _beta_and_decay(gates):
    """Of what follows the values: `beta` or None, and the log decay."""
    *beta, log_decay, _, _ = gates
    return beta[0] if beta else None, log_decay


def _unsupported(backend, kind, query, key, value, form):
    if form != "chunk":
        return f"form={form!r} is not that of the kernel, which is form='chunk'"
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.dtype.name not in DTYPES:
            return f"{name} is {array.dtype.name}; the kernel takes {' and '.join(DTYPES)}"
    if 0 in key.shape or 0 in value.shape:
        return f"there is nothing to compute for key {key.shape} and value {value.shape}"
    return backend.unsupported(kind, *key.shape[2:], value.shape[3], _common(query, key, value))


def _kind(beta, log_decay):
    if beta is not None:
        return "delta"
    return "channel" if log_decay is not None and log_decay.shape[-1] > 1 else "scalar"


def _common(*arrays):
    """bfloat16 where all are, else float32."""
    return jnp.result_type(*(x.dtype for x in arrays))


def _served(query, key, value, *gates, backend, scale, return_state, **options):
    static = dict(backend=backend, scale=scale, return_state=return_state)
    return compat.traced_once(_run, static, query, key, value, *_beta_and_decay(gates), *gates[-2:])


def _run(query, key, value, beta, log_decay, initial_state, segments, *, backend, scale, return_state):
    batch, tokens, heads, channels = key.shape
    kind = _kind(beta, log_decay)
    dtype = _common(query, key, value)
    chunk = backend.chunk(kind, tokens, heads, channels, value.shape[-1], dtype)
    log_decay = _bounded(log_decay, segments, key.shape)

    def padded(x, dtype):
        if x is None:
            return None
        return jnp.pad(x.astype(dtype), ((0, 0), (0, -tokens % chunk)) + ((0, 0),) * (x.ndim - 2))

    operands = (
        *(padded(x, dtype) for x in (query, key, value)),
        padded(beta, jnp.float32),
        padded(log_decay, jnp.float32),
        None if initial_state is None else initial_state.astype(jnp.float32),
    )
    out, state = recurrence(Call(backend, kind, chunk, float(scale)), *compat.match_varying(*operands))
    out = out[:, :tokens].astype(value.dtype)
    return (out, state) if return_state else out


def _bounded(log_decay, segments, shape):
    """The log decay in float32, `FLOOR` at least and where a document begins; `(B, N, H)`, or `(B, N, H, D)`."""
    if log_decay is None and segments is None:
        return None
    starts = document_starts(segments)
    if log_decay is None:
        log_decay = jnp.zeros((), jnp.float32)
    else:
        log_decay = jnp.maximum(log_decay.astype(jnp.float32), FLOOR)
    if starts is not None:
        log_decay = jnp.where(starts, FLOOR, log_decay)
    log_decay = jnp.broadcast_to(log_decay, (*shape[:3], log_decay.shape[-1]))
    return log_decay[..., 0] if log_decay.shape[-1] == 1 else log_decay


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recurrence(call: Call, query, key, value, beta, log_decay, initial_state):
    """Output and final state of a backend's recurrence; its gradient keeps the operands and the chunks' states."""
    return _forward(call, query, key, value, beta, log_decay, initial_state, keep=False)[:2]


def _forward(call, *operands, keep):
    return call.backend.forward(call.kind, *operands, chunk=call.chunk, scale=call.scale, keep=keep)


def _recurrence_forward(call, *operands):
    out, final, states = _forward(call, *operands, keep=True)
    return (out, final), (operands, states)


def _recurrence_backward(call, kept, cotangents):
    operands, states = kept
    *gradients, initial = call.backend.backward(
        call.kind, *operands, states, *cotangents, chunk=call.chunk, scale=call.scale
    )
    return *gradients, None if operands[-1] is None else initial


recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def decay_sums(log_decay, chunk: int):
    """Sums of the log decays `(B, N, H)` from each token's chunk's start to the token, as two float32 arrays.

    What decays between two tokens is `exp` of a difference of sums, which a sum of many strong decays would leave no
    digits for weak ones. The first array is a sum of multiples of 1 / 1024, exact in float32 for 128 tokens; the
    second, of what they leave, is small. So `(first_i - first_j) + (second_i - second_j)` has the digits of its value.
    """
    batch, tokens, heads = log_decay.shape
    chunks = log_decay.reshape(batch, -1, chunk, heads)
    coarse = jnp.round(chunks * 1024) / 1024
    return tuple(jnp.cumsum(x, 2).reshape(log_decay.shape) for x in (coarse, chunks - coarse))


def forward_flops(kind: str, chunk: int, channels: int, values: int) -> int:
    """Operations of the matrix products of a chunk of a head; those of triangular matrices count half."""
    pairs, state = chunk * chunk, 2 * chunk * channels * values
    flops = pairs * (channels + values) + 2 * state
    if kind == "delta":
        # Keys by keys, what they recall, the system.
        flops += pairs * channels + state + pairs * values
    return flops


def backward_flops(kind: str, chunk: int, channels: int, values: int) -> int:
    """The same of the gradient, which computes the weights of the forward pass again."""
    pairs, state = chunk * chunk, 2 * chunk * channels * values
    # Weights; their gradient, that of the values, of queries and of keys; the states' with queries, keys and values.
    flops = pairs * (3 * channels + 2 * values) + 4 * state
    if kind == "delta":
        # The system and what was written; the system transposed; the gradients of keys by keys, twice.
        flops += pairs * (3 * channels + 3 * values) + 3 * state
    return flops


def transcendentals(kind: str, chunk: int, channels: int, decayed: bool) -> int:
    """Exponentials of a chunk of a head: of the decays between its tokens, half a matrix, and to its ends."""
    if not decayed:
        return 0
    return chunk * channels if kind == "channel" else chunk * (chunk + 1) // 2 + 2 * chunk


def estimate(flops: int, transcendentals: int, operands: Any, results: Any) -> pl.CostEstimate:
    """The cost of a kernel that reads its operands and writes its results once."""
    moved = tree_bytes((operands, results))
    return pl.CostEstimate(flops=flops, transcendentals=transcendentals, bytes_accessed=moved)
