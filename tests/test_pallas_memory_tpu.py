"""The kernel of memories compiled for TPUs that are not there."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels import aot, hlo
from kernels.memory import memora, miras, moneta, yaad
from tests.tpu_child import in_tpu_process

RULES = {"yaad": yaad(), "moneta": moneta(), "memora": memora(interior="linear"), "matrix": yaad(memory="matrix")}
# Rows, tokens, heads, their channels, hidden units: of the 170m models and of those of 1.3 billion parameters.
SMALL, LARGE = (1, 1024, 4, 48, 192), (1, 256, 2, 128, 512)


def compiled(topology, name, sizes, dtype, implementation="pallas_tpu"):
    """Of output and gradients: how many kernels the program calls, and the bytes that it moves."""
    (b, n, h, d, f), rule = sizes, RULES[name]
    where = NamedSharding(Mesh(aot.tpu_devices(topology)[:1], ("x",)), PartitionSpec())

    def of(*shape, dtype="float32"):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=where)

    arrays = {name: of(b, n, h, d, dtype=dtype) for name in ("query", "key", "value")}
    arrays |= {name: of(b, n, h, d) for name in ("step", "log_retention")}
    if rule.bias.threshold is not None:
        arrays["threshold"] = of(b, n, h)
    arrays["weights"] = {"w": of(h, d, d)} if name == "matrix" else {"w1": of(h, d, f), "w2": of(h, f, d)}

    def both(arrays):
        out, pull = jax.vjp(lambda arrays: miras(**arrays, rule=rule, implementation=implementation), arrays)
        return out, pull(out)

    text = jax.jit(both).lower(arrays).compile().as_text()
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
def test_a_memory_on_the_chip_moves_an_eighth():
    # Of fewer heads XLA, too, has all memories on the chip.
    sizes = (4, 512, 16, 48, 192)
    cases = [("v5e:2x2", "yaad", sizes, "bfloat16", implementation) for implementation in ("pallas_tpu", "xla")]
    (kernels, moved), (none, without) = in_tpu_process(compile_all, cases)
    assert (kernels, none) == (2, 0)
    assert moved < without / 8
