"""How work and the memory of the backward pass grow with the number of tokens, counted without running anything."""

import math

import jax
import jax.numpy as jnp
import pytest

from kernels.cluster import routing_attention
from kernels.cost import cost
from kernels.delta import delta_rule
from kernels.dense import attention
from kernels.gated_linear import gated_linear_attention
from kernels.linear import linear_attention
from kernels.memory import memora, miras, moneta, yaad
from kernels.residuals import residual_bytes

D = 64
LENGTHS = (16384, 65536)


def tokens(n, *shape):
    return jax.ShapeDtypeStruct((1, n, 1, *shape), jnp.float32)


def vectors(n, count=3):
    return [tokens(n, D)] * count


def of_memory(rule, threshold=False, **options):
    weights = {"w1": jax.ShapeDtypeStruct((1, D, 4 * D), jnp.float32)}
    weights["w2"] = jax.ShapeDtypeStruct((1, 4 * D, D), jnp.float32)

    def run(q, k, v, step, retention, *rest):
        given = dict(threshold=rest[0]) if threshold else {}
        return miras(q, k, v, rest[-1], rule=rule, step=step, log_retention=retention, **given, **options)

    return run, lambda n: [*vectors(n, 5), *([tokens(n)] if threshold else []), weights]


def routed(n):
    clusters = math.isqrt(n)
    return lambda q, v, means: routing_attention(q, None, v, means, window=n // clusters, implementation="xla")


def routed_arguments(n):
    return [*vectors(n, 2), jax.ShapeDtypeStruct((1, math.isqrt(n), D), jnp.float32)]


LINEAR = {
    "linear": (lambda q, k, v: linear_attention(q, k, v, causal=True), vectors),
    "no decay": (gated_linear_attention, vectors),
    "decay per token": (gated_linear_attention, lambda n: [*vectors(n), tokens(n)]),
    "decay per channel": (gated_linear_attention, lambda n: vectors(n, 4)),
    "delta": (delta_rule, lambda n: [*vectors(n), tokens(n)]),
    "gated delta": (delta_rule, lambda n: [*vectors(n), tokens(n), tokens(n)]),
    "moneta": of_memory(moneta()),
    "yaad": of_memory(yaad(), threshold=True),
    "memora": of_memory(memora()),
}


def exponent(count):
    """The local exponent over the last two octaves."""
    few, many = (count(n) for n in LENGTHS)
    return math.log(many / few) / math.log(LENGTHS[1] / LENGTHS[0])


@pytest.mark.parametrize("name", LINEAR)
def test_linear_work_and_linear_memory(name):
    run, arguments = LINEAR[name]
    assert exponent(lambda n: cost(run, *arguments(n)).matmul_flops) == pytest.approx(1, abs=0.05)
    assert exponent(lambda n: residual_bytes(run, *arguments(n))) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("rule, threshold", [(moneta(), False), (yaad(), True)])
def test_the_backward_pass_of_a_memory_keeps_a_state_per_chunk(rule, threshold):
    """Of N tokens N / chunk states of 8 D^2 numbers, and less for the tokens themselves than for the states."""
    states = 4 * 2 * (4 * D * D)
    for chunk in (16, 64):
        run, arguments = of_memory(rule, threshold, chunk_size=chunk)
        kept = residual_bytes(run, *arguments(4096)) - residual_bytes(run, *arguments(2048))
        per_chunk = kept / (2048 / chunk)
        tokens_of_a_chunk = 4 * chunk * D
        # The running state and the anchor, of which a chunk's start needs one; inputs, gates and outputs.
        assert per_chunk < 2 * states + 20 * tokens_of_a_chunk, (per_chunk / states, chunk)


def test_routing_with_as_many_clusters_as_the_square_root():
    found = exponent(lambda n: cost(routed(n), *routed_arguments(n)).matmul_flops)
    assert found == pytest.approx(1.5, abs=0.05)
    # N * window weights, beside which the tokens weigh as much at these lengths.
    assert 1 < exponent(lambda n: residual_bytes(routed(n), *routed_arguments(n))) < 1.55


def test_softmax_is_quadratic():
    def run(q, k, v):
        return attention(q, k, v, causal=True, implementation="xla")

    assert exponent(lambda n: cost(run, *vectors(n)).matmul_flops) == pytest.approx(2, abs=0.05)
    assert exponent(lambda n: residual_bytes(run, *vectors(n))) == pytest.approx(2, abs=0.05)
