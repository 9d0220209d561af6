"""Norm-aware linear attention: the longer a query, the sharper its feature map, as a softmax would have it."""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.choices import check_choice
from kernels.chunks import FORMS, check_segments
from kernels.dense import accumulator_dtype
from kernels.dispatch import Implementation, dispatch
from kernels.gated_linear import gated_linear_attention
from kernels.linear import LinearState
from kernels.rotary import rotary as turned
from kernels.running import running

MAPS = ("sign_split", "cossin")


def _power(x, exponent):
    """`x ** exponent` for x >= 0, where x is 0 with gradients of 0: those by the exponent would be 0 log 0."""
    positive = x > 0
    return jnp.where(positive, jnp.exp(exponent * jnp.log(jnp.where(positive, x, 1))), 0)


def _norm_and_direction(x):
    """Norms `(..., 1)` and `x` divided by them; for zeros both are 0, and so are the gradients."""
    squares = jnp.square(x).sum(-1, keepdims=True)
    positive = squares > 0
    norm = jnp.sqrt(jnp.where(positive, squares, 1))
    return jnp.where(positive, norm, 0), jnp.where(positive, x / norm, 0)


def _halves(x, magnitude, map):
    """The two halves of the features, `(..., D)` each, of directions `x` and what they are weighed with."""
    if map == "cossin":
        return magnitude * jnp.cos(x), magnitude * jnp.sin(x)
    return jnp.where(x > 0, magnitude, 0), jnp.where(x < 0, magnitude, 0)


def _feature_halves(query, key, map, power, tau):
    norm, query = _norm_and_direction(query)
    weighed_key = _power(abs(key), power)
    if map == "cossin":
        # Only here are keys taken by their direction as well.
        _, key = _norm_and_direction(key)
    weighed_query = _power(abs(query), power * (tau + jnp.tanh(norm)))
    return _halves(query, weighed_query, map), _halves(key, weighed_key, map)


def _joined(halves, turn):
    return jnp.concatenate(halves if turn is None else [turn(half) for half in halves], -1)


def _noncausal(query, key, turned_query, turned_key, value, epsilon):
    normalizer = jnp.einsum("bnhf,bhf->bnh", query, key.mean(1)) + epsilon
    products = jnp.einsum("bmhf,bmhe->bhfe", turned_key, value) / key.shape[1]
    return jnp.einsum("bnhf,bhfe->bnhe", turned_query, products) / normalizer[..., None]


def _causal(query, key, turned_query, turned_key, value, state, segments, *, epsilon, form, chunk_size):
    batch, tokens = value.shape[:2]
    options = dict(scale=1.0, form=form, chunk_size=chunk_size, segments=segments, implementation="xla")
    products, keys, before = None, None, jnp.zeros(batch, value.dtype)
    if state is not None:
        products, keys, before = (x.astype(value.dtype) for x in state)
        keys = keys[..., None]
    out, products = gated_linear_attention(
        turned_query, turned_key, value, initial_state=products, return_state=True, **options
    )
    ones = jnp.ones((*value.shape[:3], 1), value.dtype)
    normalizer, keys = gated_linear_attention(query, key, ones, initial_state=keys, return_state=True, **options)
    seen = running(ones[:, :, 0], before[:, None], segments)[..., None]
    out = out / seen / (normalizer / seen + epsilon)
    return out, LinearState(products, keys[..., 0], seen[:, -1, 0, 0])


def _xla(
    query,
    key,
    value,
    state,
    segments,
    *,
    map,
    power,
    tau,
    epsilon,
    causal,
    turn_query,
    turn_key,
    form,
    chunk_size,
    return_state,
):
    dtype, acc = value.dtype, accumulator_dtype(value.dtype)
    queries, keys = _feature_halves(query.astype(acc), key.astype(acc), map, power, tau)
    features = [_joined(queries, None), _joined(keys, None), _joined(queries, turn_query), _joined(keys, turn_key)]
    value = value.astype(acc)
    if not causal:
        return _noncausal(*features, value, epsilon).astype(dtype)
    options = dict(epsilon=epsilon, form=form, chunk_size=chunk_size)
    out, state = _causal(*features, value, state, segments, **options)
    return (out.astype(dtype), state) if return_state else out.astype(dtype)


TABLE = (Implementation("xla", _xla),)


def norm_aware_linear_attention(
    query: Float[Array, "B N H D"],
    key: Float[Array, "B M H D"],
    value: Float[Array, "B M H E"],
    *,
    map: str = "sign_split",
    power: float = 3.0,
    tau: float = 0.5,
    epsilon: float = 1e-6,
    causal: bool = False,
    rotary: Callable | Int[Array, "N"] | Int[Array, "B N"] | None = None,
    key_rotary: Callable | Int[Array, "M"] | Int[Array, "B M"] | None = None,
    form: str = "chunk",
    chunk_size: int = 64,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    segments: Int[Array, "B N"] | None = None,
    implementation: str | Sequence[str] | None = None,
):
    """Normalised linear attention whose query map sharpens with the query's norm: self, cross, and self causal.

    With d(x) = x / |x|, the exponent p(x) = power (tau + tanh |x|), and all powers channel by channel:

        "sign_split":  phi_q(q) = [relu(d(q))^p(q); relu(-d(q))^p(q)],  phi_k(k) = [relu(k)^power; relu(-k)^power]
        "cossin":      phi_q(q) = abs(d(q))^p(q) [cos d(q); sin d(q)],  phi_k(k) = abs(k)^power [cos d(k); sin d(k)]

        out_n = R phi_q(q_n) mean_m(R phi_k(k_m) value_m^T) / (phi_q(q_n) mean_m(phi_k(k_m)) + epsilon)

    where R, the rotation, turns each half of the features and acts on the numerator only. Causal, the means are those
    over the keys up to the query's own: token n gets what the noncausal form gives it with the keys 0 to n.

    A zero has no direction and its power no logarithm. Here a query of zeros has features of zeros and gets zeros;
    a channel of 0 has features of 0; and gradients at these are 0, which is their limit where exponents are above 1,
    that is for `power * tau > 1` and `power > 1`. In between directions turn arbitrarily fast: gradients grow as
    1 / |x|.

    Args:
        query: `(B, N, H, D)`: N tokens, H heads of D channels.
        key: `(B, M, H, D)`; M may differ from N (cross-attention) unless it is causal.
        value: `(B, M, H, E)`.
        map: `"sign_split"`, the features of the published code, or `"cossin"`, those of the paper. Either makes 2 D
            features. With the paper's the products of features are cosines of differences of directions, which can
            be negative where two differ by more than pi / 2 in a channel, and so can the normaliser.
        power: lambda, the exponent of keys and the factor of that of queries; positive.
        tau: what the exponent of the shortest queries is of `power`; positive.
        epsilon: added to the normaliser; positive.
        causal: query n sees keys 0 to n.
        rotary: the rotation R: a function from `(B, N, H, D)` to the same shape, called on either half of the
            features of the queries and of the keys; or positions for `kernels.rotary.rotary` with its defaults,
            `(N,)` or `(B, N)`. None: no rotation. To decode, give the positions of the tokens at hand.
        key_rotary: the same of the keys where it is another, as in cross-attention; None means `rotary`.
        form: of causal attention. `"chunk"`: matmuls within chunks, states from chunk to chunk, time and memory
            linear in N. `"recurrent"`: one token after the other. `"parallel"`: all N x N pairs at once.
            Noncausal attention has one form only and no use for this and `chunk_size`.
        chunk_size: tokens per chunk, rounded up to a power of two; the backward pass keeps one state per chunk, also
            in the recurrent form. The parallel form has no use for it.
        initial_state: before the first token, of causal attention; None means zeros. With N = 1 this is a decoding
            step. Its products are those of rotated keys, its sums those of keys without rotation.
        return_state: also return the state after the last token, of causal attention.
        segments: of causal attention, ids of the documents packed into a row, `(B, N)`. A token sees those of its own
            run of equal ids; the first run goes on from `initial_state`, later ones start from zeros.
        implementation: None, a name or an order of preference; see `kernels.dispatch`.

    Returns:
        `(B, N, H, E)` in the dtype of `value`; with `return_state` a pair with the `LinearState` of the last run,
        whose F is 2 D. Features, rotations, states and sums are float32 (float64 for float64 values).

    Raises:
        ValueError: for shapes that do not fit, an unknown map or form, a power, tau or epsilon that is not positive,
            a chunk size below 1, a `key_rotary` without `rotary`, and for arguments of causal attention without
            `causal=True`.
        NotImplementedError: if a forced implementation cannot serve the call.

    Source: NaLaFormer (arXiv:2506.21137) and its published code, which has no cosines and sines but
    splits signs, and normalises before it rotates. The causal form is not theirs: it is the noncausal one of every
    prefix. Theirs gives nan for a query of zeros.
    """
    for name, number in (("power", power), ("tau", tau), ("epsilon", epsilon)):
        if number <= 0:
            raise ValueError(f"{name} must be positive, got {number}")
    if key_rotary is not None and rotary is None:
        raise ValueError("key_rotary is given without rotary; a rotation of keys only has no meaning")
    check_choice("map", map, MAPS)
    check_choice("form", form, FORMS)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    _check_shapes(query, key, value, causal, initial_state)
    check_segments(segments, *query.shape[:2])
    if not causal:
        given = dict(initial_state=initial_state, return_state=return_state or None, segments=segments)
        given = [name for name, argument in given.items() if argument is not None]
        if given:
            raise ValueError(f"{', '.join(given)} need causal=True: noncausal attention has no state along the tokens")
    options = dict(
        map=map,
        power=power,
        tau=tau,
        epsilon=epsilon,
        causal=causal,
        turn_query=_rotation("rotary", rotary, query),
        turn_key=_rotation("rotary" if key_rotary is None else "key_rotary", _first_given(key_rotary, rotary), key),
        form=form,
        chunk_size=chunk_size,
        return_state=return_state,
    )
    arrays = (query, key, value, initial_state, segments)
    return dispatch("norm_aware_linear_attention", TABLE, implementation, arrays, options)


def _first_given(first, second):
    return second if first is None else first


def _rotation(argument, given, x):
    """The rotation of an operand as a function, or None."""
    if given is None or callable(given):
        return given
    if given.shape not in (x.shape[1:2], x.shape[:2]):
        raise ValueError(
            f"{argument} must be a function or positions {x.shape[1:2]} or {x.shape[:2]} here; got {given.shape}"
            + ("; positions of the keys go into key_rotary" if argument == "rotary" else "")
        )
    return functools.partial(turned, positions=given)


def _check_shapes(query, key, value, causal, state):
    if query.shape[0] != key.shape[0] or query.shape[2:] != key.shape[2:]:
        raise ValueError(f"key must be (B, M, H, D) with B, H and D of query, which is {query.shape}; got {key.shape}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value must be (B, M, H, E) with B, M and H of key, which is {key.shape}; got {value.shape}")
    if causal and query.shape[1] != key.shape[1]:
        raise ValueError(f"causal=True is self-attention, N = M; got {query.shape[1]} queries and {key.shape[1]} keys")
    if state is not None:
        batch, _, heads, channels = key.shape
        wanted = (batch, heads, 2 * channels, value.shape[-1])
        if state.products.shape != wanted or state.keys.shape != wanted[:3] or state.tokens.shape != wanted[:1]:
            raise ValueError(
                f"initial_state must have products (B, H, F, E), keys (B, H, F) and tokens (B,), products being "
                f"{wanted} here; got {', '.join(str(x.shape) for x in state)}"
            )
