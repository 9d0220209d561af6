"""How an op is divided along its tokens: over the mesh axis `sequence`, by `shard_map`.

While a mesh with such an axis is in effect (`jax.set_mesh`, `jax.sharding.use_abstract_mesh`), the ops below call
themselves on every device for its part of the tokens; a model knows nothing of it. What goes from device to device:

- linear attention, with and without decay, and the delta rule: each device's last state and what it leaves of the
  state before it, one all-gather forward and one backward, whatever the number of tokens;
- softmax attention: an all-gather of keys and values; of a window, the keys and values of the window before;
- short convolutions: the few tokens before;
- memories that learn at test time: the state, from device to device in turn. Nothing is won in time there.

Everything else, noncausal linear attention and Flow-Attention among it, XLA divides by itself: its sums over tokens
become sums over devices.

Source: Sun et al., LASP-2 (arXiv:2502.07563), algorithms 1 and 2, and section 4.3 for softmax attention, here with
decay, the delta rule, documents and states before the first and after the last token.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernels import partition
from kernels.masking import document_runs

AXIS = partition.SEQUENCE_AXIS
HEADS_AXIS = "tensor"


def ranks(*lengths: int) -> int:
    """Over how many devices the tokens of an op are divided here; 1 without a mesh, and for a single token.

    Raises:
        ValueError: for a number of tokens that does not divide.
    """
    ways = partition.automatic_axes().get(AXIS, 1)
    if ways == 1 or min(lengths) == 1:
        return 1
    for tokens in lengths:
        if tokens % ways:
            near = " or ".join(str(n * ways) for n in (tokens // ways, tokens // ways + 1) if n)
            raise ValueError(
                f"{tokens} tokens do not divide over the {ways} devices of the mesh's axis {AXIS}; {near} would"
            )
    return ways


def split(run: Callable[..., Any], kinds: str, results: str, *arrays: Any) -> Any:
    """`run(*arrays)` on every device for its part of the batch, of the tokens and of the heads.

    Args:
        run: what a device computes.
        kinds: for each array a word, of which every letter is a dimension: `b` the batch, `n` the tokens, `h` the
            heads, `r` one row for each device along the tokens, and anything else what no axis divides. `-` is the
            same everywhere.
        results: likewise.
        *arrays: operands, trees of arrays with the same first dimensions, or None. A dimension of size 1 stays whole.
    """
    axes = partition.automatic_axes()
    words = kinds.split()
    batch = tuple(name for name in partition.BATCH_AXES if name in axes)
    ways = {"b": math.prod(axes[name] for name in batch), "h": axes.get(HEADS_AXIS, 1)}
    over = {"n": AXIS, "r": AXIS, "b": batch, "h": HEADS_AXIS if HEADS_AXIS in axes else None}
    for kind, divisor in ways.items():
        leaves = [(word, leaf) for word, array in zip(words, arrays) for leaf in jax.tree.leaves(array)]
        sizes = {size for word, leaf in leaves for letter, size in zip(word, leaf.shape) if letter == kind} - {1}
        if not sizes or any(size % divisor for size in sizes):
            over[kind] = None

    def spec(word, shape=None):
        if word == "-":
            return PartitionSpec()
        shape = [None] * len(word) if shape is None else shape
        return PartitionSpec(*(None if size == 1 else over.get(letter) for letter, size in zip(word, shape)))

    def specs(word, array):
        return jax.tree.map(lambda leaf: spec(word, leaf.shape), array)

    return jax.shard_map(
        run,
        in_specs=tuple(map(specs, words, arrays)),
        out_specs=tuple(map(spec, results.split())) if " " in results else spec(results),
        axis_names=set(axes),
        # The XLA forms start their loops from constants, which vary over no axis as their results do.
        check_vma=False,
    )(*arrays)


def _rank_and_size():
    return jax.lax.axis_index(AXIS), jax.lax.axis_size(AXIS)


def _from_before(x, count: int, first=None):
    """The `count` tokens before this device's, `(B, count, ...)`; before the row are those of `first`, else zeros."""
    rank, size = _rank_and_size()
    tokens = x.shape[1]
    hops = -(-count // tokens)
    parts = []
    for hop in range(min(hops, size - 1), 0, -1):
        wanted = tokens if hop < hops else count - (hops - 1) * tokens
        there = [(source, source + hop) for source in range(size - hop)]
        parts.append(jax.lax.ppermute(x[:, tokens - wanted :], AXIS, there))
    found = jnp.concatenate(parts, axis=1)
    found = jnp.pad(found, [(0, 0), (count - found.shape[1], 0), *[(0, 0)] * (x.ndim - 2)])
    if first is None:
        return found
    # Token i of these has the place rank * tokens - count + i of the row.
    behind = jnp.concatenate((first.astype(x.dtype), jnp.zeros_like(found)), axis=1)
    behind = jax.lax.dynamic_slice_in_dim(behind, jnp.minimum(rank * tokens, count), count, 1)
    outside = jnp.arange(count) < count - rank * tokens
    return jnp.where(outside.reshape(1, -1, *[1] * (x.ndim - 2)), behind, found)


def _goes_on(segments):
    """Whether this device's first token belongs to the document of the token before it, `(B,)`; None for None."""
    if segments is None:
        return None
    rank, _ = _rank_and_size()
    before = _from_before(segments[:, -1:], 1)[:, 0]
    return (rank == 0) | (before == segments[:, 0])


def _apply(kept, state):
    """What is left of a state, `kept` being factors of its rows or a matrix."""
    return kept * state if kept.shape[-1] == 1 else jnp.matmul(kept, state, precision="highest")


@jax.custom_vjp
def states_before(kept, written, first):
    """The state that each device's first token finds: one all-gather, and one in the backward pass.

    Args:
        kept: `(B, H, D, 1)` or `(B, H, D, D)`: what this device's tokens leave of the state before them.
        written: `(B, H, D, E)`: what they add to it.
        first: `(B, H, D, E)`: the state before the first token of all.
    """
    return _states_before(kept, written, first)[0]


def _states_before(kept, written, first):
    rank, size = _rank_and_size()
    gathered = jax.lax.all_gather(jnp.concatenate((written, kept), -1), AXIS)
    writes, keeps = jnp.split(gathered, [written.shape[-1]], axis=-1)

    def step(carry, of_rank):
        state, found = carry
        index, written, kept = of_rank
        return (_apply(kept, state) + written, jnp.where(index == rank, state, found)), None

    (_, found), _ = jax.lax.scan(step, (first, first), (jnp.arange(size), writes, keeps))
    return found, (keeps, found)


def _states_before_backward(residuals, gradient):
    keeps, found = residuals
    rank, size = _rank_and_size()
    gradients = jax.lax.all_gather(gradient, AXIS)

    def step(carry, of_rank):
        later, mine = carry
        index, gradient, kept = of_rank
        mine = jnp.where(index == rank, later, mine)
        return (gradient + _apply(kept if kept.shape[-1] == 1 else kept.swapaxes(-1, -2), later), mine), None

    zeros = jnp.zeros_like(gradient)
    (first, mine), _ = jax.lax.scan(step, (zeros, zeros), (jnp.arange(size), gradients, keeps), reverse=True)
    if keeps.shape[-1] == 1:
        kept = (mine * found).sum(-1, keepdims=True)
    else:
        kept = jnp.matmul(mine, found.swapaxes(-1, -2), precision="highest")
    # All devices have the gradient of the state before the first token; it is summed up over them.
    return kept, mine, jnp.where(rank == 0, first, 0)


states_before.defvjp(_states_before, _states_before_backward)


def _last(states):
    """Of the devices' states the last one's."""
    return jax.tree.map(lambda x: x[-1], states)


def _scaled(x, factor):
    """An array times a factor per row of the batch; None is 1."""
    return x if factor is None else x * factor.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)


def gated_linear(op, query, key, value, log_decay, initial_state, segments, *, scale, **options):
    """`kernels.gated_linear.gated_linear_attention`, tokens over devices: output, and the state after the last token.

    Every device computes its tokens from a state of zeros; what its queries get from the state before them is added
    once the states are there, so that they can travel meanwhile.
    """

    def local(query, key, value, log_decay, first, segments):
        out, written = op(query, key, value, log_decay, scale=scale, segments=segments, return_state=True, **options)
        acc = written.dtype
        into, kept = _decayed(log_decay, key.shape[:3], acc)
        if segments is not None:
            alive = (document_runs(segments) == 0)[:, :, None, None]
            into, kept = jnp.where(alive, into, 0), jnp.where(alive[:, -1:], kept, 0)
        goes_on = _goes_on(segments)
        kept = jnp.broadcast_to(_scaled(kept, goes_on), (*written.shape[:-1], 1))
        before = states_before(kept, written, jnp.zeros_like(written) if first is None else first.astype(acc))
        query = query.astype(acc) * (scale * into)
        out = out + jnp.einsum("bnhd,bhde->bnhe", query, _scaled(before, goes_on)).astype(out.dtype)
        return out, (kept * before + written)[None]

    decays = {0: "-", 1: "h", 3: "bnh", 4: "bnhd"}[0 if log_decay is None else log_decay.ndim]
    arrays = (query, key, value, log_decay, initial_state, segments)
    out, states = split(local, f"bnhd bnhd bnhe {decays} bhde bn", "bnhe rbhde", *arrays)
    return out, _last(states)


def _decayed(log_decay, shape, acc):
    """What is left after each token `(B, N, H, K)`, and after the last `(B, H, K, 1)`, of the state before them."""
    batch, tokens, heads = shape
    if log_decay is None:
        return jnp.ones((1, 1, 1, 1), acc), jnp.ones((batch, heads, 1, 1), acc)
    log_decay = log_decay.astype(acc)
    if log_decay.ndim == 1:
        sums = jnp.arange(1, tokens + 1, dtype=acc)[:, None, None] * log_decay[:, None]
        sums = jnp.broadcast_to(sums, (batch, *sums.shape))
    else:
        sums = jnp.cumsum(log_decay if log_decay.ndim == 4 else log_decay[..., None], axis=1)
    into = jnp.exp(sums)
    return into, into[:, -1, :, :, None]


def delta(op, query, key, value, beta, log_decay, initial_state, segments, **options):
    """`kernels.delta.delta_rule`, tokens over devices: output, and the state after the last token.

    What the tokens make of the state before them is an affine map. Its matrix is what they make of the identity when
    they write nothing: D more channels of value, in which each of them also gets the query that it puts to that state.
    """

    def local(query, key, value, beta, log_decay, first, segments):
        batch, tokens, heads, channels = key.shape
        acc, values = jnp.promote_types(value.dtype, jnp.float32), value.shape[-1]
        identity = jnp.broadcast_to(jnp.eye(channels, dtype=acc), (batch, heads, channels, channels))
        empty = jnp.zeros((batch, heads, channels, values), acc)
        out, after = op(
            *(query, key, jnp.pad(value, ((0, 0),) * 3 + ((0, channels),)), beta, log_decay),
            initial_state=jnp.concatenate((empty, identity), -1),
            segments=segments,
            return_state=True,
            **options,
        )
        out, queries = out[..., :values], out[..., values:].astype(acc)
        written, kept = after[..., :values], after[..., values:]
        goes_on = _goes_on(segments)
        kept = _scaled(kept, goes_on)
        before = states_before(kept, written, empty if first is None else first.astype(acc))
        out = out + jnp.einsum("bnhd,bhde->bnhe", queries, _scaled(before, goes_on)).astype(out.dtype)
        return out, (jnp.matmul(kept, before, precision="highest") + written)[None]

    arrays = (query, key, value, beta, log_decay, initial_state, segments)
    out, states = split(local, "bnhd bnhd bnhe bnh bnh bhde bn", "bnhe rbhde", *arrays)
    return out, _last(states)


def attention(op, query, key, value, bias, mask, *, causal, **options):
    """`kernels.dense.attention`, queries over devices, of which each gathers all keys and values."""

    def local(query, key, value, bias, mask):
        rank, _ = _rank_and_size()
        key, value = (jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in (key, value))
        if causal:
            own = rank * query.shape[1] + jnp.arange(query.shape[1])
            seen = (own[:, None] >= jnp.arange(key.shape[1]))[None, None]
            mask = seen if mask is None else mask & seen
        return op(query, key, value, bias=bias, mask=mask, **options)

    return split(local, "bnhd bnhd bnhd bhnk bhnk", "bnhd", query, key, value, bias, mask)


def window_attention(op, query, key, value, relative_key, relative_value, key_mask, segments, *, reach, **options):
    """`kernels.local.local_attention`, causal; each device gets the `reach` keys and values before its own."""

    def local(query, key, value, relative_key, relative_value, key_mask, segments):
        rank, _ = _rank_and_size()
        batch, tokens = query.shape[:2]
        key_mask = jnp.ones((batch, tokens), bool) if key_mask is None else key_mask
        key, value, key_mask = (jnp.concatenate((_from_before(x, reach), x), 1) for x in (key, value, key_mask))
        key_mask = key_mask & (rank * tokens + jnp.arange(reach + tokens) >= reach)
        if segments is not None:
            segments = jnp.concatenate((_from_before(segments, reach), segments), 1)
        query = jnp.pad(query, ((0, 0), (reach, 0), (0, 0), (0, 0)))
        tables = dict(relative_key=relative_key, relative_value=relative_value)
        return op(query, key, value, key_mask=key_mask, segments=segments, **tables, **options)[:, reach:]

    arrays = (query, key, value, relative_key, relative_value, key_mask, segments)
    return split(local, "bnhd bnhd bnhe - - bn bn", "bnhe", *arrays)


def short_conv(op, x, kernel, bias, initial_state, segments):
    """`kernels.short_conv.short_conv`; each device gets the tokens before its own: output, and the last state."""
    past = len(kernel) - 1

    def local(x, kernel, bias, before, segments, first):
        if past:
            before = _from_before(x, past, before)
            if segments is not None:
                ids = _from_before(segments, past, jnp.repeat(first, past, axis=1))
                runs = document_runs(jnp.concatenate((ids, segments), axis=1))
                before = jnp.where((runs[:, :past] == runs[:, past : past + 1])[..., None], before, 0)
        out, state = op(x, kernel, bias, initial_state=before, segments=segments, return_state=True)
        return out, state[None]

    # The document that the row begins with, to which the tokens before the row belong.
    first = None if segments is None else segments[:, :1]
    arrays = (x, kernel, bias, initial_state, segments, first)
    out, states = split(local, "bnc - - bsc bn bs", "bnc rbsc", *arrays)
    return out, _last(states)


def running(op, x, before, segments, combine):
    """`kernels.running.running`: each device's last value goes to those after it."""

    def local(x, before, segments):
        rank, size = _rank_and_size()
        out = op(x, None, segments, combine=combine)
        last = out[:, -1]
        lasts = jax.lax.all_gather(last, AXIS)
        within = jnp.ones(x.shape[:2], bool)
        if segments is not None:
            within = _goes_on(segments)[:, None] & (document_runs(segments) == 0)
        throughs = jax.lax.all_gather(within[:, -1:], AXIS)

        def joined(seen, earlier, later):
            # Nothing is combined where nothing came before: that may have no gradient.
            return jnp.where(seen, combine(jnp.where(seen, earlier, later), later), later)

        state = jnp.zeros_like(last) if before is None else before.astype(last.dtype)
        seen = jnp.full(last.shape, before is not None)
        mine, mine_seen = state, seen
        for index in range(1, size):
            state, seen = joined(seen & throughs[index - 1], state, lasts[index - 1]), jnp.ones_like(seen)
            mine, mine_seen = jnp.where(rank == index, state, mine), jnp.where(rank == index, seen, mine_seen)
        return joined(mine_seen[:, None] & within[..., None], mine[:, None], out)

    return split(local, "bnh bh bn", "bnh", x, before, segments)


def memory(op, fresh, arrays, gates, weights, segments, state, **options):
    """`kernels.memory.miras`: output, and the state after the last token.

    What a chunk makes of a memory is no linear map, so that the devices have to wait for each other: each takes the
    state from the one before it, goes through its tokens, and hands the state on. The backward pass keeps the state
    that each began with, and goes through the tokens again.

    Args:
        op: `(query, key, value, weights, **gates, segments, initial_state)` to output and state.
        fresh: `(weights, batch)` to the state before the first token.
        arrays: query, key and value; gates: by name, or None; state: before the first token.
    """
    begin = fresh(weights, len(arrays[0])) if state is None else state

    def local(arrays, gates, weights, segments, state, position):
        rank, size = _rank_and_size()
        goes_on = _goes_on(segments)
        state = begin._replace(**state, position=position)

        def turn(state, out):
            if goes_on is not None:
                new = fresh(weights, len(out))._replace(position=state.position)
                state = jax.tree.map(
                    lambda old, new: jnp.where(goes_on.reshape(-1, *[1] * (old.ndim - 1)), old, new), state, new
                )
            out, state = op(*arrays, weights, **gates, segments=segments, initial_state=state)
            return state, out

        # In the loop nothing can be merged across the barrier that prevent_cse would put up.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def body(carry, index):
            state, out = jax.lax.cond(index == rank, turn, lambda *same: same, *carry)
            onwards = [(source, (source + 1) % size) for source in range(size)]
            return (jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, onwards), state), out), None

        (state, out), _ = jax.lax.scan(body, (state, jnp.zeros_like(arrays[2])), jnp.arange(size))
        parts = state._asdict()
        position = parts.pop("position")
        return out, jax.tree.map(lambda x: x[None], parts), position[None]

    parts = begin._asdict()
    position = parts.pop("position")
    operands = (arrays, gates, weights, segments, parts, position)
    out, states, positions = split(local, "bnh bnh h bn bh b", "bnh rbh rb", *operands)
    # The last device has handed its state on to the first.
    return out, begin._replace(**jax.tree.map(lambda x: x[0], states), position=positions[0])
