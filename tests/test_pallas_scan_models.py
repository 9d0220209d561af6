"""Sequence models with kernels of recurrences: they are in what is lowered for a TPU, and change no logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from kernels import compat
from tests.language_models import VOCABULARY, random_variables, rows, small

# What every mixer is lowered to.
KERNELS = {"N": "scalar", "R": "scalar", "T": "scalar", "L": "channel", "H": "channel", "D": "delta", "G": "delta"}
NAMES = ("linear_attention", "retnet", "lightning", "gla", "hgrn2", "deltanet", "gated_deltanet")
TOKENS = rows(length=40, vocabulary=VOCABULARY)


@functools.cache
def logits(pattern, implementation):
    model = small(pattern, length=40, implementation=implementation)
    with compat.interpret():
        return np.asarray(jax.jit(model.apply)(random_variables(model), TOKENS))


@pytest.mark.parametrize(
    "pattern", [pattern if pattern in "RG" else pytest.param(pattern, marks=pytest.mark.slow) for pattern in KERNELS]
)
def test_logits(pattern):
    expected = logits(pattern, "xla")
    found = logits(pattern, "pallas_tpu")
    assert not np.array_equal(found, expected)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def lowered(model, tokens):
    """Of the logits and of their gradient."""
    tokens = jax.ShapeDtypeStruct(tokens, jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)

    def loss(variables, tokens):
        return jnp.square(model.apply(variables, tokens)).mean()

    functions = model.apply, jax.grad(loss)
    return [jax.jit(f).trace(variables, tokens).lower(lowering_platforms=("tpu",)).as_text() for f in functions]


def assert_has_kernels(texts, kind, blocks):
    """One call of each kernel in the program of a block's, as blocks share what is the same in them."""
    forward, gradient = texts
    assert 1 <= forward.count(f'kernel_name = "scan_{kind}_forward"') <= blocks
    assert "backward" not in forward
    for direction in ("forward", "backward"):
        assert 1 <= gradient.count(f'kernel_name = "scan_{kind}_{direction}"') <= blocks


@pytest.mark.parametrize("pattern", ["R", "L", "G"])
def test_kernels_are_in_what_is_lowered_for_a_tpu(pattern):
    assert_has_kernels(lowered(small(pattern, length=40, depth=1), TOKENS.shape), KERNELS[pattern], 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_registered_models_have_them(name):
    model = zoo.create_model(f"{name}_nano")
    assert_has_kernels(lowered(model, (2, 256)), KERNELS[model.mixers], model.depth)
