"""The operands of the references of linear recurrences, made again wherever they are needed."""

import numpy as np

from tests.reference.weights import pseudo_normal

BATCH, TOKENS, HEADS, CHANNELS, VALUES = 2, 70, 3, 8, 5
LIGHTNING_HEADS = (1, 2, 3, 5, 8, 12, 20, 64)
# heads, layer, layers
FLA_LAYERS = ((8, 0, 24), (8, 23, 24), (5, 3, 7), (1, 0, 1))


def linear_operands() -> dict[str, np.ndarray]:
    """Float64 operands by name; decays from none to all within a few tokens."""
    shape = (BATCH, TOKENS, HEADS)

    def normal(name, *sizes):
        return pseudo_normal(name, sizes)

    key = normal("key", *shape, CHANNELS)
    return {
        "query": normal("query", *shape, CHANNELS),
        "key": key,
        "unit_key": key / np.linalg.norm(key, axis=-1, keepdims=True),
        "value": normal("value", *shape, VALUES),
        "beta": 2 / (1 + np.exp(-normal("beta", *shape))),
        "scalar": -np.exp(2 * normal("scalar", *shape) - 2),
        "channel": -np.exp(2 * normal("channel", *shape, CHANNELS) - 2),
        "state": normal("state", BATCH, HEADS, CHANNELS, VALUES),
        "key_sums": 1 + abs(normal("key_sums", BATCH, HEADS, CHANNELS)),
    }
