"""Attention primitives: pure functions of arrays."""

from kernels.channel import channel_attention
from kernels.dense import attention
from kernels.depthwise import depthwise_conv2d
from kernels.window import merge_windows, partition_windows, window_attention

__all__ = [
    "attention",
    "channel_attention",
    "depthwise_conv2d",
    "merge_windows",
    "partition_windows",
    "window_attention",
]
