"""Placeholder until the measured form lands."""
import jax


def depthwise_conv2d(x, kernel, bias=None, *, strides=1, padding="SAME", form=None):
    p = ((padding, padding),) * 2
    y = jax.lax.conv_general_dilated(x, kernel, (strides, strides), p, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1])
    return y if bias is None else y + bias
