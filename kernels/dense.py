"""Plain softmax attention of every query with every key."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels import compat, sequence_parallel
from kernels.dispatch import Implementation, dispatch


def accumulator_dtype(dtype) -> jnp.dtype:
    """The dtype of logits, softmax and running sums for operands of `dtype`: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def _weights(query, key, bias, mask, scale, causal):
    """Softmax weights `(B, H, Tq, Tk)`; queries may outnumber the heads of the keys (grouped queries)."""
    groups = query.shape[2] // key.shape[2]
    key = jnp.repeat(key, groups, axis=2)
    acc = accumulator_dtype(query.dtype)
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=acc) * scale
    if bias is not None:
        logits = logits + bias.astype(acc)
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    if causal:
        allowed = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        logits = jnp.where(allowed, logits, -jnp.inf)
    return jax.nn.softmax(logits, axis=-1)


def _xla(query, key, value, bias, mask, *, scale, causal, return_weights):
    # jax's function takes its softmax in float32 even of float64 operands.
    if not return_weights and query.dtype != jnp.float64:
        return jax.nn.dot_product_attention(
            query, key, value, bias, mask, scale=scale, is_causal=causal, implementation="xla"
        )
    weights = _weights(query, key, bias, mask, scale, causal)
    groups = query.shape[2] // key.shape[2]
    value = jnp.repeat(value, groups, axis=2)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)
    return (out, weights) if return_weights else out


def _cudnn(query, key, value, bias, mask, *, scale, causal, return_weights):
    return jax.nn.dot_product_attention(
        query, key, value, bias, mask, scale=scale, is_causal=causal, implementation="cudnn"
    )


def _cudnn_unsupported(query, key, value, bias, mask, *, scale, causal, return_weights):
    if return_weights:
        return "return_weights needs 'xla'"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {query.dtype}; it takes bfloat16 and float16"
    if query.shape[-1] > 128 or query.shape[-1] % 8:
        return f"head dim {query.shape[-1]}; it takes multiples of 8 up to 128"
    if query.shape[1] % 2 or key.shape[1] % 2:
        return f"{query.shape[1]} queries and {key.shape[1]} keys; its backward pass takes even lengths"
    if not compat.has_cudnn():
        return "no NVIDIA GPU on the tracing host"
    return None


TABLE = (
    Implementation("cudnn", _cudnn, _cudnn_unsupported, platforms=("cuda",)),
    Implementation("xla", _xla),
)


def attention(
    query: Float[Array, "B Tq H D"],
    key: Float[Array, "B Tk K D"],
    value: Float[Array, "B Tk K D"],
    *,
    bias: Float[Array, "#B #H #Tq #Tk"] | None = None,
    mask: Bool[Array, "#B #H #Tq #Tk"] | None = None,
    scale: float | None = None,
    causal: bool = False,
    implementation: str | Sequence[str] | None = None,
    return_weights: bool = False,
):
    """Softmax attention, self or cross, causal or not, through `jax.nn.dot_product_attention`.

    Args:
        query: `(B, Tq, H, D)`.
        key, value: `(B, Tk, K, D)`; K divides H (grouped-query attention).
        bias: broadcasts to `(B, H, Tq, Tk)`, added to the scaled logits.
        mask: broadcasts likewise; True lets a query see a key. A row with no key in sight is undefined.
        scale: factor on the logits; None means `D ** -0.5`.
        causal: query i sees keys 0 to i.
        implementation: None, `"xla"`, `"cudnn"` (CUDA, 16-bit floats, even lengths) or an order of preference.
        return_weights: also return the weights (XLA form only).

    Returns:
        `(B, Tq, H, D)` in the dtype of `query`; with `return_weights` a pair with the weights
        `(B, H, Tq, Tk)`, float32 (float64 for float64 inputs).

    Raises:
        ValueError: for head counts that do not divide.
        NotImplementedError: if a forced implementation cannot serve the call.

    Source: Vaswani et al. (arXiv:1706.03762), equation 1.
    """
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"key has {key.shape[2]} heads, which do not divide query's {query.shape[2]}")
    options = dict(
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        causal=causal,
    )
    if not return_weights and sequence_parallel.ranks(query.shape[1], key.shape[1]) > 1:
        arrays = (query, key, value, bias, mask)
        return sequence_parallel.attention(attention, *arrays, **options, implementation=implementation)
    options |= dict(return_weights=return_weights)
    return dispatch("attention", TABLE, implementation, (query, key, value, bias, mask), options)
