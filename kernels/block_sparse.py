"""Block-sparse attention: blocks of queries attend to listed blocks of keys, the list being data."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.block_sparse_plan import Blocks, Plan
from kernels.dense import accumulator_dtype
from kernels.dispatch import Implementation, dispatch
from kernels.masking import masked_softmax
from kernels.pallas_gpu import block_sparse as gpu
from kernels.pallas_tpu import block_sparse as tpu


def block_sparse_attention(
    query: Float[Array, "B N H D"],
    key: Float[Array, "B M H D"],
    value: Float[Array, "B M H E"],
    lists: Int[Array, "B R k"],
    *,
    key_block: int | None = None,
    block_weights: Float[Array, "B R k"] | None = None,
    valid: Bool[Array, "B M"] | None = None,
    mask: Bool[Array, "#B N K"] | None = None,
    scale: float | None = None,
    implementation: str | Sequence[str] | None = None,
    return_weights: bool = False,
):
    """Softmax attention of every block of queries to the keys of the blocks that its list names.

    Self- or cross-attention; causal by a `mask`. All heads share the lists, and the queries of a block share one
    softmax over the keys of all its listed blocks, so that the order of a list does not matter.

    Args:
        query: `(B, N, H, D)`, in R contiguous blocks of N / R.
        key: `(B, M, H, D)`.
        value: `(B, M, H, E)`.
        lists: int32, for every query block the key blocks that it attends to. A block takes part as often as it is
            listed. A negative entry lists nothing. Entries are not checked when the program runs.
        key_block: tokens of a key block, which divides M; None: as many as a query block has.
        block_weights: factors on the keys and the values of every listed block, or None.
        valid: False hides a key from all queries.
        mask: `(B, N, k * key_block)`, or with 1 for B: which of the listed keys, in the order of the list, a query
            sees.
        scale: factor on the logits; None means `D ** -0.5`.
        implementation: None, a name or an order of preference; see `kernels.dispatch`.
        return_weights: also return the attention weights (XLA form only).

    Returns:
        `(B, N, H, E)` in the dtype of `value`, zero for a query that sees no key; with `return_weights` a pair with the
        weights `(B, R, H, N / R, k * key_block)`. Logits, softmax and weights are float32 (float64 for float64
        queries).

    Raises:
        ValueError: for shapes that do not fit, naming them.
        NotImplementedError: if a forced implementation cannot serve the call.

    Source: the gathered form of BiFormer (arXiv:2303.08810, equations 5 and 6), whose lists are a router's choice.
    """
    key_block = _check(query, key, value, lists, key_block, mask)
    options = dict(
        key_block=key_block,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        return_weights=return_weights,
    )
    arrays = (query, key, value, lists, block_weights, valid, mask)
    return dispatch("block_sparse_attention", TABLE, implementation, arrays, options)


def _check(query, key, value, lists, key_block, mask) -> int:
    """The size of a key block."""
    b, n, h, d = query.shape
    m, blocks, k = key.shape[1], *lists.shape[1:]
    if key.shape != (b, m, h, d) or value.shape[:3] != (b, m, h):
        raise ValueError(
            f"key must be (B, M, H, D) and value (B, M, H, E) with B, H and D of query, which is {query.shape}; got "
            f"{key.shape} and {value.shape}"
        )
    if blocks == 0 or n % blocks:
        raise ValueError(f"lists is for {blocks} blocks of queries, which do not divide the {n} queries")
    if k == 0:
        raise ValueError("lists must have at least one entry a block; a negative one lists nothing")
    key_block = n // blocks if key_block is None else key_block
    if key_block < 1 or m % key_block:
        raise ValueError(f"key_block must divide the {m} keys, got {key_block}")
    if mask is not None and mask.shape[1:] != (n, k * key_block):
        raise ValueError(
            f"mask must be (B or 1, {n}, {k * key_block}) for {n} queries and {k} listed blocks of {key_block} keys; "
            f"got {mask.shape}"
        )
    return key_block


def _xla(query, key, value, lists, block_weights, valid, mask, *, key_block, scale, return_weights):
    (b, n, h, d), (blocks, k) = query.shape, lists.shape[1:]
    m = key.shape[1]
    listed = lists >= 0
    at = jnp.where(listed, lists, 0)
    seen = jnp.repeat(listed, key_block, axis=-1)

    def gather(x):
        """`(B, M, ...)` to `(B, R, k, key_block, ...)`."""
        x = x.reshape(b, m // key_block, key_block, *x.shape[2:])
        return jax.vmap(lambda x, i: x.at[i].get(mode="promise_in_bounds"))(x, at)

    if valid is not None:
        seen = seen & gather(valid).reshape(seen.shape)

    def chosen(x):
        """`(B, M, H, channels)` to `(B, H, R, k * key_block, channels)`, zero where nothing is seen."""
        part = gather(x)
        part = jnp.where(seen.reshape(part.shape[:4])[..., None, None], part, 0)
        if block_weights is not None:
            part = part * block_weights.astype(part.dtype)[..., None, None, None]
        return part.reshape(b, blocks, k * key_block, h, x.shape[-1]).transpose(0, 3, 1, 2, 4)

    query = query.reshape(b, blocks, n // blocks, h, d).transpose(0, 3, 1, 2, 4)
    acc = accumulator_dtype(query.dtype)
    logits = jnp.einsum("bhrid,bhrjd->bhrij", query, chosen(key), preferred_element_type=acc) * scale
    allowed = seen[:, None, :, None]
    if mask is not None:
        allowed = allowed & mask.reshape(mask.shape[0], 1, blocks, n // blocks, k * key_block)
    weights = masked_softmax(logits, allowed)
    out = jnp.einsum("bhrij,bhrje->bhrie", weights.astype(value.dtype), chosen(value))
    out = out.transpose(0, 2, 3, 1, 4).reshape(b, n, h, value.shape[-1])
    return (out, weights.swapaxes(1, 2)) if return_weights else out


def _plan(query, key, value, lists, key_block, scale) -> Plan:
    n, h, d = query.shape[1:]
    return Plan(
        query=Blocks((1, n), (1, n // lists.shape[1])),
        key=Blocks((1, key.shape[1]), (1, key_block)),
        heads=h,
        dim=d,
        value_dim=value.shape[-1],
        k=lists.shape[2],
        scale=scale,
        packed=False,
    )


def _kernel(backend):
    """`unsupported` and `run` of a backend's module."""

    def rows(x):
        return x.reshape(*x.shape[:2], -1)

    def unsupported(query, key, value, lists, weights, valid, mask, *, key_block, scale, return_weights):
        if return_weights:
            return "return_weights: a fused kernel never holds the weights; implementation='xla' returns them"
        shapes = [(*x.shape[:2], x.shape[2] * x.shape[3]) for x in (query, key, value)]
        arrays = tuple(jax.ShapeDtypeStruct(shape, x.dtype) for shape, x in zip(shapes, (query, key, value)))
        plan = _plan(query, key, value, lists, key_block, scale)
        return backend.refusal(arrays, plan, weights, valid, mask)

    def run(query, key, value, lists, weights, valid, mask, *, key_block, scale, return_weights):
        plan = _plan(query, key, value, lists, key_block, scale)
        out = backend.attend(plan, tuple(map(rows, (query, key, value))), lists, weights, valid, mask)
        return out.reshape(*query.shape[:3], value.shape[-1])

    return dict(run=run, unsupported=unsupported, batched=(True,) * 7)


TABLE = (
    Implementation("pallas_tpu", platforms=("tpu",), **_kernel(tpu)),
    Implementation("pallas_triton", platforms=("cuda",), **_kernel(gpu)),
    Implementation("xla", _xla),
)
