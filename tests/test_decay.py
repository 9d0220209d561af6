"""The fixed decays against the published code's own and the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import decay
from tests.parity import REFERENCE
from tests.reference.linear_operands import FLA_LAYERS, LIGHTNING_HEADS

RECORD = np.load(REFERENCE / "linear_recurrences.npz")


def test_retnet():
    with jax.enable_x64(True):
        rates = decay.retnet(8)
        assert rates.dtype == jnp.float64
        np.testing.assert_allclose(np.exp(rates), 1 - 1 / np.asarray([32, 64, 128, 256, 512, 1024, 2048, 4096]))
    assert decay.retnet(3).dtype == jnp.float32
    # In float32 log(1 - x) would lose x's digits from the twentieth head on.
    np.testing.assert_allclose(decay.retnet(40)[-1], -(2.0**-44), rtol=1e-6)


@pytest.mark.parametrize("heads", LIGHTNING_HEADS)
def test_lightning_has_the_published_slopes(heads):
    slopes = RECORD[f"lightning/slopes{heads}"]
    for layer, factor in ((0, 1 + 1e-5), (3, 2 / 5 + 1e-5), (5, 1e-5)):
        np.testing.assert_allclose(decay.lightning(heads, layer, 6), -slopes * factor, rtol=1e-5)


@pytest.mark.parametrize(("heads", "layer", "layers"), FLA_LAYERS)
def test_fla(heads, layer, layers):
    expected = RECORD[f"fla/decay{heads},{layer},{layers}"]
    np.testing.assert_allclose(decay.fla(heads, layer, layers), expected, rtol=1e-6)


def test_transnormer_as_printed():
    # Heads count from 0 and layers from 1: lambda = exp(-(8 h / H) (1 - l / L)).
    for layer in range(4):
        expected = [-8 * h / 6 * (1 - (layer + 1) / 4) for h in range(6)]
        np.testing.assert_allclose(decay.transnormer(6, layer, 4), expected, rtol=1e-6, atol=0)
    assert not decay.transnormer(6, 3, 4).any()
    np.testing.assert_array_equal(decay.transnormer(6, 1, 4), decay.fla(6, 2, 4))


@pytest.mark.parametrize("convention", [decay.transnormer, decay.fla, decay.lightning])
def test_the_conventions_do_not_grow_and_refuse_layers_out_of_range(convention):
    assert (convention(12, 1, 24) <= 0).all()
    for layer in (-1, 24):
        with pytest.raises(ValueError, match=f"layer must be in 0 ... layers - 1.*got layer {layer} of 24 layers"):
            convention(12, layer, 24)
    with pytest.raises(ValueError, match="heads must be at least 1, got 0"):
        convention(0, 0, 24)


def test_what_has_no_meaning():
    with pytest.raises(ValueError, match="layers must be at least 2"):
        decay.lightning(8, 0, 1)
    with pytest.raises(ValueError, match="heads must be at least 1, got 0"):
        decay.retnet(0)
