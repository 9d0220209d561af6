"""Depthwise convolution: both forms and their gradients against a float64 loop, and which form is lowered where."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kernels import depthwise_conv2d

RNG = np.random.default_rng(0)


def loop(x, kernel, dy=None, *, strides, pads):
    """Output, and with `dy` the gradients of x, kernel and bias, pixel by pixel in float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)[:, :, 0]
    (kh, kw), (sh, sw) = kernel.shape[:2], strides
    padded = np.pad(x, ((0, 0), *pads, (0, 0)))
    h, w = (padded.shape[1] - kh) // sh + 1, (padded.shape[2] - kw) // sw + 1
    y, d_padded, d_kernel = np.zeros((len(x), h, w, x.shape[-1])), np.zeros_like(padded), np.zeros_like(kernel)
    dy = np.zeros_like(y) if dy is None else np.asarray(dy, np.float64)
    for i, j in np.ndindex(h, w):
        here = (slice(None), slice(i * sh, i * sh + kh), slice(j * sw, j * sw + kw))
        pixel = dy[:, i : i + 1, j : j + 1]
        y[:, i, j] = (padded[here] * kernel).sum((1, 2))
        d_padded[here] += kernel * pixel
        d_kernel += (padded[here] * pixel).sum(0)
    (top, _), (left, _) = pads
    dx = d_padded[:, top : top + x.shape[1], left : left + x.shape[2]]
    return y, dx, d_kernel[:, :, None], dy.sum((0, 1, 2))


def pads_of(padding, size, kernel, strides):
    if padding == "SAME":
        total = [max((math.ceil(n / s) - 1) * s + k - n, 0) for n, k, s in zip(size, kernel, strides)]
        return [(t // 2, t - t // 2) for t in total]
    return [(padding, padding)] * 2 if isinstance(padding, int) else padding


def value_and_gradients(x, kernel, bias, dy, **options):
    y, pull = jax.vjp(lambda *arrays: depthwise_conv2d(*arrays, **options), x, kernel, bias)
    return y, *pull(dy)


CASES = [
    # size, kernel, strides, padding
    ((7, 5), (3, 3), 1, "SAME"),
    ((7, 7), (3, 3), 1, 1),
    ((8, 9), (5, 5), 1, "SAME"),
    ((9, 8), (7, 7), 1, 3),
    ((8, 7), (3, 3), 2, "SAME"),
    ((8, 8), (3, 3), 2, "SAME"),
    ((19, 4), (5, 5), 2, 2),
    ((34, 3), (2, 4), (1, 3), "SAME"),
    ((6, 8), (1, 1), 1, 0),
    ((6, 8), (1, 2), (3, 2), 0),
    ((5, 6), (3, 4), (2, 1), ((0, 3), (5, 1))),
    ((4, 3), (2, 2), 1, ((4, 0), (0, 4))),
]


@pytest.mark.parametrize(("size", "kernel", "strides", "padding"), CASES, ids=str)
def test_shifted_form_equals_the_loop(size, kernel, strides, padding):
    pair = (strides, strides) if isinstance(strides, int) else strides
    with jax.enable_x64(True):
        x, k, b = (jnp.asarray(RNG.standard_normal(s)) for s in ((2, *size, 3), (*kernel, 1, 3), (3,)))
        pads = pads_of(padding, size, kernel, pair)
        dy = jnp.asarray(RNG.standard_normal(loop(x, k, strides=pair, pads=pads)[0].shape))
        y, *gradients = loop(x, k, dy, strides=pair, pads=pads)
        run = jax.jit(value_and_gradients, static_argnames=("strides", "padding", "form"))
        ours = run(x, k, b, dy, strides=strides, padding=padding, form="shift")
        for actual, expected in zip(ours, (y + b, *gradients), strict=True):
            assert actual.dtype == jnp.float64
            np.testing.assert_allclose(actual, expected, atol=1e-12)


# Without the cases whose gradient XLA's own convolution refuses or crashes on.
@pytest.mark.parametrize(("size", "kernel", "strides", "padding"), CASES[:6:2], ids=str)
def test_convolution_form_equals_the_loop(size, kernel, strides, padding):
    with jax.enable_x64(True):
        x, k, b = (jnp.asarray(RNG.standard_normal(s)) for s in ((2, *size, 3), (*kernel, 1, 3), (3,)))
        geometry = dict(strides=(strides, strides), pads=pads_of(padding, size, kernel, (strides, strides)))
        dy = jnp.asarray(RNG.standard_normal(loop(x, k, **geometry)[0].shape))
        y, *gradients = loop(x, k, dy, **geometry)
        ours = value_and_gradients(x, k, b, dy, strides=strides, padding=padding, form="conv")
        for actual, expected in zip(ours, (y + b, *gradients), strict=True):
            np.testing.assert_allclose(actual, expected, atol=1e-12)


def small(dtype=jnp.float32):
    return (
        jnp.asarray(RNG.standard_normal((4, 9, 8, 5)), dtype),
        jnp.asarray(RNG.standard_normal((3, 3, 1, 5)), dtype),
        jnp.asarray(RNG.standard_normal(5), dtype),
    )


def loss(x, kernel, bias, form=None):
    return jnp.sin(depthwise_conv2d(x, kernel, bias, form=form)).sum()


def test_16_bit_sums_are_kept_in_float32():
    x, k, _ = small(jnp.bfloat16)
    dy = jnp.asarray(RNG.standard_normal(x.shape), jnp.bfloat16)
    y, pull = jax.vjp(lambda x, k: depthwise_conv2d(x, k, form="shift"), x, k)
    geometry = dict(strides=(1, 1), pads=[(1, 1), (1, 1)])
    expected = loop(x, k, dy, **geometry)
    magnitude = loop(abs(x), abs(k), abs(dy), **geometry)
    for actual, exact, terms in zip((y, *pull(dy)), expected, magnitude):
        assert actual.dtype == jnp.bfloat16
        # The last rounding to 8 bits, and one to 24 bits for each of at most 4 * 9 * 8 additions.
        bound = 2.0**-8 * abs(exact) + 288 * 2.0**-24 * terms
        assert (abs(np.asarray(actual, np.float64) - exact) <= bound).all()


def test_each_platform_gets_its_form_when_lowered():
    arrays = small()
    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    for function, convolutions in ((jax.jit(depthwise_conv2d), 1), (gradient, 3)):
        for platform, expected in (("cpu", 0), ("cuda", convolutions), ("tpu", convolutions)):
            text = function.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
            assert text.count("stablehlo.convolution") == expected, platform
    jax.tree.map(
        np.testing.assert_array_equal, gradient(*arrays), jax.grad(lambda *a: loss(*a, "shift"), (0, 1, 2))(*arrays)
    )


def test_data_parallel_gradients():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x, k, b = small()
    expected = jax.grad(loss, (0, 1, 2))(x, k, b)

    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    compiled = jax.jit(jax.grad(loss, 1)).lower(sharded, k, b).compile()
    # One exchange, not one for each tap.
    assert compiled.as_text().count(" all-reduce(") == 1
    np.testing.assert_allclose(compiled(sharded, k, b), expected[1], rtol=1e-5, atol=1e-5)

    def total(x, k, b):
        return jax.lax.psum(loss(x, k, b), "data")

    specs = (PartitionSpec("data"), PartitionSpec(), PartitionSpec())
    manual = jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    for actual, wanted in zip(jax.jit(jax.grad(manual, (0, 1, 2)))(x, k, b), expected):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)


def test_transformations():
    x, k, b = small()
    per_example = jax.vmap(jax.grad(loss, 1), (0, None, None))(x[:, None], k, b)
    np.testing.assert_allclose(per_example.sum(0), jax.grad(loss, 1)(x, k, b), rtol=1e-5, atol=1e-5)

    def norm(k, form):
        return (jax.grad(loss)(x, k, b, form) ** 2).sum()

    second, plain = (jax.jit(jax.grad(norm), static_argnums=1)(k, form) for form in (None, "conv"))
    np.testing.assert_allclose(second, plain, rtol=1e-4, atol=1e-3)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: depthwise_conv2d(x, k), (x,), (x,))
    tangent = jax.jvp(lambda x: depthwise_conv2d(x, k, form="conv"), (x,), (x,))[1]
    np.testing.assert_allclose(tangent, depthwise_conv2d(x, k), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(form="shfit"), ValueError, "unknown form 'shfit'; did you mean 'shift'?"),
        (dict(form="winograd"), ValueError, "unknown form 'winograd'; known: None, 'conv', 'shift'"),
        (dict(kernel=jnp.ones((3, 3, 1, 4))), ValueError, r"kernel must be \(kh, kw, 1, 5\).*got \(3, 3, 1, 4\)"),
        (dict(kernel=jnp.ones((3, 3, 5, 5))), ValueError, r"kernel must be \(kh, kw, 1, 5\)"),
        (dict(bias=jnp.ones(3)), ValueError, r"bias must be \(5,\)"),
        (dict(x=jnp.ones((9, 8, 5))), ValueError, r"x must be \(B, H, W, C\), got shape \(9, 8, 5\)"),
        (dict(kernel=jnp.ones((3, 3, 1, 5), jnp.bfloat16)), TypeError, "kernel is bfloat16 and x is float32; cast"),
        (dict(strides=0), ValueError, "strides must be one or two numbers of at least 1, got 0"),
        (dict(strides=(1, 2, 1)), ValueError, r"strides must be .* got \(1, 2, 1\)"),
        (dict(padding="VALID"), ValueError, "got 'VALID'; did you mean 0"),
        (dict(padding=(1, 1)), ValueError, r"padding must be .*\(\(top, bottom\), \(left, right\)\), got \(1, 1\)"),
        (dict(padding=-1), ValueError, "padding must not be negative, got -1"),
        (dict(kernel=jnp.ones((11, 3, 1, 5)), padding=0), ValueError, "11x3 kernel does not fit into 9x8 pixels"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_errors_say_what_would_be_accepted(change, error, message):
    x, kernel, bias = small()
    arguments = dict(x=x, kernel=kernel, bias=bias) | change
    # Without the shape checker of the tests, which would speak first.
    with pytest.raises(error, match=message):
        inspect.unwrap(depthwise_conv2d)(**arguments)
