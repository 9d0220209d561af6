"""The bytes kept for the backward pass, against functions whose residuals are known by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.residuals import residual_bytes

X, Y = np.zeros((5, 7), np.float32), np.zeros((5, 7), np.float32)
SIZE = 4 * 5 * 7


@pytest.mark.parametrize(
    ("fn", "args", "expected"),
    [
        (lambda x, y: x + y, (X, Y), 0),
        (lambda x: 3.0 * x, (X,), 0),
        (lambda x, y: x * y, (X, Y), 2 * SIZE),
        (lambda x: x * x, (X,), SIZE),
        (lambda x: (jnp.exp(x), jnp.sin(x)), (X,), 2 * SIZE),
        (lambda x: jnp.sin(jnp.sin(jnp.sin(x))), (X,), 3 * SIZE),
        (jax.checkpoint(lambda x: jnp.sin(jnp.sin(jnp.sin(x)))), (X,), SIZE),
        (lambda x, y: x @ y.T, (X, Y), 2 * SIZE),
        (lambda x, i: x * i, (X, np.zeros((5, 7), np.int8)), SIZE),
        (lambda x: x * x, (X.astype(jnp.bfloat16),), SIZE // 2),
    ],
    ids=["sum", "constant", "product", "square", "two", "chain", "checkpoint", "matmul", "integers", "bfloat16"],
)
def test_known_residuals(fn, args, expected):
    assert residual_bytes(fn, *args) == expected
    assert residual_bytes(jax.jit(fn), *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args)) == expected


def test_a_scan_keeps_a_state_for_every_step():
    def run(xs):
        return jax.lax.scan(lambda state, x: (jnp.sin(state + x), None), jnp.zeros(7), xs)[0]

    assert residual_bytes(run, X) == SIZE
    assert residual_bytes(run, np.zeros((10, 7), np.float32)) == 2 * SIZE


def test_nothing_is_allocated():
    """Only shapes are looked at: 4 TiB of them here."""
    huge = jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.float32)
    assert residual_bytes(jnp.sin, huge) == 1 << 42
