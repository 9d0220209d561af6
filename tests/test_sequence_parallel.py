"""Tokens divided over the mesh axis `sequence`: every op gives what it gives on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from kernels.dense import attention
from kernels.flow import flow_attention
from kernels.gated_linear import gated_linear_attention
from kernels.linear import linear_attention
from kernels.local import local_attention
from kernels.memory import MemoryRule, MemoryState, initial_memory, memora, miras, moneta, yaad
from kernels.running import running
from kernels.short_conv import short_conv
from tests import memories
from tests.recurrences import OPS

TOKENS = 16


def mesh_of(sequence, data=1, tensor=1):
    shape = (data, 1, tensor, sequence)
    devices = jax.devices()[: data * tensor * sequence]
    return jax.make_mesh(shape, ("data", "fsdp", "tensor", "sequence"), (AxisType.Auto,) * 4, devices=devices)


def results(run, arrays, mesh=None):
    """What an op gives, and the gradients of all operands of floats for random cotangents."""
    floats = {name: x for name, x in arrays.items() if all(leaf.dtype.kind == "f" for leaf in jax.tree.leaves(x))}
    rest = {name: x for name, x in arrays.items() if name not in floats}

    def total(floats, rest):
        out = run(**floats, **rest)
        draws = np.random.default_rng(7)
        parts = [jnp.vdot(leaf, draws.standard_normal(leaf.shape).astype(leaf.dtype)) for leaf in jax.tree.leaves(out)]
        return sum(parts), out

    both = jax.jit(jax.value_and_grad(total, has_aux=True))
    if mesh is None:
        (_, out), gradients = both(floats, rest)
    else:
        with jax.set_mesh(mesh):
            (_, out), gradients = both(floats, rest)
    return jax.tree.map(np.asarray, (out, gradients))


def close(found, expected, tolerance):
    """Leaf by leaf, relative to the largest number of the leaf where that is above 1."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(initial=1))


def same(run, arrays, mesh):
    """On the mesh as without one in float64."""
    found = results(run, arrays, mesh)
    with jax.enable_x64(True):
        expected = results(run, wide(arrays))
    close(found, jax.tree.map(lambda a, b: a.astype(b.dtype), expected, found), 1e-5)


def same_in_float64(run, arrays, mesh):
    with jax.enable_x64(True):
        close(results(run, wide(arrays), mesh), results(run, wide(arrays)), 1e-12)


def wide(arrays):
    return jax.tree.map(lambda x: np.asarray(x, np.float64) if x.dtype.kind == "f" else x, arrays)


def documents(tokens=TOKENS, batch=2):
    """Packed rows: a document that goes over several devices, one that begins with a device, an id that comes again."""
    starts = np.zeros((batch, tokens), int)
    starts[0, [tokens // 4, tokens // 2 + 1]] = 1
    starts[1, [1, 2, tokens - 3]] = 1
    return (starts.cumsum(1) % 2).astype(np.int32)


def recurrence(name, packed, channels=4, dtype=np.float32):
    rng = np.random.default_rng(0)
    op = OPS[name]
    arrays = op.operands(rng, TOKENS, channels=channels, values=3, heads=2, dtype=dtype)
    arrays["initial_state"] = op.state(rng, channels=channels, values=3, heads=2, dtype=dtype)
    if packed:
        arrays["segments"] = documents()
    return functools.partial(op.run, return_state=True, chunk_size=2), arrays


QUICK = {("decay per channel", True, 4), ("gated delta", True, 4), ("no decay", False, 8), ("normalised", True, 2)}
CASES = [(name, packed, size) for name in OPS for packed in (False, True) for size in (2, 4, 8)]


@pytest.mark.parametrize(
    "name, packed, size", [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_recurrences_over_devices(name, packed, size):
    run, arrays = recurrence(name, packed)
    same(run, arrays, mesh_of(size))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPS)
def test_recurrences_in_float64(name):
    same_in_float64(*recurrence(name, True), mesh_of(4))


def tokens_of(*shapes, dtype=np.float32):
    rng = np.random.default_rng(3)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def qkv(heads=2, keys=2, dtype=np.float32):
    shapes = (2, TOKENS, heads, 4), (2, TOKENS, keys, 4), (2, TOKENS, keys, 4)
    return dict(zip(("query", "key", "value"), tokens_of(*shapes, dtype=dtype)))


def visible():
    """A mask of packed documents, as a language model makes it."""
    runs = (np.diff(documents(), axis=1, prepend=0) != 0).cumsum(1)
    return ((runs[:, :, None] == runs[:, None]) & np.tri(TOKENS, dtype=bool))[:, None]


def convolution(width, state=True, packed=True):
    x, kernel, bias, before = tokens_of((2, TOKENS, 6), (width, 6), (6,), (2, width - 1, 6))
    arrays = dict(x=x, kernel=kernel, bias=bias)
    arrays |= dict(initial_state=before) if state else {}
    arrays |= dict(segments=documents()) if packed else {}
    return functools.partial(short_conv, return_state=True), arrays


def relative():
    rows = dict(zip(("relative_key", "relative_value"), tokens_of((5, 4), (5, 4))))
    return {**qkv(), **rows, "segments": documents(), "key_mask": np.arange(2 * TOKENS).reshape(2, -1) % 7 > 0}


def sums(combine, packed):
    x, before = tokens_of((2, TOKENS, 3), (2, 3))
    arrays = dict(x=x, before=before)
    return functools.partial(running, combine=combine), arrays | (dict(segments=documents()) if packed else {})


def flow(**options):
    return functools.partial(flow_attention, causal=True, return_state=True, chunk_size=2, **options)


def flow_after():
    """Flow-Attention of documents, the first of which goes on from a state."""
    _, state = flow()(**{name: jnp.asarray(x) for name, x in qkv().items()})
    arrays = qkv() | dict(initial_state=jax.tree.map(np.asarray, state), segments=documents())
    return flow(clip=None), arrays


def local(block, arrays, **options):
    return functools.partial(local_attention, block=block, **options), arrays


# What gives an op and its arrays; by how many devices in the quick tests.
OTHERS = {
    "softmax": (lambda: (functools.partial(attention, causal=True), qkv(heads=4)), 4),
    "softmax of documents": (lambda: (attention, qkv() | dict(mask=visible())), None),
    "softmax, noncausal": (lambda: (attention, qkv() | dict(bias=tokens_of((1, 2, TOKENS, TOKENS))[0])), None),
    "window": (lambda: local(3, qkv() | dict(segments=documents()), window=3), 8),
    "window over two devices": (lambda: local(7, qkv(), window=6), None),
    "blocks": (lambda: local(2, relative(), look_back=2), None),
    "blocks over devices": (lambda: local(5, qkv()), None),
    "flow": (lambda: (flow(), qkv()), None),
    "flow of documents": (flow_after, None),
    "flow, noncausal": (lambda: (flow_attention, qkv()), None),
    "linear, noncausal": (lambda: (linear_attention, qkv()), None),
    "convolution of one": (lambda: convolution(1), None),
    "convolution of two": (lambda: convolution(2), None),
    "convolution": (lambda: convolution(4), 8),
    "convolution from nothing": (lambda: convolution(4, False, False), None),
    "sums": (lambda: sums(jnp.add, False), None),
    "sums of documents": (lambda: sums(jnp.add, True), None),
    "logarithms of sums": (lambda: sums(jnp.logaddexp, True), None),
}


@pytest.mark.parametrize(
    "name, size",
    [
        (name, size) if size == quick else pytest.param(name, size, marks=pytest.mark.slow)
        for name, (_, quick) in OTHERS.items()
        for size in (2, 4, 8)
    ],
)
def test_other_ops_over_devices(name, size):
    run, arrays = OTHERS[name][0]()
    same(run, arrays, mesh_of(size))


MEMORIES = {
    "moneta": (moneta(), dict(chunk_size=4), False, 2),
    "yaad": (yaad(), dict(chunk_size=3), True, 4),
    "memora": (memora(), dict(chunk_size=4), True, 2),
    "momentum": (MemoryRule("matrix", "l2", "decay", "momentum"), dict(chunk_size=3), True, 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMORIES)
def test_memories_device_by_device(name):
    """Devices that divide chunks, documents that begin within them, a state before the first token."""
    rule, options, packed, size = MEMORIES[name]
    arrays, gates = memories.operands(rule, TOKENS)
    arrays = arrays | gates
    if packed:
        other = jax.tree.map(lambda w: jnp.asarray(1.1 * w), arrays["weights"])
        state = initial_memory(other, rule=rule, batch=2)
        state = jax.tree.map(np.asarray, state)._asdict()
        arrays |= dict(segments=documents(), position=state.pop("position"), state=state)

    def run(position=None, state=None, **arrays):
        before = None if state is None else MemoryState(**state, position=position)
        out, after = miras(rule=rule, return_state=True, initial_state=before, **arrays, **options)
        return out, (after.running, after.velocity)

    same_in_float64(run, arrays, mesh_of(size))


def test_tokens_that_do_not_divide_and_single_tokens():
    query, key, value = tokens_of((1, 10, 2, 4), (1, 10, 2, 4), (1, 10, 2, 4))
    with jax.set_mesh(mesh_of(4)):
        with pytest.raises(ValueError, match="10 tokens do not divide over the 4 devices .* sequence; 8 or 12 would"):
            jax.jit(gated_linear_attention)(query, key, value)
        step = jax.jit(gated_linear_attention)(query[:, :1], key[:, :1], value[:, :1])
    np.testing.assert_allclose(step, 0.5 * (query * key).sum(-1, keepdims=True)[:, :1] * value[:, :1], rtol=1e-5)


@pytest.mark.slow
def test_batch_and_heads_over_devices_beside_the_tokens():
    for data, tensor in ((2, 2), (4, 1), (1, 4)):
        # Two rows and two heads do not divide over four devices: those stay whole.
        run, arrays = recurrence("gated delta", True)
        same(run, arrays, mesh_of(2, data, tensor))


def test_weights_are_asked_for_on_any_mesh():
    arrays = {name: jnp.asarray(x) for name, x in qkv().items()}
    op = jax.jit(functools.partial(gated_linear_attention, return_weights=True))
    expected = op(**arrays)
    with jax.set_mesh(mesh_of(4)):
        found = jax.jit(functools.partial(gated_linear_attention, return_weights=True))(**arrays)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
