"""Attention without a softmax: a product of feature maps, whose cost is linear in the number of tokens."""

import difflib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.choices import check_choice
from kernels.chunks import FORMS, check_segments
from kernels.dense import accumulator_dtype
from kernels.dispatch import Implementation, dispatch
from kernels.gated_linear import TABLE as GATED
from kernels.gated_linear import gated_linear_attention
from kernels.running import running


def _elu1(x):
    # Below 0 this is exp(x), whose digits adding 1 to expm1(x) would round away. Chosen twice, so that the branch
    # not taken cannot overflow and make the gradient nan.
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


# Numbers of channels that kernels take are multiples of this.
KERNEL_CHANNELS = 16

FEATURE_MAPS: dict[str, Callable] = {"elu1": _elu1, "relu": jax.nn.relu, "identity": lambda x: x}


class LinearState(NamedTuple):
    """What causal linear attention remembers of the tokens so far, all of it in float32 (or float64).

    Attributes:
        products: the sums of `phi(key) value^T`, `(B, H, F, E)`.
        keys: the sums of `phi(key)`, `(B, H, F)`.
        tokens: how many tokens there were, `(B,)`.
    """

    products: Float[Array, "B H F E"]
    keys: Float[Array, "B H F"]
    tokens: Float[Array, " B"]


def _noncausal(query, key, value, *, feature_map, epsilon, return_weights):
    # Feature maps are mostly positive, so that sums over tokens grow with their number: never in 16 bits.
    acc = accumulator_dtype(value.dtype)
    query, key = feature_map(query.astype(acc)), feature_map(key.astype(acc))
    state = jnp.einsum("bmhf,bmhe->bhfe", key, value.astype(acc))
    if epsilon is None:
        factor = None
        out = jnp.einsum("bnhf,bhfe->bnhe", query, state)
    else:
        tokens = key.shape[1]
        normalizer = jnp.einsum("bnhf,bhf->bnh", query, key.mean(1)) + epsilon
        factor = 1 / normalizer
        out = jnp.einsum("bnhf,bhfe->bnhe", query, state / tokens) * factor[..., None]
    out = out.astype(value.dtype)
    if not return_weights:
        return out
    weights = jnp.einsum("bnhf,bmhf->bhnm", query, key)
    if factor is not None:
        weights = weights * (factor.transpose(0, 2, 1)[..., None] / tokens)
    return out, weights


def _causal(
    query,
    key,
    value,
    state,
    segments,
    *,
    feature_map,
    epsilon,
    form,
    chunk_size,
    return_state,
    return_weights,
    kernel=None,
):
    dtype, acc = value.dtype, accumulator_dtype(value.dtype)
    query, key = feature_map(query.astype(acc)), feature_map(key.astype(acc))
    batch, tokens, heads, features = key.shape
    values = value.shape[-1]
    # A channel that is 1 in every token carries the normaliser along.
    value = jnp.concatenate((value.astype(acc), jnp.ones((batch, tokens, heads, 1), acc)), -1)
    unused = 0
    if kernel is not None:
        # The normaliser's gradient is a small difference: features stay in float32 for kernels too.
        unused = -value.shape[-1] % KERNEL_CHANNELS
        value = jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, unused)))
    before, sums = jnp.zeros(batch, acc), None
    if state is not None:
        wanted = (batch, heads, features, values)
        if state.products.shape != wanted or state.keys.shape != wanted[:3] or state.tokens.shape != wanted[:1]:
            raise ValueError(
                f"initial_state must have products (B, H, F, E), keys (B, H, F) and tokens (B,), products being "
                f"{wanted} here; got {', '.join(str(x.shape) for x in state)}"
            )
        before = state.tokens.astype(acc)
        sums = jnp.concatenate((state.products.astype(acc), state.keys.astype(acc)[..., None]), -1)
        sums = jnp.pad(sums, ((0, 0), (0, 0), (0, 0), (0, unused)))
    options = dict(scale=1.0, form=form, chunk_size=chunk_size, return_state=True, return_weights=return_weights)
    if kernel is not None:
        out, sums, *weights = kernel(query, key, value, None, sums, segments, **options)
    else:
        out, sums, *weights = gated_linear_attention(
            query, key, value, initial_state=sums, segments=segments, implementation="xla", **options
        )
    # Tokens of its document that each token sees, itself among them.
    counts = running(jnp.ones((batch, tokens, 1), acc), before[:, None], segments)[..., 0]
    out, normalizer = out[..., :values], out[..., values : values + 1]
    if epsilon is not None:
        seen = counts[:, :, None, None]
        factor = 1 / (normalizer / seen + epsilon) / seen
        out = out * factor
        weights = [w * factor.transpose(0, 2, 1, 3) for w in weights]
    results = (out.astype(dtype),)
    if return_state:
        results += (LinearState(sums[..., :values], sums[..., values], counts[:, -1]),)
    results += tuple(weights)
    return results if len(results) > 1 else results[0]


def _xla(query, key, value, state, segments, *, causal, form, chunk_size, return_state, **options):
    if not causal:
        return _noncausal(query, key, value, **options)
    options |= dict(form=form, chunk_size=chunk_size, return_state=return_state)
    return _causal(query, key, value, state, segments, **options)


def _with_kernel(gated: Implementation) -> Implementation:
    """Causal attention by a kernel of gated linear attention."""

    def run(*arrays, causal, **options):
        return _causal(*arrays, kernel=gated.run, **options)

    def unsupported(query, key, value, state, segments, *, feature_map, causal, **options):
        if not causal:
            return "causal=False is two products and no recurrence; use implementation='xla'"
        acc = accumulator_dtype(value.dtype)
        query, key = (jax.eval_shape(feature_map, jax.ShapeDtypeStruct(x.shape, acc)) for x in (query, key))
        channels = -(-(value.shape[-1] + 1) // KERNEL_CHANNELS) * KERNEL_CHANNELS
        value = jax.ShapeDtypeStruct((*value.shape[:3], channels), acc)
        return gated.unsupported(query, key, value, None, None, segments, **options)

    return Implementation(gated.name, run, unsupported, platforms=gated.platforms, batched=(True,) * 5)


TABLE = (Implementation("xla", _xla), *(_with_kernel(i) for i in GATED if i.batched is not None))


def linear_attention(
    query: Float[Array, "B N H D"],
    key: Float[Array, "B M H D"],
    value: Float[Array, "B M H E"],
    *,
    feature_map: str | Callable = "elu1",
    epsilon: float | None = 1e-6,
    causal: bool = False,
    form: str = "chunk",
    chunk_size: int = 64,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    segments: Int[Array, "B N"] | None = None,
    implementation: str | Sequence[str] | None = None,
    return_weights: bool = False,
):
    """Normalised linear attention: self or cross noncausal, and self causal.

    Noncausal, keys and values are summed up once and read by every query. With the feature map phi, and means over
    the M keys as in CARE, so that epsilon does not weigh less the more keys there are:

        out_n = phi(query_n) mean_m(phi(key_m) value_m^T) / (phi(query_n) mean_m(phi(key_m)) + epsilon)

    Causal, the means are those over the keys up to the query's own: token n gets what the noncausal form gives it
    with the keys 0 to n. That is why the state counts the tokens.

    There is no factor `D ** -0.5`, and the memory needed does not grow with N * M unless weights are returned.

    Args:
        query: `(B, N, H, D)`: N tokens, H heads of D channels.
        key: `(B, M, H, D)`; M may differ from N (cross-attention) unless it is causal.
        value: `(B, M, H, E)`.
        feature_map: `"elu1"` (ELU + 1), `"relu"`, `"identity"`, or a function from `(..., D)` to `(..., F)`.
            It gets float32 (float64 for float64 values) whatever the dtype of its operand.
        epsilon: added to the normaliser, which is not positive for every feature map: with `"relu"` it may be
            zero, with `"identity"` it may have any sign. None leaves the normaliser and the means out:
            `out_n = phi(query_n) sum_m(phi(key_m) value_m^T)`.
        causal: query n sees keys 0 to n.
        form: of causal attention. `"chunk"`: matmuls within chunks, states from chunk to chunk, time and memory
            linear in N. `"recurrent"`: one token after the other. `"parallel"`: all N x N pairs at once.
            Noncausal attention has one form only and no use for this and `chunk_size`.
        chunk_size: tokens per chunk, rounded up to a power of two; the backward pass keeps one state per chunk, also
            in the recurrent form. The parallel form has no use for it, and kernels have chunks of their own.
        initial_state: before the first token, of causal attention; None means zeros. With N = 1 this is a decoding
            step.
        return_state: also return the state after the last token, of causal attention.
        segments: of causal attention, ids of the documents packed into a row, `(B, N)`. A token sees those of its own
            run of equal ids; the first run goes on from `initial_state`, later ones start from zeros.
        implementation: None, a name or an order of preference; see `kernels.dispatch`.
        return_weights: also return what each query takes from each value, which costs N * M.

    Returns:
        `(B, N, H, E)` in the dtype of `value`; or a tuple of it, then with `return_state` the `LinearState` of the last
        run, then with `return_weights` the weights `(B, H, N, M)`, in float32 (float64 for float64), without what
        came from `initial_state`. With a normaliser of size z a row of them sums to z / (z + epsilon). Feature
        maps, sums and normaliser are float32 (float64 for float64 values).

    Raises:
        ValueError: for shapes that do not fit, an unknown feature map or form, a negative epsilon, a chunk size below
            1, and for arguments of causal attention without `causal=True`.
        NotImplementedError: if a forced implementation cannot serve the call.

    Source: Katharopoulos et al. (arXiv:2006.16236), section 3.2, equations 5 and 7, and section 3.3, equations 9 to
    12; the means and the epsilon are those of the code of CARE (arXiv:2411.16170).
    """
    if query.shape[0] != key.shape[0] or query.shape[2:] != key.shape[2:]:
        raise ValueError(f"key must be (B, M, H, D) with B, H and D of query, which is {query.shape}; got {key.shape}")
    if value.ndim != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value must be (B, M, H, E) with B, M and H of key, which is {key.shape}; got {value.shape}")
    if epsilon is not None and epsilon < 0:
        raise ValueError(f"epsilon must be at least 0, or None for no normaliser; got {epsilon}")
    if causal and query.shape[1] != key.shape[1]:
        raise ValueError(f"causal=True is self-attention, N = M; got {query.shape[1]} queries and {key.shape[1]} keys")
    if not causal:
        given = dict(initial_state=initial_state, return_state=return_state or None, segments=segments)
        given = [name for name, argument in given.items() if argument is not None]
        if given:
            raise ValueError(f"{', '.join(given)} need causal=True: noncausal attention has no state along the tokens")
    check_choice("form", form, FORMS)
    check_segments(segments, *query.shape[:2])
    if not callable(feature_map):
        if feature_map not in FEATURE_MAPS:
            close = difflib.get_close_matches(str(feature_map), FEATURE_MAPS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(map(repr, FEATURE_MAPS))}"
            raise ValueError(f"unknown feature_map {feature_map!r}, which may also be a function; {hint}")
        feature_map = FEATURE_MAPS[feature_map]
    options = dict(
        feature_map=feature_map,
        epsilon=epsilon,
        causal=causal,
        form=form,
        chunk_size=chunk_size,
        return_state=return_state,
        return_weights=return_weights,
    )
    arrays = (query, key, value, initial_state, segments)
    return dispatch("linear_attention", TABLE, implementation, arrays, options)
