"""Every family on every mesh: what is computed does not depend on how many devices compute it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kernels.delta import delta_rule
from kernels.gated_linear import gated_linear_attention
from kernels.linear import linear_attention
from tests import mesh_runs
from tests.checkpoint_child import same_bits
from tests.checkpoints import plain
from tests.mesh_runs import LANGUAGE_MODELS, MODELS
from tests.test_sequence_parallel import mesh_of
from train import sharding
from train.checkpoint import Checkpoints
from zoo import biformer_attention

MIXED, LONG = dict(data=2, fsdp=2, tensor=2), dict(data=2, sequence=4)
# Of every kind of mesh one, by devices: 2, 4 and 8.
MESHES = [dict(data=2), dict(tensor=2), dict(fsdp=4), dict(data=2, tensor=2), dict(fsdp=2, tensor=4), dict(fsdp=8)]
LONG_MESHES = [dict(sequence=2), dict(tensor=2, sequence=2), dict(fsdp=2, tensor=2, sequence=2), dict(sequence=8)]
CASES = [(name, MIXED) for name in MODELS] + [(name, LONG) for name in LANGUAGE_MODELS]
CASES += [("vit_nano", mesh) for mesh in MESHES]
CASES += [("gated_deltanet_h_nano", mesh) for mesh in LONG_MESHES]
QUICK = [("vit_nano", MIXED)]
SLOW = [("biformer_nano", MIXED), ("care_nano", MIXED), ("vit_nano", dict(fsdp=2, tensor=4))]
SLOW += [("gla_nano", LONG), ("gated_deltanet_h_nano", LONG)]
STEPS = 20


@functools.cache
def on_one_device(name, steps, dtype):
    return mesh_runs.trained(name, steps, dtype)


def norm(tree):
    return np.sqrt(sum(float((x.astype(np.float64) ** 2).sum()) for x in jax.tree.leaves(tree)))


def apart(found, expected):
    """The norm of the difference over the norm."""
    return norm(jax.tree.map(np.subtract, found, expected)) / norm(expected)


def marked(case):
    marks = () if case in QUICK else pytest.mark.slow if case in SLOW else pytest.mark.bench
    return pytest.param(*case, marks=marks)


@pytest.mark.parametrize("name, mesh", [marked(case) for case in CASES])
def test_every_mesh_trains_the_same(float64, name, mesh):
    """In float64 twenty steps of AdamW, by the norm of all parameters, statistics and centroids."""
    losses, gradient, variables = mesh_runs.trained(name, STEPS, "float64", **mesh)
    expected_losses, expected_gradient, expected = on_one_device(name, STEPS, "float64")
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-9)
    assert apart(gradient, expected_gradient) < 1e-9
    assert apart(variables, expected) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, mesh",
    [
        *((name, MIXED) for name in ("vit_nano", "davit_nano", "maxvit_nano", "biformer_nano", "care_nano")),
        *((name, LONG) for name in ("gla_nano", "gated_deltanet_h_nano", "yaad_h_nano", "routing_transformer_nano")),
    ],
)
def test_the_first_gradient_in_float32(name, mesh):
    losses, gradient, _ = mesh_runs.trained(name, 1, **mesh)
    expected_losses, expected, _ = on_one_device(name, 1, "float32")
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert apart(gradient, expected) < 1e-5


@pytest.mark.slow
def test_regions_are_routed_alike(monkeypatch):
    """In float32, wherever the logits of those that are chosen, and of the next, are more than 1e-5 apart."""
    original = biformer_attention.route_regions

    def routed(**mesh):
        run, dataset = mesh_runs.built("biformer_nano", **mesh)
        batch = sharding.place_batch(mesh_runs.batch_of(dataset, 0), run.rows)
        state, seen = run.init(), []

        def forward(variables, batch):
            seen.clear()
            run.model.apply(variables, run.task.prepare(batch, jax.random.key(0))["image"])
            return list(seen)

        def recorded(query, key, *, k, **options):
            found = original(query, key, k=k, **options)
            seen.append((query, key, found[0]))
            return found

        monkeypatch.setattr(biformer_attention, "route_regions", recorded)
        with jax.sharding.use_abstract_mesh(run.mesh.abstract_mesh):
            traced = jax.jit(forward).trace(state.variables(), batch)
        return jax.tree.map(np.asarray, traced.lower().compile()(state.variables(), batch))

    for (query, key, chosen), (*_, found) in zip(routed(), routed(**MIXED), strict=True):
        logits = np.einsum("bqc,bkc->bqk", *(x.astype(np.float64) for x in (query, key))) * query.shape[-1] ** -0.5
        gaps = -np.diff(-np.sort(-logits)[..., : chosen.shape[-1] + 1])
        clear = (gaps > 1e-5).all(-1)
        assert clear.mean() > 0.9
        np.testing.assert_array_equal(found[clear], chosen[clear])


def test_a_state_is_restored_on_another_mesh_bit_for_bit(tmp_path):
    """Eight by fsdp, restored on fsdp by tensor, on data alone, and on one device."""
    run, dataset = mesh_runs.built("vit_nano", fsdp=8)
    key = jax.jit(lambda: jax.random.key(0), out_shardings=run.replicated)()
    batch = sharding.place_batch(mesh_runs.batch_of(dataset, 0), run.rows)
    state, _ = run.train_step(run.init(), batch, key, run.task)
    expected = plain(state)
    with Checkpoints(tmp_path, every_steps=1, keep=1) as checkpoints:
        checkpoints.save(1, state, data={}, config={}, force=True)
    kernel = ("stages_0_0", "attention", "qkv", "kernel")
    for mesh, shards in ((dict(fsdp=2, tensor=4), 8), (dict(data=8), 1), ({}, 1)):
        like = mesh_runs.built("vit_nano", **mesh)[0].abstract_state
        with Checkpoints(tmp_path, every_steps=1, keep=1) as checkpoints:
            restored = checkpoints.restore(like)
        assert restored.step == 1 and same_bits(plain(restored.state), expected)
        for found, wanted in zip(jax.tree.leaves(restored.state), jax.tree.leaves(like)):
            assert found.sharding.is_equivalent_to(wanted.sharding, found.ndim)
        leaf = functools.reduce(lambda tree, name: tree[name], kernel, restored.state.params)
        assert len({str(shard.index) for shard in leaf.addressable_shards}) == shards


def test_meshes_that_do_not_fit_the_rows():
    with pytest.raises(
        ValueError, match=r"config.mesh.sequence = 2 divides the tokens of a row, and the pictures has no"
    ):
        mesh_runs.built("vit_nano", sequence=2)
    message = r"32 tokens \(config.data.length\) do not divide over config.mesh.sequence = 3 devices; .* 30 or 33"
    with pytest.raises(ValueError, match=message):
        mesh_runs.built("gla_nano", sequence=3)


def test_rows_of_tokens_are_split_along_the_sequence():
    run, dataset = mesh_runs.built("gla_nano", **LONG)
    batch = mesh_runs.batch_of(dataset, 0)
    placed = sharding.place_batch(batch, run.rows)
    assert {shard.data.shape for shard in placed["targets"].addressable_shards} == {(4, 8)}
    assert {shard.data.shape for shard in placed["bytes"].addressable_shards} == {(4,)}
    for name, rows in batch.items():
        np.testing.assert_array_equal(placed[name], rows)


def collectives(run, shapes, gradient):
    """Kind and number of elements of everything that goes between four devices that have a part of the tokens each."""
    mesh = mesh_of(4)
    place = NamedSharding(mesh, PartitionSpec(None, "sequence"))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for shape in shapes]

    def loss(*arrays):
        out = run(*arrays)
        return (out * out).sum() if gradient else out

    function = jax.grad(loss, argnums=tuple(range(len(arrays)))) if gradient else loss
    with jax.set_mesh(mesh):
        text = jax.jit(function).lower(*arrays).compile().as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text)
    return [(kind, sum(map(elements, re.findall(r"\[([\d,]*)\]", result)))) for result, kind in found]


def elements(shape):
    return int(np.prod([int(n) for n in shape.split(",") if n]))


B, N, H, D = 2, 256, 2, 16
VECTORS, NUMBERS = (B, N, H, D), (B, N, H)
# An op, its operands, and how many columns a state of D rows has as it is sent, and as its gradient is.
SENT = {
    "no decay": (gated_linear_attention, [VECTORS] * 3, D + 1, D),
    "decay per channel": (gated_linear_attention, [VECTORS] * 4, D + 1, D),
    "gated delta": (delta_rule, [VECTORS] * 3 + [NUMBERS] * 2, D + D, D),
    "normalised": (functools.partial(linear_attention, causal=True), [VECTORS] * 3, D + 2, D + 1),
}


@pytest.mark.parametrize("name", ["no decay", *(pytest.param(name, marks=pytest.mark.slow) for name in list(SENT)[1:])])
def test_states_are_gathered_once_each_way_and_tokens_never(name):
    """Whatever the number of tokens: four states of B * H heads."""
    run, shapes, forward, backward = SENT[name]
    sent = [("all-gather", 4 * B * H * D * columns) for columns in (forward, backward)]
    assert collectives(run, shapes, gradient=False) == sent[:1]
    assert sorted(collectives(run, shapes, gradient=True), reverse=True) == sorted(sent, reverse=True)


def test_noncausal_linear_attention_adds_up_states():
    found = collectives(linear_attention, [VECTORS] * 3, gradient=False)
    assert {kind for kind, _ in found} == {"all-reduce"} and sum(size for _, size in found) <= B * H * D * (D + 1)
