"""Random variables for models, with nothing at a value where leaving it out would go unnoticed."""

import jax
import jax.numpy as jnp
import numpy as np


def filled(abstract, laws, otherwise=0.2, clip=np.inf, seed=1):
    """Draws every leaf from a normal distribution.

    Args:
        abstract: a tree of shapes.
        laws: last name of a path -> mean and standard deviation.
        otherwise: the standard deviation around 0 of what has no law.
        clip: how many deviations a value may be away from its mean.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        mean, deviation = laws.get(path[-1].key, (0, otherwise))
        return jnp.asarray(mean + deviation * rng.standard_normal(leaf.shape).clip(-clip, clip), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, abstract)
