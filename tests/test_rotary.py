"""Rotary positions against rotations written as complex numbers, and against lucidrains' record."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.rotary import rotary
from tests.parity import REFERENCE, part
from tests.reference.weights import pseudo_normal


@functools.cache
def program(**options):
    return jax.jit(functools.partial(rotary, **options))


def turned(x, positions, base, interleaved, dims):
    """Channel pairs as complex numbers, each times `exp(i * angle)`."""
    x = np.array(x, np.float64)
    first, second = (np.arange(0, dims, 2),) * 2 if interleaved else (np.arange(dims // 2),) * 2
    second = first + (1 if interleaved else dims // 2)
    angles = np.asarray(positions)[..., None, None] * base ** (-2 * np.arange(dims // 2) / dims)
    z = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angles)
    x[..., first], x[..., second] = z.real, z.imag
    return x


@pytest.mark.parametrize("dims", [8, 6])
@pytest.mark.parametrize("interleaved", [False, True])
def test_turns_pairs_of_channels(interleaved, dims):
    x = pseudo_normal("x", (2, 5, 3, 8))
    run = program(interleaved=interleaved, dims=dims, base=100.0)
    with jax.enable_x64(True):
        for positions in (np.arange(5) - 2, np.array([[0, 1, 2, 0, 1], [7, 8, 9, 10, 4000]])):
            expected = turned(x, positions, 100.0, interleaved, dims)
            np.testing.assert_allclose(run(x, positions), expected, atol=1e-11)
            np.testing.assert_array_equal(run(x, positions)[..., dims:], x[..., dims:])


def test_products_depend_on_the_distance_only():
    query, key = pseudo_normal("query", (1, 1, 2, 16)), pseudo_normal("key", (1, 1, 2, 16))
    with jax.enable_x64(True):
        run = program()
        products = [(run(query, np.array([t])) * run(key, np.array([t - 7]))).sum(-1) for t in (7, 0, 1000)]
    np.testing.assert_allclose(products[0], products[1], atol=1e-12)
    np.testing.assert_allclose(products[0], products[2], atol=1e-11)


def test_equals_lucidrains_routing_heads():
    """They rotate queries, keys and values alike, by neighbouring channels."""
    with np.load(REFERENCE / "cluster.npz") as file:
        record = part(dict(file), "rotary/")
    assert set(record) == {"query", "key", "value"}
    for name, expected in record.items():
        x = np.float32(pseudo_normal(name, (4, 18, 4)).reshape(2, 2, 18, 4).swapaxes(1, 2))
        np.testing.assert_allclose(program(interleaved=True)(x, np.arange(18)), expected.swapaxes(1, 2), atol=5e-6)


def test_bfloat16_angles_are_float32():
    x = pseudo_normal("x", (1, 300, 1, 4))
    out = program()(jnp.asarray(x, jnp.bfloat16), np.arange(300))
    assert out.dtype == jnp.bfloat16
    expected = turned(np.float32(jnp.asarray(x, jnp.bfloat16)), np.arange(300), 10000.0, False, 4)
    np.testing.assert_allclose(np.float64(out), expected, atol=2e-2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(), "dims must be even and between 2 and 129.*got 129; pass an even dims"),
        (dict(dims=130), "dims must be even and between 2 and 129, the channels of x; got 130"),
        (dict(dims=0), "got 0"),
        (dict(dims=128, base=-1.0), "base must be positive, got -1.0"),
    ],
    ids=str,
)
def test_names_what_is_wrong(options, words):
    with pytest.raises(ValueError, match=words):
        rotary(jnp.zeros((1, 2, 1, 129)), jnp.arange(2), **options)
