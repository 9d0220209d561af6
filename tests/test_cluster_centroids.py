"""Centroids: the official moving averages, lucidrains' k-means, and statistics summed over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kernels.cluster.centroids import (
    Centroids,
    commitment_loss,
    init_centroids,
    kmeans_init,
    kmeans_step,
    normalize_tokens,
    update_centroids,
)
from tests.parity import REFERENCE, part
from tests.reference import cluster as reference
from tests.reference.weights import pseudo_normal

B, N, H, D, K = 8, 11, 2, 5, 4


pytestmark = pytest.mark.usefixtures("float64")


def state(style="official"):
    means = reference.normal(pseudo_normal("means", (H, K, D)), style)
    count = np.abs(pseudo_normal("count", (H, K)))
    return Centroids(means, count, means * count[..., None])


def tokens(style="official"):
    return reference.normal(pseudo_normal("tokens", (B, N, H, D)), style)


@functools.cache
def update(**options):
    return jax.jit(functools.partial(update_centroids, **options))


def moved(old, tokens, counted, decay):
    """The official equations, one token at a time."""
    means, count, total = (np.zeros_like(x) for x in old)
    for b, n, h in np.ndindex(tokens.shape[:3]):
        if counted[b, n]:
            nearest = np.argmax(old.means[h] @ tokens[b, n, h])
            count[h, nearest] += 1
            total[h, nearest] += tokens[b, n, h]
    count = decay * old.count + (1 - decay) * count
    total = decay * old.total + (1 - decay) * total
    for h in range(H):
        mass = count[h].sum()
        for c in range(K):
            means[h, c] = total[h, c] / ((count[h, c] + 1e-5) / (mass + K * 1e-5) * mass)
    return Centroids(means, count, total)


def test_official_moving_averages():
    old, x = state(), tokens()
    x[1, 3], x[2, 7:] = 0, 0
    padding = (x == 0).all((2, 3))
    new = update(decay=0.9)(old, x)
    for mine, wanted in zip(new, moved(old, x, ~padding, 0.9), strict=True):
        np.testing.assert_allclose(mine, wanted, atol=1e-13)
    mask = pseudo_normal("mask", (B, N)) > -0.5
    new = update(decay=0.9)(old, x, mask=mask)
    for mine, wanted in zip(new, moved(old, x, mask & ~padding, 0.9), strict=True):
        np.testing.assert_allclose(mine, wanted, atol=1e-13)
    # Not normalised again: means of vectors of norm sqrt(D) are shorter.
    assert (np.linalg.norm(update(decay=0.0)(old, x).means, axis=-1) < D**0.5 * (1 + 1e-4)).all()


def test_the_official_cold_start_blows_centroids_up():
    """By about decay / ((1 - decay) c) for c tokens in a step; counting the initial means as one token does not."""
    cold, warm = (init_centroids(jax.random.key(0), H, K, D, count=count) for count in (0.0, 1.0))
    np.testing.assert_array_equal(cold.means, warm.means)
    np.testing.assert_array_equal(cold.total, cold.means)
    np.testing.assert_allclose(warm.total, warm.means * warm.count[..., None])
    x = np.float32(tokens()[:1])
    before = np.linalg.norm(cold.means, axis=-1)
    counts = np.asarray(update(decay=0.0)(cold, x).count)
    growth = np.linalg.norm(update()(cold, x).means, axis=-1) / before
    some = counts > 0
    np.testing.assert_allclose(growth[some], (0.999 / (0.001 * counts))[some], rtol=0.05)
    growth = np.linalg.norm(update()(warm, x).means, axis=-1) / before
    np.testing.assert_allclose(growth, 1, atol=0.02)
    assert {leaf.dtype for leaf in update()(warm, x)} == {jnp.dtype("float32")}


def test_lucidrains_kmeans():
    with np.load(REFERENCE / "cluster.npz") as file:
        record = part(dict(file), "kmeans/")
    x = pseudo_normal("tokens", (2, 2, 18, 4)).swapaxes(1, 2)
    unit = reference.normal(x, "lucidrains")
    before = Centroids(record["before"], np.ones((2, 3)), np.ones((2, 3, 4)))
    after = update(style="lucidrains", decay=0.9)(before, unit)
    np.testing.assert_allclose(after.means, record["after"], atol=1e-13)
    np.testing.assert_array_equal(after.means[:, -1], before.means[:, -1], "an empty cluster moved")
    np.testing.assert_array_equal(after.count, before.count)
    np.testing.assert_allclose(jax.jit(commitment_loss)(unit, before.means), record["loss"], rtol=1e-13)

    step = jax.jit(kmeans_step)
    # Their tokens are numbered sample by sample, as ours are.
    means = x.reshape(36, 2, 4)[record["start"]].swapaxes(0, 1)
    for _ in range(10):
        means = step(means, x)
    np.testing.assert_allclose(means, record["initial"], atol=1e-12)


def test_kmeans_init_starts_from_tokens():
    x = pseudo_normal("tokens", (2, 9, H, D))
    run = jax.jit(kmeans_init, static_argnames=("clusters", "iterations"))
    start = np.asarray(run(jax.random.key(3), x, 5, iterations=0))
    flat = x.reshape(18, H, D)
    chosen = [[int(np.flatnonzero((flat[:, h] == start[h, c]).all(-1))[0]) for c in range(5)] for h in range(H)]
    assert chosen[0] == chosen[1] and len(set(chosen[0])) == 5
    means, step = start, jax.jit(kmeans_step)
    for _ in range(10):
        means = step(means, x)
    np.testing.assert_allclose(run(jax.random.key(3), x, 5), means, atol=1e-13)
    assert run(jax.random.key(3), x[:1, :2], 5).shape == (H, 5, D)


@pytest.mark.parametrize("style", ["official", "lucidrains"])
def test_statistics_are_summed_over_devices(style):
    """Under `shard_map` with the axis named, and under plain `jit` with a sharded batch, as on one device."""
    old, x, mask = state(style), tokens(style), pseudo_normal("mask", (B, N)) > -0.5
    expected = update(style=style, decay=0.9)(old, x, mask=mask)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data, everywhere = PartitionSpec("data"), PartitionSpec()
    mapped = jax.shard_map(
        lambda old, x, mask: update_centroids(old, x, mask=mask, style=style, decay=0.9, axis_name="data"),
        mesh=mesh,
        in_specs=(everywhere, data, data),
        out_specs=everywhere,
    )
    sharded = [jax.device_put(a, NamedSharding(mesh, data)) for a in (x, mask)]
    for new in (jax.jit(mapped)(old, *sharded), update(style=style, decay=0.9)(old, sharded[0], mask=sharded[1])):
        for mine, wanted in zip(new, expected, strict=True):
            np.testing.assert_allclose(mine, wanted, atol=1e-13)


def test_commitment_loss_and_its_gradient():
    x, means = tokens(), state().means
    mask = pseudo_normal("mask", (B, N)) > -0.5
    nearest = np.array([[[means[h] @ x[b, n, h] for h in range(H)] for n in range(N)] for b in range(B)]).argmax(-1)
    difference = x - means[np.arange(H), nearest]
    run = jax.jit(jax.value_and_grad(lambda x, means, mask: commitment_loss(x, means, mask=mask), (0, 1)))
    loss, (gradient, none) = run(x, means, mask)
    np.testing.assert_allclose(loss, np.square(difference[mask]).mean(), rtol=1e-13)
    size = mask.sum() * H * D
    np.testing.assert_allclose(gradient, 2 * difference * mask[..., None, None] / size, atol=1e-15)
    assert not none.any()
    np.testing.assert_allclose(jax.jit(commitment_loss)(x, means), np.square(difference).mean(), rtol=1e-13)


@pytest.mark.parametrize("style", ["official", "lucidrains"])
def test_normalized_tokens(style):
    x = pseudo_normal("x", (3, 129))
    run = jax.jit(functools.partial(normalize_tokens, style=style))
    np.testing.assert_allclose(run(x), reference.normal(x, style), rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(run(x), axis=-1), 129**0.5 if style == "official" else 1, rtol=1e-5)
    zero = jnp.zeros((1, 6))
    assert not run(zero).any()
    assert jnp.isfinite(jax.jit(jax.grad(lambda x: run(x).sum()))(zero)).all()
    assert run(jnp.ones((1, 6), jnp.bfloat16)).dtype == jnp.float32


def test_names_what_is_wrong():
    old, x = jax.tree.map(jnp.asarray, state()), jnp.asarray(tokens())
    with pytest.raises(ValueError, match="unknown style 'lucid'; did you mean 'lucidrains'"):
        init_centroids(jax.random.key(0), 1, 2, 3, style="lucid")
    with pytest.raises(ValueError, match="count must be at least 0, got -1"):
        init_centroids(jax.random.key(0), 1, 2, 3, count=-1.0)
    with pytest.raises(ValueError, match="decay must be between 0 and 1, got 1.5"):
        update_centroids(old, x, decay=1.5)
    with pytest.raises(ValueError, match="unknown style 'Official'; did you mean 'official'"):
        normalize_tokens(x, "Official")
