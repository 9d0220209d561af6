"""The forms of a memory: chunk by chunk, token by token."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import memory_plan, sequence_parallel
from kernels.dense import accumulator_dtype
from kernels.dispatch import Implementation, dispatch
from kernels.memory.block import State, Tokens, Weights, advance
from kernels.memory.check import check_operands
from kernels.memory.rule import MemoryRule
from kernels.pallas_tpu import memory as pallas_tpu


class MemoryState(NamedTuple):
    """What a memory carries from one call to the next; every leaf is per sample and head, `(B, H, ...)`.

    Attributes:
        anchor: the state at the start of the current chunk, where its gradients are taken.
        running: the state now.
        velocity: the momentum, None without one.
        position: `(B,)`, int32, tokens of the current chunk that are done; at 0 the anchor is not used.
    """

    anchor: State
    running: State
    velocity: State | None
    position: Int[Array, "B"]


def initial_memory(
    weights: Mapping[str, Float[Array, "H ..."]], *, rule: MemoryRule, batch: int, dtype=jnp.float32
) -> MemoryState:
    """The state of `batch` sequences before their first token, as `miras` starts from without an `initial_state`."""
    fresh = {
        name: jnp.broadcast_to(state, (batch, *state.shape))
        for name, state in _starts(rule, weights, accumulator_dtype(dtype)).items()
    }
    velocity = jax.tree.map(jnp.zeros_like, fresh) if rule.algorithm == "momentum" else None
    return MemoryState(fresh, fresh, velocity, jnp.zeros(batch, jnp.int32))


def miras(
    query: Float[Array, "B N H D"],
    key: Float[Array, "B N H D"],
    value: Float[Array, "B N H E"],
    weights: Mapping[str, Float[Array, "H ..."]],
    *,
    rule: MemoryRule,
    step: Float[Array, "B N H"] | Float[Array, "B N H D"],
    log_retention: Float[Array, "B N H"] | Float[Array, "B N H D"] | None = None,
    threshold: Float[Array, "B N H"] | Float[Array, "B N H E"] | None = None,
    log_momentum: Float[Array, "B N H"] | Float[Array, "B N H D"] | None = None,
    chunk_size: int = 16,
    form: str = "chunk",
    initial_state: MemoryState | None = None,
    return_state: bool = False,
    segments: Int[Array, "B N"] | None = None,
    aligned: bool = False,
    implementation: str | Sequence[str] | None = None,
):
    """An associative memory that every token teaches and reads: causal self-attention with a recurrent state.

    With the gate's `link` from the state A to the weights W of the memory M, and with all gradients of a chunk of
    `chunk_size` tokens at the weights of its start, W',

        A_t = alpha_t A_{t-1} - step_t gradient of the bias at (W'; key_t, value_t),  W_t = link(A_t)
        out_t = M(query_t; W_t)

    for gates with a linear update; for the others see `kernels.memory.proximal`. `chunk_size` changes what is computed,
    not how: the model is trained and run with the same one, and 1 is the exact recurrence. Chunks are counted from the
    start of the sequence. There is no factor `D ** -0.5`: keys and queries should have norm 1.

    Gates per channel act on the D-sized axis of each matrix of the memory: the rows of w1, the columns of w2 and w.

    Args:
        query, key: `(B, N, H, D)`.
        value: `(B, N, H, E)`; E is D for the memories `"mlp"` and `"vector"`.
        weights: the learned initial memory of each head, in the gate's state: `{"w1": (H, D, F), "w2": (H, F, D)}` for
            `"mlp"`, `{"w": (H, E, D)}` for `"matrix"`, `{"w": (H, D)}` for `"vector"`.
        rule: the four choices; see `MemoryRule`, `moneta`, `yaad`, `memora`.
        step: inner step size, at least 0, for each head or each of its channels.
        log_retention: log alpha, at most 0 and finite, likewise; None for alpha = 1 where the rule's gate allows it.
        threshold: for the Huber losses delta, positive, per channel for `"coord"` only; for `"shift_robust"` Delta.
        log_momentum: log mu, at most 0 and finite, likewise, for `algorithm="momentum"`.
        chunk_size: tokens whose gradients are taken at the same weights.
        form: `"chunk"`: chunk by chunk, the tokens of a chunk at once, in the dual form where the weights are the
            state times a factor (all of Yaad, Moneta with its defaults, Memora with `interior="linear"`), else with a
            chunk's states written down. `"recurrent"`: token by token, the form to decode with. `"materialized"`: as
            `"chunk"`, with the states of a chunk written down whatever the rule. The results are the same.
        initial_state: what an earlier call of any form returned, at any position of a chunk, or `initial_memory`;
            None for the learned initial memory. `weights` then count only where `segments` starts a document.
        return_state: also return a `MemoryState`.
        segments: ids of the documents packed into a row. A document is a run of equal ids and starts from `weights`;
            the first of a row goes on from `initial_state`. Nothing is read or written across. Chunks stay aligned
            with the row: a document that starts inside a chunk takes its first gradients, up to the chunk's end, at
            `weights`. To have it computed as it would be alone, start it at a multiple of `chunk_size`.
        aligned: a promise that documents start at chunks' starts only, which halves the work; one that does not goes
            on with the memory of the document before.
        implementation: None, a name or an order of preference; see `kernels.dispatch`.

    Returns:
        `(B, N, H, E)` in the dtype of `value`, or a pair with the state; computed in float32 (float64 for float64
        values). The backward pass keeps the states of chunks' starts only (of every token for `"recurrent"`). The
        TPU's kernel keeps one in 128 tokens, and rounds the operands of its products to bfloat16, as XLA does there by
        default, where query, key and value are bfloat16; for float32 ones it does not.

    Raises:
        ValueError: for shapes that do not fit, a gate that the rule needs and lacks or has and does not use.
        NotImplementedError: if a forced implementation cannot serve the call.

    Source: Behrouz et al., It's All Connected (arXiv:2504.13173), equation 28 for chunks.
    """
    arrays = (query, key, value, dict(weights), step, log_retention, threshold, log_momentum, segments, initial_state)
    options = dict(rule=rule, chunk_size=chunk_size, form=form, return_state=return_state)
    check_operands(*arrays, **options)
    if sequence_parallel.ranks(query.shape[1]) > 1:
        gates = dict(step=step, log_retention=log_retention, threshold=threshold, log_momentum=log_momentum)
        out, state = sequence_parallel.memory(
            functools.partial(
                miras, **options | dict(return_state=True, aligned=aligned), implementation=implementation
            ),
            lambda weights, batch: initial_memory(weights, rule=rule, batch=batch, dtype=value.dtype),
            *(arrays[:3], gates, arrays[3], segments, initial_state),
        )
        return (out, state) if return_state else out
    return dispatch("miras", TABLE, implementation, arrays, {**options, "aligned": aligned})


def _run(
    query,
    key,
    value,
    weights,
    step,
    log_retention,
    threshold,
    log_momentum,
    segments,
    initial_state,
    *,
    kernel=None,
    **options,
):
    """The op; `kernel` is a backend of `kernels.memory_plan` that walks through the chunks, None for XLA."""
    rule, chunk_size, form = options["rule"], options["chunk_size"], options["form"]
    acc = accumulator_dtype(value.dtype)
    b, n, h, _ = query.shape
    fresh = {
        name: jnp.broadcast_to(state, (b, *state.shape)).reshape(-1, *state.shape[1:])
        for name, state in _starts(rule, weights, acc).items()
    }
    gates = (
        None if g is None else g if g.ndim == 4 else g[..., None]
        for g in (step, log_retention, threshold, log_momentum)
    )
    step, log_retention, threshold, log_momentum = gates
    starts = None
    if segments is not None:
        starts = jnp.concatenate([jnp.zeros((b, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    live = jnp.ones((b, n), bool)
    operands = Tokens(query, key, value, step, log_retention, threshold, log_momentum, live, starts)
    if initial_state is None:
        velocity = jax.tree.map(jnp.zeros_like, fresh) if rule.algorithm == "momentum" else None
        begin, position = Weights(fresh, fresh, velocity), None
    else:
        begin = jax.tree.map(lambda x: x.astype(acc).reshape(-1, *x.shape[2:]), Weights(*initial_state[:3]))
        position = initial_state.position

    def block(weights, tokens, opens, one_by_one=form == "materialized"):
        return advance(rule, chunk_size, fresh, weights, tokens, opens, one_by_one, options["aligned"])

    if form == "recurrent":
        end, out = _recurrent(block, begin, position, operands, chunk_size)
    else:
        walk = None
        if kernel is not None:
            walk = functools.partial(memory_plan.walk, kernel, rule, chunk_size, fresh, options["return_state"])
        end, out = _chunks(block, begin, position, operands, chunk_size, walk)
    out = out.astype(value.dtype)
    if not options["return_state"]:
        return out
    done = (jnp.zeros(b, jnp.int32) if position is None else position) + n
    end = jax.tree.map(lambda x: x.reshape(b, h, *x.shape[1:]), end)
    return out, MemoryState(*end, done % chunk_size)


TABLE = (
    Implementation("xla", _run),
    memory_plan.implementation(_run, pallas_tpu.BACKEND),
)


def _starts(rule, weights, dtype) -> State:
    sides = rule.memory.sides
    return {name: rule.retention.start(jnp.asarray(weights[name], dtype), sides[name]) for name in sides}


def _blocks(operands: Tokens, size: int, dtype) -> Tokens:
    """Operands `(B, N, H, c)` as `(N / size, B * H, size, c)`, those of tokens `(B, N)` repeated for each head."""
    b, n, h, _ = operands.query.shape

    def one(x):
        x = x if x.ndim == 4 else jnp.broadcast_to(x[:, :, None, None], (b, n, h, 1))
        x = x.reshape(b, n // size, size, h, x.shape[-1]).transpose(1, 0, 3, 2, 4)
        x = x.reshape(n // size, b * h, size, x.shape[-1])
        return x[..., 0] if x.dtype == bool else x.astype(dtype)

    return jax.tree.map(one, operands)


def _joined(out, b: int, h: int):
    """The inverse of `_blocks`."""
    blocks, _, size, channels = out.shape
    out = out.reshape(blocks, b, h, size, channels).transpose(1, 0, 3, 2, 4)
    return out.reshape(b, blocks * size, h, channels)


def _recurrent(block, begin, position, operands, chunk_size):
    b, _, h, _ = operands.query.shape
    position = jnp.zeros(b, jnp.int32) if position is None else position

    @jax.checkpoint
    def body(carry, tokens):
        weights, position = carry
        weights, out = block(weights, tokens, position == 0)
        return (weights, (position + 1) % chunk_size), out

    tokens = _blocks(operands, 1, jax.tree.leaves(begin)[0].dtype)
    (end, _), out = jax.lax.scan(body, (begin, jnp.repeat(position, h)), tokens)
    return end, _joined(out, b, h)


def _chunks(block, begin, position, operands, chunk_size, kernel):
    """Chunk by chunk; `kernel` walks through whole chunks as `scanned` does, where there is one."""
    b, n, h, _ = operands.query.shape
    behind = -n % chunk_size if position is None else -(n + chunk_size - 1) % chunk_size + chunk_size - 1

    def placed(x, fill=0):
        """The tokens where they are in their chunks, with fillers around them."""
        if position is None:
            return jnp.pad(x, [(0, 0), (0, behind), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)
        room = jnp.full((x.shape[1] + behind, *x.shape[2:]), fill, x.dtype)
        return jax.vmap(lambda x, p: jax.lax.dynamic_update_slice_in_dim(room, x, p, 0))(x, position)

    fills = Tokens(*(0,) * 5, 1, *(0,) * 3)
    padded = Tokens(*(None if x is None else placed(x, fill) for x, fill in zip(operands, fills)))

    @jax.checkpoint
    def body(weights, tokens):
        moved, out = block(weights, tokens, True)
        # A chunk of fillers alone leaves the anchor where it was.
        filled = tokens.live.any(1)
        anchor = jax.tree.map(
            lambda new, old: jnp.where(filled.reshape(-1, *[1] * (new.ndim - 1)), new, old),
            moved.anchor,
            weights.anchor,
        )
        return moved._replace(anchor=anchor), out

    def blocks(tokens):
        return _blocks(tokens, chunk_size, jax.tree.leaves(begin)[0].dtype)

    def scanned(weights, tokens):
        end, out = jax.lax.scan(body, weights, blocks(tokens))
        return end, _joined(out, b, h)

    if position is None:
        end, out = (kernel or scanned)(begin, padded)
        return end, out[:, :n]

    def chunks(first, last):
        return jax.tree.map(lambda x: x[:, first * chunk_size : last * chunk_size], padded)

    opens = jnp.repeat(position == 0, h)
    first = jax.tree.map(lambda x: x[0], blocks(chunks(0, 1)))
    end, out = jax.checkpoint(lambda w, t: block(w, t, opens))(begin, first)
    outs = [_joined(out[None], b, h)]
    # A kernel knows no chunk that has begun already, as the first, nor one without a token, as the last may be.
    count = padded.query.shape[1] // chunk_size
    last = count if kernel is None else max(1, count - 1)
    for walk, part in ((kernel or scanned, (1, last)), (scanned, (last, count))):
        if part[0] < part[1]:
            end, out = walk(end, chunks(*part))
            outs.append(out.astype(outs[0].dtype))
    return end, jax.vmap(lambda x, p: jax.lax.dynamic_slice_in_dim(x, p, n, 0))(jnp.concatenate(outs, 1), position)
