"""The kernel of memories compiled for TPUs that are not there."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels import aot, hlo
from kernels.memory import Entropy, Huber, LpError, LqStability, MemoryRule, memora, miras, moneta, yaad
from tests.tpu_child import in_tpu_process

RULES = {"yaad": yaad(), "moneta": moneta(), "memora": memora(interior="linear"), "matrix": yaad(memory="matrix")}
PARTS = {
    "reads before": yaad(huber="coord", read="before"),
    "a hyperbolic tangent": MemoryRule("matrix", Huber("switch", smooth="tanh"), "decay"),
    "a bound, a power": MemoryRule("mlp", LpError(2.5, max_norm=0.5), LqStability(3.5)),
    "shifts": MemoryRule("matrix", "shift_robust", Entropy("matrix", interior="linear")),
    "outputs": MemoryRule("mlp", "dot", Entropy("channel", total=2.5, interior="linear")),
}
# Rows, tokens, heads, their channels, hidden units: of the 170m models and of those of 1.3 billion parameters.
SMALL, LARGE = (1, 1024, 4, 48, 192), (1, 256, 2, 128, 512)


def compiled(topology, name, sizes, dtype, implementation="pallas_tpu", documents=False):
    """Of output and gradients: how many kernels the program calls, and the bytes that it moves.

    With documents gates are of heads, and the last state, too, has a gradient.
    """
    (b, n, h, d, f), rule = sizes, (RULES | PARTS)[name]
    where = NamedSharding(Mesh(aot.tpu_devices(topology)[:1], ("x",)), PartitionSpec())

    def of(*shape, dtype="float32"):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=where)

    arrays = {name: of(b, n, h, d, dtype=dtype) for name in ("query", "key", "value")}
    arrays |= {name: of(b, n, h, *(() if documents else (d,))) for name in ("step", "log_retention")}
    if rule.bias.threshold is not None:
        arrays["threshold"] = of(b, n, h)
    sides = rule.memory.sides
    arrays["weights"] = {"w": of(h, d, d)} if "w" in sides else {"w1": of(h, d, f), "w2": of(h, f, d)}
    segments = of(b, n, dtype="int32") if documents else None

    def both(arrays, segments):
        def results(arrays):
            options = dict(rule=rule, implementation=implementation, segments=segments, aligned=documents)
            if not documents:
                return miras(**arrays, **options)
            out, state = miras(**arrays, **options, return_state=True)
            return out, state.anchor, state.running

        out, pull = jax.vjp(results, arrays)
        return out, pull(out)

    text = jax.jit(both).lower(arrays, segments).compile().as_text()
    return text.count('custom_call_target="tpu_custom_call"'), hlo.summary(text, 1).bytes


def compile_all(cases):
    return [compiled(*case) for case in cases]


@pytest.mark.slow
def test_memories_compile_for_every_tpu():
    cases = [(topology, "yaad", SMALL, "bfloat16") for topology in ("v5e:2x2", "v6e:2x2", "v5p:2x2x1")]
    cases += [("v5e:2x2", name, SMALL, "bfloat16") for name in ("moneta", "memora", "matrix")]
    cases += [("v5e:2x2", "yaad", SMALL, "float32"), ("v5e:2x2", "yaad", LARGE, "bfloat16")]
    found = in_tpu_process(compile_all, cases)
    assert [kernels for kernels, _ in found] == [2] * len(cases)


@pytest.mark.slow
def test_what_rules_are_made_of_compiles():
    """With documents and a last state; heads of 16 channels, whose tiles are filled up, and five of them."""
    cases = [("v5e:2x2", name, (1, 200, 5, 16, 32), "bfloat16", "pallas_tpu", True) for name in PARTS]
    cases += [("v5e:2x2", name, SMALL, "bfloat16", "pallas_tpu", True) for name in RULES]
    found = in_tpu_process(compile_all, cases)
    assert [kernels for kernels, _ in found] == [2] * len(cases)


@pytest.mark.slow
def test_a_memory_on_the_chip_moves_an_eighth():
    # Of fewer heads XLA, too, has all memories on the chip.
    sizes = (4, 512, 16, 48, 192)
    cases = [("v5e:2x2", "yaad", sizes, "bfloat16", implementation) for implementation in ("pallas_tpu", "xla")]
    (kernels, moved), (none, without) = in_tpu_process(compile_all, cases)
    assert (kernels, none) == (2, 0)
    assert moved < without / 8
