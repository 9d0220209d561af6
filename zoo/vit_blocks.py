"""The parts of a Vision Transformer: patches as tokens, attention, blocks."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from kernels import attention
from kernels.cross.selected import take_tokens
from zoo.layers import Conv, DropPath, Dtype, LayerNorm, Linear, Mlp, normal02_init
from zoo.watch import DenseMap, watched

# What takes the place of plain attention: `attend(query, key, value, return_weights=...)` on `(B, M, H, D)` and twice
# `(B, T, H, D)` gives `(B, M, H, D)`, or a pair with the weights.
Attend = Callable[..., Any]
Norm = functools.partial(LayerNorm, epsilon=1e-6)


class QueryKeyValue(nn.Module):
    """Queries, keys and values by one matrix, `kernel` `(C, 3 * C)` in this order."""

    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T C"], queries: Float[Array, "B M C"] | None = None
    ) -> tuple[Float[Array, "B M C"], Float[Array, "B T C"], Float[Array, "B T C"]]:
        """Keys and values of `x`; queries of `queries`, or of `x` too."""
        c = x.shape[-1]
        kernel = self.param("kernel", normal02_init, (c, 3 * c), self.param_dtype)
        bias = self.param("bias", initializers.zeros, (3 * c,), self.param_dtype) if self.use_bias else None
        x, queries, kernel, bias = nn.dtypes.promote_dtype(x, queries, kernel, bias, dtype=self.dtype)

        def project(tokens, columns):
            y = tokens.reshape(-1, c) @ kernel[:, columns]
            y = y if bias is None else y + bias[columns]
            return y.reshape(*tokens.shape[:-1], -1)

        if queries is None:
            return tuple(jnp.split(project(x, slice(None)), 3, axis=-1))
        return project(queries, slice(c)), *jnp.split(project(x, slice(c, None)), 2, axis=-1)


class Attention(nn.Module):
    """Multi-head attention of tokens to tokens.

    Attributes:
        num_heads: divides the channels.
        grid: rows and columns of the patches, the last of the tokens; for the maps of `zoo.watch` alone.
        qkv_bias: whether queries, keys and values have a bias.
        implementation: of the attention, see `kernels.attention`.
    """

    num_heads: int
    grid: tuple[int, int]
    qkv_bias: bool = True
    implementation: str | tuple[str, ...] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T C"],
        queries: Float[Array, "B M C"] | None = None,
        attend: Attend | None = None,
        return_weights: bool = False,
    ):
        """What the tokens `queries` find in the tokens `x`.

        Args:
            x: tokens that are attended to.
            queries: tokens that attend, None for all of `x`.
            attend: in place of plain attention, see `Attend`: to join the keys and values of another image to an
                image's own, say. It computes what it likes from the heads' queries, keys and values.
            return_weights: also return the weights.

        Returns:
            `(B, M, C)`; with `return_weights` a pair with the weights `(B, heads, M, T)`, or as `attend` has them.
        """
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        c = x.shape[-1]
        parts = QueryKeyValue(self.qkv_bias, name="qkv", **like)(x, queries)
        query, key, value = (part.reshape(*part.shape[:2], self.num_heads, c // self.num_heads) for part in parts)
        # Of some of the tokens, or of what `attend` computes, there is no map.
        watching = watched(self) and attend is None and queries is None
        wants_weights = return_weights or watching
        if attend is None:
            how = "xla" if wants_weights else self.implementation
            attend = functools.partial(attention, implementation=how)
        out = attend(query, key, value, return_weights=wants_weights)
        weights = None
        if wants_weights:
            out, weights = out
        if watching:
            self.sow("attention", "map", DenseMap(weights, self.grid, x.shape[1] - self.grid[0] * self.grid[1]))
        out = Linear(c, name="proj", **like)(out.reshape(*out.shape[:2], c))
        return (out, weights) if return_weights else out


class Block(nn.Module):
    """Norm, attention, norm, MLP, each pair beside a shortcut.

    Attributes:
        num_heads, grid, qkv_bias: of the attention.
        mlp_ratio: hidden width of the MLP over its input width.
        drop_path: rate of stochastic depth.
        layer_scale: what the factors of the two branches' channels start from; None: there are none.
    """

    num_heads: int
    grid: tuple[int, int]
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop_path: float = 0.0
    layer_scale: float | None = None
    implementation: str | tuple[str, ...] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T C"],
        train: bool,
        attend: Attend | None = None,
        return_weights: bool = False,
        rows: Int[Array, "B M"] | None = None,
    ):
        """The tokens after this block.

        Under `remat`, pass all arguments by position.

        Args:
            x: tokens.
            train: whether the model is in training.
            attend: in place of plain attention, see `Attention`.
            return_weights: also return the weights of the attention.
            rows: numbers of the tokens that attend; only these go on, all are attended to. None: all.

        Returns:
            `(B, M, C)`, with `rows` None `(B, T, C)`; with `return_weights` a pair with the weights.
        """
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        normed = Norm(name="norm1", **like)(x)
        queries = None
        if rows is not None:
            x, queries = take_tokens(x, rows), take_tokens(normed, rows)
        attended = Attention(self.num_heads, self.grid, self.qkv_bias, self.implementation, name="attention", **like)(
            normed, queries, attend, return_weights
        )
        weights = None
        if return_weights:
            attended, weights = attended
        x = x + DropPath(self.drop_path)(self._scaled(attended, 1), train)
        hidden = Mlp(int(self.mlp_ratio * x.shape[-1]), name="mlp", **like)(Norm(name="norm2", **like)(x))
        x = x + DropPath(self.drop_path)(self._scaled(hidden, 2), train)
        return (x, weights) if return_weights else x

    def _scaled(self, branch, number):
        if self.layer_scale is None:
            return branch
        start, shape = initializers.constant(self.layer_scale), branch.shape[-1:]
        return branch * self.param(f"layer_scale{number}", start, shape, self.param_dtype).astype(branch.dtype)


class Stem(nn.Module):
    """Patches as tokens, behind the class token and the distillation token, plus a learned position each.

    Attributes:
        features: channels of a token.
        patch: side of a patch in pixels.
        distilled: whether there is a distillation token.
        embed_class: whether these two have positions as well.
        position_std: standard deviation of the positions at the start.
    """

    features: int
    patch: int
    distilled: bool = False
    embed_class: bool = True
    position_std: float = 0.02
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B T D"]:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = Conv(self.features, self.patch, self.patch, name="conv", **like)(x)
        x = x.reshape(x.shape[0], -1, self.features)
        names = ("cls_token", "dist_token") if self.distilled else ("cls_token",)
        starts = dict(cls_token=initializers.normal(1e-6), dist_token=normal02_init)
        first = [self.param(name, starts[name], (self.features,), self.param_dtype) for name in names]
        first = jnp.broadcast_to(jnp.stack(first).astype(x.dtype), (x.shape[0], len(names), self.features))
        positions = x.shape[1] + len(names) * self.embed_class
        start = initializers.normal(self.position_std)
        table = self.param("pos_embed", start, (positions, self.features), self.param_dtype).astype(x.dtype)
        if self.embed_class:
            return jnp.concatenate([first, x], axis=1) + table
        return jnp.concatenate([first, x + table], axis=1)
