"""Attention without a softmax: a product of feature maps, whose cost is linear in the number of tokens."""

import difflib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.dense import accumulator_dtype
from kernels.dispatch import Implementation, dispatch


def _elu1(x):
    # Below 0 this is exp(x), whose digits adding 1 to expm1(x) would round away. Chosen twice, so that the branch
    # not taken cannot overflow and make the gradient nan.
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


FEATURE_MAPS: dict[str, Callable] = {"elu1": _elu1, "relu": jax.nn.relu, "identity": lambda x: x}


def _xla(query, key, value, *, feature_map, epsilon, return_weights):
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


TABLE = (Implementation("xla", _xla),)


def linear_attention(
    query: Float[Array, "B N H D"],
    key: Float[Array, "B M H D"],
    value: Float[Array, "B M H E"],
    *,
    feature_map: str | Callable = "elu1",
    epsilon: float | None = 1e-6,
    causal: bool = False,
    implementation: str | Sequence[str] | None = None,
    return_weights: bool = False,
):
    """Linear attention, self or cross, noncausal: keys and values are summed up once and read by every query.

    With the feature map phi, and means over the M keys as in CARE, so that epsilon does not weigh less the more
    keys there are:

        out_n = phi(query_n) mean_m(phi(key_m) value_m^T) / (phi(query_n) mean_m(phi(key_m)) + epsilon)

    There is no factor `D ** -0.5`, and the memory needed does not grow with N * M unless weights are returned.

    Args:
        query: `(B, N, H, D)`: N tokens, H heads of D channels.
        key: `(B, M, H, D)`; M may differ from N (cross-attention).
        value: `(B, M, H, E)`.
        feature_map: `"elu1"` (ELU + 1), `"relu"`, `"identity"`, or a function from `(..., D)` to `(..., F)`.
            It gets float32 (float64 for float64 values) whatever the dtype of its operand.
        epsilon: added to the normaliser, which is not positive for every feature map: with `"relu"` it may be
            zero, with `"identity"` it may have any sign. None leaves the normaliser and the means out:
            `out_n = phi(query_n) sum_m(phi(key_m) value_m^T)`.
        causal: True is not implemented yet.
        implementation: None, a name or an order of preference; see `kernels.dispatch`.
        return_weights: also return what each query takes from each value, which costs N * M.

    Returns:
        `(B, N, H, E)` in the dtype of `value`; with `return_weights` a pair with the weights `(B, H, N, M)`, in
        float32 (float64 for float64). With a normaliser of size z a row of them sums to z / (z + epsilon). Feature
        maps, sums and normaliser are float32 (float64 for float64 values).

    Raises:
        ValueError: for shapes that do not fit, an unknown feature map, a negative epsilon.
        NotImplementedError: for `causal=True`, or if a forced implementation cannot serve the call.

    Source: Katharopoulos et al. (arXiv:2006.16236), section 3.2, equations 5 and 7; the means and the epsilon are
    those of the code of CARE (arXiv:2411.16170).
    """
    if causal:
        raise NotImplementedError("linear_attention is noncausal: causal=True is not implemented; pass causal=False")
    if query.shape[0] != key.shape[0] or query.shape[2:] != key.shape[2:]:
        raise ValueError(
            f"key must be (B, M, H, D) with B, H and D of query, which is {query.shape}; got {key.shape}"
        )
    if value.ndim != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value must be (B, M, H, E) with B, M and H of key, which is {key.shape}; got {value.shape}")
    if epsilon is not None and epsilon < 0:
        raise ValueError(f"epsilon must be at least 0, or None for no normaliser; got {epsilon}")
    if not callable(feature_map):
        if feature_map not in FEATURE_MAPS:
            close = difflib.get_close_matches(str(feature_map), FEATURE_MAPS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(map(repr, FEATURE_MAPS))}"
            raise ValueError(f"unknown feature_map {feature_map!r}, which may also be a function; {hint}")
        feature_map = FEATURE_MAPS[feature_map]
    options = dict(feature_map=feature_map, epsilon=epsilon, return_weights=return_weights)
    return dispatch("linear_attention", TABLE, implementation, (query, key, value), options)
