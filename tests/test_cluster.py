"""Routing attention as published: expected numbers, loops in float64, lucidrains' modules, identities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.cluster import routing_attention
from kernels.cluster.centroids import commitment_loss, normalize_tokens
from kernels.cluster.members import hash_projections, top_members
from kernels.cost import cost
from kernels.dispatch import record_choices
from tests.parity import REFERENCE, part
from tests.reference import cluster as reference
from tests.reference.weights import pseudo_normal

B, N, H, D, E, K, W = 2, 19, 2, 5, 4, 3, 7


pytestmark = pytest.mark.usefixtures("float64")


def normal(name, *shape, dtype=np.float64):
    return pseudo_normal(name, shape).astype(dtype)


def operands(n=N, m=N, d=D, e=E, shared=True):
    key = None if shared else normal("key", B, m, H, d)
    return normal("query", B, n, H, d), key, normal("value", B, m, H, e), normal("means", H, K, d)


@functools.cache
def program(**options):
    """`routing_attention` compiled, with options that are no arrays; tests share what they have in common."""
    return jax.jit(functools.partial(routing_attention, **options))


def sheet(shape, a, phase):
    """A wave over the flat index, float32, heads before tokens; returned with tokens before heads."""
    wave = np.sin(a * np.arange(np.prod(shape)) + phase).astype(np.float32).reshape(shape)
    return wave if len(shape) == 3 else wave.transpose(0, 2, 1, 3)


@functools.partial(jax.jit, static_argnames="style")
def commitment(tokens, means, style):
    return commitment_loss(normalize_tokens(tokens, style), means)


WAVES = dict(
    query=sheet((1, 2, 16, 8), 0.7, 0.1),
    key=sheet((1, 2, 16, 8), 1.1, 0.3),
    value=sheet((1, 2, 16, 8), 0.9, 0.5),
    means=sheet((2, 4, 8), 1.7, 0.2),
)
HEAD0 = [[0, 8, 9, 10], [6, 7, 8, 15], [5, 6, 14, 15], [4, 5, 13, 14]]
HEAD1 = [[4, 5, 13, 14], [3, 4, 12, 13], [2, 3, 11, 12], [0, 1, 9, 10]]


@pytest.mark.parametrize(
    ("style", "shared", "total", "magnitude", "token", "loss"),
    [
        ("lucidrains", True, -3.446382, 99.985443, (-0.893384, -0.616179, 0.127338, 0.774488), 0.21071),
        ("lucidrains", False, 1.378550, 31.048767, (0.282083, 0.507686, 0.349083, -0.073699), 0.19637),
        ("official", True, -0.972527, 88.879676, (-0.920504, -0.348383, 0.487387, 0.954312), 1.667746),
    ],
)
def test_expected_numbers(style, shared, total, magnitude, token, loss):
    query, key, value, means = WAVES.values()
    key = None if shared else key
    means = reference.normal(means, style).astype(np.float32)
    run = program(window=4, style=style, causal=shared, return_membership=True)
    out, (members, _) = run(query, key, value, means)
    assert members[0, 0].tolist() == HEAD0
    assert np.bincount(members[0, 0].ravel(), minlength=16).tolist() == [1, 0, 0, 0, 1, 2, 2, 1, 2, 1, 1, 0, 0, 1, 2, 2]
    if style == "official":
        assert members[0, 1].tolist() == HEAD1
    assert out.dtype == jnp.float32
    out = np.asarray(out, np.float64)
    np.testing.assert_allclose([out.sum(), abs(out).sum()], [total, magnitude], rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(out[0, 5, 0, :4], token, atol=1e-6)
    tokens = query if shared else np.concatenate([query, key], axis=1)
    np.testing.assert_allclose(commitment(tokens, means, style=style), loss, atol=1e-5)


CASES = {
    "causal": dict(),
    "lucidrains": dict(style="lucidrains"),
    "tables": dict(tables=True),
    "causal unshared": dict(shared=False, tables=True),
    "encoder": dict(causal=False, tables=True),
    "encoder shared": dict(causal=False, shared=True, style="lucidrains"),
    "mask": dict(masked=True),
    "segments": dict(segmented=True, tables=True),
    "encoder segments": dict(segmented=True, causal=False, masked=True, style="lucidrains"),
    "memory": dict(memory=True, style="lucidrains", causal=False, masked=True),
    "causal memory": dict(memory=True, scale=0.3),
    "cross": dict(causal=False, m=11, key_window=4),
    "cross with more keys": dict(causal=False, m=40, masked=True, style="lucidrains"),
    "window beyond the tokens": dict(window=50, tables=True),
    "strided": dict(assignment="strided"),
    "strided encoder": dict(assignment="strided", causal=False, window=4, tables=True),
    "hash": dict(assignment="hash"),
    "hash encoder": dict(assignment="hash", causal=False, style="lucidrains"),
    "odd channels": dict(d=129, e=129, tables=True),
}


def case(name):
    """Operands by their name, and the arguments that are no arrays."""
    options = dict(window=W) | CASES[name]
    m, d, e = (options.pop(size, default) for size, default in (("m", N), ("d", D), ("e", E)))
    masked, segmented, memory, tables = (options.pop(x, False) for x in ("masked", "segmented", "memory", "tables"))
    shared = options.get("shared", options.get("causal", True))
    arrays = dict(zip(("query", "key", "value", "means"), operands(m=m, d=d, e=e, shared=shared)))
    if options.get("assignment") == "hash":
        arrays["means"] = np.float64(hash_projections(jax.random.key(0), H, 4, d))
    if tables:
        arrays |= {f"relative_{name}": normal(f"relative_{name}", 7, x) for name, x in (("key", d), ("value", e))}
    if memory:
        arrays |= {f"memory_{name}": normal(f"memory_{name}", H, K, 2, x) for name, x in (("key", d), ("value", e))}
    if masked:
        arrays["key_mask"] = normal("mask", B, m) > -0.7
    if segmented:
        arrays["segments"] = np.array([[5] * 8 + [2] * 6 + [5] * 5, [0] * 18 + [1]])
    return arrays, options


@pytest.mark.parametrize("name", CASES)
def test_equals_the_loops(name):
    arrays, options = case(name)
    out, weights = program(return_weights=True, **options)(**arrays)
    expected, expected_weights = reference.routing(**arrays, **options)
    np.testing.assert_allclose(out, expected, atol=1e-11)
    np.testing.assert_allclose(weights, expected_weights, atol=1e-12)
    if options.get("causal", True):
        assert not np.triu(weights, 1).any(), "attention to a later token"


@pytest.mark.parametrize("name", ["tables", "lucidrains", "cross with more keys", "causal memory"])
def test_gradients_equal_differences_of_the_loops(name):
    """Centroids have neither: who is in which cluster does not change by small steps."""
    arrays, options = case(name)
    direction = normal("direction", B, N, H, E)
    moving = {name: x for name, x in arrays.items() if x is not None and x.dtype == np.float64}

    def objective(moving, arrays):
        return (routing_attention(**{**arrays, **moving}, **options) * direction).sum()

    for name, gradient in jax.jit(jax.grad(objective))(moving, arrays).items():
        step = 1e-6 * normal("step", *gradient.shape)
        ends = [reference.routing(**{**arrays, name: arrays[name] + s * step}, **options)[0] for s in (1, -1)]
        difference = ((ends[0] - ends[1]) / 2 * direction).sum()
        np.testing.assert_allclose((gradient * step).sum(), difference, rtol=1e-5, err_msg=name)


LUCIDRAINS = {
    "causal_shared": dict(),
    "causal_shared_memory": dict(slots=2),
    "causal_unshared": dict(shared=False, slots=2),
    "shared": dict(causal=False, shared=True),
    "unshared": dict(causal=False),
    "context": dict(causal=False, tokens=11, key_window=5),
}


@pytest.mark.parametrize("name", LUCIDRAINS)
def test_equals_lucidrains_module(name):
    with np.load(REFERENCE / "cluster.npz") as file:
        record = part(dict(file), f"attention/{name}")
    options = dict(LUCIDRAINS[name])
    slots, tokens = options.pop("slots", 0), options.pop("tokens", 18)
    shared = options.get("shared", options.get("causal", True))
    query, key, value = (
        normal(name, 2, 2, n, 4).swapaxes(1, 2) for name, n in (("query", 18), ("key", tokens), ("value", tokens))
    )
    means = reference.normal(normal("means", 2, 3, 4), "lucidrains")
    memory = {f"memory_{x}": normal(f"memory_{x}", 2, 3, slots, 4) for x in ("key", "value") if slots}
    run = program(window=5, style="lucidrains", **options)
    mask = normal("key_mask", 2, tokens) > -0.85
    for suffix, key_mask in (("", np.ones_like(mask)), ("_masked", mask)):
        out = np.asarray(run(query, None if shared else key, value, means, key_mask=key_mask, **memory))
        # There padded queries see all keys at once, padded and later ones included.
        seen = key_mask if tokens == 18 else np.ones((2, 18), bool)
        np.testing.assert_allclose(out[seen], record[f"{suffix}/out"].swapaxes(1, 2)[seen], atol=1e-12)
    routed = query if shared else np.concatenate([query, key], axis=1)
    np.testing.assert_allclose(1e-4 * commitment(routed, means, style="lucidrains"), record["/loss"], rtol=1e-12)


def test_one_cluster_of_all_tokens_is_full_causal_attention():
    query, _, value, _ = operands()
    means = normal("one", H, 1, D)
    run = program(window=N)
    out = run(query, None, value, means)
    unit = reference.normal(query, "official")
    expected, _ = reference.local(unit, unit, value, sees=lambda b, t, j: j <= t, scale=1.0)
    np.testing.assert_allclose(out, expected / 1.01, atol=1e-12)
    early = np.arange(N)[:, None, None] < 8
    after = run(np.where(early, query, 3 - query), None, np.where(early, value, -value), means)
    np.testing.assert_array_equal(after[:, :8], out[:, :8])
    assert (after[:, 8:] != out[:, 8:]).any()


def test_the_membership_of_a_sequence_leaks_the_future():
    """As documented: if this fails, the documentation is wrong."""
    query, _, value, means = operands()
    out = program(window=W)(query, None, value, means)
    flipped = np.where(np.arange(N)[:, None, None] < 10, query, -query)
    changed = program(window=W)(flipped, None, value, means)
    assert (abs(changed - out)[:, :10].max(-1) > 1e-3).any()


def test_identities():
    query, _, value, means = operands()
    run = program(window=W, return_membership=True)
    out, (members, keys) = run(query, None, value, means)
    np.testing.assert_array_equal(members, keys)
    assert (np.diff(members, axis=-1) > 0).all()
    shuffled, _ = run(query, None, value, means[:, [2, 0, 1]])
    np.testing.assert_allclose(shuffled, out, atol=1e-13)
    _, (scaled, _) = run(query, None, value, means * np.array([0.1, 1.0, 40.0])[:, None])
    np.testing.assert_array_equal(scaled, members)
    counts = np.stack([[np.bincount(m.ravel(), minlength=N) for m in sample] for sample in members])
    constant, _ = run(query, None, np.broadcast_to(value[:, :1], value.shape), means)
    share = (counts / (counts + 0.01)).swapaxes(1, 2)[..., None]
    np.testing.assert_allclose(constant, value[:, :1] * share, atol=1e-13)
    assert (counts == 0).any() and not out[(counts == 0).swapaxes(1, 2)].any()


def test_disjoint_clusters_scale_by_one_over_1_01():
    """Clusters that share the tokens out: each attends as if it were alone."""
    tokens = 5 * np.eye(6)[np.arange(12) % 3][None, :, None]
    means = np.eye(3, 6)[None]
    value = normal("value", 1, 12, 1, 4)
    out, (members, _) = program(window=4, return_membership=True)(tokens, None, value, means)
    assert members[0, 0].tolist() == [[c, c + 3, c + 6, c + 9] for c in range(3)]
    for c in range(3):
        own = slice(c, None, 3)
        alone = program(window=4)(tokens[:, own], None, value[:, own], means[:, :1])
        np.testing.assert_allclose(out[:, own], alone, atol=1e-14)
        np.testing.assert_allclose(out[:, c], value[:, c] / 1.01, atol=1e-14)


def test_equal_scores_take_the_first():
    scores = jnp.array([1.0, 2.0, 1.0, 1.0, 2.0, 1.0])[None, None, :, None]
    assert top_members(scores, 4)[0, 0, 0].tolist() == [0, 1, 2, 4]


def test_bfloat16_is_routed_and_summed_in_float32():
    query, _, value, means = (x if x is None else x.astype(jnp.bfloat16) for x in operands())
    run = program(window=W, return_membership=True)
    out, (members, _) = run(query, None, value, means)
    exact, (expected, _) = run(*(x if x is None else x.astype(np.float32) for x in (query, None, value, means)))
    np.testing.assert_array_equal(members, expected)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=3e-2)


def test_float32_and_a_second_run():
    arrays = [None if x is None else x.astype(np.float32) for x in operands()]
    run = program(window=W)
    out = run(*arrays)
    np.testing.assert_array_equal(run(*arrays), out)
    np.testing.assert_allclose(out, reference.routing(*arrays, window=W)[0], atol=1e-5)


def test_dropped_weights():
    query, _, value, means = operands()
    _, kept = program(window=W, return_weights=True)(query, None, value, means)
    run = program(window=W, return_weights=True, dropout_rate=0.25)
    out, weights = run(query, None, value, means, dropout_key=jax.random.key(1))
    np.testing.assert_allclose(np.einsum("bhnm,bmhe->bnhe", weights, value), out, atol=1e-12)
    single = np.asarray((kept > 0) & (weights != kept))
    ratio = np.asarray(weights)[single] / np.asarray(kept)[single]
    assert 0.1 < (ratio == 0).mean() < 0.4
    np.testing.assert_allclose(ratio.max(), 4 / 3)


def test_cost_grows_with_the_power_one_and_a_half():
    def flops(n):
        clusters = int(n**0.5)
        arrays = (jax.ShapeDtypeStruct((1, n, 1, 64), jnp.float32),) * 2
        means = jax.ShapeDtypeStruct((1, clusters, 64), jnp.float32)
        run = functools.partial(routing_attention, window=n // clusters)
        return cost(lambda q, v, means: run(q, None, v, means), *arrays, means).flops

    exponent = np.log2(flops(65536) / flops(16384)) / 2
    assert 1.45 < exponent < 1.55


def test_implementations():
    query, value, means = (jnp.asarray(x) for x in operands() if x is not None)
    with record_choices() as choices:
        expected = routing_attention(query, None, value, means, window=W)
    assert {choice.implementation for choice in choices} == {"xla"}
    same = routing_attention(query, None, value, means, window=W, implementation="xla")
    np.testing.assert_array_equal(same, expected)
    with pytest.raises(NotImplementedError, match="cudnn: not written for this op, which has pallas_tpu"):
        routing_attention(query, None, value, means, window=W, implementation="cudnn")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(style="officail"), "unknown style 'officail'; did you mean 'official'"),
        (dict(membership="prefixes"), "unknown membership 'prefixes'; did you mean 'prefix'"),
        (dict(assignment="lsh"), "unknown assignment 'lsh'; known: 'topk', 'strided', 'hash'"),
        (dict(window=0), "window must be at least 1 token, got 0"),
        (dict(key_window=4), "key_window=4 is for unshared attention"),
        (dict(shared=False), "shared=False key must be given"),
        (dict(key="k"), "shared=True .the default of causal attention; queries are the keys. key must be None"),
        (
            dict(key="k", causal=False, value="v"),
            r"value must be .* of key, of shape \(2, 19, 2, 5\); got \(2, 9, 2, 4\)",
        ),
        (dict(key="m", shared=False, value="v"), "causal attention needs as many keys as queries, 19; got 9"),
        (dict(key="m", causal=False, value="v", relative_key="r"), "hold 10 queries and 9 keys"),
        (dict(relative_key="d"), r"relative_key must be \(2 R . 1, 5\).*got \(4, 5\)"),
        (dict(means="kd"), r"means must be \(H, K, D\) with H=2 and D=5 of query; got \(2, 3, 4\)"),
        (dict(memory_key="mk"), "memory_key and memory_value come together"),
        (dict(memory_key="mk", memory_value="mk"), r"memory_value must be .*\(2, 3, 1, 4\), got \(2, 3, 1, 5\)"),
        (dict(membership="prefix", memory_key="mk", memory_value="mv"), "'prefix' needs memory_key=None"),
        (dict(membership="nearest", causal=False, shared=True), "membership 'nearest' needs causal=True"),
        (dict(membership="nearest", shared=False, key="k"), "membership 'nearest' needs shared=True"),
        (dict(membership="prefix", assignment="strided"), "needs assignment='topk' or 'hash'"),
        (dict(segments="s"), r"segments are for self-attention over \(2, 19\) tokens, got \(2, 9\)"),
        (dict(dropout_rate=1.0), "dropout_rate must be at least 0 and below 1, got 1.0"),
        (dict(dropout_rate=0.5), "dropout_rate 0.5 needs a dropout_key"),
    ],
    ids=str,
)
def test_names_what_is_wrong(options, words):
    made = dict(k=(2, 19, 2, 5), m=(2, 9, 2, 5), v=(2, 9, 2, 4), r=(7, 5), d=(4, 5), kd=(2, 3, 4), s=(2, 9))
    made |= dict(mk=(2, 3, 1, 5), mv=(2, 3, 1, 4))
    options = {name: jnp.zeros(made[x]) if isinstance(x, str) and x in made else x for name, x in options.items()}
    arguments = dict(zip(("query", "key", "value", "means"), operands()), window=10)
    with pytest.raises(ValueError, match=words):
        routing_attention.__wrapped__(**arguments | options)
