"""What the kernels of window attention have in common: the calls they serve, the places of tokens, costs, gradients."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import compat

MAX_TOKENS = 1024
MAX_HEAD_DIM = 128


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Maps cut into windows.

    Attributes:
        batch, height, width: of the maps, in tokens.
        heads, dim: of the attention; a token has `3 * heads * dim` channels.
        window: height and width in tokens.
        grid: whether windows are strided (MaxViT) instead of contiguous.
        masked: whether keys past the edges of the map are excluded; if not they have the value of `pad`.
        scale: factor on the logits.
    """

    batch: int
    height: int
    width: int
    heads: int
    dim: int
    window: tuple[int, int]
    grid: bool
    masked: bool
    scale: float

    @property
    def channels(self) -> int:
        return self.heads * self.dim

    @property
    def tokens(self) -> int:
        """Of a window."""
        return math.prod(self.window)

    @property
    def rows(self) -> int:
        """Windows from top to bottom."""
        return -(-self.height // self.window[0])

    @property
    def cols(self) -> int:
        """Windows from left to right."""
        return -(-self.width // self.window[1])

    @property
    def windows(self) -> int:
        """Of a map."""
        return self.rows * self.cols

    @property
    def ragged(self) -> bool:
        return self.height % self.window[0] != 0 or self.width % self.window[1] != 0

    def row(self, r, a):
        """The map's row that is row `a` of the windows in row `r` of windows; past the edge from `height` on."""
        return a * self.rows + r if self.grid else r * self.window[0] + a

    def col(self, c, b):
        """The map's column that is column `b` of the windows in column `c` of windows."""
        return b * self.cols + c if self.grid else c * self.window[1] + b


def geometry(qkv, options: dict[str, Any]) -> Geometry:
    """Of a call of `window_attention`, by its operand and the options of its implementations."""
    b, h, w, c3 = qkv.shape
    heads = options["num_heads"]
    return Geometry(
        batch=b,
        height=h,
        width=w,
        heads=heads,
        dim=c3 // 3 // heads,
        window=options["window"],
        grid=options["partition"] == "grid",
        masked=options["mask_pad"],
        scale=float(options["scale"]),
    )


def refusal(qkv, bias, pad, **options: Any) -> str | None:
    """Why no kernel serves this call, or None."""
    if options["return_weights"]:
        return "return_weights=True: a kernel never holds the weights; the XLA form returns them"
    if qkv.dtype not in (jnp.bfloat16, jnp.float32):
        return f"qkv is {qkv.dtype}; bfloat16 and float32 are served"
    if 0 in qkv.shape:
        return f"qkv has no elements: its shape is {qkv.shape}"
    g = geometry(qkv, options)
    if g.dim > MAX_HEAD_DIM:
        return f"the heads are {g.dim} wide; up to {MAX_HEAD_DIM} is served: more num_heads"
    if g.tokens > MAX_TOKENS:
        return f"a window has {g.tokens} tokens; up to {MAX_TOKENS} are served"
    return None


def cost(g: Geometry, itemsize: int, bias: bool, pad: bool, *, backward: bool) -> pl.CostEstimate:
    """Products of full windows; every operand read once and every result written once."""
    small = (bias * g.heads * g.tokens**2 + pad * 3 * g.channels) * 4
    if backward:
        return estimate(g, itemsize, products=5, maps=7, small=2 * small)
    return estimate(g, itemsize, products=2, maps=4, small=small)


def estimate(g: Geometry, itemsize: int, *, products: int, maps: int, small: int = 0) -> pl.CostEstimate:
    """Of so many products for every pair of queries and keys, which move so many maps and `small` bytes besides."""
    weights = g.batch * g.windows * g.heads * g.tokens**2
    pixels = g.batch * g.height * g.width * g.channels * itemsize
    return pl.CostEstimate(
        flops=weights * 2 * g.dim * products, transcendentals=weights, bytes_accessed=maps * pixels + small
    )


def optional(refs: Sequence[Any], has_bias: bool, has_pad: bool):
    """Of a body's references those to the bias and to pad, or to their gradients, None for absent, and the rest."""
    refs = list(refs)
    return refs.pop(0) if has_bias else None, refs.pop(0) if has_pad else None, refs


@dataclasses.dataclass(frozen=True)
class Backend:
    """The two functions of a backend.

    Attributes:
        forward: `forward(qkv, bias, pad, *, g)` to `(B, H, W, C)`.
        backward: `backward(qkv, bias, pad, gradient, *, g)` to the gradients of qkv, bias and pad, None where those
            are None.

    qkv is `(B, H, W, 3 * C)`, bias `(heads, n, n)` float32 or None, pad `(3 * C,)` float32 or None: None where no
    token is filled or where filled keys are masked.
    """

    forward: Callable[..., jax.Array]
    backward: Callable[..., tuple[jax.Array, jax.Array | None, jax.Array | None]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(backend: Backend, g: Geometry, qkv, bias, pad):
    return compat.traced_once(backend.forward, {"g": g}, qkv, bias, pad)


def _attend_forward(backend, g, qkv, bias, pad):
    return _attend(backend, g, qkv, bias, pad), (qkv, bias, pad)


def _attend_backward(backend, g, saved, gradient):
    return compat.traced_once(backend.backward, {"g": g}, *saved, gradient)


_attend.defvjp(_attend_forward, _attend_backward)


def run(backend: Backend, qkv, bias, pad, **options: Any):
    """`window_attention` by a backend; nothing is kept for the gradient but the operands."""
    g = geometry(qkv, options)
    if bias is not None:
        bias = bias.astype(jnp.float32)
    if pad is not None:
        # As in the XLA form, the filled tokens have the precision of the map.
        pad = pad.astype(qkv.dtype).astype(jnp.float32) if g.ragged else None
    return _attend(backend, g, *compat.match_varying(qkv, bias, pad))
