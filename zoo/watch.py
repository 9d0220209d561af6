"""What a model attended to, in the form in which each kind of attention has it.

A module that runs with the flax collection `"attention"` mutable sows one of these under `"map"`. Fields are arrays
or, under a transformation, what stands for them; the methods are for arrays at hand and compute with numpy. All but
`ChannelMap` have the same ones: `heat`, `reach` and `received`.
"""

import collections
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import flax.traverse_util
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernels.window import partition_windows

Token = tuple[int, int]
Heat = Float[np.ndarray, "B h w"]
Reach = Bool[np.ndarray, "B h w"]


def watched(module: nn.Module) -> bool:
    """Whether a module should sow what it attends to."""
    return module.is_mutable_collection("attention") and not module.is_initializing()


def attention_maps(
    model: nn.Module, variables: Any, images: Float[Array, "B H W C"] | Float[np.ndarray, "B H W C"]
) -> dict[str, Any]:
    """What every attention module of a model attended to.

    Args:
        model: a model of the zoo.
        variables: its variables.
        images: `(B, H, W, C)`, normalised.

    Returns:
        Path of a module (`"stages_0_0/spatial/attention"`) to its map, in the order in which they ran. Maps hold
        arrays of jax; `jax.device_get` makes them numpy's.
    """
    return run_watched(model, variables, images)[1]


@functools.partial(jax.jit, static_argnums=0)
def run_watched(model: nn.Module, variables: Any, images: Float[Array, "B H W C"]) -> tuple[Any, dict[str, Any]]:
    """The model's output, and what `attention_maps` returns."""
    output, state = model.apply(variables, images, mutable=["attention"])
    sown = flax.traverse_util.flatten_dict(state.get("attention", {}))
    # jax sorts the keys of a plain dict.
    maps = collections.OrderedDict(("/".join(path[:-1]), found) for path, (found,) in sown.items())
    return output, maps


def _static():
    return flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class WindowMap:
    """Attention inside windows.

    Attributes:
        weights: `(B, windows, heads, n, n)`, as `kernels.window_attention` returns them.
        shape: height and width of the feature map, without padding.
        window: height and width of a window in tokens.
        partition: `"block"` or `"grid"`.
    """

    weights: Any
    shape: tuple[int, int] = _static()
    window: tuple[int, int] = _static()
    partition: str = _static()

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.weights.shape[2]

    def _tokens(self) -> Int[np.ndarray, "windows n"]:
        return _tokens_of_windows(self._padded, self.window, self.partition)

    @property
    def _padded(self) -> tuple[int, int]:
        return tuple(side + -side % step for side, step in zip(self.shape, self.window))

    def heat(self, token: Token) -> Heat:
        """How much the token at (row, column) attends to every token: `(B, h, w)`, the mean over heads.

        Sums to 1 less what goes to padding; 0 outside `reach`.
        """
        tokens = self._tokens()
        window, query = _position(tokens, token, self.shape, self._padded)
        weights = _wide(self.weights)[:, window, :, query].mean(1)
        return _on_map(weights, tokens[window], self.shape, self._padded)

    def reach(self, token: Token) -> Reach:
        """Which tokens the token at (row, column) can attend to, `(B, h, w)`."""
        tokens = self._tokens()
        window, _ = _position(tokens, token, self.shape, self._padded)
        marks = np.ones((self.weights.shape[0], tokens.shape[1]), bool)
        return _on_map(marks, tokens[window], self.shape, self._padded)

    def received(self) -> Heat:
        """How much every token is attended to: the mean of `heat` over all tokens, `(B, h, w)`."""
        tokens = self._tokens()
        real = _is_real(tokens, self.shape, self._padded)
        weights = np.einsum("bwhqk,wq->bwk", _wide(self.weights), real.astype(np.float32))
        weights = weights / (self.heads * real.sum())
        return _on_map(weights.reshape(len(weights), -1), tokens.reshape(-1), self.shape, self._padded)


@flax.struct.dataclass
class RoutedMap:
    """Attention of every region to the regions that it was routed to (BiFormer).

    What goes to a pooled key is spread evenly over the share of its region that it stands for: one of as many equal
    parts as there are keys along a side. Where these do not end between tokens, the pooling's own bins may reach a
    token further.

    Attributes:
        weights: `(B, regions, heads, m, k * n)`: m queries of a region, n keys of each of its k regions.
        indices: `(B, regions, k)`: which regions those are, row-major.
        shape: height and width of the feature map, without padding.
        regions: rows and columns of regions.
        region: height and width of a region in tokens.
        keys: height and width of a region after its keys were pooled; equal to `region` without pooling.
    """

    weights: Any
    indices: Any
    shape: tuple[int, int] = _static()
    regions: tuple[int, int] = _static()
    region: tuple[int, int] = _static()
    keys: tuple[int, int] = _static()

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.weights.shape[2]

    def _tokens(self) -> Int[np.ndarray, "regions m"]:
        return _tokens_of_windows(self._padded, self.region, "block")

    @property
    def _padded(self) -> tuple[int, int]:
        return tuple(count * side for count, side in zip(self.regions, self.region))

    def _unpool(self, keys: Float[np.ndarray, "B regions n"]) -> Heat:
        """What goes to the keys of every region, on the map."""
        parts = np.kron(*(_parts(side, count) for side, count in zip(self.region, self.keys)))
        spread = (keys @ parts.astype(keys.dtype)).reshape(len(keys), -1)
        return _on_map(spread, self._tokens().reshape(-1), self.shape, self._padded)

    def heat(self, token: Token) -> Heat:
        """How much the token at (row, column) attends to every token: `(B, h, w)`, the mean over heads.

        Sums to 1 less what goes to padding; 0 outside `reach`.
        """
        region, query = _position(self._tokens(), token, self.shape, self._padded)
        weights = _wide(self.weights)[:, region, :, query].mean(1)
        chosen = np.asarray(self.indices)[:, region]
        keys = np.zeros((len(weights), self.indices.shape[1], self.keys[0] * self.keys[1]), weights.dtype)
        np.put_along_axis(keys, chosen[..., None], weights.reshape(*chosen.shape, -1), axis=1)
        return self._unpool(keys)

    def reach(self, token: Token) -> Reach:
        """Which tokens the token at (row, column) can attend to, `(B, h, w)`."""
        tokens = self._tokens()
        region, _ = _position(tokens, token, self.shape, self._padded)
        marks = np.zeros((self.indices.shape[0], len(tokens), 1), bool)
        np.put_along_axis(marks, np.asarray(self.indices)[:, region, :, None], True, axis=1)
        marks = np.repeat(marks, tokens.shape[1], axis=2)
        return _on_map(marks.reshape(len(marks), -1), tokens.reshape(-1), self.shape, self._padded)

    def received(self) -> Heat:
        """How much every token is attended to: the mean of `heat` over all tokens, `(B, h, w)`."""
        real = _is_real(self._tokens(), self.shape, self._padded)
        weights = np.einsum("brhqk,rq->brk", _wide(self.weights), real.astype(np.float32))
        weights = weights / (self.heads * real.sum())
        indices = np.asarray(self.indices)
        keys = np.zeros((*indices.shape[:2], self.keys[0] * self.keys[1]), weights.dtype)
        images = np.arange(len(indices))[:, None, None]
        np.add.at(keys, (images, indices), weights.reshape(*indices.shape, -1))
        return self._unpool(keys)


@flax.struct.dataclass
class ChannelMap:
    """Attention between the channels of each group (DaViT). There are no weights from token to token.

    Attributes:
        weights: `(B, groups, d, d)`.
        values: `(B, h, w, groups)`: root mean square of each group's output at every token.
    """

    weights: Any
    values: Any

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the feature map."""
        return tuple(self.values.shape[1:3])


@flax.struct.dataclass
class LinearMap:
    """Linear attention: query n attends to key m by `query[n] @ key[m]` over its sum for all keys.

    Attributes:
        query, key: `(B, N, heads, D)` after the feature map, which makes them non-negative.
        shape: height and width of the feature map; N is their product, row-major.
    """

    query: Any
    key: Any
    shape: tuple[int, int] = _static()

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.key.shape[2]

    def heat(self, token: Token) -> Heat:
        """How much the token at (row, column) attends to every token: `(B, h, w)`, the mean over heads; sums to 1.

        Computed for this token alone.
        """
        query, key = _wide(self.query)[:, _flat(token, self.shape)], _wide(self.key)
        products = np.einsum("bhd,bmhd->bmh", query, key)
        return (products / products.sum(1, keepdims=True)).mean(-1).reshape(-1, *self.shape)

    def reach(self, token: Token) -> Reach:
        """Which tokens the token at (row, column) can attend to: all of them, `(B, h, w)`."""
        return _everywhere(self.key.shape[0], token, self.shape)

    def received(self) -> Heat:
        """How much every token is attended to: the mean of `heat` over all tokens, `(B, h, w)`.

        Queries enter only through their sum, each over its normaliser, so that no weights are computed.
        """
        query, key = _wide(self.query), _wide(self.key)
        normalizer = np.einsum("bnhd,bhd->bnh", query, key.sum(1))
        total = (query / normalizer[..., None]).mean(1)
        return np.einsum("bhd,bmhd->bmh", total, key).mean(-1).reshape(-1, *self.shape)


@flax.struct.dataclass
class DenseMap:
    """Attention of every token to every token.

    Attributes:
        weights: `(B, heads, N, N)`.
        shape: height and width of the feature map, whose tokens are the last, row-major.
        prefix: how many tokens that lie nowhere on it, such as a class token, come before them.
    """

    weights: Any
    shape: tuple[int, int] = _static()
    prefix: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.weights.shape[1]

    def heat(self, token: Token) -> Heat:
        """How much the token at (row, column) attends to every token: `(B, h, w)`, the mean over heads.

        Sums to 1 less what goes to the tokens of the prefix.
        """
        return self._on_map(_wide(self.weights)[:, :, self.prefix + _flat(token, self.shape)].mean(1))

    def of_prefix(self, number: int = 0) -> Heat:
        """How much a token of the prefix, such as the class token, attends to every token of the map: `(B, h, w)`."""
        if not 0 <= number < self.prefix:
            raise ValueError(f"number must be from 0 and below {self.prefix}, the tokens before the map, got {number}")
        return self._on_map(_wide(self.weights)[:, :, number].mean(1))

    def reach(self, token: Token) -> Reach:
        """Which tokens the token at (row, column) can attend to: all of them, `(B, h, w)`."""
        return _everywhere(self.weights.shape[0], token, self.shape)

    def received(self) -> Heat:
        """How much every token is attended to: the mean of `heat` over all tokens, `(B, h, w)`."""
        return self._on_map(_wide(self.weights)[:, :, self.prefix :].mean((1, 2)))

    def _on_map(self, received: Float[np.ndarray, "B N"]) -> Heat:
        return received[:, self.prefix :].reshape(-1, *self.shape)


def _wide(values: Any) -> Float[np.ndarray, "..."]:
    array = np.asarray(values)
    return array if array.dtype == np.float64 else array.astype(np.float32)


def _flat(token: Token, shape: tuple[int, int]) -> int:
    """Row-major position of a token; raises `ValueError` where the map has none."""
    row, column = token
    if not (0 <= row < shape[0] and 0 <= column < shape[1]):
        raise ValueError(
            f"token must be a (row, column) from (0, 0) to {(shape[0] - 1, shape[1] - 1)}, got {(row, column)}"
        )
    return row * shape[1] + column


def _everywhere(batch: int, token: Token, shape: tuple[int, int]) -> Reach:
    _flat(token, shape)
    return np.ones((batch, *shape), bool)


@functools.cache
def _tokens_of_windows(padded: tuple[int, int], window: tuple[int, int], partition: str) -> Int[np.ndarray, "w n"]:
    """The row-major position, on the padded map, of every token of every window; read-only."""
    positions = np.arange(padded[0] * padded[1]).reshape(1, *padded, 1)
    return np.asarray(jax.jit(partition_windows, static_argnums=(1, 2))(positions, window, partition))[..., 0]


def _position(
    tokens: Int[np.ndarray, "w n"], token: Token, shape: tuple[int, int], padded: tuple[int, int]
) -> tuple[int, int]:
    """The window that a token is in, and its place there."""
    _flat(token, shape)
    ((window, place),) = np.argwhere(tokens == _flat(token, padded))
    return int(window), int(place)


def _is_real(
    tokens: Int[np.ndarray, "w n"], shape: tuple[int, int], padded: tuple[int, int]
) -> Bool[np.ndarray, "w n"]:
    """Which tokens are not padding."""
    rows, columns = np.divmod(tokens, padded[1])
    return (rows < shape[0]) & (columns < shape[1])


def _on_map(values: np.ndarray, tokens: np.ndarray, shape: tuple[int, int], padded: tuple[int, int]) -> np.ndarray:
    """`(B, h, w)` from `(B, n)` values of the n tokens; 0 elsewhere, and what is on padding dropped."""
    whole = np.zeros((len(values), padded[0] * padded[1]), values.dtype)
    whole[:, tokens] = values
    return whole.reshape(-1, *padded)[:, : shape[0], : shape[1]]


def _parts(side: int, count: int) -> Float[np.ndarray, "count side"]:
    """How `count` equal parts of a side are spread over its tokens; rows sum to 1."""
    edges = np.arange(count + 1) * (side / count)
    starts = np.arange(side)
    overlap = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    return np.maximum(overlap, 0) * (count / side)
