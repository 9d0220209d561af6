"""What a model attended to, in the form in which each kind of attention has it.

A module that runs with the flax collection `"attention"` mutable sows one of these under `"map"`. Fields are arrays
or, under a transformation, what stands for them.
"""

from typing import Any

import flax.linen as nn
import flax.struct


def watched(module: nn.Module) -> bool:
    """Whether a module should sow what it attends to."""
    return module.is_mutable_collection("attention") and not module.is_initializing()


def _static():
    return flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class WindowMap:
    """Attention inside windows.

    Attributes:
        weights: `(B, windows, heads, n, n)`, as `kernels.window_attention` returns them.
        shape: height and width of the feature map, without padding.
        window: height and width of a window in tokens.
        partition: `"block"` or `"grid"`.
    """

    weights: Any
    shape: tuple[int, int] = _static()
    window: tuple[int, int] = _static()
    partition: str = _static()


@flax.struct.dataclass
class RoutedMap:
    """Attention of every region to the regions that it was routed to (BiFormer).

    Attributes:
        weights: `(B, regions, heads, m, k * n)`: m queries of a region, n keys of each of its k regions.
        indices: `(B, regions, k)`: which regions those are, row-major.
        shape: height and width of the feature map, without padding.
        regions: rows and columns of regions.
        region: height and width of a region in tokens.
        keys: height and width of a region after its keys were pooled; equal to `region` without pooling.
    """

    weights: Any
    indices: Any
    shape: tuple[int, int] = _static()
    regions: tuple[int, int] = _static()
    region: tuple[int, int] = _static()
    keys: tuple[int, int] = _static()


@flax.struct.dataclass
class ChannelMap:
    """Attention between the channels of each group (DaViT).

    Attributes:
        weights: `(B, groups, d, d)`.
        values: `(B, h, w, groups)`: root mean square of each group's output at every token.
    """

    weights: Any
    values: Any


@flax.struct.dataclass
class LinearMap:
    """Linear attention: query n attends to key m by `query[n] @ key[m]` over its sum for all keys.

    Attributes:
        query, key: `(B, N, heads, D)` after the feature map, which makes them non-negative.
        shape: height and width of the feature map; N is their product, row-major.
    """

    query: Any
    key: Any
    shape: tuple[int, int] = _static()


@flax.struct.dataclass
class DenseMap:
    """Attention of every token to every token.

    Attributes:
        weights: `(B, heads, N, N)`.
        shape: height and width of the feature map; N is their product, row-major.
    """

    weights: Any
    shape: tuple[int, int] = _static()
