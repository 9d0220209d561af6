"""Bi-level routing attention: regions of a feature map choose the regions whose tokens they attend to."""

import difflib
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.block_sparse_plan import Blocks, Plan
from kernels.dense import accumulator_dtype
from kernels.dispatch import Implementation, dispatch
from kernels.pallas_gpu import block_sparse as gpu
from kernels.pallas_tpu import block_sparse as tpu
from kernels.window import merge_windows, partition_windows

KvDownsampleMode = Literal["identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool", "fracpool", "conv"]
Spans = Sequence[tuple[int, int]]


def region_descriptors(x: Float[Array, "B H W C"], region: tuple[int, int]) -> Float[Array, "B regions C"]:
    """The mean token of every region of a feature map.

    Args:
        x: `(B, H, W, C)`, queries or keys.
        region: height and width of a region in tokens. Regions at the bottom and the right may be cut off by the
            edge; their mean is over the tokens that they have.

    Returns:
        `(B, regions, C)` in row-major order, `ceil(H / height) * ceil(W / width)` regions, float32 (float64 for
        float64 inputs).

    Raises:
        ValueError: if `region` is not a pair of positive sizes.

    Source: BiFormer (arXiv:2303.08810, section 3.2); cut-off regions as in the authors' `ops/bra_nchw.py`.
    """
    h, w = x.shape[1:3]
    _check_region(region)
    for axis, size, side in ((1, h, region[0]), (2, w, region[1])):
        spans = [(start, min(start + side, size)) for start in range(0, size, side)]
        x = _pool_axis(x, axis, spans, "avg", accumulator_dtype(x.dtype))
    return x.reshape(x.shape[0], -1, x.shape[-1])


def route_regions(
    query: Float[Array, "B Rq C"],
    key: Float[Array, "B Rk C"],
    *,
    k: int,
    scale: float | None = None,
    differentiable: bool = False,
) -> tuple[Int[Array, "B Rq k"], Float[Array, "B Rq k"]]:
    """The `k` regions that match each region best, one choice for all heads.

    Args:
        query, key: descriptors of the regions that ask and of those that are chosen from.
        k: how many are chosen.
        scale: factor on the logits; None means `C ** -0.5`.
        differentiable: let the gradient of the weights reach the descriptors; the choice itself has none.

    Returns:
        The indices, best first, int32; of equal logits the one with the lowest index comes first. The softmax over
        the chosen logits, float32 (float64 for float64 inputs). The products are taken at the highest precision,
        since a choice is discrete: noise near a tie changes it whole.

    Raises:
        ValueError: if `k` is not between 1 and the number of regions to choose from.

    Source: BiFormer (arXiv:2303.08810, equations 3 and 4).
    """
    if not 1 <= k <= key.shape[1]:
        raise ValueError(f"k must be between 1 and {key.shape[1]}, the number of regions, got {k}")
    if not differentiable:
        query, key = jax.lax.stop_gradient((query, key))
    acc = accumulator_dtype(query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key = query.astype(acc) * scale, key.astype(acc)
    logits = jnp.einsum("bqc,bkc->bqk", query, key, precision=jax.lax.Precision.HIGHEST)
    chosen, indices = jax.lax.top_k(logits, k)
    return indices, jax.nn.softmax(chosen, axis=-1)


def bilevel_attention(
    qkv: Float[Array, "B H W C3"],
    indices: Int[Array, "B regions k"],
    *,
    num_heads: int,
    region: tuple[int, int],
    pad: Literal["zeros"] | None = None,
    scale: float | None = None,
    route_weights: Float[Array, "B regions k"] | None = None,
    kv_downsample_mode: KvDownsampleMode = "identity",
    kv_per_win: int | None = None,
    kv_downsample_ratio: int | None = None,
    implementation: str | Sequence[str] | None = None,
    return_weights: bool = False,
):
    """Multi-head softmax attention of every region's tokens to all tokens of its chosen regions.

    Self-attention, noncausal. A region's queries share one softmax over the keys of all its chosen regions, whose
    order therefore does not matter.

    Args:
        qkv: packed queries, keys, values, `(B, H, W, 3 * C)`: first C channels q, then k, then v, the `num_heads`
            heads contiguous in each.
        indices: for every region, row-major, the regions that it attends to, all different; `route_regions` gives
            them. Nothing is checked or clipped when the program runs.
        num_heads: divides C.
        region: height and width of a region in tokens.
        pad: what happens when H or W do not divide by the region. None: an error. `"zeros"`: the bottom and right
            edges are filled with queries, keys and values of zero, which take part in the softmax.
        scale: factor on the logits; None means `C ** -0.5`, with C the width of all heads together.
        route_weights: factors on the keys and the values of every chosen region ("soft" routing), or None.
        kv_downsample_mode: how the keys and the values of a region are pooled, the descriptors being those of all
            tokens. `"identity"`: not at all. `"ada_avgpool"`, `"ada_maxpool"`: to `kv_per_win` times `kv_per_win`
            bins, which overlap where the sizes do not divide, as torch's adaptive pooling has them. `"avgpool"`,
            `"maxpool"`: over squares of side `kv_downsample_ratio`, what is left over at the edges being dropped.
        kv_per_win: side of the pooled region, for the adaptive modes.
        kv_downsample_ratio: side of the squares, for the other two.
        implementation: None, a name or an order of preference; see `kernels.dispatch`.
        return_weights: also return the attention weights (XLA form only; fused kernels never hold them).

    Returns:
        `(B, H, W, C)` in the dtype of `qkv`; with `return_weights` a pair with the weights
        `(B, regions, heads, m, k * n)` for the m tokens of a region and the n keys of each chosen one, in the
        accumulator's dtype. Logits, softmax and sums are float32 (float64 for float64 inputs).

    Raises:
        ValueError: for shapes that do not fit and modes that are unknown or lack their size, naming the argument.
        NotImplementedError: for `"fracpool"` and `"conv"`, which the authors left open too, and if a forced
            implementation cannot serve the call.

    Source: BiFormer (arXiv:2303.08810, equations 5 and 6) and the authors' `ops/bra_legacy.py`, whose scale it is.
    """
    h, w, c3 = qkv.shape[1:]
    if c3 % 3 or (c3 // 3) % num_heads:
        raise ValueError(f"qkv has {c3} channels, which is not 3 * C with C divisible by num_heads={num_heads}")
    _check_region(region)
    if pad not in (None, "zeros"):
        raise ValueError(f"pad must be None or 'zeros', got {pad!r}")
    size = h + -h % region[0], w + -w % region[1]
    if pad is None and size != (h, w):
        raise ValueError(
            f"a map of {h}x{w} tokens does not divide into {region[0]}x{region[1]} regions; pass pad='zeros' or "
            f"resize to {size[0]}x{size[1]}"
        )
    regions = (size[0] // region[0]) * (size[1] // region[1])
    if indices.shape[1] != regions:
        raise ValueError(
            f"indices is for {indices.shape[1]} regions; a map of {h}x{w} tokens has {regions} of "
            f"{region[0]}x{region[1]}"
        )
    options = dict(
        num_heads=num_heads,
        region=tuple(region),
        size=size,
        scale=(c3 // 3) ** -0.5 if scale is None else scale,
        pool=_kv_pool(tuple(region), kv_downsample_mode, kv_per_win, kv_downsample_ratio),
        return_weights=return_weights,
    )
    return dispatch("bilevel_attention", TABLE, implementation, (qkv, indices, route_weights), options)


def pooled_region(
    region: tuple[int, int],
    kv_downsample_mode: KvDownsampleMode = "identity",
    kv_per_win: int | None = None,
    kv_downsample_ratio: int | None = None,
) -> tuple[int, int]:
    """Height and width of a region's keys once they are pooled; arguments and errors of `bilevel_attention`."""
    pool = _kv_pool(tuple(region), kv_downsample_mode, kv_per_win, kv_downsample_ratio)
    return tuple(region) if pool is None else (len(pool[1]), len(pool[2]))


def _xla(qkv, indices, route_weights, *, num_heads, region, size, scale, pool, return_weights):
    b, h, w, c3 = qkv.shape
    d, k = c3 // 3 // num_heads, indices.shape[-1]
    if size != (h, w):
        qkv = jnp.pad(qkv, ((0, 0), (0, size[0] - h), (0, size[1] - w), (0, 0)))

    def fold(x):
        """`(B, heads, regions, tokens, d)`: heads are parted before the gather, while there is less to move."""
        return x.reshape(b, -1, x.shape[1], num_heads, d).transpose(0, 3, 1, 2, 4)

    def gather(x):
        chosen = jax.vmap(lambda x, i: x.at[:, i].get(mode="promise_in_bounds"))(x, indices)
        if route_weights is not None:
            chosen = chosen * route_weights.astype(chosen.dtype)[:, None, :, :, None, None]
        return chosen.reshape(-1, k * x.shape[3], d)

    query, key, value = (partition_windows(x, region) for x in jnp.split(qkv, 3, axis=-1))
    if pool is not None:
        key, value = (_pool_regions(x, region, pool) for x in (key, value))
    query, key, value = fold(query).reshape(-1, region[0] * region[1], d), gather(fold(key)), gather(fold(value))
    acc = accumulator_dtype(qkv.dtype)
    logits = jnp.einsum("bnd,bmd->bnm", query, key, preferred_element_type=acc) * scale
    weights = jax.nn.softmax(logits, axis=-1)
    out = jnp.einsum("bnm,bmd->bnd", weights.astype(qkv.dtype), value)
    shape = (b, num_heads, -1)
    out = out.reshape(*shape, *out.shape[1:]).transpose(0, 2, 3, 1, 4).reshape(-1, query.shape[1], num_heads * d)
    out = merge_windows(out, size, region)[:, :h, :w]
    if return_weights:
        return out, weights.reshape(*shape, *weights.shape[1:]).swapaxes(1, 2)
    return out


def _plan(qkv, indices, *, num_heads, region, scale, pool) -> Plan:
    b, h, w, c3 = qkv.shape
    query = key = Blocks((h, w), region)
    if pool is not None:
        tokens = len(pool[1]) * len(pool[2])
        key = Blocks((1, query.count * tokens), (1, tokens))
    dim = c3 // 3 // num_heads
    return Plan(query, key, num_heads, dim, dim, indices.shape[2], scale, packed=pool is None)


def _kernel(backend):
    """What a module of block-sparse kernels makes of this op: regions are its blocks."""

    def unsupported(qkv, indices, route_weights, *, size, return_weights, **options):
        if return_weights:
            return "return_weights: a fused kernel never holds the weights; implementation='xla' returns them"
        plan = _plan(qkv, indices, **options)
        b, h, w, c3 = qkv.shape
        keys = plan.key.count * plan.key.tokens
        shapes = [(b, h * w, c3)] if plan.packed else [(b, n, c3 // 3) for n in (h * w, keys, keys)]
        arrays = tuple(jax.ShapeDtypeStruct(shape, qkv.dtype) for shape in shapes)
        return backend.refusal(arrays, plan, route_weights)

    def run(qkv, indices, route_weights, *, size, return_weights, **options):
        plan = _plan(qkv, indices, **options)
        b, h, w, c3 = qkv.shape
        if plan.packed:
            arrays = (qkv.reshape(b, h * w, c3),)
        else:
            region, pool = options["region"], options["pool"]
            query, key_value = jnp.split(qkv, [c3 // 3], axis=-1)
            edges = ((0, 0), (0, size[0] - h), (0, size[1] - w), (0, 0))
            regions = partition_windows(jnp.pad(key_value, edges), region)
            pooled = _pool_regions(regions, region, pool).reshape(b, -1, 2 * c3 // 3)
            arrays = (query.reshape(b, h * w, c3 // 3), *jnp.split(pooled, 2, axis=-1))
        return backend.attend(plan, arrays, indices, route_weights).reshape(b, h, w, c3 // 3)

    return dict(run=run, unsupported=unsupported, batched=(True, True, True))


TABLE = (
    Implementation("pallas_tpu", platforms=("tpu",), **_kernel(tpu)),
    Implementation("pallas_triton", platforms=("cuda",), **_kernel(gpu)),
    Implementation("xla", _xla),
)


def _check_region(region):
    if len(region) != 2 or min(region) < 1:
        raise ValueError(f"region must be a pair of positive sizes, got {region}")


def _pool_axis(x, axis: int, spans: Spans, kind: str, dtype):
    """Averages or maxima over the given spans of an axis, which become its entries."""

    def reduce(part, axis):
        return part.mean(axis, dtype=dtype) if kind == "avg" else part.max(axis)

    side = spans[0][1]
    if all(span == (i * side, (i + 1) * side) for i, span in enumerate(spans)):
        x = jax.lax.slice_in_dim(x, 0, side * len(spans), axis=axis)
        return reduce(x.reshape(*x.shape[:axis], len(spans), side, *x.shape[axis + 1 :]), axis + 1)
    return jnp.stack([reduce(jax.lax.slice_in_dim(x, *span, axis=axis), axis) for span in spans], axis)


def _pool_regions(x, region, pool):
    """Regions' tokens `(BR, tokens, C)`, pooled to `(BR, keys, C)`."""
    kind, rows, columns = pool
    pooled = x.reshape(-1, *region, x.shape[-1])
    for axis, spans in ((1, rows), (2, columns)):
        pooled = _pool_axis(pooled, axis, spans, kind, accumulator_dtype(x.dtype))
    return pooled.reshape(x.shape[0], -1, x.shape[-1]).astype(x.dtype)


def _kv_pool(region, mode: str, kv_per_win: int | None, ratio: int | None):
    """`"avg"` or `"max"` and what each pooled key spans along either side of a region; None for no pooling."""
    modes = get_args(KvDownsampleMode)
    if mode not in modes:
        close = difflib.get_close_matches(str(mode), modes, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(map(repr, modes))}"
        raise ValueError(f"unknown kv_downsample_mode {mode!r}; {hint}")
    if mode in ("fracpool", "conv"):
        raise NotImplementedError(
            f"kv_downsample_mode {mode!r} is a name without a meaning in the authors' code; use 'ada_avgpool', "
            "'ada_maxpool', 'avgpool', 'maxpool' or 'identity'"
        )
    wanted = {"ada": "kv_per_win", "avg": "kv_downsample_ratio", "max": "kv_downsample_ratio"}.get(mode[:3])
    for name, value in (("kv_per_win", kv_per_win), ("kv_downsample_ratio", ratio)):
        if name == wanted and (value is None or value < 1):
            raise ValueError(f"kv_downsample_mode {mode!r} needs a positive {name}, got {value}")
        if name != wanted and value is not None:
            raise ValueError(f"kv_downsample_mode {mode!r} takes no {name}, got {value}; leave it None")
    if mode == "identity":
        return None
    if wanted == "kv_downsample_ratio" and ratio > min(region):
        raise ValueError(
            f"kv_downsample_ratio {ratio} exceeds the region of {region[0]}x{region[1]} tokens; take at most "
            f"{min(region)}"
        )

    def spans(side: int) -> Spans:
        if wanted == "kv_per_win":
            return tuple((i * side // kv_per_win, -(-(i + 1) * side // kv_per_win)) for i in range(kv_per_win))
        return tuple((i * ratio, (i + 1) * ratio) for i in range(side // ratio))

    return "max" if "max" in mode else "avg", spans(region[0]), spans(region[1])
