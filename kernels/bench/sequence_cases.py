"""Cases on sequences: softmax, local and routed attention, recurrences and memories."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from kernels import (
    attention,
    delta_rule,
    flow_attention,
    gated_linear_attention,
    linear_attention,
    local_attention,
    memora,
    miras,
    moneta,
    norm_aware_linear_attention,
    routing_attention,
    short_conv,
    yaad,
)
from kernels.bench.case import MULTIPLY_ADD, Case, Operand, part, table_of
from kernels.running import running

# Tokens of a cluster or a block of local attention.
WINDOW = 64
# Moneta with bounded errors: without, random values drive it out of range.
RULES = {"moneta": functools.partial(moneta, max_norm=1.0), "yaad": yaad, "memora": memora}


def _case(op, variant, family, sizes, pattern, operands, options, flops, table, state=None, name=None) -> Case:
    """A case whose operands go to `op` by name; `state(**arrays)` as in `Case`."""
    batch, tokens, heads, d = sizes

    def run(implementation, **arrays):
        return op(**arrays, **options, implementation=implementation)

    return Case(
        op=name or op.__name__,
        variant=variant,
        family=family,
        shape=_shape(*sizes),
        pattern=pattern,
        operands=operands,
        run=run,
        table=table,
        flops=MULTIPLY_ADD * batch * heads * flops,
        length=tokens,
        state=state,
    )


def _shape(batch, tokens, heads, d) -> str:
    return f"B{batch} N{tokens} H{heads} D{d}"


def _qkv(batch, tokens, heads, d, key: str = "normal", source: int | None = None) -> dict[str, Operand]:
    shape, other = (batch, tokens, heads, d), (batch, tokens if source is None else source, heads, d)
    return {"query": Operand(shape), "key": Operand(other, key), "value": Operand(other)}


def _pattern(causal: bool, source: int | None) -> str:
    return f"{'self' if source is None else 'cross'} {'causal' if causal else 'noncausal'}"


def _seen(tokens: int, causal: bool, source: int | None = None) -> int:
    """How many pairs of query and key there are."""
    return tokens * (tokens + 1) // 2 if causal else tokens * (tokens if source is None else source)


def _carried(op: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The state that an op returns."""
    return lambda **arrays: op(**arrays, **options, return_state=True)[1]


def softmax(batch: int, tokens: int, heads: int, d: int, *, causal: bool = False, source: int | None = None) -> Case:
    sizes = batch, tokens, heads, d
    return _case(
        attention,
        "softmax",
        "sequence",
        sizes,
        _pattern(causal, source),
        _qkv(*sizes, source=source),
        dict(causal=causal),
        _seen(tokens, causal, source) * 2 * d,
        table_of(attention),
        (lambda query, key, value: (key, value)) if causal else None,
    )


def _linear(op: Callable[..., Any], variant: str, sizes, causal: bool, source: int | None, flops: int) -> Case:
    """A relative of linear attention: a recurrence where it is causal."""
    return _case(
        op,
        variant,
        "scan" if causal else "sequence",
        sizes,
        _pattern(causal, source),
        _qkv(*sizes, source=source),
        dict(causal=causal),
        flops,
        table_of(op),
        _carried(op, causal=causal) if causal else None,
    )


def linear(batch: int, tokens: int, heads: int, d: int, *, causal: bool = False, source: int | None = None) -> Case:
    """Written, read, and the sum that it is divided by."""
    sums = (tokens + (tokens if source is None else source)) * d * d + tokens * d
    # A channel of ones goes along with the values.
    products = 2 * tokens * d * (d + 1) if causal else sums
    return _linear(linear_attention, "linear", (batch, tokens, heads, d), causal, source, products)


def gated(batch: int, tokens: int, heads: int, d: int, *, decay: str | None = None) -> Case:
    """Linear attention that forgets: not at all, per head, per head and token, or per channel."""
    variant = {None: "no decay", "head": "retention", "token": "simple GLA", "channel": "GLA"}[decay]
    shape = {"head": (heads,), "token": (batch, tokens, heads), "channel": (batch, tokens, heads, d)}
    sizes = batch, tokens, heads, d
    operands = _qkv(*sizes)
    if decay is not None:
        operands["log_decay"] = Operand(shape[decay], "decay", batched=decay != "head", wide=True)
    return _case(
        gated_linear_attention,
        variant,
        "scan",
        sizes,
        "self causal",
        operands,
        {},
        2 * tokens * d * d,
        table_of(gated_linear_attention),
        _carried(gated_linear_attention),
    )


def delta(batch: int, tokens: int, heads: int, d: int, *, decay: bool = False) -> Case:
    """Recalled, written and read."""
    sizes = batch, tokens, heads, d
    operands = _qkv(*sizes, key="unit") | {"beta": Operand((batch, tokens, heads), "share")}
    if decay:
        operands["log_decay"] = Operand((batch, tokens, heads), "decay", wide=True)
    return _case(
        delta_rule,
        "gated delta" if decay else "delta",
        "scan",
        sizes,
        "self causal",
        operands,
        {},
        3 * tokens * d * d,
        table_of(delta_rule),
        _carried(delta_rule),
    )


def flow(batch: int, tokens: int, heads: int, d: int, *, causal: bool = False, source: int | None = None) -> Case:
    """Written and read once; four flows, vectors in and out of each."""
    other = tokens if source is None else source
    products = 2 * tokens * d * d + 4 * 2 * tokens * d if causal else (tokens + other) * (d * d + 2 * d)
    return _linear(flow_attention, "flow", (batch, tokens, heads, d), causal, source, products)


def norm_aware(batch: int, tokens: int, heads: int, d: int, *, causal: bool = False, source: int | None = None) -> Case:
    """As linear attention with twice the features."""
    other, features = tokens if source is None else source, 2 * d
    sums = (tokens + other) * features * d + tokens * features
    products = 2 * tokens * features * (d + 1) if causal else sums
    return _linear(norm_aware_linear_attention, "norm-aware", (batch, tokens, heads, d), causal, source, products)


def local(batch: int, tokens: int, heads: int, d: int, *, causal: bool = True, block: int = WINDOW) -> Case:
    """A block sees itself and the one before; noncausal the one after as well."""
    sizes = batch, tokens, heads, d
    blocks = math.ceil(tokens / block)
    ends = [min((i + 1) * block, tokens) for i in range(blocks)]
    pairs = 0
    for i, end in enumerate(ends):
        own, before = end - i * block, min(i, 1) * block
        after = 0 if causal or i + 1 == blocks else ends[i + 1] - end
        pairs += own * (before + after) + (own * (own + 1) // 2 if causal else own * own)
    return _case(
        local_attention,
        "local",
        "gather",
        sizes,
        _pattern(causal, None),
        _qkv(*sizes),
        dict(block=block, causal=causal, look_ahead=0 if causal else 1),
        pairs * 2 * d,
        table_of(local_attention),
        (lambda query, key, value: (key[:, : 2 * block], value[:, : 2 * block])) if causal else None,
    )


def routing(batch: int, tokens: int, heads: int, d: int, *, causal: bool = True, window: int = WINDOW) -> Case:
    """Queries are the keys; each fit to a cluster is a product, and so is each pair within one."""
    clusters = max(1, tokens // window)
    sizes = batch, tokens, heads, d
    operands = _qkv(*sizes) | {"means": Operand((heads, clusters, d), "unit", batched=False, wide=True)}
    del operands["key"]
    window = min(window, tokens)
    return _case(
        functools.partial(routing_attention, key=None, shared=True),
        "routing",
        "gather",
        sizes,
        _pattern(causal, None),
        operands,
        dict(window=window, causal=causal),
        tokens * clusters * d + clusters * _seen(window, causal) * 2 * d,
        table_of(routing_attention),
        name="routing_attention",
    )


def memory(batch: int, tokens: int, heads: int, d: int, *, rule: str = "yaad") -> Case:
    """A two-layer perceptron as memory, as wide as it is deep: recalled at the key, taught, and read at the query."""
    sizes = batch, tokens, heads, d
    gates = {"step": Operand((batch, tokens, heads), "step", wide=True)}
    if rule == "yaad":
        gates["threshold"] = Operand((batch, tokens, heads), "share", wide=True)
    gates["log_retention"] = Operand((batch, tokens, heads), "slow", wide=True)
    layers = {n: Operand((heads, d, d), "initial", batched=False, wide=True) for n in ("w1", "w2")}
    operands = {n: Operand(x.shape, x.kind if n == "value" else "unit") for n, x in _qkv(*sizes).items()}
    made = RULES[rule]()

    def op(w1, w2, **arrays):
        return miras(**arrays, weights={"w1": w1, "w2": w2}, rule=made)

    return _case(
        op,
        rule,
        "memory",
        sizes,
        "self causal",
        operands | gates | layers,
        {},
        # Two products each to recall and to read, three for the gradient of both layers.
        7 * tokens * d * d,
        table_of(miras),
        lambda w1, w2, **arrays: miras(**arrays, weights={"w1": w1, "w2": w2}, rule=made, return_state=True)[1],
        name=rule,
    )


def conv(batch: int, tokens: int, heads: int, d: int, *, width: int = 4) -> Case:
    channels = heads * d
    return part(
        "short_conv",
        f"short conv {width}",
        _shape(batch, tokens, heads, d),
        "self causal",
        short_conv,
        operands={"x": Operand((batch, tokens, channels)), "kernel": Operand((width, channels), batched=False)},
        flops=MULTIPLY_ADD * batch * channels * (width * tokens - width * (width - 1) // 2),
        length=tokens,
        state=lambda x, kernel: short_conv(x, kernel, return_state=True)[1],
    )


def running_sum(batch: int, tokens: int, heads: int, d: int) -> Case:
    return part(
        "running",
        "running sum",
        _shape(batch, tokens, heads, d),
        "self causal",
        running,
        operands={"x": Operand((batch, tokens, heads * d))},
        flops=batch * (tokens - 1) * heads * d,
        passes=2,
        length=tokens,
        state=lambda x: jnp.zeros_like(x[:, 0]),
    )
