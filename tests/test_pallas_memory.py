"""The kernel of memories, interpreted: against XLA's form in float64, and at its limits."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import zoo
from kernels import compat, memory_plan
from kernels.cost import cost
from kernels.dispatch import record_choices
from kernels.memory import MLP, Decay, Entropy, MemoryRule, SquaredError, initial_memory, memora, miras, moneta, yaad
from kernels.pallas_tpu import memory_chunk
from kernels.pallas_tpu.memory import BACKEND
from tests import memories
from tests.test_linear_recurrences import assert_close
from tests.test_pallas_scan import float64

RULES = {
    "yaad": yaad(),
    "thresholds of channels, read before": yaad(huber="coord", read="before"),
    "moneta": moneta(),
    "memora": memora(interior="linear"),
    "matrix": yaad(memory="matrix"),
    "no retention": MemoryRule("mlp", "l2", "none"),
}
# Two blocks of a kernel, the second not full. Documents start with chunks, one in the middle of a block.
TOKENS = 150
SEGMENTS = np.repeat([[3, 0, 3, 1], [0, 1, 2, 2]], [48, 16, 80, 6], axis=1)
CHUNK = 16

slow = pytest.mark.slow
every_rule = pytest.mark.parametrize("name", ["yaad", *(pytest.param(n, marks=slow) for n in RULES if n != "yaad")])


def operands(rule, tokens=TOKENS, batch=2, heads=1, seed=0, channels=True, dtype=jnp.float32):
    """Operands as trained models have them: keys of norm 1, a chunk's steps small in sum, its retention near 1."""
    rng = np.random.default_rng(seed)
    e = 32 if type(rule.memory).__name__ == "Matrix" else None
    arrays, gates = memories.operands(rule, tokens, channels, heads, 16, e, 32, batch, rng)
    for name in ("query", "key"):
        arrays[name] /= np.linalg.norm(arrays[name], axis=-1, keepdims=True)
    gates = {n: x / CHUNK if n in ("step", "log_retention") else x for n, x in gates.items()}
    arrays, gates = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (arrays, gates))
    return arrays | {name: arrays[name].astype(dtype) for name in memory_plan.WIDE}, gates


def run(arrays, gates, segments, state, *, rule, implementation):
    options = dict(rule=rule, chunk_size=CHUNK, return_state=True, implementation=implementation)
    aligned = segments is not None
    out, after = miras(**arrays, **gates, **options, segments=segments, aligned=aligned, initial_state=state)
    return out, after.anchor, after.running


@functools.cache
def jitted(rule, implementation):
    """Operands, documents, initial state and cotangents to results, and to the gradients of all that has one."""

    def both(arrays, gates, segments, state, directions):
        split = (None, None) if state is None else (state[:3], state.position)

        def differentiable(arrays, gates, first):
            whole = None if first is None else type(state)(*first, split[1])
            return run(arrays, gates, segments, whole, rule=rule, implementation=implementation)

        results, pull = jax.vjp(differentiable, arrays, gates, split[0])
        return results, pull(directions)

    function = jax.jit(both)

    def interpreted(*operands):
        with compat.interpret():
            return function(*operands)

    return interpreted


def directions(rule, arrays, gates, segments=None, state=None):
    of = functools.partial(run, rule=rule, implementation="xla")
    shapes = jax.eval_shape(of, arrays, gates, segments, state)
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), shapes)


def in_float64(rule, *operands):
    with jax.enable_x64(True):
        return jax.device_get(jitted(rule, "xla")(*jax.tree.map(wide, operands)))


def wide(x):
    return float64(x) if jnp.issubdtype(x.dtype, jnp.floating) else x


@every_rule
def test_equals_the_xla_form(name):
    """With documents; gradients of everything, also through the last state and its anchor."""
    rule = RULES[name]
    given = (*operands(rule), SEGMENTS, None)
    given += (directions(rule, *given),)
    assert_close(jitted(rule, "pallas_tpu")(*given), in_float64(rule, *given), 2e-5)


@slow
@pytest.mark.parametrize("name", ["yaad", "moneta", "memora"])
def test_gates_of_a_head_and_no_documents(name):
    rule = RULES[name]
    given = (*operands(rule, 40, heads=3, channels=False), None, None)
    given += (directions(rule, *given),)
    assert_close(jitted(rule, "pallas_tpu")(*given), in_float64(rule, *given), 2e-5)


@slow
def test_gates_of_heads_beside_gates_of_channels():
    """Also simplexes along a matrix's outputs, of another sum, and keys and values of different widths."""
    rule = MemoryRule("matrix", "huber_coord", Entropy("channel", total=2.5, interior="linear"))
    arrays, gates = operands(rule, 40)
    gates |= {name: gates[name][..., 0] for name in ("step", "threshold")}
    given = (arrays, gates, None, None)
    given += (directions(rule, *given),)
    assert_close(jitted(rule, "pallas_tpu")(*given), in_float64(rule, *given), 2e-5)


@slow
@pytest.mark.parametrize("name", ["yaad", "memora"])
def test_goes_on_from_any_place_of_a_chunk(name):
    """Rows stand at different places; what follows is longer than a block, or ends in the chunk that had begun."""
    rule = RULES[name]
    arrays, gates = operands(rule, 20)
    for tokens in (150, 3):
        start = initial_memory(arrays["weights"], rule=rule, batch=2)
        _, state = miras(**arrays, **gates, rule=rule, chunk_size=CHUNK, initial_state=start, return_state=True)
        state = state._replace(position=jnp.array([4, 0], jnp.int32))
        given = (*operands(rule, tokens, seed=1), None, state)
        given += (directions(rule, *given),)
        assert_close(jitted(rule, "pallas_tpu")(*given), in_float64(rule, *given), 2e-5)


@slow
@pytest.mark.parametrize("name", ["yaad", "moneta", "memora", "matrix"])
def test_bfloat16_loses_about_what_rounding_loses(name):
    """Products round what they multiply: up to eight times what comes of rounding the operands once more."""
    rule = RULES[name]
    given = (*operands(rule, 64, dtype=jnp.bfloat16), None, None)
    given += (directions(rule, *given),)
    found, expected = jitted(rule, "pallas_tpu")(*given), in_float64(rule, *given)
    rng = np.random.default_rng(5)
    moved = in_float64(rule, *jax.tree.map(lambda x: wide(x) * (1 + rng.uniform(-(2.0**-9), 2.0**-9, x.shape)), given))
    assert found[0][0].dtype == jnp.bfloat16
    for f, m, e in zip(*map(jax.tree.leaves, (found, moved, expected)), strict=True):
        f, size = np.asarray(f, np.float64), np.linalg.norm(e)
        assert np.linalg.norm(f - e) <= 8 * max(np.linalg.norm(m - e), 2**-9 * size)


def test_a_nan_stays_in_its_row_and_document():
    rule = RULES["yaad"]
    arrays, gates = operands(rule)
    given = (arrays, gates, SEGMENTS, None, directions(rule, arrays, gates, SEGMENTS))
    clean = jitted(rule, "pallas_tpu")(*given)
    arrays["value"] = arrays["value"].at[1, 50, 0, 3].set(jnp.nan)
    found = jitted(rule, "pallas_tpu")(*given)
    assert np.isnan(found[0][0][1, 50:64]).all()
    for tree in (found, clean):
        tree[1][0].pop("weights")
    kept = jax.tree.map(lambda x: np.asarray(x)[0], found), found[0][0][1, :48], found[0][0][1, 64:]
    chex.assert_trees_all_equal(kept, (jax.tree.map(lambda x: x[0], clean), clean[0][0][1, :48], clean[0][0][1, 64:]))


def test_the_same_twice():
    rule = RULES["yaad"]
    given = (*operands(rule), SEGMENTS, None)
    given += (directions(rule, *given),)
    chex.assert_trees_all_equal(*(jitted(rule, "pallas_tpu")(*given) for _ in range(2)))


def test_what_the_kernel_does_not_serve_is_left_to_xla():
    rule = RULES["yaad"]
    arrays, gates = operands(rule, 20)

    def refusal(arrays, gates, rule, **options):
        options = dict(rule=rule, chunk_size=CHUNK) | options

        def shapes(implementation):
            of = functools.partial(miras, **options, implementation=implementation)
            return jax.eval_shape(of, **arrays, **gates)

        with record_choices() as choices:
            shapes(None)
        assert {choice.implementation for choice in choices} == {"xla"}
        with pytest.raises(NotImplementedError) as error:
            shapes("pallas_tpu")
        return str(error.value)

    assert "form='recurrent'" in refusal(arrays, gates, rule, form="recurrent")
    assert "aligned=True" in refusal(arrays, gates, rule, segments=jnp.asarray(SEGMENTS[:, :20]))
    assert "chunk_size=12" in refusal(arrays, gates, rule, chunk_size=12)
    momentum = MemoryRule("mlp", "huber_norm", "decay", "momentum")
    assert "algorithm='momentum'" in refusal(arrays, gates | {"log_momentum": gates["step"]}, momentum)
    no_threshold = {n: gates[n] for n in ("step", "log_retention")}
    assert "Decay(first=True)" in refusal(arrays, no_threshold, MemoryRule("mlp", SquaredError(), Decay(first=True)))
    for other in (memora(), moneta(normalizer="token")):
        assert "not the state times a factor" in refusal(arrays, no_threshold, other)
    vector = arrays | {"weights": {"w": jnp.zeros((1, 16))}}
    assert "not for 'vector'" in refusal(vector, no_threshold, MemoryRule("vector", "l2", "decay"))
    half = arrays | {"value": arrays["value"].astype(jnp.float16)}
    assert "value is float16" in refusal(half, gates, rule)
    none = jax.tree.map(lambda x: x[:0], (arrays | {"weights": None}, gates))
    assert "nothing to compute" in refusal(none[0] | {"weights": arrays["weights"]}, none[1], rule)
    narrow = jax.tree.map(lambda x: x[..., :9], (arrays | {"weights": None}, no_threshold))
    erf = MemoryRule(MLP(gelu="erf"), "l2", "decay")
    assert "gelu='erf'" in refusal(arrays, no_threshold, erf)
    weights = {"w1": jnp.zeros((1, 9, 32)), "w2": jnp.zeros((1, 32, 9))}
    assert "multiples of 16" in refusal(narrow[0] | {"weights": weights}, narrow[1], MemoryRule("mlp", "l2", "decay"))
    huge = jax.ShapeDtypeStruct
    weights = {"w1": huge((1, 16, 65536), jnp.float32), "w2": huge((1, 65536, 16), jnp.float32)}
    assert "MiB of fast memory" in refusal(arrays | {"weights": weights}, gates, rule)
    # By libtpu 62 MiB with Entropy("matrix", interior="linear"), and 64 with Moneta's gate, of 60.
    assert "MiB of fast memory" in BACKEND.unsupported(8, {"w": (800, 512)})
    assert "MiB of fast memory" in BACKEND.unsupported(128, {"w1": (256, 1280), "w2": (1280, 256)})
    assert BACKEND.unsupported(64, {"w1": (256, 1024), "w2": (1024, 256)}) is None


@slow
@pytest.mark.parametrize("ways", [2, 4])
def test_over_a_mesh(ways):
    """Each device has its part of the batch; the learned memory gets the gradients of all."""
    rule = RULES["yaad"]
    arrays, gates = operands(rule, 20, batch=4)
    given = (arrays, gates, np.zeros((4, 20), np.int32), None)
    given += (directions(rule, *given),)
    expected = in_float64(rule, *given)
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, ways // 2), ("data", "fsdp"), axes, devices=jax.devices()[:ways])
    with jax.set_mesh(mesh):
        assert_close(jax.device_get(jitted.__wrapped__(rule, "pallas_tpu")(*given)), expected, 2e-5)


@pytest.mark.parametrize("lags", [False, True])
def test_products_are_those_of_the_equations(lags):
    """Counted where the chunk is traced, in bfloat16; tokens by tokens at one level instead of four."""
    rule, shapes = RULES["memora" if lags else "yaad"], {"w1": (16, 32), "w2": (32, 16)}
    state = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    rows = jax.ShapeDtypeStruct((CHUNK, 16), jnp.float32)
    threshold = None if lags else jax.ShapeDtypeStruct((CHUNK, 1), jnp.float32)
    chunk = memory_chunk.Chunk(*(rows,) * 5, threshold, None)

    def counted(read):
        traced = jax.make_jaxpr(lambda s, c: memory_chunk.forward(rule, True, s, None, c, read))(state, chunk)
        return sum(products(traced.jaxpr))

    levels = 2 * 2 * CHUNK * CHUNK * 16 * 3
    writing, reading = memory_plan.products(rule, CHUNK, shapes)
    assert counted(False) == writing
    assert counted(True) == writing + reading + levels


def products(jaxpr):
    """Operations of each product of bfloat16."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and equation.invars[0].aval.dtype == jnp.bfloat16:
            ((contracted, _), _) = equation.params["dimension_numbers"]
            yield 2 * equation.outvars[0].aval.size * equation.invars[0].aval.shape[contracted[0]]
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


def test_costs_are_the_closed_form():
    rule, (b, n, h, d, f) = RULES["yaad"], (2, 256, 4, 16, 32)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    arrays = {name: jax.ShapeDtypeStruct((b, n, h, d), jnp.bfloat16) for name in memory_plan.WIDE}
    gates = {"step": shape((b, n, h, d)), "log_retention": shape((b, n, h, d)), "threshold": shape((b, n, h))}
    weights = {"w1": shape((h, d, f)), "w2": shape((h, f, d))}

    def both(arrays, gates, weights):
        options = dict(rule=rule, chunk_size=CHUNK, implementation="pallas_tpu")
        out, pull = jax.vjp(lambda a, g, w: miras(**a, **g, weights=w, **options), arrays, gates, weights)
        return pull(out)

    found = cost(both, arrays, gates, weights, platform="tpu").by_primitive["pallas_call"]
    chunks = b * h * n // CHUNK
    # Recall, its error and two writes; then reading, and what tokens of a chunk have of each other.
    writing, reading = 5 * 2 * CHUNK * d * f, 2 * 2 * CHUNK * d * f + 2 * 2 * CHUNK * CHUNK * (d + f)
    assert found.flops == chunks * (writing + reading + writing + 3 * (writing + reading))
    assert found.transcendentals == 3 * chunks * (4 * CHUNK * d + 2 * CHUNK * f)
    wide, state = b * n * h * d, 4 * b * h * 2 * d * f
    # Three operands and two gates; heads in pairs have eight rows for their thresholds.
    operands = 3 * 2 * wide + 2 * 4 * wide + 4 * b * n * (h // 2) * 8
    kept = state * n // BACKEND.block(CHUNK)
    forward = operands + 2 * wide + 2 * state + kept
    assert found.bytes == forward + 2 * operands + 2 * wide + kept + 2 * state


@pytest.mark.parametrize("name", ["yaad_nano", pytest.param("moneta_nano", marks=slow)])
def test_a_model_lowered_for_a_tpu_holds_the_kernel(name):
    model = zoo.create_model(name, depth=1, vocab_size=64)
    tokens = jax.ShapeDtypeStruct((2, 40), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)

    def loss(variables, tokens):
        return jnp.square(model.apply(variables, tokens)).mean()

    text = jax.jit(jax.grad(loss)).trace(variables, tokens).lower(lowering_platforms=("tpu",)).as_text()
    for direction in ("forward", "backward"):
        assert f'kernel_name = "memory_{direction}"' in text
