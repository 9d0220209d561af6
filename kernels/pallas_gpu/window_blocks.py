"""The gradient of attention in large windows on NVIDIA GPUs: queries and keys in blocks."""

from kernels.pallas_gpu.window_tiles import Layout


def backward(qkv, bias, pad, gradient, *, at: Layout):
    raise NotImplementedError
