"""A model's inner outputs, for every model of the zoo."""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float


def forward_intermediates(
    model: nn.Module, variables: Any, images: Float[Array, "B H W C"], *, include_stem: bool = False
) -> list[Float[Array, "B h w D"]]:
    """The feature maps after each stage, before the next downsampling.

    Args:
        model: a model of the zoo; `model.feature_info` tells channels and strides without running it.
        variables: `{"params": ..., ...}`.
        images: `(B, H, W, C)`, normalised.
        include_stem: put the stem's output first.

    Returns:
        One `(B, h, w, channels)` array per stage.
    """
    features = model.apply(variables, images, method="forward_intermediates")
    return features if include_stem else features[1:]
