"""Chunked recurrences on a TPU: the state stays in fast memory while a row's chunks pass by.

One program computes one chunk of a group of heads. Programs of a row and group run one after the other, backward in
the backward pass, and hand on the state, or its gradient, in the block of the result that holds the last one.

Operands are `(B, H * D, N)`, tokens being lanes: so XLA lays out what is computed per head, and with any other layout
copies all of it before the call and after. Heads of few channels waste no lanes then, and gates are rows.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import compat, scan_plan, tuning
from kernels.pallas_tpu import scan_channel, scan_delta, scan_scalar
from kernels.pallas_tpu.scan_parts import Products, decay_sums, turned, turned_back

VMEM_BYTES = 60 * 2**20


def chunk_length(kind, tokens, heads, channels, values, dtype) -> int:
    """128 tokens fill the matrix unit; of fewer one chunk is made."""
    default = dict(chunk=min(128, max(16, tuning.bucket(tokens))))
    shape = dict(kind=kind, channels=tuning.bucket(channels), values=tuning.bucket(values), dtype=str(dtype))
    return tuning.blocks("scan", "tpu", default, **shape, tokens=tuning.bucket(tokens))["chunk"]


def unsupported(kind, heads, channels, values, dtype) -> str | None:
    """Why heads of these sizes cannot be served, or None."""
    for name, size in (("D", channels), ("E", values)):
        if size % 16 or not 16 <= size <= 256:
            return f"a head has {name} = {size} channels; the kernel takes multiples of 16 from 16 to 256"
    return None


def _group(kind, heads, channels, values, dtype) -> int:
    """Heads of a program: what waits for one head's products is filled with another's."""
    default = dict(heads=max(g for g in (1, 2, 4) if g == 1 or g * max(channels, values) <= 512))
    bucket = dict(kind=kind, channels=tuning.bucket(channels), values=tuning.bucket(values), dtype=str(dtype))
    return math.gcd(heads, tuning.blocks("scan_heads", "tpu", default, **bucket)["heads"])


BODIES = {
    "scalar": (scan_scalar.forward, scan_scalar.backward),
    "channel": (scan_channel.forward, scan_channel.backward),
    "delta": (scan_delta.forward, scan_delta.backward),
}


@dataclasses.dataclass(frozen=True)
class _Shapes:
    """Static sizes of a call; `heads` in groups of `group`, `tokens` in chunks of `chunk`."""

    kind: str
    decayed: bool
    batch: int
    tokens: int
    heads: int
    channels: int
    values: int
    group: int
    chunk: int
    dtype: str
    scale: float
    backward: bool = False

    @property
    def chunks(self) -> int:
        return self.tokens // self.chunk

    def index(self, chunk):
        """The chunk of a step: in the backward pass the last one comes first."""
        return self.chunks - 1 - chunk if self.backward else chunk

    def wide(self, channels: int) -> pl.BlockSpec:
        """A chunk of the group's heads of an array `(B, H * channels, N)`."""
        return pl.BlockSpec((1, self.group * channels, self.chunk), lambda b, g, c: (b, g, self.index(c)))

    def gates(self, rows: int) -> pl.BlockSpec:
        """A chunk of the group's heads of an array `(B, groups, rows, N)`."""
        return pl.BlockSpec((1, 1, rows, self.chunk), lambda b, g, c: (b, g, 0, self.index(c)))

    @property
    def state(self) -> pl.BlockSpec:
        """The group's heads of an array `(B, H, D, E)`."""
        return pl.BlockSpec((1, self.group, self.channels, self.values), lambda b, g, c: (b, g, 0, 0))

    @property
    def states(self) -> pl.BlockSpec:
        """A chunk of the group's heads of an array `(B, H, chunks, D, E)`."""
        shape = (1, self.group, 1, self.channels, self.values)
        return pl.BlockSpec(shape, lambda b, g, c: (b, g, self.index(c), 0, 0))


def _shapes(kind, query, value, log_decay, **static) -> _Shapes:
    batch, tokens, heads, channels = query.shape
    values = value.shape[-1]
    return _Shapes(
        kind=kind,
        decayed=log_decay is not None,
        batch=batch,
        tokens=tokens,
        heads=heads,
        channels=channels,
        values=values,
        group=_group(kind, heads, channels, values, query.dtype),
        dtype=query.dtype.name,
        **static,
    )


def _turned_shape(x):
    batch, tokens, heads, channels = x.shape
    return jax.ShapeDtypeStruct((batch, heads * channels, tokens), x.dtype)


def _rows(shapes, arrays):
    """Gates `(B, N, H)` as `(B, groups, gates * group, N)`."""
    groups = (shapes.batch, shapes.heads // shapes.group, shapes.group, shapes.tokens)
    return jnp.concatenate([x.transpose(0, 2, 1).reshape(groups) for x in arrays], 2)


def _from_rows(shapes, rows):
    """Gates of `_rows`, each `(B, N, H)`."""
    heads = (shapes.batch, shapes.heads, shapes.tokens)
    gates = rows.shape[2] // shapes.group
    return [x.reshape(heads).transpose(0, 2, 1) for x in jnp.split(rows, gates, 2)]


def _operands(shapes, query, key, value, beta, log_decay):
    """The operands of both kernels: names to pairs of an array and how it comes in blocks."""
    channels, values = shapes.channels, shapes.values
    found = {
        "query": (turned(query), shapes.wide(channels)),
        "key": (turned(key), shapes.wide(channels)),
        "value": (turned(value), shapes.wide(values)),
    }
    if shapes.kind == "channel":
        found["log_decay"] = (turned(log_decay), shapes.wide(channels))
        return found
    gates = () if beta is None else (beta,)
    if log_decay is not None:
        gates += (log_decay,)
    if gates:
        rows = _rows(shapes, gates)
        found["gates"] = (rows, shapes.gates(rows.shape[2]))
    return found


def _call(body, shapes, operands, results, flops, transcendentals):
    """Runs a body over `(B, groups, chunks)`; results are names to pairs of a shape and a block."""
    programs = shapes.batch * shapes.heads * shapes.chunks
    arrays = [array for array, _ in operands.values()]
    outs = [compat.shape_like(shape.shape, shape.dtype, *arrays) for shape, _ in results.values()]

    def named(*refs):
        body(dict(zip((*operands, *results), refs)), shapes)

    name = f"scan_{shapes.kind}_{'backward' if shapes.backward else 'forward'}"
    found = compat.pallas_call(
        named,
        name=name,
        out_shape=outs,
        grid=(shapes.batch, shapes.heads // shapes.group, shapes.chunks),
        in_specs=[spec for _, spec in operands.values()],
        out_specs=[spec for _, spec in results.values()],
        cost_estimate=scan_plan.estimate(programs * flops, programs * transcendentals, arrays, outs),
        compiler_params=compat.tpu_params(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
    )(*arrays)
    return dict(zip(results, found))


def forward(kind, query, key, value, beta, log_decay, initial_state, *, chunk, scale, keep):
    """See `kernels.scan_plan`; the states before the chunks are in the dtype of the operands."""
    shapes = _shapes(kind, query, value, log_decay, chunk=chunk, scale=scale)
    operands = _operands(shapes, query, key, value, beta, log_decay)
    if initial_state is not None:
        operands["initial"] = (initial_state, shapes.state)
    state = (shapes.batch, shapes.heads, shapes.channels, shapes.values)
    results = {
        "out": (_turned_shape(value), shapes.wide(shapes.values)),
        "final": (jax.ShapeDtypeStruct(state, jnp.float32), shapes.state),
    }
    if keep:
        kept = (*state[:2], shapes.chunks, *state[2:])
        results["states"] = (jax.ShapeDtypeStruct(kept, query.dtype), shapes.states)
    sizes = chunk, shapes.channels, shapes.values
    transcendentals = scan_plan.transcendentals(kind, chunk, shapes.channels, shapes.decayed)
    found = _call(_forward_body, shapes, operands, results, scan_plan.forward_flops(kind, *sizes), transcendentals)
    return turned_back(found["out"], value.shape[-1]), found["final"], found.get("states")


def backward(kind, query, key, value, beta, log_decay, initial_state, states, d_out, d_final_state, *, chunk, scale):
    """See `kernels.scan_plan`."""
    shapes = _shapes(kind, query, value, log_decay, chunk=chunk, scale=scale, backward=True)
    channels, values = shapes.channels, shapes.values
    operands = _operands(shapes, query, key, value, beta, log_decay)
    operands["d_out"] = (turned(d_out), shapes.wide(values))
    operands["states"] = (states, shapes.states)
    operands["d_final"] = (d_final_state, shapes.state)
    results = {
        "d_query": (_turned_shape(query), shapes.wide(channels)),
        "d_key": (_turned_shape(key), shapes.wide(channels)),
        "d_value": (_turned_shape(value), shapes.wide(values)),
        "d_initial": (jax.ShapeDtypeStruct(d_final_state.shape, jnp.float32), shapes.state),
    }
    if kind == "channel":
        results["d_log_decay"] = (_turned_shape(log_decay), shapes.wide(channels))
    rows = shapes.group * ((kind == "delta") + (shapes.decayed and kind != "channel"))
    if rows:
        shape = (shapes.batch, shapes.heads // shapes.group, rows, shapes.tokens)
        results["d_gates"] = (jax.ShapeDtypeStruct(shape, jnp.float32), shapes.gates(rows))
    sizes = chunk, channels, values
    transcendentals = scan_plan.transcendentals(kind, chunk, channels, shapes.decayed)
    found = _call(_backward_body, shapes, operands, results, scan_plan.backward_flops(kind, *sizes), transcendentals)
    d_beta = d_log_decay = None
    if "d_log_decay" in found:
        d_log_decay = turned_back(found["d_log_decay"], channels)
    if rows:
        gates = _from_rows(shapes, found["d_gates"])
        d_beta = gates[0] if kind == "delta" else None
        d_log_decay = gates[-1] if shapes.decayed else None
    wide = (("d_query", channels), ("d_key", channels), ("d_value", values))
    gradients = (turned_back(found[name], size) for name, size in wide)
    return *gradients, d_beta, d_log_decay, found["d_initial"]


class Gates(NamedTuple):
    """Of a head: the coarse and fine sum of its log decay and its beta, rows all, or its channels' log decays."""

    sums: Any = None
    beta: Any = None
    log_decay: Any = None


def _gates(refs, shapes):
    """The gates of each head of the group."""
    if shapes.kind == "channel":
        return [Gates(log_decay=_part(refs["log_decay"], head, shapes.channels)) for head in range(shapes.group)]

    if "gates" not in refs:
        return [Gates()] * shapes.group
    rows = refs["gates"][0, 0]
    gates = jnp.split(rows, len(rows) // shapes.group)
    coarse, fine = decay_sums(gates[-1]) if shapes.decayed else (None, None)

    def row(gates, head):
        return gates[head : head + 1]

    return [
        Gates(
            sums=(row(coarse, head), row(fine, head)) if shapes.decayed else None,
            beta=row(gates[0], head) if shapes.kind == "delta" else None,
        )
        for head in range(shapes.group)
    ]


def _part(ref, head, channels):
    """A head's part of a block, in float32."""
    return ref[0, head * channels : (head + 1) * channels].astype(jnp.float32)


def _store(ref, head, x):
    channels = len(x)
    ref[0, head * channels : (head + 1) * channels] = x.astype(ref.dtype)


def _forward_body(refs, shapes):
    channels, values = shapes.channels, shapes.values
    state_ref = refs["final"]

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = refs["initial"][...] if "initial" in refs else jnp.zeros_like(state_ref)

    product = Products(shapes.dtype == "bfloat16")
    for head, gates in enumerate(_gates(refs, shapes)):
        state = state_ref[0, head]
        if "states" in refs:
            refs["states"][0, head, 0] = state.astype(refs["states"].dtype)
        operands = (_part(refs[name], head, size) for name, size in _widths(channels, values))
        out, state = BODIES[shapes.kind][0](product, *operands, gates, state, shapes.scale)
        _store(refs["out"], head, out)
        state_ref[0, head] = state


def _widths(channels, values):
    return ("query", channels), ("key", channels), ("value", values)


def _backward_body(refs, shapes):
    channels, values, group = shapes.channels, shapes.values, shapes.group
    state_ref = refs["d_initial"]

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = refs["d_final"][...]

    product = Products(shapes.dtype == "bfloat16")
    for head, gates in enumerate(_gates(refs, shapes)):
        operands = (_part(refs[name], head, size) for name, size in _widths(channels, values))
        state = refs["states"][0, head, 0].astype(jnp.float32)
        d_out = _part(refs["d_out"], head, values) * shapes.scale
        *wide, d_beta, d_log_decay, d_state = BODIES[shapes.kind][1](
            product, *operands, gates, state, d_out, state_ref[0, head]
        )
        for name, gradient in zip(("d_query", "d_key", "d_value"), wide):
            _store(refs[name], head, gradient)
        state_ref[0, head] = d_state
        if "d_log_decay" in refs:
            _store(refs["d_log_decay"], head, d_log_decay)
        else:
            for position, row in enumerate(x for x in (d_beta, d_log_decay) if x is not None):
                at = position * group + head
                refs["d_gates"][0, 0, at : at + 1] = row


BACKEND = scan_plan.Backend("pallas_tpu", ("tpu",), forward, backward, chunk_length, unsupported)
