"""Window, channel and dense attention and the dispatcher, against float64 loops and closed forms."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention, channel_attention, merge_windows, partition_windows, window_attention
from kernels.dispatch import Implementation, dispatch, record_choices
from tests.reference import attention as reference

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


WINDOW_CASES = [
    dict(size=(8, 12), window=(4, 3), partition="block"),
    dict(size=(8, 12), window=(4, 3), partition="grid"),
    dict(size=(7, 10), window=(4, 4), partition="block", pad="mask"),
    dict(size=(7, 10), window=(4, 4), partition="grid", pad="mask"),
    dict(size=(7, 10), window=(4, 4), partition="block", pad="array"),
    dict(size=(3, 2), window=(5, 4), partition="block", pad="array", bias=True),
    dict(size=(3, 2), window=(5, 4), partition="grid", pad="mask", bias=True),
    dict(size=(6, 6), window=(3, 3), partition="grid", bias=True, scale=0.3),
    dict(size=(4, 4), window=(1, 1), partition="block"),
]


@pytest.mark.parametrize("case", WINDOW_CASES, ids=str)
def test_window_attention_equals_the_loop(case):
    heads, dim, (h, w), window = 2, 5, case["size"], case["window"]
    n = window[0] * window[1]
    kwargs = dict(num_heads=heads, window=window, partition=case["partition"], scale=case.get("scale"))
    pad = case.get("pad")
    kwargs["pad"] = normal(3 * heads * dim) if pad == "array" else pad
    kwargs["bias"] = normal(heads, n, n) if case.get("bias") else None
    qkv = normal(2, h, w, 3 * heads * dim)
    expected = reference.window_attention(qkv, **kwargs)
    np.testing.assert_allclose(window_attention(qkv, **kwargs), expected, atol=2e-6)
    with_weights, weights = window_attention(qkv, return_weights=True, **kwargs)
    np.testing.assert_allclose(with_weights, expected, atol=2e-6)
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)
    assert weights.shape[-2:] == (n, n) and weights.dtype == jnp.float32


def test_window_attention_gradients_equal_finite_differences():
    with jax.enable_x64(True):
        qkv, fill, bias = (jnp.asarray(RNG.standard_normal(s)) for s in ((1, 5, 4, 12), (12,), (2, 9, 9)))
        direction = jnp.asarray(RNG.standard_normal((1, 5, 4, 4)))

        def loss(*arrays):
            qkv, fill, bias = map(jnp.asarray, arrays)
            out = window_attention(qkv, num_heads=2, window=(3, 3), bias=bias, pad=fill)
            assert out.dtype == jnp.float64
            return (out * direction).sum()

        jax.test_util.check_grads(loss, (qkv, fill, bias), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_nan_stays_in_its_window():
    qkv = normal(1, 6, 6, 12).at[0, 0, 0, 0].set(jnp.nan)
    bad = jnp.isnan(window_attention(qkv, num_heads=2, window=(3, 3))).any(-1)[0]
    assert bad[:3, :3].any() and not bad[3:].any() and not bad[:, 3:].any()


@pytest.mark.parametrize("partition", ["block", "grid"])
def test_partition_round_trip_and_members(partition):
    x = jnp.arange(6 * 8, dtype=jnp.float32).reshape(1, 6, 8, 1)
    windows = partition_windows(x, (3, 2), partition)
    np.testing.assert_array_equal(merge_windows(windows, (6, 8), (3, 2), partition), x)
    expected = [[y * 8 + x for y, x in w] for w in reference.window_tokens(6, 8, (3, 2), partition)]
    np.testing.assert_array_equal(windows[..., 0], expected)


def test_bfloat16_inputs_are_accumulated_in_float32():
    qkv = normal(1, 7, 7, 96).astype(jnp.bfloat16)
    out, weights = window_attention(qkv, num_heads=1, window=(7, 7), return_weights=True)
    assert out.dtype == jnp.bfloat16 and weights.dtype == jnp.float32
    expected = reference.window_attention(qkv.astype(jnp.float32), num_heads=1, window=(7, 7))
    # Weights and output are rounded to 8 bits of mantissa once each.
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=2**-7)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (dict(window=(4, 4)), "pass pad='mask' or pad=array, or resize to 8x8"),
        (dict(window=(7, 7), num_heads=5), "num_heads=5"),
        (dict(window=(7,)), "window must be a pair"),
        (dict(window=(7, 7), partition="blok"), "'block' or 'grid'"),
        (dict(window=(7, 7), pad="msk"), "'msk'"),
        (dict(window=(7, 7), pad=jnp.zeros(5)), r"shape \(12,\)"),
        (dict(window=(7, 7), bias=jnp.zeros((2, 4, 4))), r"\(2, 49, 49\)"),
    ],
)
def test_window_attention_names_what_is_wrong(kwargs, words):
    kwargs = {"num_heads": 2, **kwargs}
    with pytest.raises(Exception, match=words):
        window_attention.__wrapped__(normal(1, 7, 7, 12), **kwargs)


def test_dense_attention_of_float64_is_float64():
    q, k, v = RNG.standard_normal((3, 2, 7, 2, 4))
    with jax.enable_x64(True):
        operands = [jnp.asarray(x) for x in (q, k, v)]
        out = attention(*operands)
        found, weights = attention(*operands, return_weights=True)
    expected = reference.softmax(np.einsum("bqhd,bkhd->bhqk", q, k) / 2)
    np.testing.assert_allclose(weights, expected, rtol=1e-13)
    for array in (out, found):
        np.testing.assert_allclose(array, np.einsum("bhqk,bkhd->bqhd", expected, v), rtol=0, atol=1e-14)


def test_channel_attention_equals_the_loop():
    q, k, v = normal(2, 50, 3, 4), normal(2, 50, 3, 4), normal(2, 50, 3, 4)
    out, weights = channel_attention(q, k, v, scale=0.2, return_weights=True)
    for b in range(2):
        for h in range(3):
            q64, k64, v64 = (np.asarray(x[b, :, h], np.float64) for x in (q, k, v))
            expected = reference.softmax(0.2 * q64.T @ k64)
            np.testing.assert_allclose(weights[b, h], expected, atol=2e-6)
            np.testing.assert_allclose(out[b, :, h], v64 @ expected.T, atol=5e-6)
    np.testing.assert_allclose(channel_attention(q, k, v), channel_attention(q, k, v, scale=0.5), atol=1e-6)


def test_channel_attention_sums_in_float32_over_many_tokens():
    # 4096 products of 1/16 are 256, where bfloat16 steps by 2: a 16-bit sum would stall far below.
    ones = jnp.full((1, 4096, 1, 2), 0.25, jnp.bfloat16)
    key = jnp.stack([ones[..., 0], jnp.zeros_like(ones[..., 0])], -1)
    _, weights = channel_attention(ones, key, ones, scale=1 / 128, return_weights=True)
    np.testing.assert_allclose(weights[0, 0, 0], reference.softmax(np.array([2.0, 0.0])), atol=1e-5)


@pytest.mark.parametrize("tokens", [65, 784, 3136])
def test_channel_attention_loses_little_of_long_sums(tokens):
    q, k, v = (abs(normal(2, tokens, 3, 8)) for _ in range(3))
    scale = 32 / tokens
    _, weights = channel_attention(q, k, v, scale=scale, return_weights=True)
    logits = scale * np.einsum("bnhd,bnhe->bhde", np.float64(q), np.float64(k))
    error = np.log(np.float64(weights)) - np.log(reference.softmax(logits))
    # In units of the logits' last place; one float32 sum over 784 tokens is off by 20, over 3136 by 15 and more.
    assert abs(error).max() < 8 * 2.0**-24 * logits.max()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_equals_the_formula(causal, kv_heads):
    q, k, v = normal(2, 6, 4, 8), normal(2, 6, kv_heads, 8), normal(2, 6, kv_heads, 8)
    bias, mask = normal(1, 4, 6, 6), jnp.asarray(RNG.random((2, 1, 6, 6)) < 0.7).at[..., 0].set(True)
    q64, k64, v64 = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("bqhd,bkhd->bhqk", q64, k64.repeat(4 // kv_heads, 2)) * 8**-0.5 + np.asarray(bias)
    allowed = np.asarray(mask) & (np.tril(np.ones((6, 6), bool)) if causal else True)
    weights = reference.softmax(np.where(allowed, logits, -np.inf))
    expected = np.einsum("bhqk,bkhd->bqhd", weights, v64.repeat(4 // kv_heads, 2))
    kwargs = dict(bias=bias, mask=mask, causal=causal)
    np.testing.assert_allclose(attention(q, k, v, **kwargs), expected, atol=2e-6)
    out, returned = attention(q, k, v, return_weights=True, **kwargs)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(returned, weights, atol=2e-6)


def test_attention_refuses_what_cudnn_cannot_do():
    q = normal(1, 4, 1, 8)
    with pytest.raises(NotImplementedError, match="cudnn: return_weights needs 'xla'"):
        attention(q, q, q, implementation="cudnn", return_weights=True)
    with pytest.raises(NotImplementedError, match="float32; it takes bfloat16"):
        attention(q, q, q, implementation="cudnn")
    np.testing.assert_array_equal(
        attention(q, q, q, implementation=("cudnn", "xla")), attention(q, q, q, implementation="xla")
    )


def test_unknown_and_unwritten_implementations():
    qkv = normal(1, 2, 2, 6)
    with pytest.raises(ValueError, match="did you mean 'pallas_tpu'"):
        window_attention(qkv, num_heads=1, window=(2, 2), implementation="palas_tpu")
    with pytest.raises(ValueError, match="empty sequence"):
        window_attention(qkv, num_heads=1, window=(2, 2), implementation=())
    with pytest.raises(
        NotImplementedError, match="cudnn: not written for this op, which has pallas_tpu, pallas_triton, xla"
    ):
        window_attention(qkv, num_heads=1, window=(2, 2), implementation="cudnn")


PLATFORM_TABLE = (
    Implementation("xla", lambda x, y, *, power: x**power + y),
    Implementation(
        "pallas_tpu",
        lambda x, y, *, power: jnp.sin(x) + y,
        lambda x, y, *, power: None if power == 2 else f"power {power}; it takes 2",
        platforms=("tpu",),
    ),
)


def test_the_platform_is_chosen_when_the_program_is_lowered():
    def op(x):
        return dispatch("op", PLATFORM_TABLE, None, (x, x), dict(power=2))

    with record_choices() as choices:
        traced = jax.jit(op).trace(jnp.float32(3.0))
    assert {c.platform: c.implementation for c in choices} == {
        "cpu": "xla", "tpu": "pallas_tpu", "cuda": "xla", "rocm": "xla",
    }  # fmt: skip
    assert "sine" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "sine" not in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert op(jnp.float32(3.0)) == 12.0
    assert jax.grad(op)(jnp.float32(3.0)) == 7.0


def test_an_implementation_that_cannot_serve_the_call_is_passed_over_or_named():
    arrays, options = (jnp.float32(2.0), jnp.float32(1.0)), dict(power=3)
    with record_choices() as choices:
        assert dispatch("op", PLATFORM_TABLE, None, arrays, options) == 9.0
    assert {c.implementation for c in choices} == {"xla"}
    assert any("power 3; it takes 2" in reason for c in choices for reason in c.refused)
    with pytest.raises(NotImplementedError, match="op: pallas_tpu: power 3; it takes 2"):
        dispatch("op", PLATFORM_TABLE, "pallas_tpu", arrays, options)


class TestVariants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_window_attention_is_the_same_with_and_without_jit(self):
        qkv = normal(1, 6, 6, 24)
        run = self.variant(lambda x: window_attention(x, num_heads=2, window=(3, 3)))
        expected = reference.window_attention(qkv, num_heads=2, window=(3, 3))
        chex.assert_trees_all_close(run(qkv), expected.astype(np.float32), atol=2e-6)
