"""Cases on feature maps: windows, channels, routed regions, halves, pairs and parts."""

from kernels import bilevel_attention, channel_attention, depthwise_conv2d, window_attention
from kernels.bench.case import MULTIPLY_ADD, Case, Operand, part, table_of
from kernels.cross import bilateral_attention, global_local_attention, pairwise_attention, part_attention
from kernels.dense import attention


def _case(function, variant, family, shape, operands, run, pairs, *, pattern="self noncausal", table=None) -> Case:
    """A case whose products are `pairs` multiply-adds; the table is the function's own where none is given."""
    return Case(
        op=function.__name__,
        variant=variant,
        family=family,
        shape=shape,
        pattern=pattern,
        operands=operands,
        run=run,
        table=table or table_of(function),
        flops=MULTIPLY_ADD * pairs,
    )


def window(
    batch: int, side: int, heads: int, size: int = 7, *, bias: bool = False, partition: str = "block", d: int = 32
) -> Case:
    n, channels = size * size, heads * d
    operands = {"qkv": Operand((batch, side, side, 3 * channels))}
    if bias:
        operands["bias"] = Operand((heads, n, n), batched=False)
    windows = batch * (side // size) ** 2

    def run(implementation, qkv, bias=None):
        return window_attention(
            qkv,
            num_heads=heads,
            window=(size, size),
            partition=partition,
            bias=bias,
            implementation=implementation,
        )

    return _case(
        window_attention,
        {"block": "window", "grid": "grid window"}[partition] + (" + bias" if bias else ""),
        "window",
        f"{windows}x{heads} windows of {size}x{size}, map {batch}x{side}x{side}, D{d}",
        operands,
        run,
        windows * heads * n * n * 2 * d,
    )


def bilevel(batch: int, regions: int, size: int, k: int, heads: int, d: int = 32) -> Case:
    """`regions` x `regions` regions of `size` x `size` tokens."""
    side, count, n = regions * size, regions * regions, size * size
    operands = {
        "qkv": Operand((batch, side, side, 3 * heads * d)),
        "indices": Operand((batch, count, k), "choice", of=count),
    }

    def run(implementation, qkv, indices):
        return bilevel_attention(qkv, indices, num_heads=heads, region=(size, size), implementation=implementation)

    return _case(
        bilevel_attention,
        "bi-level",
        "gather",
        f"{count} regions of {n} tokens, top {k}, map {batch}x{side}x{side}, H{heads} D{d}",
        operands,
        run,
        batch * heads * count * n * (k * n) * 2 * d,
    )


def channel(batch: int, side: int, heads: int, d: int = 32) -> Case:
    tokens = side * side
    shape = Operand((batch, tokens, heads, d))
    return _case(
        channel_attention,
        "channel",
        "image",
        _map(batch, side, heads, d),
        {"query": shape, "key": shape, "value": shape},
        lambda implementation, **arrays: channel_attention(**arrays, implementation=implementation),
        batch * tokens * heads * d * d * 2,
    )


def bilateral(batch: int, side: int, heads: int, d: int = 32) -> Case:
    operands = [Operand((batch, side, side, heads, d))] * 3
    half = side * side // 2
    return _cross(bilateral_attention, "bilateral", (batch, side, heads, d), operands, 2 * half * half)


def pairwise(batch: int, side: int, heads: int, d: int = 32) -> Case:
    n = side * side
    operands = [Operand((batch, n, heads, d))] * 5
    return _cross(pairwise_attention, "pair-wise", (batch, side, heads, d), operands, n * 2 * n)


def global_local(batch: int, side: int, heads: int, d: int = 32) -> Case:
    """A tenth of the tokens ask, as in DCAL."""
    n = side * side
    operands = [Operand((batch, n // 10, heads, d)), *[Operand((batch, n, heads, d))] * 2]
    return _cross(global_local_attention, "global-local", (batch, side, heads, d), operands, n // 10 * n)


def parts(batch: int, side: int, heads: int, d: int = 32, count: int = 5, cells: int = 16) -> Case:
    n = side * side
    operands = [Operand((batch, count, cells, heads, d)), *[Operand((batch, n, heads, d))] * 2]
    return _cross(part_attention, "parts", (batch, side, heads, d), operands, count * cells * n)


def depthwise(batch: int, side: int, heads: int, d: int = 32) -> Case:
    channels, kernel = heads * d, 3
    pairs = kernel * side - 2
    return part(
        "depthwise_conv2d",
        "depthwise 3x3",
        _map(batch, side, heads, d),
        "self noncausal",
        lambda x, kernel: depthwise_conv2d(x, kernel, padding=1),
        operands={
            "x": Operand((batch, side, side, channels)),
            "kernel": Operand((kernel, kernel, 1, channels), batched=False),
        },
        flops=MULTIPLY_ADD * batch * pairs * pairs * channels,
    )


def _map(batch, side, heads, d) -> str:
    return f"map {batch}x{side}x{side}, H{heads} D{d}"


def _cross(function, variant, sizes, operands, pairs) -> Case:
    """Softmax attention over a map, to (key, value) or to those of a partner as well."""
    batch, side, heads, d = sizes
    names = ("query", "key", "value", "partner_key", "partner_value")

    def run(implementation, query, key, value, **partner):
        given = (tuple(partner.values()),) if partner else ()
        return function(query, key, value, *given, implementation=implementation)

    return _case(
        function,
        variant,
        "image",
        _map(batch, side, heads, d),
        dict(zip(names, operands)),
        run,
        batch * heads * pairs * 2 * d,
        pattern="cross noncausal",
        table=table_of(attention),
    )
