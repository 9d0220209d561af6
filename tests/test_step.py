"""One training step: accumulation, averages, randomness, what is not finite, any mesh."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoo
from tests import runs
from train import config as config_lib
from train import inputs, optim, program, sharding, sources, step, tasks
from zoo import registry

MODEL = zoo.create_model("davit_nano", depths=(1,), dims=(8,), num_heads=(2,), in_chans=1)
TASK = tasks.Classify(10, (0.5,), (0.5,), label_smoothing=0.1)
RATE = 0.5


@functools.cache
def first_state(ema: bool = False) -> step.TrainState:
    inputs = dict(images=jnp.zeros((1, 8, 8, 1)))
    init = functools.partial(step.init_state, MODEL, optax.sgd(RATE), inputs, seed=0, ema=ema)
    return jax.jit(init)()


def batch(seed: int = 0, size: int = 16) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (size, 8, 8, 1), dtype=np.uint8),
        "label": rng.integers(0, 10, size, dtype=np.int32),
    }


def make(task=TASK, model=MODEL, **options):
    return functools.partial(step.make_train_step(model, optax.sgd(RATE), lambda count: RATE, **options), task=task)


def test_sgd_against_a_loop_by_hand():
    state, key = first_state(), jax.random.key(1)
    stepped = jax.jit(make())
    for seed in range(3):
        state, metrics = stepped(state, batch(seed), key)

    def loss(params, images, labels):
        logits = MODEL.apply({"params": params}, (images / 255.0 - 0.5) / 0.5)
        targets = jnp.eye(10)[labels] * 0.9 + 0.01
        return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean()

    gradient = jax.jit(jax.value_and_grad(loss))
    params = first_state().params
    for seed in range(3):
        rows = batch(seed)
        value, grads = gradient(params, rows["image"].astype(np.float32), rows["label"])
        params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
    assert int(state.step) == 3 and int(state.nonfinite_step) == -1
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-6)
    norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in map(np.asarray, jax.tree.leaves(grads))))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-6)
    chex.assert_trees_all_close(state.params, params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)])
def test_accumulation_is_the_whole_batch(parts):
    """Relative norm of the difference of the gradients at most 1e-6: what SGD adds is the gradient."""

    def update(accum_steps):
        state, metrics = jax.jit(make(accum_steps=accum_steps))(first_state(), batch(), jax.random.key(0))
        moved = jax.tree.map(lambda new, old: np.asarray(new, np.float64) - old, state.params, first_state().params)
        return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(moved)]), metrics

    # Parameters near 1 (scales of the norms) round what is added to them; so compare the gradients' own leaves.
    (whole, metrics), (parted, parted_metrics) = update(1), update(parts)
    assert np.linalg.norm(parted - whole) <= 1e-6 * np.linalg.norm(whole) + 1e-7 * np.sqrt(len(whole))
    for name in metrics:
        assert float(parted_metrics[name]) == pytest.approx(float(metrics[name]), rel=1e-5), name


def test_moving_average_in_closed_form():
    decay, state = 0.5, first_state(ema=True)
    stepped = jax.jit(make(ema_decay=decay))
    expected = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params)
    for count in range(4):
        state, _ = stepped(state, batch(count), jax.random.key(0))
        keep = min(decay, (1 + count) / (10 + count))
        expected = jax.tree.map(
            lambda e, p, k=keep: k * e + (1 - k) * np.asarray(p, np.float64), expected, state.params
        )
    chex.assert_trees_all_close(state.ema["params"], jax.tree.map(np.float32, expected), rtol=1e-5, atol=1e-6)
    assert state.variables(averaged=True) is state.ema
    assert state.variables() == {"params": state.params}


def test_randomness_depends_on_the_key_and_the_number_of_the_step():
    model = MODEL.clone(drop_path_rate=0.5)
    task = tasks.Classify(10, (0.5,), (0.5,), mixup=0.8, cutmix=1.0)
    stepped = jax.jit(make(task, model))

    def loss(count, key):
        state = first_state().replace(step=jnp.int32(count))
        return float(stepped(state, batch(), jax.random.key(key))[1]["loss"])

    assert loss(3, 0) == loss(3, 0)
    assert len({loss(3, 0), loss(4, 0), loss(3, 1)}) == 3


def test_the_first_step_that_is_not_finite_is_kept():
    stepped = jax.jit(make())
    state, _ = stepped(first_state(), batch(), jax.random.key(0))
    broken = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), state.params)
    for expected in (2, 2):
        state, metrics = stepped(state.replace(params=broken), batch(), jax.random.key(0))
        assert int(state.nonfinite_step) == int(metrics["nonfinite_step"]) == expected


@pytest.fixture(scope="module")
def digits():
    return sources.open_source("digits", split="train")


@pytest.mark.slow
def test_any_mesh_computes_the_same(digits):
    """Eight devices by data, fsdp and tensor, against one."""

    def three_steps(devices, **mesh):
        config = config_lib.load(runs.CONFIG, runs.overrides(**{f"mesh__{axis}": n for axis, n in mesh.items()}))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "devices", lambda *_: devices)
            built = program.build(config, digits)
        state, key = built.init(), jax.jit(lambda: jax.random.key(0), out_shardings=built.replicated)()
        for seed in range(3):
            state, metrics = built.train_step(state, sharding.place_batch(batch(seed), built.rows), key, built.task)
        return jax.tree.map(np.asarray, (state.params, state.ema, metrics))

    every = jax.devices()
    one = three_steps(every[:1], data=1)
    chex.assert_trees_all_close(three_steps(every, data=2, fsdp=2, tensor=2), one, rtol=1e-4, atol=1e-5)


def test_moments_and_averages_lie_where_their_parameter_lies(digits):
    config = config_lib.load(runs.CONFIG, runs.overrides(mesh__data=1, mesh__fsdp=2, mesh__tensor=4))
    built = program.build(config, digits)
    state = built.abstract_state
    assert "tensor" in str(state.params["stages_0_0"]["spatial"]["mlp"]["fc1"]["kernel"].sharding.spec)
    places = {sharding.path_of(path): leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    for tree in (adam.mu, adam.nu, state.ema["params"]):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            assert leaf.sharding == places[sharding.path_of(path)]


def test_errors_of_meshes_rules_and_batches():
    with pytest.raises(ValueError, match=r"takes 3 devices, there are 8; set one of config.mesh"):
        sharding.make_mesh(dict(data=3, fsdp=1, tensor=1, sequence=1))
    with pytest.raises(ValueError, match="at most one is -1"):
        sharding.make_mesh(dict(data=-1, fsdp=-1, tensor=1, sequence=1))
    mesh = sharding.make_mesh(dict(data=4, fsdp=2, tensor=1, sequence=1))
    with pytest.raises(ValueError, match=r"no sharding rule matches params/odd/kernel \(3, 4\)"):
        sharding.param_spec("params/odd/kernel", (3, 4), ((r"params/head/.*", (None,)),), mesh)
    with pytest.raises(ValueError, match=r"has 1 axes, but params/odd/kernel has shape \(3, 4\)"):
        sharding.param_spec("params/odd/kernel", (3, 4), ((r".*", (None,)),), mesh)
    assert tuple(sharding.param_spec("x", (3, 4), ((r".*", ("fsdp", "fsdp")),), mesh)) == (None, "fsdp")
    with pytest.raises(
        ValueError, match="batch = 20 does not divide over 8 devices .* times accum_steps = 2; .* 16 or 32"
    ):
        sharding.check_batch("batch", 20, mesh, 2)
    sharding.check_batch("batch", 32, mesh, 2)


def test_erasing_is_left_out_where_nothing_is_erased(digits):
    config = config_lib.load(runs.CONFIG, runs.overrides())
    task = tasks.Classify.from_config(config, 10)
    assert task.erase_mode is None
    erasing = config_lib.load(runs.CONFIG, runs.overrides(augment__erase_prob=1.0))
    assert tasks.Classify.from_config(erasing, 10).erase_mode == "pixel"
    example = {"image": np.full((8, 8, 1), 7, np.uint8), "label": 3, "index": 0}
    entries = inputs.train_transform(erasing, digits)(example, np.random.default_rng(0))
    rows = {name: jnp.asarray(value)[None] for name, value in entries.items()}
    prepared = tasks.Classify.from_config(erasing, 10).prepare(rows, jax.random.key(0))["image"]
    untouched = task.prepare(rows, jax.random.key(0))["image"]
    top, left, height, width = rows["erase_box"][0]
    changed = np.asarray(prepared != untouched)[0, :, :, 0]
    inside = np.zeros((8, 8), bool)
    inside[top : top + height, left : left + width] = True
    np.testing.assert_array_equal(changed, inside)


def test_optimizer_of_the_recipe_is_what_the_state_holds(digits):
    """The layer-wise rates of the family reach the optimizer."""
    config = config_lib.load(runs.CONFIG, runs.overrides(optim__layer_decay=0.5))
    layer_of, last = registry.family_of("davit_nano").layers(MODEL)
    assert (layer_of("stem/conv/kernel"), layer_of("stages_0_0/spatial/cpe1/kernel"), layer_of("head/bias"), last) == (
        0,
        1,
        2,
        2,
    )
    params = first_state().params
    optimizer, _ = optim.make(config.optim, 10, params, layer_id=layer_of, num_layers=last)

    @jax.jit
    def second_update(params):
        ones, zeros = (jax.tree.map(like, params) for like in (jnp.ones_like, jnp.zeros_like))
        _, state = optimizer.update(ones, optimizer.init(params), zeros)
        return optimizer.update(ones, state, zeros)[0]

    updates = second_update(params)
    head, stem = updates["head"]["bias"][0], updates["stem"]["conv"]["bias"][0]
    assert float(stem / head) == pytest.approx(0.25, rel=1e-5)
