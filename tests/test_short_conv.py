"""The short convolution against its sum written out, its steps, its documents and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.residuals import residual_bytes
from kernels.short_conv import short_conv

RNG = np.random.default_rng(0)
SEGMENTS = np.asarray([[3, 3, 5, 3, 3, 3, 3, 0, 0], [1, 1, 1, 1, 1, 2, 2, 2, 2]])


def operands(tokens=9, width=4, channels=5, batch=2):
    shapes = dict(x=(batch, tokens, channels), kernel=(width, channels), bias=(channels,))
    arrays = {name: RNG.standard_normal(shape) for name, shape in shapes.items()}
    return arrays, RNG.standard_normal((batch, width - 1, channels))


def written_out(x, kernel, bias, state, segments=None):
    """Output and state by definition, in float64."""
    width, out = len(kernel), np.zeros(x.shape)
    extended = np.concatenate((state, x), 1)
    last = extended[:, x.shape[1] :].copy()
    for b, t in np.ndindex(x.shape[:2]):
        out[b, t] = bias
        for back in range(width):
            if segments is not None and len(set(segments[b, max(t - back, 0) : t + 1])) > 1:
                break
            if segments is not None and t < back and (segments[b, : t + 1] != segments[b, 0]).any():
                break
            out[b, t] += kernel[width - 1 - back] * extended[b, t - back + width - 1]
        for slot in range(width - 1):
            source = x.shape[1] - (width - 1) + slot
            if segments is not None and (segments[b, max(source, 0) :] != segments[b, -1]).any():
                last[b, slot] = 0
    return out, last


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4, 12])
def test_equals_its_definition(width, packed):
    arrays, state = operands(width=width)
    segments = SEGMENTS if packed else None
    expected, last = written_out(**arrays, state=state, segments=segments)
    with jax.enable_x64(True):
        out, new = short_conv(
            **{n: jnp.asarray(x) for n, x in arrays.items()},
            initial_state=jnp.asarray(state),
            segments=None if segments is None else jnp.asarray(segments),
            return_state=True,
        )
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(new, last)


def test_equals_convolution_of_the_library():
    arrays, _ = operands(tokens=20)
    single = {n: jnp.asarray(x, jnp.float32) for n, x in arrays.items()}
    expected = jax.lax.conv_general_dilated(
        single["x"],
        single["kernel"][:, None],
        (1,),
        [(3, 0)],
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=5,
    )
    np.testing.assert_allclose(short_conv(single["x"], single["kernel"]), expected, atol=1e-6)
    np.testing.assert_allclose(short_conv(**single), expected + single["bias"], atol=1e-6)


def test_parts_and_single_tokens_equal_one_go():
    arrays, state = operands(tokens=12)
    x, kernel, bias = (jnp.asarray(arrays[n], jnp.float32) for n in ("x", "kernel", "bias"))
    first = jnp.asarray(state, jnp.float32)
    expected, last = short_conv(x, kernel, bias, initial_state=first, return_state=True)
    for parts in ([5, 12], range(1, 13), [2, 3, 12]):
        outs, state, start = [], first, 0
        for end in parts:
            out, state = short_conv(x[:, start:end], kernel, bias, initial_state=state, return_state=True)
            outs.append(out)
            start = end
        np.testing.assert_array_equal(jnp.concatenate(outs, 1), expected)
        np.testing.assert_array_equal(state, last)


def test_a_document_is_as_if_alone():
    arrays, state = operands()
    x, kernel, bias = (jnp.asarray(arrays[n], jnp.float32) for n in ("x", "kernel", "bias"))
    first = jnp.asarray(state, jnp.float32)
    out = short_conv(x, kernel, bias, initial_state=first, segments=jnp.asarray(SEGMENTS))
    for row, start, end in ((0, 0, 2), (0, 2, 3), (0, 3, 7), (0, 7, 9), (1, 0, 5), (1, 5, 9)):
        before = None if start else first[row : row + 1]
        alone = short_conv(x[row : row + 1, start:end], kernel, bias, initial_state=before)
        np.testing.assert_array_equal(out[row, start:end], alone[0])


def test_gradients_against_finite_differences():
    with jax.enable_x64(True):
        arrays, state = operands()
        point = {n: jnp.asarray(x) for n, x in arrays.items()} | {"initial_state": jnp.asarray(state)}
        direction = jnp.asarray(RNG.standard_normal((2, 9, 5)))

        @jax.jit
        def objective(point):
            out, state = short_conv(**point, segments=jnp.asarray(SEGMENTS), return_state=True)
            return (jnp.sin(out) * direction).sum() + (state**2).sum()

        gradient = jax.grad(objective)(point)
        for name, value in point.items():
            shift = jnp.asarray(RNG.standard_normal(value.shape))
            ahead, behind = (objective(point | {name: value + sign * 1e-6 * shift}) for sign in (1, -1))
            np.testing.assert_allclose((gradient[name] * shift).sum(), (ahead - behind) / 2e-6, rtol=1e-7, err_msg=name)


def test_nothing_leaks_from_the_future():
    arrays, _ = operands()
    x, kernel = (jnp.asarray(arrays[n], jnp.float32) for n in ("x", "kernel"))
    changed = short_conv(x.at[:, 4:].set(jnp.nan), kernel)
    np.testing.assert_array_equal(changed[:, :4], short_conv(x, kernel)[:, :4])
    gradient = jax.grad(lambda x: short_conv(x, kernel)[:, :4].sum())(x)
    assert not gradient[:, 4:].any() and gradient[:, :4].any()


def test_bfloat16_is_summed_in_float32_and_kept_as_it_is():
    arrays, _ = operands(tokens=30)
    x, kernel, bias = (jnp.asarray(arrays[n], jnp.bfloat16) for n in ("x", "kernel", "bias"))
    out, state = short_conv(x, kernel, bias, return_state=True)
    assert out.dtype == state.dtype == jnp.bfloat16
    np.testing.assert_array_equal(state, x[:, -3:])
    exact = short_conv(*(y.astype(jnp.float32) for y in (x, kernel, bias)))
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))


def test_the_backward_pass_keeps_the_tokens_once():
    x, kernel, state = jnp.zeros((2, 64, 16)), jnp.zeros((4, 16)), jnp.zeros((2, 3, 16))
    kept = residual_bytes(lambda x, kernel, state: short_conv(x, kernel, initial_state=state), x, kernel, state)
    assert kept == 4 * (2 * 67 * 16 + 4 * 16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(kernel=(4, 6)), r"kernel must be \(W, C\) with W at least 1 and C = 5 of x; got \(4, 6\)"),
        (dict(kernel=(0, 5)), r"kernel must be \(W, C\) with W at least 1"),
        (dict(bias=(4,)), r"bias must be \(C,\), here \(5,\); got \(4,\)"),
        (dict(initial_state=(2, 4, 5)), r"initial_state must be \(B, W - 1, C\), here \(2, 3, 5\); got \(2, 4, 5\)"),
        (dict(segments=(2, 8)), r"segments must be \(B, N\), here \(2, 9\); got \(2, 8\)"),
    ],
)
def test_names_what_is_wrong(options, words):
    shapes = dict(x=(2, 9, 5), kernel=(4, 5)) | options
    with pytest.raises(ValueError, match=words):
        short_conv.__wrapped__(**{name: jnp.zeros(shape) for name, shape in shapes.items()})
