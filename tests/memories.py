"""Random operands of Miras, and its two computations of them: ours and the reference's."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels.memory import memora, miras, moneta, yaad
from tests import memory_reference as ref

RULES = (moneta(), yaad(), memora(), memora(interior="linear"))


def shapes(kind, heads=2, d=3, e=3, f=5):
    return {
        "vector": {"w": (heads, d)},
        "matrix": {"w": (heads, e, d)},
        "mlp": {"w1": (heads, d, f), "w2": (heads, f, d)},
    }[kind]


def operands(rule, tokens, channels=False, heads=2, d=3, e=None, f=5, batch=2, rng=None):
    """Arguments of `miras`, in float64, as dicts of arrays and of gates; keys and values such that errors are O(1)."""
    kind, rng = type(rule.memory).__name__.lower(), rng or np.random.default_rng(0)
    e = e or d
    lead = (batch, tokens, heads)
    gate = (*lead, d) if channels else lead
    arrays = {"query": rng.standard_normal((*lead, d)), "key": rng.standard_normal((*lead, d)) / d**0.5}
    arrays |= {"value": rng.standard_normal((*lead, e))}
    arrays |= {"weights": {k: rng.standard_normal(s) / 2 for k, s in shapes(kind, heads, d, e, f).items()}}
    gates = {"step": rng.uniform(0.02, 0.3, gate)}
    if rule.retention.decays != "refused":
        gates["log_retention"] = np.log(rng.uniform(0.3, 1, gate))
    if rule.bias.threshold is not None:
        gates["threshold"] = rng.uniform(0.3, 1.2, (*lead, e) if rule.bias.threshold == "channel" else lead)
    if rule.algorithm == "momentum":
        gates["log_momentum"] = np.log(rng.uniform(0.1, 0.9, gate))
    return arrays, gates


compiled = jax.jit(miras, static_argnames=("rule", "chunk_size", "form", "return_state"))


def ours(arrays, gates, rule, jit=False, **options):
    """Operation by operation unless `jit`: the shapes are few and the rules many, whose compilation would take long."""
    if jit:
        return compiled(**arrays, **gates, rule=rule, **options)
    arrays, gates = jax.tree.map(jnp.asarray, (arrays, gates))
    with jax.disable_jit():
        return miras(**arrays, **gates, rule=rule, **options)


def theirs(arrays, gates, kind, bias, gate, **options):
    return ref.run(kind, bias, gate, **arrays, **gates, **options)[0]
