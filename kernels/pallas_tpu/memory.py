"""Memories on a TPU: the state of a head stays in fast memory while a row's chunks pass by; see `kernels.memory_plan`.

One program computes a block of chunks of a group of heads. Programs of a row and group run one after the other,
backward in the backward pass, and hand on the state, or its gradient, in the block of the result that holds the last
one. The state before each block is written for the backward pass, which computes those between the block's chunks
again.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import compat, memory_plan
from kernels.pallas_tpu import memory_chunk
from kernels.pallas_tpu.memory_chunk import Chunk
from kernels.pallas_tpu.memory_layout import (
    LANES,
    block_tokens,
    named_states,
    of_states,
    packed,
    shapes_of,
    state_structs,
    unpacked,
)
from kernels.pallas_tpu.scan_parts import turned, turned_back

VMEM_BYTES = 60 * 2**20


def _state_bytes(shapes) -> int:
    """Of a head's state as fast memory holds it, whole tiles of 8 x 128."""
    return 4 * sum(-(-rows // 8) * 8 * -(-columns // LANES) * LANES for rows, columns in shapes.values())


def unsupported(chunk: int, shapes: dict[str, tuple[int, int]]) -> str | None:
    """Why chunks or states of these sizes cannot be served, or None."""
    if not 8 <= chunk <= LANES or chunk & (chunk - 1):
        return f"chunk_size={chunk}; the kernel takes powers of two from 8 to {LANES}"
    for name, (rows, columns) in shapes.items():
        if rows % 16 or columns % 16:
            return f"weights[{name!r}] are {rows} x {columns} of a head; the kernel takes multiples of 16"
    block = block_tokens(chunk)
    # The states of a block's chunks, and as many again as have operands and results: initial, fresh, last, gradients.
    needed = (block // chunk + 20) * _state_bytes(shapes)
    # At most seven operands and six gradients of a head's tokens, each in two buffers and once turned.
    needed += 13 * 3 * 4 * block * max(shapes["w"] if "w" in shapes else shapes["w2"][1:])
    # About as many of a chunk's hidden units, or outputs, does the backward pass have at a time.
    needed += 16 * 4 * chunk * max(map(max, shapes.values()))
    if needed > VMEM_BYTES:
        return f"a head wants {needed / 2**20:.0f} MiB of fast memory; the kernel has {VMEM_BYTES >> 20}"
    return None


def _inputs(shapes, operands):
    """Names to pairs of an array and how it comes in blocks."""
    found = {name: (turned(operands[name]), shapes.wide_spec(c)) for name, c in shapes.wide.items()}
    if shapes.rows:
        found["rows"] = (packed(shapes, operands), shapes.rows_spec)
    return found


def _scratch(shapes, names):
    """Of each operand a block of the group's heads, tokens being rows."""
    return {n: pltpu.VMEM((shapes.group, shapes.block, c), jnp.float32) for n, c in names.items()}


def _call(body, shapes, operands, results, scratch, flops, transcendentals):
    """Runs a body over `(B, groups, blocks)`; results are names to pairs of a shape and a block."""
    programs = shapes.batch * shapes.heads * shapes.call.tokens // shapes.call.chunk
    arrays = [array for array, _ in operands.values()]
    outs = [compat.shape_like(shape.shape, shape.dtype, *arrays) for shape, _ in results.values()]

    def named(*refs):
        body(dict(zip((*operands, *results, *scratch), refs)), shapes)

    found = compat.pallas_call(
        named,
        name=f"memory_{'backward' if shapes.backward else 'forward'}",
        out_shape=outs,
        grid=(shapes.batch, shapes.heads // shapes.group, shapes.blocks),
        in_specs=[spec for _, spec in operands.values()],
        out_specs=[spec for _, spec in results.values()],
        scratch_shapes=list(scratch.values()),
        cost_estimate=memory_plan.estimate(programs * flops, programs * transcendentals, arrays, outs),
        compiler_params=compat.tpu_params(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
    )(*arrays)
    return dict(zip(results, found))


def forward(call, operands, begin, fresh, keep):
    """See `kernels.memory_plan`."""
    shapes = shapes_of(call, operands, begin)
    value = operands["value"]
    inputs = _inputs(shapes, operands) | of_states(shapes, "begin", begin) | of_states(shapes, "fresh", fresh or {})
    out = jax.ShapeDtypeStruct((shapes.batch, shapes.heads * value.shape[-1], shapes.tokens), value.dtype)
    results = {"out": (out, shapes.wide_spec(value.shape[-1]))} | state_structs(shapes, "end")
    if call.anchored:
        results |= state_structs(shapes, "anchor")
    if keep:
        results |= state_structs(shapes, "kept", shapes.blocks)
    writing, reading = memory_plan.products(call.rule, call.chunk, shapes.states)
    transcendentals = memory_plan.transcendentals(call.rule, call.chunk, shapes.states)
    scratch = _scratch(shapes, {**shapes.wide, "out_rows": value.shape[-1]})
    scratch |= {"columns": pltpu.VMEM((shapes.block, shapes.padded_rows), jnp.float32)} if shapes.rows else {}
    scratch = {f"{name}_turned": x for name, x in scratch.items()}
    found = _call(_forward_body, shapes, inputs, results, scratch, writing + reading, transcendentals)
    return (
        turned_back(found["out"], value.shape[-1]),
        named_states(found, "end", shapes),
        named_states(found, "anchor", shapes) if call.anchored else None,
        named_states(found, "kept", shapes) if keep else None,
    )


def backward(call, operands, fresh, states, d_out, d_end, d_anchor):
    """See `kernels.memory_plan`."""
    shapes = shapes_of(call, operands, d_end, backward=True)
    width = d_out.shape[-1]
    inputs = _inputs(shapes, operands) | {"d_out": (turned(d_out), shapes.wide_spec(width))}
    inputs |= {f"kept_{name}": (x, shapes.kept_spec(name)) for name, x in states.items()}
    inputs |= of_states(shapes, "d_end", d_end) | of_states(shapes, "d_anchor", d_anchor or {})
    inputs |= of_states(shapes, "fresh", fresh or {})
    results = {
        f"d_{name}": (
            jax.ShapeDtypeStruct((shapes.batch, shapes.heads * c, shapes.tokens), operands[name].dtype),
            shapes.wide_spec(c),
        )
        for name, c in shapes.wide.items()
    }
    if shapes.rows:
        packed = (shapes.batch, shapes.heads // shapes.group, shapes.padded_rows, shapes.tokens)
        results["d_rows"] = (jax.ShapeDtypeStruct(packed, jnp.float32), shapes.rows_spec)
    results |= state_structs(shapes, "d_begin") | (state_structs(shapes, "d_fresh") if fresh else {})
    scratch = _scratch(shapes, {**shapes.wide, "d_out": width, **{f"d_{n}": c for n, c in shapes.wide.items()}})
    if shapes.rows:
        scratch |= dict.fromkeys(("columns", "d_columns"), pltpu.VMEM((shapes.block, shapes.padded_rows), jnp.float32))
    scratch = {f"{name}_turned": x for name, x in scratch.items()}
    scratch |= {
        f"before_{n}": pltpu.VMEM((shapes.chunks, shapes.group, *s), jnp.float32) for n, s in shapes.states.items()
    }
    writing, reading = memory_plan.products(call.rule, call.chunk, shapes.states)
    transcendentals = memory_plan.transcendentals(call.rule, call.chunk, shapes.states)
    # The states between chunks, then each chunk once more, and two products for the gradient of each.
    flops = writing + 3 * (writing + reading)
    found = _call(_backward_body, shapes, inputs, results, scratch, flops, 2 * transcendentals)
    d_operands = {name: turned_back(found[f"d_{name}"], c) for name, c in shapes.wide.items()}
    if shapes.rows:
        d_operands |= unpacked(shapes, found["d_rows"])
    if "start" in d_operands:
        d_operands["start"] = jnp.zeros_like(operands["start"])
    return d_operands, named_states(found, "d_begin", shapes), named_states(found, "d_fresh", shapes) if fresh else None


def _turn_in(refs, shapes, names):
    """Operands into scratch, tokens being rows."""
    for name, channels in names.items():
        for head in range(shapes.group):
            part = refs[name][0, head * channels : (head + 1) * channels].astype(jnp.float32)
            refs[f"{name}_turned"][head] = part.T
    if shapes.rows:
        refs["columns_turned"][...] = refs["rows"][0, 0].T


def _turn_out(refs, shapes, name, source, channels):
    for head in range(shapes.group):
        part = refs[f"{source}_turned"][head].T
        refs[name][0, head * channels : (head + 1) * channels] = part.astype(refs[name].dtype)


def _tokens(shapes, chunk):
    """Where a chunk's tokens are in a block."""
    return pl.ds(pl.multiple_of(chunk * shapes.call.chunk, shapes.call.chunk), shapes.call.chunk)


def _operands(refs, shapes, head, at):
    """Those of a chunk of a head, by name."""
    found = {name: refs[f"{name}_turned"][head, at] for name in shapes.wide}
    for i, name in enumerate(shapes.rows):
        column = i * shapes.group + head
        found[name] = refs["columns_turned"][at, column : column + 1]
    return found


def _chunk(operands) -> Chunk:
    """Gates as the chunk takes them, with a number for each channel."""
    like = operands["key"].shape
    step = jnp.broadcast_to(operands["step"], like)
    log_retention = operands.get("log_retention")
    log_retention = jnp.zeros(like, jnp.float32) if log_retention is None else jnp.broadcast_to(log_retention, like)
    wide = (operands[name] for name in memory_plan.WIDE)
    return Chunk(*wide, step, log_retention, operands.get("threshold"), operands.get("start"))


def _state(refs, prefix, shapes, head):
    return {name: refs[f"{prefix}_{name}"][0, head] for name in shapes.states}


def _fresh(refs, shapes, head):
    return _state(refs, "fresh", shapes, head) if "start" in shapes.rows else None


def _live_chunks(shapes, block):
    """Chunks of a block that have tokens."""
    total = shapes.call.tokens // shapes.call.chunk
    return jnp.minimum(shapes.chunks, total - block * shapes.chunks)


def _forward_body(refs, shapes):
    call, block = shapes.call, pl.program_id(2)

    @pl.when(block == 0)
    def _():
        for name in shapes.states:
            refs[f"end_{name}"][...] = refs[f"begin_{name}"][...]

    for name in shapes.states:
        if f"kept_{name}" in refs:
            refs[f"kept_{name}"][:, :, 0] = refs[f"end_{name}"][...]
    _turn_in(refs, shapes, shapes.wide)
    live = _live_chunks(shapes, block)

    @pl.loop(0, live)
    def _(chunk):
        at = _tokens(shapes, chunk)
        for head in range(shapes.group):
            state = _state(refs, "end", shapes, head)
            operands = _chunk(_operands(refs, shapes, head, at))
            fresh = _fresh(refs, shapes, head)
            anchor, after, out = memory_chunk.forward(call.rule, shapes.narrow, state, fresh, operands)
            refs["out_rows_turned"][head, at] = out
            for name in shapes.states:
                refs[f"end_{name}"][0, head] = after[name]
            if call.anchored:
                # What the last chunk leaves here is what stays.
                for name in shapes.states:
                    refs[f"anchor_{name}"][0, head] = anchor[name]

    _turn_out(refs, shapes, "out", "out_rows", refs["out_rows_turned"].shape[-1])


def _backward_body(refs, shapes):
    call, block = shapes.call, shapes.index(pl.program_id(2))
    documents = "start" in shapes.rows

    @pl.when(pl.program_id(2) == 0)
    def _():
        for name in shapes.states:
            refs[f"d_begin_{name}"][...] = refs[f"d_end_{name}"][...]
            if documents:
                refs[f"d_fresh_{name}"][...] = jnp.zeros_like(refs[f"d_fresh_{name}"])

    width = refs["d_out_turned"].shape[-1]
    _turn_in(refs, shapes, {**shapes.wide, "d_out": width})
    live = _live_chunks(shapes, block)
    if shapes.rows:
        # Of what fills up tiles nobody else writes.
        refs["d_columns_turned"][...] = jnp.zeros_like(refs["d_columns_turned"])

    def run(operands, state, fresh, read=True):
        return memory_chunk.forward(call.rule, shapes.narrow, state, fresh, _chunk(operands), read)

    for name in shapes.states:
        refs[f"before_{name}"][0] = refs[f"kept_{name}"][0, :, 0]

    @pl.loop(0, live - 1)
    def _(chunk):
        for head in range(shapes.group):
            state = {name: refs[f"before_{name}"][chunk, head] for name in shapes.states}
            operands = _operands(refs, shapes, head, _tokens(shapes, chunk))
            _, after, _ = run(operands, state, _fresh(refs, shapes, head), False)
            for name in shapes.states:
                refs[f"before_{name}"][chunk + 1, head] = after[name]

    @pl.loop(0, live)
    def _(step):
        chunk = live - 1 - step
        at = _tokens(shapes, chunk)
        last = (block == shapes.blocks - 1) & (step == 0)
        for head in range(shapes.group):
            state = {name: refs[f"before_{name}"][chunk, head] for name in shapes.states}
            operands = _operands(refs, shapes, head, at)
            (anchor, _, _), pull = jax.vjp(run, operands, state, _fresh(refs, shapes, head))
            if call.anchored:
                d_anchor = {name: jnp.where(last, x, 0.0) for name, x in _state(refs, "d_anchor", shapes, head).items()}
            else:
                d_anchor = jax.tree.map(jnp.zeros_like, anchor)
            d_operands, d_state, d_fresh = pull(
                (d_anchor, _state(refs, "d_begin", shapes, head), refs["d_out_turned"][head, at])
            )
            for name in shapes.wide:
                refs[f"d_{name}_turned"][head, at] = d_operands[name]
            for i, name in enumerate(shapes.rows):
                column = i * shapes.group + head
                refs["d_columns_turned"][at, column : column + 1] = d_operands[name]
            for name in shapes.states:
                refs[f"d_begin_{name}"][0, head] = d_state[name]
                if documents:
                    refs[f"d_fresh_{name}"][0, head] += d_fresh[name]

    for name, channels in shapes.wide.items():
        _turn_out(refs, shapes, f"d_{name}", f"d_{name}", channels)
    if shapes.rows:
        refs["d_rows"][0, 0] = refs["d_columns_turned"][...].T


BACKEND = memory_plan.Backend("pallas_tpu", ("tpu",), forward, backward, block_tokens, unsupported)
