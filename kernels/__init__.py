"""Attention primitives: pure functions of arrays."""

from kernels.bilevel import bilevel_attention, region_descriptors, route_regions
from kernels.channel import channel_attention
from kernels.dense import attention
from kernels.depthwise import depthwise_conv2d
from kernels.linear import linear_attention
from kernels.window import merge_windows, partition_windows, window_attention

__all__ = [
    "attention",
    "bilevel_attention",
    "channel_attention",
    "depthwise_conv2d",
    "linear_attention",
    "merge_windows",
    "partition_windows",
    "region_descriptors",
    "route_regions",
    "window_attention",
]
