"""Tokens divided over the mesh axis `sequence`: every op gives what it gives on one device."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from kernels.dense import attention
from kernels.flow import flow_attention
from kernels.linear import linear_attention
from kernels.local import local_attention
from kernels.running import running
from kernels.short_conv import short_conv
from tests.recurrences import OPS

TOLERANCES = {np.float32: 1e-5, np.float64: 1e-12}
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
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))


def same(run, arrays, mesh, dtype=np.float32):
    """On the mesh as without one; with float32 numbers, as without one in float64."""
    found = results(run, arrays, mesh)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64) if x.dtype.kind == "f" else x, arrays)
        expected = results(run, wide)
    expected = jax.tree.map(lambda a, b: a.astype(b.dtype), expected, found)
    close(found, expected, TOLERANCES[dtype])


def documents(tokens=TOKENS, batch=2):
    """Packed rows: a document that goes over several devices, one that begins with a device, an id that comes again."""
    starts = np.zeros((batch, tokens), int)
    starts[0, [tokens // 4, tokens // 2 + 1]] = 1
    starts[1, [1, 2, tokens - 3]] = 1
    return (starts.cumsum(1) % 2).astype(np.int32)


def recurrence(name, packed, dtype=np.float32, channels=4):
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
    return functools.partial(running, combine=combine), dict(x=x, before=before) | packed * dict(segments=documents())


def flow_after(arrays):
    """Flow-Attention that goes on from a state."""
    _, state = flow_attention(**{n: jnp.asarray(x) for n, x in qkv().items()}, causal=True, return_state=True)
    return arrays | dict(initial_state=jax.tree.map(np.asarray, state))


# Ops, and what they are given; by how many devices in the quick tests.
OTHERS = {
    "softmax": (functools.partial(attention, causal=True), lambda: qkv(heads=4), 4),
    "softmax of documents": (attention, lambda: qkv() | dict(mask=visible()), None),
    "softmax, noncausal, biased": (attention, lambda: qkv() | dict(bias=tokens_of((1, 2, TOKENS, TOKENS))[0]), None),
    "window": (functools.partial(local_attention, block=3, window=3), lambda: qkv() | dict(segments=documents()), 8),
    "window over two devices": (functools.partial(local_attention, block=7, window=6), qkv, None),
    "blocks": (functools.partial(local_attention, block=2, look_back=2), relative, None),
    "blocks over devices": (functools.partial(local_attention, block=5), qkv, None),
    "flow": (functools.partial(flow_attention, causal=True, return_state=True, chunk_size=2), qkv, None),
    "flow of documents": (
        functools.partial(flow_attention, causal=True, return_state=True, clip=None, chunk_size=2),
        lambda: flow_after(qkv() | dict(segments=documents())),
        None,
    ),
    "flow, noncausal": (flow_attention, qkv, None),
    "linear, noncausal": (linear_attention, qkv, None),
}
OTHERS |= {f"convolution {w}": (convolution(w)[0], lambda w=w: convolution(w)[1], 4 * (w == 4)) for w in (1, 2, 4)}
OTHERS["convolution from nothing"] = (convolution(4)[0], lambda: convolution(4, False, False)[1], None)
OTHERS |= {f"sums {p}": (sums(jnp.add, p)[0], lambda p=p: sums(jnp.add, p)[1], None) for p in (False, True)}
OTHERS["logarithms"] = (sums(jnp.logaddexp, True)[0], lambda: sums(jnp.logaddexp, True)[1], None)


@pytest.mark.parametrize(
    "name, size",
    [
        (name, size) if size == quick else pytest.param(name, size, marks=pytest.mark.slow)
        for name, (*_, quick) in OTHERS.items()
        for size in (2, 4, 8)
    ],
)
def test_other_ops_over_devices(name, size):
    run, arrays, _ = OTHERS[name]
    same(run, arrays(), mesh_of(size))
