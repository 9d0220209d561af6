"""How programs of window attention on a GPU are laid out, and how they read and write tokens."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from kernels import compat, tuning
from kernels.pallas_gpu.tiles import dot, side
from kernels.window_plan import Geometry

# In place of minus infinity, so that a block of keys that are all excluded has weights, which later ones take away.
EXCLUDED = -1e30
# Programs of a call that share sums: a few for each multiprocessor.
PROGRAMS = 1024
# Logits are in units of it: exponentials of base 2 take one instruction.
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a call is divided over programs.

    Attributes:
        g: the maps.
        block: queries, and keys, that are worked at together.
        blocks: of them in a window.
        wide: channels of a head, rounded up.
        together: windows that one program works at, one after the other.
        warps, stages: of the compiler's parameters.
    """

    g: Geometry
    block: int
    blocks: int
    wide: int
    together: int
    warps: int
    stages: int

    @property
    def windows(self) -> int:
        return self.g.batch * self.g.windows

    @property
    def groups(self) -> int:
        return -(-self.windows // self.together)

    @property
    def rows(self) -> int:
        """Tokens of a window, rounded up."""
        return self.block * self.blocks

    def small(self, bias, pad) -> list[jax.Array]:
        """The bias in base 2 and in whole blocks, and pad by part, head and channel, where there are any."""
        g, arrays = self.g, []
        if bias is not None:
            fill = self.rows - g.tokens
            arrays.append(jnp.pad(bias * LOG2_E, ((0, 0), (0, fill), (0, fill))))
        if pad is not None:
            arrays.append(jnp.pad(pad.reshape(3, g.heads, g.dim), ((0, 0), (0, 0), (0, self.wide - g.dim))))
        return arrays

    def sharing(self, together: int) -> "Layout":
        """The same with so many windows in a program."""
        return dataclasses.replace(self, together=together)

    def pad_gradient(self, partial):
        """The gradient of pad from sums `(programs of a head, heads, 3, wide)`."""
        return partial.sum(0)[:, :, : self.g.dim].swapaxes(0, 1).reshape(-1)


def layout(g: Geometry, dtype, bias: bool, *, backward: bool) -> Layout:
    """The blocks of a call, the measured ones if there are any."""
    wide, tokens = side(g.dim), side(g.tokens)
    # Products in float32 hold whole operands in registers.
    largest = 64 if dtype == jnp.bfloat16 else 16 if backward and wide > 16 else 32
    block = min(tokens, largest)
    blocks = -(-g.tokens // block)
    windows = g.batch * g.windows
    together = 1
    if bias and blocks == 1:
        # The bias is read, and its gradient written, once for all windows of a program.
        together = max(1, min(16, windows * g.heads // PROGRAMS))
    # So many that the compiler keeps all tiles in registers, for compute capabilities 8.0 to 9.0.
    warps = 1 if block <= 16 else 2 if block * wide <= 64 * 32 else 4
    if blocks > 1 or bias and backward:
        warps = max(warps, 4)
    if backward and wide > 32:
        warps = 8
    default = dict(together=together, warps=warps, stages=2)
    shape = dict(tokens=tokens, dim=wide, bias=bias, backward=backward, dtype=jnp.dtype(dtype).name)
    return Layout(g, block, blocks, wide, **tuning.blocks("window", "gpu", default, **shape))


def whole(array) -> pl.BlockSpec:
    """All of an operand or result for every program."""
    return pl.BlockSpec(array.shape, lambda i: (0,) * array.ndim)


def softmax(logits):
    """Of logits in base 2."""
    weights = jnp.exp2(logits - logits.max(1)[:, None])
    return weights * (1 / weights.sum(1))[:, None]


def weigh(logits, top):
    """One step of a softmax over blocks of keys, of logits in base 2.

    Args:
        logits: of this block, `(queries, keys)`.
        top: the largest logit of each query in the blocks before, `(queries,)`.

    Returns:
        The largest with this block's, the weights relative to it, and the factor for what was summed relative to `top`.
    """
    new = jnp.maximum(top, logits.max(1))
    return new, jnp.exp2(logits - new[:, None]), jnp.exp2(top - new)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens of a window, each a value a token: where in the map, whether in the window, whether on the map."""

    where: Any
    inside: Any
    real: Any


@dataclasses.dataclass(frozen=True)
class Place:
    """A window of a map."""

    at: Layout
    index: Any

    def tokens(self, block) -> Tokens:
        """The tokens of one block."""
        at, g = self.at, self.at.g
        image, window = self.index // g.windows, self.index % g.windows
        t = block * at.block + jnp.arange(at.block, dtype=jnp.int32)
        row, col = g.row(window // g.cols, t // g.window[1]), g.col(window % g.cols, t % g.window[1])
        inside = (t < g.tokens) & (self.index < at.windows)
        real = inside & (row < g.height) & (col < g.width) if g.ragged else inside
        where = (image * g.height + row) * g.width + col
        # Interpreted, a masked store writes back what it read; what is not there must not be another token.
        return Tokens(
            jnp.where(real, where, g.batch * g.height * g.width) if compat.interpreting() else where, inside, real
        )


@dataclasses.dataclass(frozen=True)
class Reader:
    """What a program reads and writes; `pad` is a reference, `(3, heads, wide)`, or None."""

    at: Layout
    pad: Any

    def program(self, blocks: int):
        """Block, head and group of windows of this program; heads of a window lie next to each other."""
        i = pl.program_id(0)
        return i % blocks, i // blocks % self.at.g.heads, i // blocks // self.at.g.heads

    def place(self, index) -> Place:
        return Place(self.at, index)

    def _channels(self, h, part: int):
        g, wide = self.at.g, self.at.wide
        own = jnp.arange(wide, dtype=jnp.int32)[None, :]
        return part * g.channels + h * g.dim + own, own < g.dim

    def load(self, ref, tokens: Tokens, h, part: int, *, filled: bool = True):
        """`(block, wide)`, the channels of a head; filled tokens have the value of pad, if `filled`, others are 0."""
        g = self.at.g
        channels, exist = self._channels(h, part)
        mask = tokens.real[:, None]
        if self.at.wide != g.dim:
            mask = mask & exist
        x = triton.load(ref.at[tokens.where[:, None], channels], mask=_wide(mask, self.at.wide), other=0.0)
        if filled and self.pad is not None:
            value = self.pad[part, h, :].astype(x.dtype)[None, :]
            x = jnp.where((tokens.inside & ~tokens.real)[:, None], value, x)
        return x

    def store(self, ref, tokens: Tokens, h, part: int, x) -> None:
        channels, exist = self._channels(h, part)
        mask = tokens.real[:, None]
        if self.at.wide != self.at.g.dim:
            mask = mask & exist
        triton.store(ref.at[tokens.where[:, None], channels], x.astype(ref.dtype), mask=_wide(mask, self.at.wide))

    def logits(self, q, k, bias, h, i, j, keys: Tokens):
        """Of a block `i` of queries and a block `j` of keys, in float32 and base 2."""
        block = self.at.block
        logits = dot(q, k, trans_b=True) * (self.at.g.scale * LOG2_E)
        if bias is not None:
            logits = logits + bias[h, pl.ds(i * block, block), pl.ds(j * block, block)]
        exist = keys.real if self.at.g.masked else keys.inside
        return jnp.where(exist[None, :], logits, EXCLUDED)

    def filled(self, tokens: Tokens, x):
        """`(wide,)`: the sum of filled tokens."""
        return jnp.where((tokens.inside & ~tokens.real)[:, None], x, 0.0).sum(0)


def _wide(mask, wide: int):
    return jnp.broadcast_to(mask, (mask.shape[0], wide))
