"""The kernels of window attention, interpreted, against the XLA form in float64."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import zoo
from kernels import compat, window_attention
from kernels.cost import cost
from kernels.dispatch import record_choices
from kernels.pallas_tpu import window_tiles
from tests.triton_kernels import hopper
from tests.variables import filled

KERNELS = ("pallas_tpu", "pallas_triton")


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of `window_attention`; `pad` is None, "mask" or "array"."""

    size: tuple[int, int]
    window: tuple[int, int]
    heads: int = 2
    dim: int = 16
    batch: int = 2
    partition: str = "block"
    pad: str | None = None
    bias: bool = False
    scale: float | None = None

    def __str__(self):
        values = dataclasses.asdict(self).items()
        return "-".join(f"{name}={value}" for name, value in values if value != getattr(Case, name, None))

    def draw(self, dtype, seed=0):
        """qkv, bias, the value of filled tokens and the direction of the gradient."""
        rng = np.random.default_rng(seed)
        c, n = self.heads * self.dim, self.window[0] * self.window[1]

        def normal(*shape, dtype):
            return jnp.asarray(rng.standard_normal(shape), dtype)

        return (
            normal(self.batch, *self.size, 3 * c, dtype=dtype),
            normal(self.heads, n, n, dtype=jnp.float32) if self.bias else None,
            normal(3 * c, dtype=dtype) if self.pad == "array" else None,
            normal(self.batch, *self.size, c, dtype=dtype),
        )

    def run(self, implementation, qkv, bias, pad):
        return window_attention(
            qkv,
            num_heads=self.heads,
            window=self.window,
            partition=self.partition,
            bias=bias,
            pad="mask" if self.pad == "mask" else pad,
            scale=self.scale,
            implementation=implementation,
        )

    def results(self, implementation, qkv, bias, pad, direction):
        """The output and the gradients of what is there."""
        out, pull = jax.vjp(functools.partial(self.run, implementation), qkv, bias, pad)
        return out, *(x for x in pull(direction) if x is not None)


def kernel_results(case, implementation, *arrays):
    with compat.interpret():
        return jax.jit(functools.partial(case.results, implementation))(*arrays)


@functools.cache
def expected(case, dtype):
    arrays = case.draw(dtype)
    with jax.enable_x64(True):
        wide = [None if x is None else jnp.asarray(x, jnp.float64) for x in arrays]
        return jax.device_get(jax.jit(functools.partial(case.results, "xla"))(*wide))


# Roundings: of float32 sums; of weights, their gradients and results to bfloat16, and of the bias's gradient.
TOLERANCES = {jnp.float32: 2e-6, jnp.bfloat16: 8e-3}


def check(case, implementation, dtype):
    found = kernel_results(case, implementation, *case.draw(dtype))
    for i, (a, b) in enumerate(zip(found, expected(case, dtype), strict=True)):
        scale = np.abs(b).max()
        np.testing.assert_allclose(
            np.asarray(a, np.float64) / scale, b / scale, rtol=0, atol=TOLERANCES[dtype], err_msg=f"result {i}"
        )


RAGGED = dict(size=(6, 9), window=(4, 4))
QUICK = [
    Case((14, 14), (7, 7), bias=True),
    Case((8, 12), (4, 3), partition="grid", bias=True, batch=3),
    Case(**RAGGED, pad="mask", bias=True),
    Case(**RAGGED, pad="mask", partition="grid"),
    Case(**RAGGED, pad="array", partition="grid", bias=True),
    Case(**RAGGED, pad="array", heads=1, dim=24, batch=1),
    Case((3, 2), (5, 4), pad="array", bias=True, batch=5),
    Case((4, 4), (2, 2), heads=3, scale=-0.5),
]
SLOW = [
    Case((7, 7), (7, 7), heads=3, dim=32, batch=3),
    Case((14, 14), (7, 7), dim=32, partition="grid", bias=True),
    Case((3, 2), (5, 4), pad="mask", partition="grid"),
    Case((7, 7), (7, 7), dim=64),
    Case((7, 7), (7, 7), dim=128, bias=True),
    Case((4, 4), (4, 4), heads=12, dim=32, bias=True),
    Case((4, 4), (4, 4), heads=3, dim=80),
    Case((16, 16), (16, 16), heads=1, bias=True),
    Case((12, 20), (12, 12), heads=1, pad="array", bias=True, partition="grid"),
    Case((32, 34), (32, 32), heads=1, batch=1, pad="mask"),
    Case((18, 18), (18, 1), heads=1, batch=1),
    Case((5, 5), (1, 1)),
]


@pytest.fixture
def rows_in_loops(monkeypatch):
    """Rows of windows are copied by loops, never by straight code, which takes twice as long to interpret."""
    monkeypatch.setattr(window_tiles, "UNROLLED_ROWS", 0)
    compat.forget_traced()
    yield
    compat.forget_traced()


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_output_and_gradients_in_float32(case, implementation, rows_in_loops):
    check(case, implementation, jnp.float32)


@pytest.mark.parametrize("implementation", KERNELS)
def test_output_and_gradients_in_bfloat16(implementation, rows_in_loops):
    check(QUICK[0], implementation, jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_output_and_gradients_of_other_shapes(case, implementation):
    check(case, implementation, jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("case", QUICK[1:], ids=str)
def test_bfloat16_of_other_shapes(case, implementation):
    check(case, implementation, jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("case", SLOW[3:], ids=str)
def test_bfloat16_of_larger_shapes(case, implementation, rows_in_loops):
    """What straight code does with them is shown in float32."""
    check(case, implementation, jnp.bfloat16)


@pytest.mark.parametrize(
    "case",
    [Case((8, 6), (4, 4), pad="mask", partition="grid", bias=True), Case((10, 6), (4, 4), pad="array")],
    ids=str,
)
def test_maps_that_are_too_large_for_vmem_are_read_by_rows_of_windows(case, monkeypatch, rows_in_loops):
    monkeypatch.setattr(window_tiles, "VMEM", 0)
    monkeypatch.setattr(window_tiles, "refusal", lambda *arguments: None)
    check(case, "pallas_tpu", jnp.float32)


@pytest.mark.parametrize("implementation", KERNELS)
def test_a_second_run_gives_the_same_bits(implementation, rows_in_loops):
    case = Case((9, 8), (4, 4), pad="array", bias=True, batch=9)
    arrays = case.draw(jnp.bfloat16)
    with compat.interpret():
        run = jax.jit(functools.partial(case.results, implementation))
        chex.assert_trees_all_equal(run(*arrays), run(*arrays))


@pytest.mark.parametrize("implementation", KERNELS)
def test_nan_stays_in_its_window_and_head(implementation, rows_in_loops):
    case = Case((6, 7), (3, 3), pad="mask")
    qkv, _, _, direction = case.draw(jnp.float32)
    # Of a key of the second head, in the window of rows 3 to 5 and columns 0 to 2.
    found = kernel_results(case, implementation, qkv.at[1, 4, 2, 32 + 16].set(jnp.nan), None, None, direction)
    for bad in map(np.isnan, found):
        heads = bad.reshape(2, 6, 7, -1, 2, 16)
        assert heads[1, 3:, :3, :, 1].any(-1).all()
        heads[1, 3:, :3, :, 1] = False
        assert not heads.any()


REFUSED = {
    "2 heads of 129": (Case((2, 2), (2, 2), dim=129), {}, "heads are 129 wide; up to 128"),
    "33 x 32 tokens": (Case((33, 32), (33, 32), heads=1), {}, "1056 tokens; up to 1024"),
    "no maps": (Case((2, 2), (2, 2), batch=0), {}, "no elements"),
    "float16": (Case((2, 2), (2, 2)), dict(dtype=jnp.float16), "qkv is float16; bfloat16 and float32"),
    "weights": (Case((2, 2), (2, 2)), dict(return_weights=True), "return_weights=True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_kernel_serves_is_left_to_xla(name):
    case, options, words = REFUSED[name]
    options = dict(options)
    qkv = case.draw(options.pop("dtype", jnp.float32))[0]
    call = functools.partial(window_attention, num_heads=case.heads, window=case.window, **options)
    with record_choices() as choices:
        jax.eval_shape(call, qkv)
    assert {choice.implementation for choice in choices} == {"xla"}
    for kernel in KERNELS:
        with pytest.raises(NotImplementedError, match=re.escape(words)):
            call(qkv, implementation=kernel)


def test_what_does_not_fit_into_vmem_is_refused():
    qkv = jax.ShapeDtypeStruct((1, 300, 301, 3 * 768), jnp.float32)
    for window, bias, words in ((7, False, "a row of windows takes"), (32, True, "bias for 24 heads")):
        bias = jax.ShapeDtypeStruct((24, window**2, window**2), jnp.float32) if bias else None
        call = functools.partial(window_attention, num_heads=24, window=(window,) * 2, pad="mask")
        with pytest.raises(NotImplementedError, match=words):
            jax.eval_shape(lambda x, b, call=call: call(x, bias=b, implementation="pallas_tpu"), qkv, bias)


@pytest.mark.parametrize("ways", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("implementation", KERNELS)
def test_each_device_takes_its_part_of_the_batch(implementation, ways, rows_in_loops):
    case = Case((4, 6), (4, 4), batch=4, pad="array", bias=True, heads=1)
    arrays = case.draw(jnp.float32)
    mesh = jax.make_mesh((ways,), ("data",), (AxisType.Auto,), devices=jax.devices()[:ways])
    with jax.set_mesh(mesh):
        found = kernel_results(case, implementation, *arrays)
    for a, b in zip(jax.device_get(found), expected(case, jnp.float32), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backward", [False, True])
def test_cost_is_that_of_full_windows(backward):
    case = Case((8, 12), (4, 3), bias=True)
    qkv, bias, _, direction = case.draw(jnp.bfloat16)

    def run(qkv, bias, direction):
        out, pull = jax.vjp(lambda *x: case.run("pallas_tpu", *x, None), qkv, bias)
        return pull(direction) if backward else out

    weights, pixels, n = 2 * 8 * 2 * 12**2, 2 * 8 * 12 * 32 * 2, 2 * 12**2 * 4
    counts = cost(run, qkv, bias, direction, platform="tpu").by_primitive["pallas_call"]
    assert counts.flops == weights * 2 * 16 * (5 if backward else 2)
    assert counts.transcendentals == weights
    assert counts.bytes == (7 * pixels + 2 * n if backward else 4 * pixels + n)


# Shapes and partitions of the windows of a model.
MODELS = {"davit_nano": 2, "maxvit_nano": 4}


@pytest.mark.parametrize("name", ["davit_nano", pytest.param("maxvit_nano", marks=pytest.mark.slow)])
def test_models_lowered_for_a_platform_contain_its_kernels(name, rows_in_loops):
    model = zoo.create_model(name)
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def loss(variables, images):
        return model.apply(variables, images).sum()

    with compat.lowering_triton(), hopper():
        traced = jax.jit(jax.value_and_grad(loss)).trace(variables, images)
        texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("tpu", "cuda")}
    for platform, word in (("tpu", "kernel_name"), ("cuda", r"\bname")):
        names = re.findall(rf'{word} = "(window\w+)"', texts[platform])
        # Of the forward pass and of the gradient: one for every shape and partition, called by all layers that have it.
        assert names.count("window_attention") == names.count("window_attention_gradient") == MODELS[name]


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("name", ["davit_nano", pytest.param("maxvit_nano", marks=pytest.mark.slow)])
def test_logits_of_models_do_not_change(name, implementation, rows_in_loops):
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 3)), jnp.float32)
    plain = zoo.create_model(name, implementation="xla")
    variables = filled(jax.eval_shape(plain.init, jax.random.key(0), images), {"scale": (1, 0.2), "var": (1, 0.1)})
    expected = jax.jit(plain.apply)(variables, images)
    with compat.interpret():
        found = jax.jit(zoo.create_model(name, implementation=(implementation, "xla")).apply)(variables, images)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
