"""Attention primitives: pure functions of arrays."""

from kernels.bilevel import bilevel_attention, region_descriptors, route_regions
from kernels.block_sparse import block_sparse_attention
from kernels.channel import channel_attention
from kernels.cluster import routing_attention
from kernels.cluster.step import routing_step
from kernels.delta import delta_rule
from kernels.dense import attention
from kernels.depthwise import depthwise_conv2d
from kernels.flow import flow_attention
from kernels.gated_linear import gated_linear_attention
from kernels.linear import linear_attention
from kernels.local import local_attention
from kernels.memory import memora, miras, moneta, yaad
from kernels.norm_aware import norm_aware_linear_attention
from kernels.rotary import rotary
from kernels.short_conv import short_conv
from kernels.window import merge_windows, partition_windows, window_attention

__all__ = [
    "attention",
    "bilevel_attention",
    "block_sparse_attention",
    "channel_attention",
    "delta_rule",
    "depthwise_conv2d",
    "flow_attention",
    "gated_linear_attention",
    "linear_attention",
    "local_attention",
    "memora",
    "merge_windows",
    "miras",
    "moneta",
    "norm_aware_linear_attention",
    "partition_windows",
    "region_descriptors",
    "rotary",
    "route_regions",
    "routing_attention",
    "routing_step",
    "short_conv",
    "window_attention",
    "yaad",
]
