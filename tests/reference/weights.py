"""Deterministic pseudo-random weights, inputs and sample positions for the parity references.

A reference file holds only outputs: what went in is made again here, by name. A value depends on the seed,
the name, the shape and the position alone, never on a framework, the order of names or the numpy version:
the raw counter stream of Philox is turned into numbers by integer sums and single IEEE operations.
"""

import hashlib
import math
import re
from collections.abc import Mapping

import numpy as np


def _raw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    key = hashlib.sha256(f"{seed}:{name}:{'x'.join(map(str, shape))}".encode()).digest()[:16]
    return np.random.Philox(key=int.from_bytes(key, "little")).random_raw(math.prod(shape))


def pseudo_normal(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Values of mean 0 and variance 1, nearly normal: each is a sum of four uniform integers, |x| < 3.47.

    Args:
        name: what the values are for; another name gives independent values.
        shape: shape of the result.
        seed: another seed gives independent values.

    Returns:
        float64 array of that shape, exactly the same on every machine.
    """
    raw = _raw(name, shape, seed)
    total = sum((raw >> np.uint64(16 * i)) & np.uint64(0xFFFF) for i in range(4))
    variance = 4 * (65536**2 - 1) / 12
    return ((total.astype(np.float64) - 4 * 65535 / 2) / math.sqrt(variance)).reshape(shape)


def _matrix(fan_in: int, gain: float = 1.0) -> tuple[float, float]:
    return 0.0, gain / math.sqrt(fan_in)


# First match wins. Each law gives (mean, standard deviation), such that activations stay of order 1 in a deep
# network and no scale, bias or statistic is at the value where leaving it out would go unnoticed. torch keeps
# the outputs of a matrix in its first axis ("weight"), TensorFlow and Flax in the last ("kernel").
# Convolutional position encodings get a gain below 1: they are added to a residual stream that no norm has
# touched, where a gain of 1 would double the variance some fifty times over. So do the keys and values of
# DaViT's channel attention: its logits are sums over all tokens, and with a gain of 1 (a root mean square of 120
# at 3136 tokens) the softmax picks one channel and float32 loses two digits. CARE's layer scale is kept small, for
# it multiplies the block's input as well: at 1 every block would double the stream.
_LAWS = tuple(
    (re.compile(pattern), law)
    for pattern, law in (
        (r"num_batches_tracked$", lambda shape: (0.0, 0.0)),
        (r"(running|moving)_mean$", lambda shape: (0.0, 0.1)),
        (r"(running_var|moving_variance)$", lambda shape: (1.0, 0.2)),
        (r"relative_(position_)?bias(_table)?$", lambda shape: (0.0, 0.4)),
        (r"(relative|rel_pos|pos_?emb|token|\bcls$)[^./]*$", lambda shape: (0.0, 0.2)),
        (
            r"(cpe[.\d]+proj|conv\d\.fn\.dw|pos_embed)\.weight$",
            lambda shape: _matrix(math.prod(shape[1:]), gain=0.25),
        ),
        (r"blocks(\.\d)+\.1\.attn\.qkv\.weight$", lambda shape: _matrix(shape[1], gain=0.25)),
        (r"(query|key|value)[./]kernel$", lambda shape: _matrix(shape[0])),
        (r"depthwise_kernel$", lambda shape: _matrix(math.prod(shape[:2]))),
        (r"kernel$", lambda shape: _matrix(math.prod(shape[:-1]))),
        (r"(bias|beta)$", lambda shape: (0.0, 0.1)),
        (r"blocks\.\d+\.gamma$", lambda shape: (0.1, 0.1)),
        (r"(weight|scale|gamma)$", lambda shape: _matrix(math.prod(shape[1:])) if shape[1:] else (1.0, 0.1)),
    )
)


def pseudo_weights(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Weights for a checkpoint, by name.

    Args:
        shapes: parameter (or floating-point buffer) name, as the reference spells it, to shape.
        seed: another seed gives an independent set.

    Returns:
        name -> float32 array, in the order of `shapes`.

    Raises:
        KeyError: a name that no law of this file covers.
    """
    weights = {}
    for name, shape in shapes.items():
        shape = tuple(shape)
        laws = [law for pattern, law in _LAWS if pattern.search(name.removesuffix(":0"))]
        if not laws:
            raise KeyError(f"no law for the weight {name!r} of shape {shape}; add one to _LAWS in {__name__}")
        mean, deviation = laws[0](shape)
        weights[name] = np.asarray(mean + deviation * pseudo_normal(name, shape, seed), np.float32)
    return weights


def pseudo_images(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Normalised images: float32 of mean 0 and variance 1 of the given shape, (B, H, W, C) by convention."""
    return pseudo_normal("images", tuple(shape), seed).astype(np.float32)


def sample(name: str, array: np.ndarray, count: int) -> np.ndarray:
    """`count` entries of `array` at pseudo-random flat positions (with repeats), or all if it holds no more.

    Args:
        name: what the array is; the positions depend on the name, the array's shape and `count`.
        array: of any shape and dtype.
        count: how many entries.

    Returns:
        1-D array of the dtype of `array`.
    """
    flat = np.asarray(array).reshape(-1)
    if flat.size <= count:
        return flat
    shape = "x".join(map(str, np.shape(array)))
    return flat[(_raw(f"positions:{name}:{shape}", (count,), 0) % np.uint64(flat.size)).astype(np.int64)]
