"""MBConv, the inverted bottleneck of MobileNetV2 (Sandler et al., arXiv:1801.04381) with squeeze-and-excitation."""

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.layers import (
    BatchNorm,
    DepthwiseConv,
    DropPath,
    Dtype,
    Linear,
    SqueezeExcite,
    normal02_init,
    tanh_gelu,
)

EXPANSION, SQUEEZE = 4, 16


class MBConv(nn.Module):
    """Norm, 1x1 expansion, 3x3 depthwise convolution, squeeze-and-excitation, 1x1 projection, shortcut.

    The norm before the expansion is followed by no activation, the projection by no norm. With stride 2 the shortcut
    is pooled 2x2 on average; where the width changes it is then projected. The inner width is four times the outer
    one, that inside the squeeze-and-excitation a sixteenth of the inner one.

    Attributes:
        features: output channels.
        strides: 1 or 2, of the depthwise convolution.
        expand_input: whether the inner width is four times that of the input, not of the output.
        padding: of the depthwise convolution, `"SAME"` or zeros on every side.
        activation: behind the norms of the expansion and of the depthwise convolution.
        use_bias: whether the projections of the branch and of the shortcut have one.
        drop_path: stochastic depth of the branch.
        epsilon, momentum: of the batch norms.

    Source: MaxViT (arXiv:2204.01697), section 3.3 and appendix A.1.
    """

    features: int
    strides: int = 1
    expand_input: bool = False
    padding: int | Literal["SAME"] = "SAME"
    activation: Callable[[Array], Array] = tanh_gelu
    use_bias: bool = True
    drop_path: float = 0.0
    epsilon: float = 1e-3
    momentum: float = 0.99
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w D"]:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = dict(epsilon=self.epsilon, momentum=self.momentum, **like)
        inner = EXPANSION * (x.shape[-1] if self.expand_input else self.features)
        shortcut = average_pool(x) if self.strides == 2 else x
        if x.shape[-1] != self.features:
            shortcut = Linear(self.features, self.use_bias, name="shortcut", **like)(shortcut)
        x = BatchNorm(name="pre_norm", **norm)(x, train)
        x = Linear(inner, use_bias=False, name="expand", **like)(x)
        x = self.activation(BatchNorm(name="expand_norm", **norm)(x, train))
        conv = dict(padding=self.padding, use_bias=False, kernel_init=normal02_init)
        x = DepthwiseConv(3, self.strides, name="depthwise", **conv, **like)(x)
        x = self.activation(BatchNorm(name="depthwise_norm", **norm)(x, train))
        x = SqueezeExcite(inner // SQUEEZE, name="se", **like)(x)
        x = Linear(self.features, self.use_bias, name="project", **like)(x)
        return shortcut + DropPath(self.drop_path)(x, train)


def average_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Means of 2x2 pixels of a map with even sides: as a reshape, for which XLA needs no loop over windows."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))
