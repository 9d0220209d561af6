"""The forms of Miras agree: outputs, gradients, states, documents, the residuals kept; and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.dispatch import record_choices
from kernels.memory import initial_memory, memora, miras, moneta, yaad
from kernels.memory.bias import Huber, LpError, ShiftRobust
from kernels.memory.proximal import ElasticNet, ElasticNetFTRL, FDivergence
from kernels.memory.retention import Bregman, Entropy, LqStability
from kernels.memory.rule import MemoryRule
from kernels.residuals import residual_bytes
from tests import memory_reference as ref
from tests.memories import RULES, operands, ours, theirs

pytestmark = pytest.mark.usefixtures("float64")

MOMENTUM = MemoryRule(algorithm="momentum")
NAMES = ["moneta", "yaad", "memora", "memora-linear", "momentum"]


def near(actual, expected, tolerance=1e-11):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance), actual, expected)


def part(arrays, gates, start, stop):
    """Tokens `start` to `stop` of operands."""
    cut = {n: a if n == "weights" else a[:, start:stop] for n, a in arrays.items()}
    return cut, {n: g[:, start:stop] for n, g in gates.items()}


def slow_but(few, rules, names):
    """Cases of which only a few are run by the quick suite."""
    return [pytest.param(r, marks=() if n in few else pytest.mark.slow, id=n) for r, n in zip(rules, names)]


@pytest.mark.parametrize("rule", slow_but(("yaad", "memora"), [*RULES, MOMENTUM], NAMES))
def test_any_split_gives_the_same(rule):
    """Prefill by chunks, decode token by token, go on by chunks inside a chunk: as if in one piece."""
    arrays, gates = operands(rule, 11, channels=rule.bias.threshold is None)
    whole, last = ours(arrays, gates, rule, chunk_size=4, return_state=True)
    weights = jax.tree.map(jnp.asarray, arrays["weights"])
    state = initial_memory(weights, rule=rule, batch=2, dtype=jnp.float64)
    start, outs = 0, []
    pieces = (("chunk", 6), ("recurrent", 7), ("recurrent", 8), ("chunk", 9), ("materialized", 11))
    for form, stop in pieces:
        options = dict(chunk_size=4, form=form, initial_state=state, return_state=True)
        out, state = ours(*part(arrays, gates, start, stop), rule, **options)
        assert (state.position == stop % 4).all()
        outs.append(out)
        start = stop
    near(jnp.concatenate(outs, 1), whole)
    near(state._replace(anchor=None), last._replace(anchor=None))
    near(state.anchor, last.anchor)


def test_samples_may_stand_at_different_positions():
    rule = yaad()
    arrays, gates = operands(rule, 9)
    whole = ours(arrays, gates, rule, chunk_size=4)
    heads = [part(arrays, gates, 0, n) for n in (3, 5)]
    states = [ours(*h, rule, chunk_size=4, return_state=True)[1] for h in heads]
    state = jax.tree.map(lambda a, b: jnp.stack([a[0], b[1]]), *states)
    rests = [part(arrays, gates, n, n + 4) for n in (3, 5)]
    rest = jax.tree.map(lambda a, b: np.stack([a[0], b[1]]), *rests)
    rest[0]["weights"] = arrays["weights"]
    for form in ("chunk", "recurrent"):
        out = ours(*rest, rule, chunk_size=4, form=form, initial_state=state)
        near(out, jnp.stack([whole[0, 3:7], whole[1, 5:9]]))


@pytest.mark.parametrize("rule", slow_but((), [RULES[0], *RULES[2:], MOMENTUM], [NAMES[0], *NAMES[2:]]))
def test_gradients_of_all_forms_agree(rule):
    arrays, gates = operands(rule, 11, channels=rule.bias.threshold is None)
    direction = np.random.default_rng(2).standard_normal((2, 11, 2, 3))

    arrays, gates = jax.tree.map(jnp.asarray, (arrays, gates))

    def total(arrays, gates, form):
        out = miras(**arrays, **gates, rule=rule, chunk_size=4, form=form)
        return (out * direction).sum()

    with jax.disable_jit():
        expected = jax.grad(total, (0, 1))(arrays, gates, "recurrent")
        assert all(jnp.abs(g).max() > 1e-4 for g in jax.tree.leaves(expected))
        for form in ("chunk", "materialized") if rule in (RULES[0], MOMENTUM) else ("chunk",):
            actual = jax.grad(total, (0, 1))(arrays, gates, form)
            for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
                np.testing.assert_allclose(a, e, rtol=1e-10, atol=1e-10 * jnp.abs(e).max())


@pytest.mark.parametrize("rule", RULES[::2], ids=NAMES[:4:2])
def test_gradients_are_those_of_differences(rule):
    arrays, gates = operands(rule, 6)
    rng = np.random.default_rng(1)
    moves = jax.tree.map(lambda x: rng.standard_normal(x.shape) * (0.1 * np.abs(x)), (arrays, gates))
    direction = np.random.default_rng(2).standard_normal((2, 6, 2, 3))

    @jax.jit
    def along(x):
        moved = jax.tree.map(lambda a, m: a + x * m, (arrays, gates), moves)
        return (miras(**moved[0], **moved[1], rule=rule, chunk_size=3) * direction).sum()

    slope = jax.jit(jax.grad(along))(0.0)
    np.testing.assert_allclose((along(1e-5) - along(-1e-5)) / 2e-5, slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rule, read", [(RULES[0], "after"), (RULES[1], "before"), (RULES[2], "after")], ids=NAMES[:3])
def test_nothing_comes_from_the_future(rule, read):
    rule = MemoryRule(rule.memory, rule.bias, rule.retention, read=read)
    arrays, gates = operands(rule, 11)
    run = jax.jit(functools.partial(miras, rule=rule, chunk_size=4))
    out = run(**arrays, **gates)
    for at in (3, 4):
        for name in (*arrays, *gates):
            if name == "weights":
                continue
            moved = jax.tree.map(np.copy, arrays | gates)
            moved[name][:, at:] = moved[name][:, at:] * 0.7 - 0.01
            new = run(**moved)
            first = at if read == "after" or name == "query" else at + 1
            np.testing.assert_array_equal(new[:, :first], out[:, :first])
            assert (new[:, first:] != out[:, first:]).any(), name


def test_heads_and_samples_do_not_mix():
    arrays, gates = operands(moneta(), 6)
    out = ours(arrays, gates, moneta(), chunk_size=4)
    arrays["key"][1, 2, 0, 1] += 0.5
    other = (ours(arrays, gates, moneta(), chunk_size=4) != out).any(-1)
    assert other[1, 2:, 0].all() and other.sum() == 4


# Documents of which some start inside a chunk, one has a single token, and an id comes again.
SEGMENTS = np.asarray([[5, 5, 5, 5, 1, 1, 2, 5, 5, 5, 5], [0, 0, 0, 3, 3, 3, 3, 3, 3, 4, 0]])


@pytest.mark.parametrize(
    "rule, read", [(yaad(), "after"), (MOMENTUM, "before"), (memora(), "before")], ids=["yaad", "momentum", "memora"]
)
def test_documents_equal_the_reference(rule, read):
    rule = MemoryRule(rule.memory, rule.bias, rule.retention, rule.algorithm, read)
    arrays, gates = operands(rule, 11, channels=rule is MOMENTUM)
    starts = np.diff(SEGMENTS, axis=1, prepend=SEGMENTS[:, :1]) != 0
    gate = ref.Simplex({"w1": (-1,), "w2": (-1,)}) if rule.retention == Entropy() else ref.Gate()
    bias = "huber_norm" if rule.bias.threshold else "l2"
    expected = theirs(arrays, gates, "mlp", bias, gate, chunk_size=4, starts=starts, read=read)
    for form in ("chunk", "recurrent", "materialized"):
        out = ours(arrays, gates, rule, chunk_size=4, form=form, segments=jnp.asarray(SEGMENTS))
        near(out, expected)


@pytest.mark.parametrize("rule", [moneta(), memora(interior="linear")], ids=["moneta", "memora-linear"])
def test_aligned_documents_are_as_if_alone(rule):
    arrays, gates = operands(rule, 11, channels=True)
    segments = np.repeat([[7] * 4 + [8] * 7], 2, 0)
    out, state = ours(arrays, gates, rule, jit=True, chunk_size=4, return_state=True, segments=segments)
    first = ours(*part(arrays, gates, 0, 4), rule, chunk_size=4)
    second, alone = ours(*part(arrays, gates, 4, 11), rule, chunk_size=4, return_state=True)
    near(out, jnp.concatenate([first, second], 1))
    near(state, alone)


def test_nothing_crosses_documents():
    rule = yaad()
    arrays, gates = operands(rule, 11)
    arrays, gates = jax.tree.map(jnp.asarray, (arrays, gates))
    options = dict(rule=rule, chunk_size=4, segments=jnp.asarray(SEGMENTS))
    options["initial_state"] = ours(*part(arrays, gates, 0, 3), rule, chunk_size=4, return_state=True)[1]

    @jax.jit
    @jax.jacrev
    def jacobian(key):
        return (miras(**arrays | {"key": key}, **gates, **options) * arrays["value"]).sum((2, 3))

    seen = np.abs(jacobian(arrays["key"])).sum((4, 5))
    run = np.cumsum(np.diff(SEGMENTS, axis=1, prepend=SEGMENTS[:, :1]) != 0, 1)
    for b, c in np.ndindex(2, 2):
        allowed = (run[b][:, None] == run[c]) & (b == c) & np.tri(11, dtype=bool)
        np.testing.assert_array_equal(seen[b, :, c] != 0, allowed)


@pytest.mark.parametrize("rule", RULES, ids=NAMES[:4])
def test_the_backward_pass_keeps_the_states_of_chunks_starts(rule):
    heads, d, f, chunk_size = 2, 8, 32, 16
    state = 4 * heads * 2 * d * f

    def kept(tokens):
        arrays, gates = operands(rule, tokens, heads=heads, d=d, f=f, batch=1)
        single = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), (arrays, gates))

        def run(arrays, gates):
            return miras(**arrays, **gates, rule=rule, chunk_size=chunk_size)

        own = sum(x.size * 4 for n, x in single[0].items() if n != "weights") + sum(
            x.size * 4 for x in single[1].values()
        )
        return residual_bytes(run, *single), own

    (short, _), (long, own) = kept(16 * 8), kept(16 * 32)
    assert long / short == pytest.approx(4, rel=0.1)
    # One state for each chunk, its operands, and little else.
    assert long <= 32 * state * 1.1 + 2.5 * own


def test_implementations():
    arrays, gates = operands(moneta(), 2)
    arrays, gates = jax.tree.map(jnp.asarray, (arrays, gates))
    with record_choices() as choices:
        miras(**arrays, **gates, rule=moneta())
    assert {choice.implementation for choice in choices} == {"xla"}
    with pytest.raises(NotImplementedError, match="pallas_triton: not written for this op"):
        miras(**arrays, **gates, rule=moneta(), implementation="pallas_triton")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(form="chunks"), "unknown form 'chunks'; did you mean 'chunk'"),
        (dict(chunk_size=0), "chunk_size must be at least 1, got 0"),
        (dict(key=(2, 5, 2, 4)), r"key must have the shape of query, which is \(2, 5, 2, 3\)"),
        (dict(value=(2, 4, 2, 3)), r"value must be \(B, N, H, E\)"),
        (dict(value=(2, 5, 2, 4)), "memory MLP maps D channels to D: value must have 3 channels"),
        (dict(weights={"w": (2, 3, 3)}), "weights of memory MLP are 'w1', 'w2'; got 'w'"),
        (dict(weights={"w1": (2, 3, 5), "w2": (2, 6, 3)}), r"weights\['w2'\] must be \(2, 5, 3\).*got \(2, 6, 3\)"),
        (dict(weights={"w1": (3, 3, 5), "w2": (2, 5, 3)}), r"weights\['w1'\] must be \(2, 3, F\).*got \(3, 3, 5\)"),
        (dict(step=(2, 5, 2, 5)), r"step must be \(B, N, H\) = \(2, 5, 2\) or with 3 channels; got \(2, 5, 2, 5\)"),
        (dict(threshold=None), "bias Huber.* needs threshold, got None"),
        (dict(threshold=(2, 5, 2, 3)), r"threshold must be \(B, N, H\) = \(2, 5, 2\); got"),
        (dict(log_retention=None), "retention Decay.* needs log_retention"),
        (dict(log_momentum=(2, 5, 2)), "algorithm 'gradient' takes no log_momentum"),
        (dict(rule=MemoryRule(bias="huber_norm", retention="none")), "retention NoRetention.* takes no log_retention"),
        (dict(rule=MemoryRule()), "bias SquaredError.* takes no threshold"),
        (dict(segments=(2, 4)), r"segments must be \(B, N\), here \(2, 5\); got \(2, 4\)"),
        (dict(initial_state=3), r"initial_state.anchor must have the shapes .*\(2, 2, 3, 5\).*got .*\(3, 2, 3, 5\)"),
    ],
)
def test_names_what_is_wrong(change, words):
    arrays, gates = operands(yaad(), 5)
    given = arrays | gates | dict(rule=yaad())
    for name, value in change.items():
        if name == "initial_state":
            weights = jax.tree.map(jnp.asarray, arrays["weights"])
            value = initial_memory(weights, rule=yaad(), batch=value)
        elif isinstance(value, dict):
            value = {n: np.zeros(s) for n, s in value.items()}
        elif isinstance(value, tuple):
            value = np.zeros(value, np.int32 if name == "segments" else np.float64)
        given[name] = value
    operand = [given.pop(n) for n in ("query", "key", "value", "weights")]
    with pytest.raises(ValueError, match=words):
        miras.__wrapped__(*operand, **given)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MemoryRule("mpl"), "unknown memory 'mpl'; did you mean 'mlp'"),
        (lambda: MemoryRule(bias="huber"), "unknown bias 'huber'; did you mean 'huber_"),
        (lambda: MemoryRule(retention="lp"), "unknown retention 'lp'"),
        (lambda: MemoryRule(algorithm="adam"), "unknown algorithm 'adam'; known: 'gradient', 'momentum'"),
        (lambda: MemoryRule(read="now"), "unknown read 'now'"),
        (lambda: MemoryRule(retention="elastic_net", algorithm="momentum"), "'momentum' needs a retention whose"),
        (lambda: MemoryRule(retention=Entropy(interior="linear"), read="before"), "read='after' only"),
        (lambda: MemoryRule("vector", retention=Entropy("matrix")), "slices must be 'fan_in', got 'matrix'"),
        (lambda: LpError(0.5), "p must be at least 1, got 0.5"),
        (lambda: LpError(max_norm=0.0), "max_norm must be positive, got 0.0"),
        (lambda: LpError(smooth="sqrt"), "unknown smooth 'sqrt'"),
        (lambda: Huber("norms"), "unknown form 'norms'; did you mean 'norm'"),
        (lambda: ShiftRobust(0.0), "epsilon must be positive, got 0.0"),
        (lambda: LqStability(1.0), "q must be above 1"),
        (lambda: LqStability(link_name="papers"), "did you mean 'paper'"),
        (lambda: Entropy(total=-1.0), "total must be positive"),
        (lambda: FDivergence("chi"), "did you mean 'chi2'"),
        (lambda: ElasticNet(l1=-1.0), "l1 must be at least 0"),
        (lambda: ElasticNetFTRL(0.0), "gamma must be positive"),
        (lambda: Bregman("logit"), "unknown inverse 'logit'"),
    ],
)
def test_rules_name_what_is_wrong(make, words):
    with pytest.raises(ValueError, match=words):
        make()
