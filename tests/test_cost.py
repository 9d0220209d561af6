"""The counter of FLOPs and bytes: closed forms, and XLA's own count."""

import functools

import jax
import jax.numpy as jnp
import pytest

from kernels import attention, channel_attention, depthwise_conv2d, window_attention
from kernels.cost import cost
from tests.closed_forms import dense, f32, products, softmax_flops, taps_inside


def test_matrix_product():
    counted = cost(jnp.matmul, f32(5, 7), f32(7, 3))
    assert counted.flops == counted.matmul_flops == products(5, 7, 3)
    assert counted.transcendentals == 0
    assert counted.bytes == counted.io_bytes == 4 * (5 * 7 + 7 * 3 + 5 * 3)
    assert counted.by_primitive["dot_general"].flops == counted.flops
    half = jax.ShapeDtypeStruct((5, 7), jnp.bfloat16), jax.ShapeDtypeStruct((7, 3), jnp.bfloat16)
    assert cost(jnp.matmul, *half).io_bytes == counted.io_bytes // 2
    batched = cost(lambda x, y: jnp.einsum("bhqd,bkhd->bhqk", x, y), f32(2, 3, 5, 7), f32(2, 4, 3, 7))
    assert batched.matmul_flops == products(2, 3, 5, 4, 7)


def test_counts_by_scope():
    """Scopes nest, also through a loop and a jitted function; what stands in none has the empty name."""

    @jax.jit
    def twice(x):
        with jax.named_scope("product"):
            return x @ x @ x

    def fn(x):
        with jax.named_scope("first"):
            y = twice(x)
            with jax.named_scope("loop"):
                y, _ = jax.lax.scan(lambda carry, _: (carry @ x, None), y, length=5)
        return y + 1

    counted = cost(fn, f32(3, 3))
    assert sum(counts.flops for counts in counted.by_scope.values()) == counted.flops
    found = {scope: counts.matmul_flops for scope, counts in counted.by_scope.items() if counts.matmul_flops}
    product, loop = (next(scope for scope in found if name in scope.split("/")) for name in ("product", "loop"))
    assert product.split("/")[0] == loop.split("/")[0] == "first"
    assert found == {product: 2 * products(3, 3, 3), loop: 5 * products(3, 3, 3)}
    assert counted.by_scope[""].flops == 3 * 3


def test_softmax():
    counted = cost(functools.partial(jax.nn.softmax, axis=-1), f32(6, 11))
    assert (counted.flops, counted.transcendentals, counted.matmul_flops) == (softmax_flops(6, 11), 6 * 11, 0)
    # What is between the operand and the result stays on the chip at best, and is written and read at worst.
    assert counted.io_bytes == 2 * 4 * 6 * 11
    assert counted.bytes > 3 * counted.io_bytes


def test_attention():
    b, t, s, h, d = 2, 6, 5, 3, 4
    counted = cost(functools.partial(attention, scale=0.5), f32(b, t, h, d), f32(b, s, h, d), f32(b, s, h, d))
    assert counted.matmul_flops == products(b, h, t, s, d, 2)
    assert counted.transcendentals == b * h * t * s
    assert counted.flops == counted.matmul_flops + b * h * t * s + softmax_flops(b * h * t, s)


def test_window_attention():
    run = functools.partial(window_attention, num_heads=3, window=(4, 4), pad="mask")
    counted = cost(run, f32(2, 7, 5, 3 * 12))
    windows = 2 * 2 * 2
    assert counted.matmul_flops == products(windows, 16, 16, 12, 2)
    assert counted.transcendentals == windows * 3 * 16 * 16


def test_channel_attention():
    b, n, h, d = 2, 64, 3, 4
    counted = cost(channel_attention, *[f32(b, n, h, d)] * 3)
    assert counted.matmul_flops == products(b, h, n, d, d, 2)
    assert counted.transcendentals == b * h * d * d


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pad", "groups"), [(9, 3, 1, 1, 1), (8, 7, 4, 3, 1), (9, 2, 2, 0, 3), (5, 3, 2, 2, 6)]
)
def test_convolution(size, kernel, stride, pad, groups):
    b, c, features = 2, 6, 12

    def conv(x, k):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, k, (stride, stride), [(pad, pad)] * 2, dimension_numbers=dims, feature_group_count=groups
        )

    counted = cost(conv, f32(b, size, size, c), f32(kernel, kernel, c // groups, features))
    pairs = taps_inside(size, kernel, stride, pad) ** 2
    assert counted.flops == counted.matmul_flops == products(b, pairs, c // groups, features)


def test_gradient_of_a_strided_convolution_counts_no_holes():
    def loss(x, k):
        return jax.lax.conv(x, k, (2, 2), "VALID").sum()

    shapes = f32(1, 3, 9, 9), f32(5, 3, 3, 3)
    forward = products(4 * 4, 3 * 3, 3, 5)
    assert cost(loss, *shapes).matmul_flops == forward
    # One convolution over a gradient with holes between its pixels, one with such a window: the same products.
    assert cost(jax.grad(loss, (0, 1)), *shapes).matmul_flops == 2 * forward


def test_depthwise_convolution_counts_in_the_form_of_the_platform():
    b, h, w, c = 2, 9, 8, 5
    run = functools.partial(depthwise_conv2d, padding=1)
    shapes = f32(b, h, w, c), f32(3, 3, 1, c)
    convolution = cost(run, *shapes, platform="tpu")
    assert convolution.matmul_flops == products(b, c, taps_inside(h, 3, 1, 1), taps_inside(w, 3, 1, 1))
    assert convolution.flops == convolution.matmul_flops
    # Nine products and eight sums; one row too many, as the function explains.
    shifted = cost(run, *shapes, platform="cpu")
    assert (shifted.flops, shifted.matmul_flops) == (17 * b * (h + 1) * w * c, 0)


def test_elementary_functions():
    x = f32(10)
    cases = {
        jnp.exp: (0, 10),
        jax.nn.sigmoid: (30, 10),
        jnp.exp2: (10, 10),
        jnp.tanh: (0, 10),
        jnp.square: (10, 0),
        jnp.sum: (9, 0),
        jnp.cumsum: (10, 0),
        jnp.argmax: (9, 0),
        jnp.sort: (40, 0),
        (lambda x: x**5): (30, 0),
        (lambda x: x**-2): (20, 0),
        (lambda x: x[::-1].reshape(2, 5).T): (0, 0),
        (lambda x: x.at[2].add(1.0)): (1, 0),
        (lambda x: x[jnp.array([1, 3])]): (0, 0),
    }
    for function, (flops, transcendentals) in cases.items():
        by_name = cost(function, x)
        indices = sum(by_name.by_primitive[p].flops for p in ("lt", "add", "select_n") if p in by_name.by_primitive)
        counted = by_name.flops - indices, by_name.transcendentals
        assert counted == (flops, transcendentals), function


def test_a_slice_moves_what_it_returns():
    table, indices = f32(1000, 8), 2 * 4
    assert cost(lambda x: jax.lax.slice(x, (0, 0), (2, 8)), table).bytes == 2 * 4 * 16
    assert cost(lambda x: jax.lax.dynamic_slice(x, (3, 0), (2, 8)), table).bytes == 2 * 4 * 16 + indices
    update = cost(lambda x, y: jax.lax.dynamic_update_slice(x, y, (3, 0)), table, f32(2, 8))
    assert update.bytes == 3 * 4 * 16 + indices


def test_what_nobody_reads_is_not_counted():
    def run(x, w):
        unused = dense(x, w)
        return x + 1, jax.jit(lambda x: (jnp.exp(x), (unused @ w).sum()))(x)[0]

    counted = cost(run, f32(4, 8), f32(8, 8))
    assert (counted.flops, counted.transcendentals) == (32, 32)
    assert counted.io_bytes == 3 * 4 * 32


def test_errors_name_the_primitives_without_a_rule():
    def run(x):
        values, vectors = jnp.linalg.eigh(x)
        return vectors @ jnp.linalg.qr(x)[0]

    with pytest.raises(ValueError, match="no rule for the primitives .*eigh.*; add them to kernels.cost_rules"):
        cost(run, f32(4, 4))
    # Not as the operand of a function that needs no rule for it.
    assert cost(lambda x: x @ x, f32(4, 4)).flops == products(4, 4, 4)


def xla_counts(function, shapes, compiled=True):
    program = jax.jit(function).lower(*shapes)
    analysis = (program.compile() if compiled else program).cost_analysis()
    return analysis["flops"], analysis.get("transcendentals", 0)


def chain(x, a, b):
    return x @ a @ b


def bilinear(q, k, v):
    return jnp.einsum("bhqk,bkhd->bqhd", jnp.einsum("bqhd,bkhd->bhqk", q, k), v)


def strided(x, k):
    return jax.lax.conv_general_dilated(x, k, (2, 2), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))


depthwise = functools.partial(depthwise_conv2d, padding=1, form="conv")


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (chain, (f32(4, 8), f32(8, 6), f32(6, 3))),
        (bilinear, (f32(2, 6, 3, 4), f32(2, 5, 3, 4), f32(2, 5, 3, 4))),
        (strided, (f32(2, 16, 16, 8), f32(3, 3, 8, 16))),
        (depthwise, (f32(2, 9, 8, 5), f32(3, 3, 1, 5))),
    ],
    ids=["chain", "bilinear", "strided", "depthwise"],
)
def test_products_count_as_in_xla(function, shapes):
    """Products alone, so to the unit; the gradients of these functions are products too.

    Before XLA compiles them, since on a CPU it makes a dense convolution of the depthwise one's gradient.
    """
    counted = cost(function, *shapes)
    assert counted.matmul_flops == counted.flops == xla_counts(function, shapes, compiled=False)[0]

    def gradients(dy, *arrays):
        return jax.vjp(function, *arrays)[1](dy)

    shapes = (f32(*jax.eval_shape(function, *shapes).shape), *shapes)
    counted = cost(gradients, *shapes)
    assert counted.matmul_flops == counted.flops == xla_counts(gradients, shapes, compiled=False)[0]


def unrolled(x, w):
    for _ in range(4):
        x = dense(x, w)
    return x


def scanned(x, w):
    return jax.lax.scan(lambda x, _: (dense(x, w), None), x, length=4)[0]


def loss(function):
    return jax.grad(lambda x, *rest: (function(x, *rest) ** 2).sum())


def test_whole_programs_count_as_in_xla():
    """Within 2 %: XLA folds what it knows beforehand, such as a causal mask, and a factor of 2 into another."""
    qkv, packed, xw = (f32(2, 64, 2, 32),) * 3, (f32(2, 14, 14, 3 * 64),), (f32(64, 128), f32(128, 128))
    windows = functools.partial(window_attention, num_heads=2, window=(7, 7))
    # Ours, XLA's program (other than ours where that has a loop), shapes.
    cases = [
        (unrolled, unrolled, xw),
        (scanned, unrolled, xw),
        (loss(scanned), loss(unrolled), xw),
        (functools.partial(attention, causal=True), functools.partial(attention, causal=True), qkv),
        (loss(attention), loss(attention), qkv),
        (windows, windows, packed),
        (loss(windows), loss(windows), packed),
        (channel_attention, channel_attention, qkv),
    ]
    for ours, theirs, shapes in cases:
        counted = cost(ours, *shapes)
        flops, transcendentals = xla_counts(theirs, shapes)
        assert counted.flops == pytest.approx(flops, rel=0.02), ours
        assert counted.transcendentals == transcendentals, ours
    # Which is why XLA's count does not do for a loop.
    assert xla_counts(scanned, xw)[0] == pytest.approx(xla_counts(unrolled, xw)[0] / 4, rel=0.01)
