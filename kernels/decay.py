"""How fast each head of a linear attention forgets where the rate is fixed: the published conventions, by name.

Each gives the natural logarithm of the factor by which a head's state shrinks from token to token, `(heads,)`, for
`kernels.gated_linear.gated_linear_attention`; head 0 comes first. Layers are counted from 0 throughout. They are
four different models: a checkpoint needs the one that it was trained with.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def retnet(heads: int) -> Float[Array, "H"]:
    """RetNet: the state is multiplied by `1 - 2 ** (-5 - h)`, in every layer alike.

    Raises:
        ValueError: for less than one head.

    Source: Sun et al. (arXiv:2307.08621), section 2.3, equation 8.
    """
    _check_heads(heads)
    return jnp.asarray(np.log1p(-np.exp2(-5.0 - np.arange(heads))))


def transnormer(heads: int, layer: int, layers: int) -> Float[Array, "H"]:
    """TransNormerLLM as printed: `-(8 h / heads) * (1 - (layer + 1) / layers)`, the paper counting layers from 1.

    Head 0 never forgets, and in the last layer no head does.

    Raises:
        ValueError: for less than one head, or a layer that is not in `0 ... layers - 1`.

    Source: Qin et al. (arXiv:2307.14995), section 3.1, on linearized relative positional encoding with
    exponential decay.
    """
    return _growing(heads, layer, layers, first=1)


def fla(heads: int, layer: int, layers: int) -> Float[Array, "H"]:
    """flash-linear-attention's: `-(8 h / heads) * (1 - layer / layers)`.

    The printed formula with layers counted from 0, so that the last layer forgets as well; head 0 never does.

    Raises:
        ValueError: for less than one head, or a layer that is not in `0 ... layers - 1`.

    Source: `chunk_lightning_attn` of flash-linear-attention.
    """
    return _growing(heads, layer, layers, first=0)


def lightning(heads: int, layer: int, layers: int) -> Float[Array, "H"]:
    """TransNormerLLM's and Lightning Attention's published code: `-slope_h * (1 - layer / (layers - 1) + 1e-5)`.

    The slopes are ALiBi's, `2 ** (-8 (h + 1) / heads)` for a power of two of heads; else those of the next lower
    power of two, followed by every other one of the next higher. Head 0 forgets fastest. This code scales queries by
    1, not by `D ** -0.5`.

    Raises:
        ValueError: for less than one head, a single layer, or a layer that is not in `0 ... layers - 1`.

    Source: OpenNLPLab's lightning-attention (`_build_slope_tensor`) with TransNormerLLM's factor of the layer;
    the slopes are those of Press et al. (arXiv:2108.12409), section 3.
    """
    _check_heads(heads)
    _check_layer(layer, layers)
    if layers == 1:
        raise ValueError(
            "layers must be at least 2 here, as layer is divided by layers - 1; `fla` takes a single layer"
        )
    lower = 1 << int(math.log2(heads))
    slopes = np.concatenate((_alibi(lower), _alibi(2 * lower)[::2]))[:heads]
    return jnp.asarray(-slopes * (1 - layer / (layers - 1) + 1e-5))


def _alibi(heads: int) -> np.ndarray:
    return np.exp2(-8.0 * (np.arange(heads) + 1) / heads)


def _growing(heads, layer, layers, first):
    """Rates that grow from head to head, the layers being counted from `first`."""
    _check_heads(heads)
    _check_layer(layer, layers)
    return jnp.asarray(-8.0 / heads * (1 - (layer + first) / layers) * np.arange(heads))


def _check_heads(heads):
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")


def _check_layer(layer, layers):
    if not 0 <= layer < layers:
        raise ValueError(f"layer must be in 0 ... layers - 1, counted from 0; got layer {layer} of {layers} layers")
