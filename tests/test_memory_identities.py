"""What the memories are known to be equal to: delta rules, each other, titans-pytorch, the optima of their steps."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.memory import memora, moneta, yaad
from kernels.memory.bias import Huber, LpError
from kernels.memory.proximal import DIVERGENCES, ElasticNet, FDivergence
from kernels.memory.retention import Bregman, Decay, Entropy, LqStability
from kernels.memory.rule import MemoryRule
from tests.memories import compiled, operands
from tests.reference.weights import pseudo_normal

pytestmark = pytest.mark.usefixtures("float64")


def normal(size):
    return np.random.default_rng(1).standard_normal(size)


def ours(arrays, gates, rule, **options):
    return compiled(**arrays, **gates, rule=rule, **options)


def near(actual, expected, tolerance=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gated", [False, True])
def test_linear_memory_with_l2_is_the_gated_delta_rule(gated):
    rule = MemoryRule("matrix", "l2", Decay(first=True) if gated else "none")
    arrays, gates = operands(rule, 7, e=4)
    out, state = ours(arrays, gates, rule, chunk_size=1, return_state=True)
    for b, h in np.ndindex(2, 2):
        w = arrays["weights"]["w"][h]
        for t in range(7):
            q, k, v = (arrays[name][b, t, h] for name in ("query", "key", "value"))
            beta = gates["step"][b, t, h]
            alpha = np.exp(gates["log_retention"][b, t, h]) if gated else 1.0
            w = alpha * w @ (np.eye(3) - beta * np.outer(k, k)) + beta * np.outer(v, k)
            near(out[b, t, h], w @ q)
        near(state.running["w"][b, h], w)


def test_the_dot_product_with_decay_is_gated_linear_attention():
    rule = MemoryRule("matrix", "dot", "decay")
    arrays, gates = operands(rule, 8, channels=True)
    arrays["weights"] = {"w": np.zeros((2, 3, 3))}
    out = ours(arrays, gates, rule, chunk_size=8)
    since = np.cumsum(gates["log_retention"], 1)
    for t in range(8):
        weights = np.exp(since[:, t, None] - since[:, : t + 1]) * gates["step"][:, : t + 1]
        scores = np.einsum("bhd,bihd,bihd->bih", arrays["query"][:, t], arrays["key"][:, : t + 1], weights)
        near(out[:, t], np.einsum("bih,bihe->bhe", scores, arrays["value"][:, : t + 1]))


@pytest.mark.slow
def test_biases_and_links_that_fall_together():
    """p = 2 is l2 with the step halved, no threshold reached is l2, and q = 2 divides by nothing."""
    arrays, gates = operands(MemoryRule(), 6)
    expected = ours(arrays, gates, MemoryRule(), chunk_size=3)
    far = gates | {"threshold": np.full((2, 6, 2), 1e6)}
    for huber in ("norm", "coord", "switch"):
        near(ours(arrays, far, yaad(huber=huber), chunk_size=3), expected)
    halved = gates | {"step": gates["step"] / 2}
    near(ours(arrays, halved, moneta(p=2.0, q=2.0), chunk_size=3), expected)
    identity = MemoryRule("mlp", "l2", Bregman("identity"))
    near(ours(arrays, gates, identity, chunk_size=3), expected)
    near(
        ours(arrays, gates | {"threshold": np.zeros((2, 6, 2))}, MemoryRule("mlp", "shift_robust")),
        ours(arrays, gates, MemoryRule()),
    )


def test_momentum_of_zero_is_none():
    rule = MemoryRule(algorithm="momentum")
    arrays, gates = operands(rule, 6)
    gates["log_momentum"] = np.full((2, 6, 2), np.log(1e-30))
    out = ours(arrays, gates, rule, chunk_size=1)
    gates.pop("log_momentum")
    near(out, ours(arrays, gates, MemoryRule(), chunk_size=1))


@pytest.mark.parametrize("slices, axes", [("fan_in", [-1, -1]), ("channel", [-1, -2]), ("matrix", [(-2, -1)] * 2)])
def test_memora_stays_on_its_simplex(slices, axes):
    rule = memora(slices=slices, total=3.0)
    arrays, gates = operands(rule, 5, channels=True)
    _, state = ours(arrays, gates, rule, chunk_size=2, return_state=True)
    moved = {}
    for (name, side), axis in zip(rule.memory.sides.items(), axes):
        weights = rule.retention.link(state.running[name], side)
        assert (weights > 0).all()
        near(weights.sum(axis), 3.0)
        # Logits mean the same with a number added to each slice.
        shift = normal(np.sum(arrays["weights"][name], axis, keepdims=True).shape)
        moved[name] = arrays["weights"][name] + shift
    near(ours(arrays | {"weights": moved}, gates, rule, chunk_size=2), ours(arrays, gates, rule, chunk_size=2), 1e-11)


def test_the_linear_interior_is_exact_in_chunks_of_one():
    arrays, gates = operands(memora(), 6, channels=True)
    exact = ours(arrays, gates, memora(), chunk_size=1)
    near(ours(arrays, gates, memora(interior="linear"), chunk_size=1), exact, 1e-11)
    gates["step"], gates["log_retention"] = gates["step"] * 1e-4, gates["log_retention"] * 1e-4
    exact = ours(arrays, gates, memora(), chunk_size=6)
    first_order = ours(arrays, gates, memora(interior="linear"), chunk_size=6)
    near(first_order[:, 0], exact[:, 0], 1e-11)


def test_the_dual_link_keeps_the_norm_in_the_dual_norm():
    q = 4.0
    state = normal((2, 3, 5))
    weights = LqStability(q, "dual").link(jnp.asarray(state), "in")
    dual = q / (q - 1)
    near((np.abs(weights) ** dual).sum((1, 2)) ** (1 / dual), (np.abs(state) ** q).sum((1, 2)) ** (1 / q))
    near(LqStability(q, "dual").link(jnp.asarray(2 * state), "in"), 2 * weights)
    # The maximum of <W, A> - ||W||^2 / 2 in the dual norm: its gradient in W vanishes.
    slope = jax.grad(lambda w: (w * state[0]).sum() - ((jnp.abs(w) ** dual).sum() ** (1 / dual)) ** 2 / 2)(weights[0])
    near(slope, np.zeros((3, 5)), 1e-10)
    paper = LqStability(q).link(jnp.asarray(2 * state), "in")
    near(paper, LqStability(q).link(jnp.asarray(state), "in") / 2)


@pytest.mark.slow
def test_norms_neither_overflow_nor_divide_by_zero():
    for link in ("paper", "dual"):
        gate = LqStability(4.0, link)
        for scale in (1e-12, 1e12):
            state = jnp.asarray(normal((2, 3)) * scale, jnp.float32)
            slope = jax.grad(lambda a, gate=gate: jnp.log(jnp.abs(gate.link(a, "in"))).sum())(state)
            assert jnp.isfinite(slope).all() and jnp.isfinite(gate.link(state, "in")).all(), (link, scale)
        zero, pull = jax.vjp(lambda a, gate=gate: gate.link(a, "in"), jnp.zeros((2, 3)))
        assert not zero.any() and jnp.isfinite(pull(jnp.ones((2, 3)))[0]).all()


def test_the_entropy_step_is_optimal():
    """Of <W, g> + KL(W, W0) / eta - entropy(W) / alpha on the simplex every partial derivative is the same."""
    eta, alpha, total = 0.7, 1.9, 5.0
    first, grad = normal((2, 4, 5))
    before = total * np.exp(first) / np.exp(first).sum(-1, keepdims=True)
    keep, step = (1 / eta) / (1 / alpha + 1 / eta), 1 / (1 / alpha + 1 / eta)
    state = keep * np.log(before) - step * grad
    w = Entropy(total=total).link(jnp.asarray(state), "in")
    slope = jax.grad(
        lambda w: (w * grad).sum() + (w * jnp.log(w / before)).sum() / eta + (w * jnp.log(w)).sum() / alpha
    )(w)
    near(slope - slope.mean(-1, keepdims=True), np.zeros_like(slope), 1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_steps_are_optimal(name):
    """Of <W, eta g> + sum W0 f(W / W0) on the simplex every partial derivative is the same, where W is not 0."""
    f = {
        "kl": lambda t: t * jnp.log(t),
        "reverse_kl": lambda t: -jnp.log(t),
        "hellinger": lambda t: (jnp.sqrt(t) - 1) ** 2,
        "chi2": lambda t: (t - 1) ** 2,
    }[name]
    gate = FDivergence(name, total=2.0)
    before = gate.start(jnp.asarray(normal((4, 6))), "in")
    tilt = jnp.asarray(normal((4, 6)))
    w = gate.move(before, jnp.asarray(0.6), tilt, "in")
    near(w.sum(-1), 2.0)
    slope = jax.grad(lambda w: (0.6 * w * tilt).sum() + (before * f(w / before)).sum())(w)
    near(slope - slope.mean(-1, keepdims=True), np.zeros_like(slope), 1e-10)
    assert (w > 0).all()
    # The derivative through the normaliser, against differences.
    direction = jnp.asarray(normal((4, 6)))
    for at in (0, 1):

        def along(x, at=at):
            parts = [before, tilt]
            parts[at] = parts[at] + x * (direction if at else before * direction)
            return (gate.move(parts[0], jnp.asarray(0.6), parts[1], "in") * jnp.cos(direction)).sum()

        near(jax.grad(along)(0.0), (along(1e-5) - along(-1e-5)) / 2e-5, 1e-8)


def test_the_elastic_net_step_is_optimal():
    """0 lies between the one-sided derivatives of the loss, entry by entry."""
    eta, l1, l2 = 0.4, 0.9, 0.3
    before, grad = normal((2, 6, 7))
    w = np.asarray(ElasticNet(l1, l2).move(jnp.asarray(before), jnp.asarray(eta), jnp.asarray(grad), "in"))
    slope = (w - before) / eta + grad + l2 * w
    zero = w == 0
    assert 5 < zero.sum() < 35
    near(slope[~zero], -l1 * np.sign(w[~zero]))
    assert (np.abs(slope[zero]) <= l1 + 1e-12).all()
    smooth = ElasticNet(l1, l2, "arctan").move(jnp.asarray(before), jnp.asarray(eta), jnp.asarray(grad), "in")
    keep = 1 / (1 + eta * l2)
    z, gamma = keep * (before - eta * grad), eta * keep * l1
    near(smooth, np.abs(z) * np.arctan(z / gamma) / (np.pi / 2))


def test_smoothing():
    r = np.linspace(-1.5, 1.5, 31)
    zero = jnp.zeros(31)
    near(LpError(3.0).error(jnp.asarray(r), zero, None), 3 * r * np.sqrt(r**2 + 1e-6))
    tanh = LpError(3.0, "tanh").error(jnp.asarray(r), zero, None)
    near(tanh, 3 * np.tanh(10 * r) * (r**2 + 1e-6))
    small = LpError(3.0, "tanh", epsilon=1e-12).error(jnp.asarray([0.01, 0.05, 0.1]), jnp.zeros(3), None)
    near(small / (3 * np.square([0.01, 0.05, 0.1])), [0.0997, 0.4621, 0.7616], 1e-4)


def test_bounded_errors():
    """Of l_p errors that are too long the direction stays."""
    r = np.asarray([[0.1, -0.2], [3.0, -4.0], [0.0, 0.0]])
    free = 3 * r * np.sqrt(r**2 + 1e-6)
    bounded = LpError(3.0, max_norm=2.0).error(jnp.asarray(r), jnp.zeros((3, 2)), None)
    near(bounded, [free[0], 2 * free[1] / np.linalg.norm(free[1]), free[2]])
    slope = jax.grad(lambda r: LpError(3.0, max_norm=2.0).error(r, 0 * r, None).sum())(jnp.asarray(r))
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("case, length", [("l2", 4), ("lp", 4), ("huber_norm", 3), ("every_token", 1), ("momentum", 4)])
def test_equals_titans_pytorch(case, length):
    with np.load(Path(__file__).parent / "reference" / "memory_titans.npz") as file:
        expected, shapes = file[case], json.loads(str(file["shapes"]))
    made = {n: pseudo_normal(f"memory/{n}", tuple(s)) / s[-1] ** 0.5 for n, s in shapes.items()}
    x = pseudo_normal("memory/sequence", expected.shape)

    def gate(name):
        return 1 / (1 + np.exp(-(x @ made[f"{name}.0.weight"].T + made[f"{name}.0.bias"])))

    arrays = {
        n: (x @ made[f"{f}.weight"].T)[:, :, None]
        for n, f in (("query", "to_queries"), ("key", "to_keys"), ("value", "to_values"))
    }
    arrays["weights"] = {n: made[n][None] for n in ("w1", "w2")}
    gates = {"step": 0.3 * gate("to_adaptive_step"), "log_retention": np.log(1 - gate("to_decay_factor"))}
    if case == "huber_norm":
        gates["threshold"] = np.ones_like(gates["step"])
    if case == "momentum":
        gates["log_momentum"] = np.log(gate("to_momentum"))
    bias = case if case in ("lp", "huber_norm") else "l2"
    rule = MemoryRule("mlp", bias, "decay", "momentum" if case == "momentum" else "gradient")
    near(ours(arrays, gates, rule, chunk_size=length)[:, :, 0], expected)


def test_named_instances():
    assert moneta() == MemoryRule("mlp", LpError(3.0), LqStability(4.0, "paper", "chunk"))
    assert yaad() == MemoryRule("mlp", "huber_norm", "decay")
    assert memora() == MemoryRule("mlp", "l2", "kl")
    assert yaad(memory="matrix", huber="coord", read="before") == MemoryRule("matrix", "huber_coord", read="before")
    assert hash(moneta()) != hash(moneta(link="dual"))


def test_the_switch_magnifies_what_the_other_hubers_do_not():
    """Where an outlier has a residual near 0 in some channel, the sign has a slope of 1 / sqrt(epsilon): why the
    default is not the letter."""
    output, value = jnp.asarray([0.0, 2.0, -3.0]), jnp.zeros(3)
    slopes = {}
    for form in ("norm", "coord", "switch"):
        jacobian = jax.jacobian(lambda x, form=form: Huber(form).error(x, value, jnp.ones(1)))(output)
        slopes[form] = np.linalg.norm(jacobian, 2)
    assert slopes["norm"] <= 1 and slopes["coord"] <= 1 and slopes["switch"] == pytest.approx(1e3)
