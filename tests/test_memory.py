"""Miras against a slow recurrence with autodiff inner gradients, in float64: every bias with every gate."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.memory.modules import MLP
from kernels.memory.proximal import ElasticNet, ElasticNetFTRL, FDivergence
from kernels.memory.retention import Bregman, Decay, Entropy, LqStability
from kernels.memory.rule import MemoryRule
from tests import memory_reference as ref
from tests.memories import RULES, operands, ours, theirs

pytestmark = pytest.mark.usefixtures("float64")

FAN_IN = {"w": (-1,), "w1": (-1,), "w2": (-1,)}
CHANNEL = {"w": (-2,), "w1": (-1,), "w2": (-2,)}
WHOLE = {"w": (-2, -1), "w1": (-2, -1), "w2": (-2, -1)}

# Ours, and the reference's; what "paper" divides by inside a chunk differs with its length.
GATES = {
    "none": ("none", lambda b: ref.Gate()),
    "decay": ("decay", lambda b: ref.Gate()),
    "kl": ("kl", lambda b: ref.Simplex(FAN_IN)),
    "kl_channel": (Entropy("channel", total=2.0), lambda b: ref.Simplex(CHANNEL, 2.0)),
    "kl_matrix": (Entropy("matrix"), lambda b: ref.Simplex(WHOLE)),
    "kl_linear": (Entropy(interior="linear"), lambda b: ref.Simplex(FAN_IN, linear=True)),
    "f_divergence": (FDivergence("kl"), lambda b: ref.Simplex(FAN_IN)),
    "elastic_net": (ElasticNet(l1=0.5, l2=0.25), lambda b: ref.ElasticNet(alpha=2.0, beta=4.0)),
    "elastic_net_ftrl": (ElasticNetFTRL(0.1), lambda b: ref.Leader(0.1)),
    "lq": ("lq", lambda b: ref.Lq(own_norm=b == 1)),
    "lq_token": (LqStability(3.0, normalizer="token"), lambda b: ref.Lq(3.0, own_norm=True)),
    "lq_dual": (LqStability(3.5, "dual"), lambda b: ref.Lq(3.5, "dual")),
    "lq_identity": (LqStability(link_name="identity"), lambda b: ref.Lq(link="identity")),
    "bregman": (Bregman("sigmoid"), lambda b: ref.Sigmoid()),
}
BIASES = ("dot", "l2", "lp", "l1", "huber_norm", "huber_coord", "huber_switch", "shift_robust")


def check(
    kind,
    bias,
    gate,
    forms,
    chunk_size,
    tokens=9,
    algorithm="gradient",
    read="after",
    channels=False,
    jit=False,
    **sizes,
):
    name, reference = GATES[gate]
    rule = MemoryRule(kind, bias, name, algorithm, read)
    arrays, gates = operands(rule, tokens, channels, **sizes)
    expected = theirs(arrays, gates, kind, bias, reference(chunk_size), chunk_size=chunk_size, read=read)
    for form in forms:
        out = ours(arrays, gates, rule, jit, chunk_size=chunk_size, form=form)
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(out, expected, rtol=1e-11, atol=1e-11, err_msg=form)


@pytest.mark.parametrize(
    "gate", ["none", "decay", "kl", "f_divergence", "elastic_net", "elastic_net_ftrl", "lq", "bregman"]
)
@pytest.mark.parametrize("bias", BIASES)
def test_chunks_of_one_are_the_recurrence(bias, gate):
    check("matrix", bias, gate, ["chunk"], 1, tokens=5, channels=gate in ("decay", "kl", "lq"))


@pytest.mark.parametrize("gate", GATES)
def test_the_mlp_in_chunks_of_one(gate):
    check("mlp", "l2", gate, ["chunk"], 1, tokens=5, channels=gate != "kl")


@pytest.mark.parametrize("gate", ["decay", *(pytest.param(g, marks=pytest.mark.slow) for g in GATES if g != "decay")])
def test_longer_chunks_freeze_the_gradient(gate):
    check("mlp", "huber_norm", gate, ["chunk", "recurrent"], 4, channels=gate != "lq")


@pytest.mark.parametrize("bias", BIASES)
def test_every_bias_in_longer_chunks(bias):
    check("mlp", bias, "decay", ["chunk"], 4)


@pytest.mark.parametrize("gate", ["decay", "kl", "lq", "elastic_net"])
def test_vectors(gate):
    check("vector", "lp", gate, ["chunk", "materialized"], 4, channels=gate != "decay")


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("kind", ["vector", "mlp"])
def test_momentum(kind, channels):
    check(kind, "l2", "decay", ["chunk", "recurrent", "materialized"], 4, algorithm="momentum", channels=channels)


@pytest.mark.parametrize("gate, algorithm", [("decay", "gradient"), ("decay", "momentum"), ("kl", "gradient")])
def test_reading_before_writing(gate, algorithm):
    check("mlp", "l2", gate, ["chunk", "recurrent"], 4, read="before", algorithm=algorithm, channels=True)


def test_decay_before_the_gradient():
    for kind in ("mlp", "vector"):
        rule = MemoryRule(kind, "l2", Decay(first=True))
        arrays, gates = operands(rule, 11, channels=True)
        expected = theirs(arrays, gates, kind, "l2", ref.Gate(), chunk_size=4, decay_first=True)
        for form in ("chunk", "recurrent"):
            np.testing.assert_allclose(ours(arrays, gates, rule, chunk_size=4, form=form), expected, rtol=1e-11)


def test_erf_and_the_norm_are_what_they_say():
    """One token, read before it writes: the memory is the initial one."""
    rule = MemoryRule(MLP(gelu="erf", epsilon=1e-2), "l2", "none", read="before")
    arrays, gates = operands(rule, 1)
    out = ours(arrays, gates, rule)
    hidden = np.einsum("hfd,bnhd->bnhf", arrays["weights"]["w2"], arrays["query"])
    hidden = hidden * (1 + np.vectorize(math.erf)(hidden / 2**0.5)) / 2
    z = np.einsum("hdf,bnhf->bnhd", arrays["weights"]["w1"], hidden)
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-2)
    np.testing.assert_allclose(out, arrays["query"] + z, rtol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_random_sizes(seed):
    rng = np.random.default_rng(seed)
    chunk_size, tokens, d = (int(rng.integers(low, high)) for low, high in ((2, 20), (1, 40), (1, 9)))
    d = 129 if seed == 0 else d
    gate, kind = rng.choice(["decay", "lq"]), rng.choice(["mlp", "matrix"])
    check(kind, "l2", gate, ["chunk"], chunk_size, tokens, channels=True, jit=True, d=d, heads=1 + seed % 3, rng=rng)


@pytest.mark.parametrize(
    "rule",
    [pytest.param(rule, marks=pytest.mark.slow) if i in (0, 3) else rule for i, rule in enumerate(RULES)],
    ids=["moneta", "yaad", "memora", "memora-linear"],
)
def test_float32_and_bfloat16(rule):
    arrays, gates = operands(rule, 20, d=8, f=32, channels=rule.bias.threshold is None)
    arrays["key"] = arrays["key"] / np.linalg.norm(arrays["key"], axis=-1, keepdims=True)
    # Steps of .001 to .015, as in training: larger ones magnify every rounding chunk by chunk, as do memories that
    # forget within a token or two and are then near no weights at all.
    gates |= {"step": gates["step"] / 20, "log_retention": gates["log_retention"] / 10}
    if type(rule.retention) is Entropy:
        # Of positive weights negative inputs leave nothing past the gelu but what the norm magnifies.
        arrays |= {n: np.abs(arrays[n]) for n in ("query", "key")}
    expected = np.asarray(ours(arrays, gates, rule, chunk_size=8))
    with jax.enable_x64(False):
        single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (arrays, gates))
        out, state = ours(*single, rule, jit=True, chunk_size=8, return_state=True)
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
        half = {n: a if n == "weights" else a.astype(jnp.bfloat16) for n, a in single[0].items()}
        out, state = ours(half, single[1], rule, jit=True, chunk_size=8, return_state=True)
        assert out.dtype == jnp.bfloat16 and all(x.dtype == jnp.float32 for x in state.running.values())
        error = np.asarray(out, np.float64) - expected
        assert np.linalg.norm(error) < 0.02 * np.linalg.norm(expected)
