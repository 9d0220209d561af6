"""Optimizers against torch's numbers and written-out formulas, schedules against timm's and closed forms."""

import math

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from train import config as config_lib
from train import optim

# From tests/reference/make_optim.py: torch in float64, lr 0.01, five steps.
ADAM = (
    [[0.4921716191296837, -1.0015797562213602], [1.9794483386917001, 0.2478866938992034]],
    [0.9498667106929798, -0.4498666188965939],
)
ADAMW = (
    [[0.4917156057518638, -0.9991113942428838], [1.9794543042516466, 0.24701606163135612]],
    [0.9498667106929798, -0.4498666188965939],
)
SGD = (
    [[0.4670765, -0.9898299999999999], [1.9742587500000002, 0.18834750000000003]],
    [0.9207422500000001, -0.024453500000000013],
)
# From the same: timm's CosineLRScheduler, 90 steps, then 10 of cool-down.
COSINE = {
    0: 1e-06,
    3: 0.0003007000000000001,
    9: 0.0009001000000000001,
    10: 0.0009701478472890247,
    11: 0.0009639560080105597,
    45: 0.000505,
    89: 1.0301540625547598e-05,
    90: 1e-05,
    99: 1e-05,
}


def settings(**changes) -> ml_collections.ConfigDict:
    config = config_lib.default().optim
    config.update(schedule="constant", lr=0.01, **changes)
    return config


def start() -> dict:
    return {"kernel": jnp.array([[0.5, -1.0], [2.0, 0.25]], float), "bias": jnp.array([1.0, -0.5], float)}


def gradients(step: int) -> dict:
    kernel = np.array([[1.0, -2.0], [0.5, 3.0]]) * (1.0 if step % 2 else -0.5) + 0.1 * step
    return {"kernel": jnp.array(kernel, float), "bias": jnp.array([0.25, -1.5], float) * (step + 1)}


def train(config: ml_collections.ConfigDict, steps: int = 5, **options) -> dict:
    params = start()
    optimizer, _ = optim.make(config, 100, params, **options)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
    return params


ADAMW_SETTINGS = dict(name="adamw", b1=0.8, b2=0.99, eps=1e-6, weight_decay=0.1)


@pytest.mark.parametrize(
    ("config", "expected"),
    [(dict(ADAMW_SETTINGS, name="adam"), ADAM), (ADAMW_SETTINGS, ADAMW), (dict(name="sgd", momentum=0.9), SGD)],
    ids=["adam", "adamw", "sgd"],
)
@pytest.mark.parametrize(("double", "tolerance"), [(True, 1e-13), (False, 1e-6)], ids=["float64", "float32"])
def test_equal_to_torch(config, expected, double, tolerance):
    with jax.enable_x64(double):
        params = train(settings(**config))
    np.testing.assert_allclose(params["kernel"], expected[0], rtol=tolerance)
    np.testing.assert_allclose(params["bias"], expected[1], rtol=tolerance)


def test_lamb_is_the_papers_algorithm():
    b1, b2, eps, decay, rate = 0.8, 0.99, 1e-6, 0.1, 0.01
    with jax.enable_x64(True):
        found = train(settings(name="lamb", b1=b1, b2=b2, eps=eps, weight_decay=decay))
        for name, weight_decay in (("kernel", decay), ("bias", 0.0)):
            x = np.asarray(start()[name])
            m = v = np.zeros_like(x)
            for t in range(5):
                g = np.asarray(gradients(t)[name])
                m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
                u = m / (1 - b1 ** (t + 1)) / (np.sqrt(v / (1 - b2 ** (t + 1))) + eps) + weight_decay * x
                x = x - rate * np.linalg.norm(x) / np.linalg.norm(u) * u
            np.testing.assert_allclose(found[name], x, rtol=1e-13)


@pytest.mark.parametrize("shape", [(6, 6), (6, 15), (15, 6)])
def test_muon_is_its_authors_algorithm(shape):
    """Momentum, Nesterov's look-ahead, the quintic iteration and the scale that gives Adam's size, written out."""
    beta, rate, decay, steps = 0.95, 0.01, 0.1, 5
    random = np.random.default_rng(0)
    grads = random.normal(size=(steps, *shape))
    x = random.normal(size=shape)
    with jax.enable_x64(True):
        params = {"kernel": jnp.asarray(x)}
        optimizer, _ = optim.make(settings(name="muon", momentum=beta, weight_decay=decay), 100, params)
        state = optimizer.init(params)
        for g in grads:
            updates, state = jax.jit(optimizer.update)({"kernel": jnp.asarray(g)}, state, params)
            params = optax.apply_updates(params, updates)
    momentum = np.zeros(shape)
    for t, g in enumerate(grads, 1):
        momentum = beta * momentum + (1 - beta) * g
        # As in Nesterov's Adam, the bias of the momentum is corrected as of the next step.
        ahead = beta * momentum / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        y = ahead / np.linalg.norm(ahead)
        y = y.T if shape[0] > shape[1] else y
        for _ in range(5):
            square = y @ y.T
            y = 3.4445 * y + (-4.7750 * square + 2.0315 * square @ square) @ y
        y = y.T if shape[0] > shape[1] else y
        assert np.all(np.abs(np.linalg.svd(y, compute_uv=False) - 1) < 0.4)
        x = x - rate * (0.2 * np.sqrt(max(shape)) * y + decay * x)
    np.testing.assert_allclose(params["kernel"], x, rtol=1e-6, atol=1e-8)


def test_muon_moves_a_stack_of_matrices_one_by_one():
    random = np.random.default_rng(0)
    stack, grads = (random.normal(size=(3, 4, 6)).astype(np.float32) for _ in range(2))

    def step(kernel, gradient):
        params = {"kernel": jnp.asarray(kernel)}
        optimizer, _ = optim.make(settings(name="muon"), 10, params)
        return optimizer.update({"kernel": jnp.asarray(gradient)}, optimizer.init(params), params)[0]["kernel"]

    alone = [step(kernel, gradient) for kernel, gradient in zip(stack, grads)]
    np.testing.assert_allclose(step(stack, grads), alone, rtol=1e-4, atol=1e-6)


def test_muon_leaves_heads_embeddings_and_vectors_to_adam():
    params = {
        "embed": {"embedding": jnp.ones((3, 4))},
        "block": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4), "conv": {"kernel": jnp.ones((2, 2, 1, 4))}},
        "head": {"kernel": jnp.ones((4, 3))},
    }
    random = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), params)
    steps = {}
    for name in ("muon", "adamw"):
        optimizer, _ = optim.make(settings(name=name), 10, params)
        steps[name], _ = optimizer.update(grads, optimizer.init(params), params)
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), steps["muon"], steps["adamw"])
    assert same.pop("block") == {"kernel": False, "bias": True, "conv": {"kernel": True}}
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "muon"])
def test_weight_decay_is_decoupled(name):
    """With no gradient only the decay acts, and on the kernel only: p times (1 - lr * weight_decay)."""
    params = start()
    optimizer, _ = optim.make(settings(name=name, weight_decay=0.1), 100, params)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    trust = 10.0 if name == "lamb" else 1.0  # |p| / |0.1 p|
    np.testing.assert_allclose(updates["kernel"], -0.01 * 0.1 * trust * params["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0.0)


def test_what_is_decayed():
    shapes = {
        "stem": {"kernel": (4, 4, 3, 8), "bias": (8,)},
        "block": {"scale": (8,), "temperature": (), "relative_position_bias_table": (169, 4)},
        "head": {"kernel": (8, 10)},
        "stacked": {"kernel": (3, 4, 8), "bias": (3, 8), "scale": (3, 4)},
    }
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    mask = optim.decay_mask(params, (r"_table$",))
    assert mask == {
        "stem": {"kernel": True, "bias": False},
        "block": {"scale": False, "temperature": False, "relative_position_bias_table": False},
        "head": {"kernel": True},
        "stacked": {"kernel": True, "bias": False, "scale": False},
    }
    assert optim.decay_mask(params)["block"]["relative_position_bias_table"]
    optim.make(settings(no_decay=("table",)), 10, params, no_decay=("absent in this variant",))
    with pytest.raises(ValueError, match="optim.no_decay: 'tabel' matches no parameter"):
        optim.make(settings(no_decay=("tabel",)), 10, params)


def test_no_decay_by_name_reaches_the_update():
    with_decay, without = (train(settings(weight_decay=0.5, no_decay=p)) for p in ((), ("kernel",)))
    plain = train(settings(weight_decay=0.0))
    chex.assert_trees_all_equal(without, plain)
    assert np.all(np.asarray(with_decay["kernel"]) != np.asarray(plain["kernel"]))


def rates(total: int, steps, **changes) -> np.ndarray:
    rate = optim.schedule(settings(**changes), total)
    return np.asarray(jax.jit(rate)(jnp.asarray(steps)))


def test_cosine_is_timms():
    config = config_lib.default().optim
    config.update(lr=1e-3, warmup_steps=10, warmup_lr=1e-6, end_lr=1e-5, cooldown_steps=10)
    with jax.enable_x64(True):
        rate = optim.schedule(config, 100)
        for step, expected in COSINE.items():
            np.testing.assert_allclose(rate(step), expected, rtol=1e-12)
    single = optim.schedule(config, 100)
    np.testing.assert_allclose([single(step) for step in COSINE], list(COSINE.values()), rtol=2e-6)


def closed_form(name: str, t: float) -> float:
    """lr 0.4 after 20 steps from 0.1, down to 0.05, of 100 steps the last 10 at the floor."""
    if t < 20:
        return 0.1 + 0.3 * t / 20
    if t >= 90:
        return 0.05
    share = {
        "cosine": (1 + math.cos(math.pi * t / 90)) / 2,
        "linear": (90 - t) / 90,
        "constant": 1.0,
        "rsqrt": math.sqrt(20 / t),
    }[name]
    return 0.05 + 0.35 * share


@pytest.mark.parametrize("name", sorted(optim.SCHEDULES))
def test_schedules_at_every_step(name):
    config = config_lib.default().optim
    config.update(schedule=name, lr=0.4, warmup_steps=20, warmup_lr=0.1, end_lr=0.05, cooldown_steps=10)
    found = jax.jit(optim.schedule(config, 100))(jnp.arange(105))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, [closed_form(name, t) for t in range(105)], rtol=1e-5)


@pytest.mark.parametrize("name", sorted(optim.SCHEDULES))
def test_schedules_without_warm_up_start_at_the_peak(name):
    config = config_lib.default().optim
    config.update(schedule=name, lr=0.4)
    found = [float(optim.schedule(config, 50)(t)) for t in (0, 49, 50)]
    assert found[0] == np.float32(0.4) and found[1] > 0 and found[2] == 0


def test_the_optimizer_follows_its_schedule():
    """SGD without momentum moves by exactly the rate of each step, the first step being number 0."""
    params = {"w": jnp.zeros(())}
    config = config_lib.default().optim
    config.update(name="sgd", momentum=0.0, lr=0.4, warmup_steps=4, cooldown_steps=2, schedule="linear")
    optimizer, rate = optim.make(config, 10, params)
    state = optimizer.init(params)
    for step in range(10):
        updates, state = optimizer.update({"w": jnp.ones(())}, state, params)
        assert updates["w"] == -rate(step)


def test_layer_decay():
    params = {f"layer_{i}": {"kernel": jnp.ones((2, 2))} for i in range(4)}
    config = settings(name="sgd", momentum=0.0, weight_decay=0.5, layer_decay=0.5)
    optimizer, _ = optim.make(config, 10, params, layer_id=lambda path: int(path.split("/")[0][-1]), num_layers=3)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    for i in range(4):
        np.testing.assert_allclose(
            updates[f"layer_{i}"]["kernel"], -0.01 * 0.5 ** (3 - i) * 1.5 * np.ones((2, 2)), rtol=1e-6
        )
    with pytest.raises(ValueError, match="optim.layer_decay 0.5 needs a layer_id"):
        optim.make(config, 10, params)
    with pytest.raises(ValueError, match=r"layer_id\('layer_0/kernel'\) must be in \[0, 3\], got 4"):
        optim.make(config, 10, params, layer_id=lambda path: 4, num_layers=3)


@pytest.mark.parametrize("limit", [0.5, 5.0, 20.0])
def test_clipping(limit):
    grads = {"a": jnp.array([[3.0, 4.0]]), "b": jnp.array([12.0])}
    assert optim.gradient_norm(grads) == 13.0
    optimizer, _ = optim.make(settings(name="sgd", momentum=0.0, clip_norm=limit), 10, grads)
    updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
    scale = -0.01 * min(1.0, limit / 13)
    np.testing.assert_allclose(updates["a"], scale * np.array([[3.0, 4.0]]), rtol=1e-6)
    np.testing.assert_allclose(updates["b"], scale * np.array([12.0]), rtol=1e-6)


def test_a_gradient_that_is_not_finite_stays_visible():
    grads = {"a": jnp.array([1.0, jnp.nan])}
    optimizer, _ = optim.make(settings(name="sgd", clip_norm=1.0), 10, grads)
    updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
    assert np.isnan(optim.gradient_norm(grads)) and np.isnan(updates["a"]).all()


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_the_state_is_laid_out_like_the_parameters(name):
    params = {"block": {"kernel": jnp.ones((4, 2), jnp.float32), "bias": jnp.ones(2, jnp.float32)}}
    config = settings(name=name, clip_norm=1.0, layer_decay=0.5)
    optimizer, _ = optim.make(config, 10, params, layer_id=lambda path: 0)
    leaves = jax.tree_util.tree_leaves_with_path(optimizer.init(params))
    moments = 0
    for path, leaf in leaves:
        if getattr(path[-1], "name", "") == "ns_coeffs":
            assert name == "muon" and leaf.shape == (3,)
        elif leaf.ndim == 0:
            assert leaf.dtype == jnp.int32
        else:
            moments += 1
            owner = params["block"][path[-1].key]
            assert path[-2].key == "block" and (leaf.shape, leaf.dtype) == (owner.shape, owner.dtype)
    assert moments == {"sgd": 2, "muon": 3}.get(name, 4)


def test_moving_average_is_its_formula():
    decay = 0.7
    values = [np.array([1.0, 2.0]) * (t + 1) for t in range(30)]
    ema = optim.ema_init({"w": jnp.zeros(2, jnp.float32), "stats": {"mean": jnp.zeros(2, jnp.bfloat16)}})
    update = jax.jit(optim.ema_update, static_argnums=2)
    expected = np.zeros(2)
    for step, value in enumerate(values):
        tree = {"w": jnp.array(value, jnp.float32), "stats": {"mean": jnp.array(value, jnp.bfloat16)}}
        ema = update(ema, tree, decay, jnp.int32(step))
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * value
    np.testing.assert_allclose(ema["w"], expected, rtol=1e-6)
    assert ema["stats"]["mean"].dtype == jnp.bfloat16


def test_moving_average_starts_with_copies():
    params = {"w": jnp.ones(3)}
    average = optim.ema_init(params)
    assert average["w"].unsafe_buffer_pointer() != params["w"].unsafe_buffer_pointer()
    chex.assert_trees_all_equal(average, params)
