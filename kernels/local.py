"""Local attention: every block of tokens attends to itself and to its neighbours, or every token to a window."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from kernels import sequence_parallel
from kernels.dense import accumulator_dtype
from kernels.dispatch import Implementation, dispatch
from kernels.masking import check_dropout, document_runs, dropout, masked_softmax
from kernels.relative import check_tables, relative_logits, relative_values


def local_attention(
    query: Float[Array, "B N H D"],
    key: Float[Array, "B N H D"],
    value: Float[Array, "B N H E"],
    *,
    block: int,
    look_back: int = 1,
    look_ahead: int = 0,
    causal: bool = True,
    window: int | None = None,
    relative_key: Float[Array, "R D"] | None = None,
    relative_value: Float[Array, "R E"] | None = None,
    key_mask: Bool[Array, "B N"] | None = None,
    segments: Int[Array, "B N"] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | UInt32[Array, "2"] | None = None,
    implementation: str | Sequence[str] | None = None,
    return_weights: bool = False,
):
    """Softmax attention within blocks and their neighbours; self-attention, causal or not, in O(N * block).

    Token t of block `i = t // block` sees the keys of blocks `i - look_back` to `i + look_ahead`, if causal those up
    to t. N need not divide by the block.

    Exact sliding-window attention, in which a token sees itself and the `window - 1` tokens before, is
    `local_attention(..., block=window, window=window)`; any block with `look_back * block >= window - 1` gives the
    same, and a smaller one computes less that is masked away.

    Args:
        query, key: `(B, N, H, D)`.
        value: `(B, N, H, E)`.
        block: tokens in a block.
        look_back: how many earlier blocks are seen.
        look_ahead: how many later blocks are seen; 0 if causal.
        causal: no token sees a later one.
        window: of what remains only keys with `t - j < window` are seen; causal only.
        relative_key: `(2 R + 1, D)` shared by the heads, or None: row `clip(j - t, -R, R) + R` is added to key j as
            query t sees it.
        relative_value: `(2 R + 1, E)`, likewise added to the values.
        key_mask: False hides a token from all queries.
        segments: ids of the documents packed into a row; a token sees tokens of its own run of equal ids only.
        scale: factor on the queries; None means `D ** -0.5`.
        dropout_rate: share of the weights that are dropped, those that remain being scaled up.
        dropout_key: random key for it; needed exactly when the rate is not 0.
        implementation: None, a name or an order of preference; see `kernels.dispatch`.
        return_weights: also return the attention weights (XLA form only), which costs N * N.

    Returns:
        `(B, N, H, E)` in the dtype of `value`, zero for a query that sees no key; with `return_weights` a pair with
        the weights `(B, H, N, N)`, after dropout. Logits, softmax and weights are float32 (float64 for float64
        queries).

    Raises:
        ValueError: for shapes that do not fit and for arguments that exclude each other, naming them.
        NotImplementedError: if a forced implementation cannot serve the call.

    Source: the local heads of Roy et al. (arXiv:2003.05997), whose blocks look back by one; relative positions of
    Shaw et al. (arXiv:1803.02155, equations 3 and 4).
    """
    _check(query, key, value, block, look_back, look_ahead, causal, window)
    check_tables(query.shape[-1], value.shape[-1], relative_key, relative_value)
    check_dropout(dropout_rate, dropout_key)
    divided = causal and not dropout_rate and not return_weights and sequence_parallel.ranks(query.shape[1])
    # Without a window it matters where blocks begin.
    if divided and divided > 1 and (window is not None or query.shape[1] // divided % block == 0):
        options = dict(block=block, look_back=look_back, window=window, scale=scale, implementation=implementation)
        arrays = (query, key, value, relative_key, relative_value, key_mask, segments)
        return sequence_parallel.window_attention(local_attention, *arrays, **options, reach=look_back * block)
    runs = None if segments is None else document_runs(segments)
    options = dict(
        block=block,
        look_back=look_back,
        look_ahead=look_ahead,
        causal=causal,
        window=window,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        dropout_rate=dropout_rate,
        self_logit=None,
        return_weights=return_weights,
    )
    arrays = (query, key, value, relative_key, relative_value, key_mask, runs, dropout_key)
    return dispatch("local_attention", TABLE, implementation, arrays, options)


def _check(query, key, value, block, look_back, look_ahead, causal, window):
    if key.shape != query.shape:
        raise ValueError(f"key must have the shape of query, which is {query.shape}; got {key.shape}")
    if value.ndim != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value must be (B, N, H, E) with B, N and H of key, which is {key.shape}; got {value.shape}")
    if block < 1:
        raise ValueError(f"block must be at least 1 token, got {block}")
    for name, blocks in (("look_back", look_back), ("look_ahead", look_ahead)):
        if blocks < 0:
            raise ValueError(f"{name} must be at least 0 blocks, got {blocks}")
    if causal and look_ahead:
        raise ValueError(f"causal attention looks at no later block, got look_ahead={look_ahead}; pass 0")
    if window is None:
        return
    if not causal:
        raise ValueError(f"window={window} is for causal attention; pass causal=True, or window=None")
    if window < 1:
        raise ValueError(f"window must be at least 1, the token itself, got {window}")
    if look_back * block < window - 1:
        wider = f" or block={-(-(window - 1) // look_back)}" if look_back else ""
        raise ValueError(
            f"window={window} reaches further back than look_back={look_back} blocks of {block}; take "
            f"look_back={-(-(window - 1) // block)}{wider}"
        )


def block_attention(
    query,
    key,
    value,
    relative_key,
    relative_value,
    key_mask,
    runs,
    dropout_key,
    *,
    block,
    look_back,
    look_ahead,
    causal,
    window,
    scale,
    dropout_rate,
    self_logit,
    return_weights,
):
    """`local_attention` in XLA, arguments checked; `runs` `(B, N)` as `document_runs` numbers them, or any ids.

    `self_logit` replaces every token's logit for itself, None leaves them.
    """
    b, n, h, _ = query.shape
    block = min(block, n)
    blocks = -(-n // block)
    look_back, look_ahead = min(look_back, blocks - 1), min(look_ahead, blocks - 1)
    span = (look_back + 1 + look_ahead) * block

    def cut(x):
        """`(B, N, ...)` to `(B, blocks, block, ...)`."""
        x = jnp.pad(x, [(0, 0), (0, blocks * block - n)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(b, blocks, block, *x.shape[2:])

    def surround(x):
        """`(B, N, ...)` to `(B, blocks, span, ...)`: every block with those that it sees before and after it."""
        x = jnp.pad(cut(x), [(0, 0), (look_back, look_ahead)] + [(0, 0)] * (x.ndim - 1))
        parts = [x[:, i : i + blocks] for i in range(look_back + 1 + look_ahead)]
        return jnp.concatenate(parts, axis=2)

    def heads_first(x):
        return x.transpose(0, 3, 1, 2, 4)

    acc = accumulator_dtype(query.dtype)
    q, k, v = heads_first(cut(query)), heads_first(surround(key)), heads_first(surround(value))
    logits = jnp.einsum("bhnid,bhnjd->bhnij", q, k, preferred_element_type=acc)
    diagonals = dict(offset=look_back * block, causal=causal)
    if relative_key is not None:
        logits = logits + relative_logits(q, relative_key, span, **diagonals)
    logits = logits * scale

    # Row i of a block is key look_back * block + i of its span.
    ahead = jnp.arange(span) - look_back * block - jnp.arange(block)[:, None]
    position = (jnp.arange(blocks)[:, None] - look_back) * block + jnp.arange(span)
    mask = ((position >= 0) & (position < n))[:, None, :]
    if causal:
        mask = mask & (ahead <= 0)
    if window is not None:
        mask = mask & (ahead > -window)
    mask = mask[None]
    if key_mask is not None:
        mask = mask & surround(key_mask)[:, :, None, :]
    if runs is not None:
        mask = mask & (cut(runs)[..., None] == surround(runs)[:, :, None, :])
    if self_logit is not None:
        logits = jnp.where(ahead == 0, self_logit, logits)
    weights = dropout(masked_softmax(logits, mask[:, None]), dropout_rate, dropout_key)
    cast = weights.astype(value.dtype)
    out = jnp.einsum("bhnij,bhnje->bhnie", cast, v)
    if relative_value is not None:
        out = out + relative_values(cast, relative_value, **diagonals)
    out = out.transpose(0, 2, 3, 1, 4).reshape(b, blocks * block, h, -1)[:, :n]
    if not return_weights:
        return out
    t = jnp.arange(n)
    column = t - (t[:, None] // block - look_back) * block
    seen = (column >= 0) & (column < span)
    weights = weights.reshape(b, h, blocks * block, span)[:, :, :n]
    column = jnp.broadcast_to(jnp.clip(column, 0, span - 1), (b, h, n, n))
    return out, jnp.where(seen, jnp.take_along_axis(weights, column, axis=-1), 0)


TABLE = (Implementation("xla", block_attention),)
