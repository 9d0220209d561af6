"""The layers that models share, against closed forms in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.image_model import ImageModel
from zoo.layers import BatchNorm, SqueezeExcite, exact_gelu, tanh_gelu

X = np.random.default_rng(0).normal(3, 2, size=(4, 5, 6, 3))


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.float64, 1e-14)])
def test_batch_norm(dtype, tolerance):
    with jax.enable_x64(dtype == jnp.float64):
        norm, x = BatchNorm(epsilon=1e-3, momentum=0.9, dtype=dtype, param_dtype=dtype), jnp.asarray(X, dtype)
        variables = norm.init(jax.random.key(0), x, False)
        trained, state = norm.apply(variables, x, True, mutable=["batch_stats"])
        settled = norm.apply({**variables, **state}, x, False)
    mean, var = X.mean((0, 1, 2)), X.var((0, 1, 2))
    np.testing.assert_allclose(trained, (X - mean) / np.sqrt(var + 1e-3), rtol=0, atol=tolerance)
    stats = state["batch_stats"]
    assert stats["mean"].dtype == stats["var"].dtype == trained.dtype == dtype
    np.testing.assert_allclose(stats["mean"], 0.1 * mean, rtol=tolerance)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * var, rtol=tolerance)
    expected = (X - 0.1 * mean) / np.sqrt(0.9 + 0.1 * var + 1e-3)
    np.testing.assert_allclose(settled, expected, rtol=0, atol=2 * tolerance)


def test_statistics_of_bfloat16_are_float32():
    x = jnp.asarray(X, jnp.bfloat16)
    norm = BatchNorm(dtype=jnp.bfloat16)
    variables = norm.init(jax.random.key(0), x, False)
    y, state = norm.apply(variables, x, True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16 and {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(state["batch_stats"]["mean"], 0.1 * exact.mean((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("gelu, form", [(exact_gelu, "erf"), (tanh_gelu, "tanh")])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 2**-8)])
def test_gelu(gelu, form, dtype, tolerance):
    x = jnp.linspace(-6, 6, 2001).astype(dtype)
    wide = np.asarray(x, np.float64)
    if form == "erf":
        share = 0.5 * (1 + np.vectorize(math.erf)(wide / np.sqrt(2)))
    else:
        share = 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
    found = np.asarray(gelu(x), np.float64)
    # Near a share of zero what is left is of the size of the rounding of 1.
    np.testing.assert_allclose(found, wide * share, rtol=tolerance, atol=6 * float(jnp.finfo(dtype).eps))


def test_squeeze_and_excitation():
    gate = SqueezeExcite(2)
    x = jnp.asarray(X, jnp.float32)
    params = gate.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.3, params)
    squeezed = X.mean((1, 2)) @ np.asarray(params["fc1"]["kernel"]) + np.asarray(params["fc1"]["bias"])
    hidden = squeezed / (1 + np.exp(-squeezed))
    scale = hidden @ np.asarray(params["fc2"]["kernel"]) + np.asarray(params["fc2"]["bias"])
    expected = X / (1 + np.exp(-scale))[:, None, None, :]
    np.testing.assert_allclose(gate.apply({"params": params}, x), expected, rtol=1e-5)


class Sized(ImageModel):
    @property
    def size_multiple(self):
        return 32, 48

    @property
    def least_size(self):
        return 64, 48


@pytest.mark.parametrize(
    "asked, nearest",
    [
        ((224, 240), (224, 240)),
        ((225, 239), (224, 240)),
        ((1, 1), (64, 48)),
        ((80, 72), (64, 48)),
        ((81, 73), (96, 96)),
    ],
)
def test_the_nearest_size(asked, nearest):
    model = Sized()
    assert model.nearest_size(*asked) == nearest
    if asked == nearest:
        return model.check_image_size(*asked)
    message = f"multiples of 32 .* multiples of 48 pixels; got {asked[0]}x{asked[1]}, .* is {nearest[0]}x{nearest[1]}"
    with pytest.raises(ValueError, match=message):
        model.check_image_size(*asked)
