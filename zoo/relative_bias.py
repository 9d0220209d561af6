"""Tables of relative position biases: one number per head and offset between two tokens of a window.

A table is `(heads, 2 * height - 1, 2 * width - 1)` for windows of height x width tokens. Its entry
`[h, dy + height - 1, dx + width - 1]` belongs to a key that lies `dy` rows below and `dx` columns right of its query.
Swin's tables count from the key to the query: theirs are these reversed along both axes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from zoo.layers import Dtype, Linear

# The free parameter of the cubic kernel, as torch has it; PIL and `jax.image` take -0.5.
CUBIC = -0.75


def expand_table(table: Float[Array, "heads H W"]) -> Float[Array, "heads n n"]:
    """The bias of every query (second axis) and key (last axis), tokens in row-major order, n = height * width.

    `bias[h, (qi, qj), (ki, kj)] = table[h, ki - qi + height - 1, kj - qj + width - 1]`, by copies and slices alone:
    a gather's gradient would be a scatter, which is slow on every platform.
    """
    heads, rows, columns = table.shape
    n = (rows + 1) // 2 * ((columns + 1) // 2)
    bias = _toeplitz(_toeplitz(table).transpose(0, 2, 3, 1))
    return bias.transpose(0, 3, 1, 4, 2).reshape(heads, n, n)


def _toeplitz(x):
    """`(..., 2n - 1)` to `(..., n, n)`: `y[..., i, j] = x[..., j - i + n - 1]`.

    Many copies of x with one more entry (2n each), cut into rows of 2n - 1: each row starts one entry later.
    """
    *batch, length = x.shape
    n = (length + 1) // 2
    cycle = jnp.concatenate([x, x[..., :1]], axis=-1)
    copies = jnp.broadcast_to(cycle[..., None, :], (*batch, n, 2 * n)).reshape(*batch, 2 * n * n)
    return copies[..., : n * length].reshape(*batch, n, length)[..., n - 1 :]


class RelativeBiasMlp(nn.Module):
    """A table computed from the offsets, so that it fits every window: timm's `RelPosMlp`, after Swin V2.

    Two linear layers with a ReLU and dropout between them, on sign(d) * ln(1 + |d|) of the offset *from the key to the
    query*.

    Source: Liu et al., arXiv:2111.09883, section 3.3, with other constants and no sigmoid.
    """

    heads: int
    window: tuple[int, int]
    hidden: int = 512
    dropout: float = 0.125
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, train: bool) -> Float[Array, "heads H W"]:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        sides = (np.arange(side - 1, -side, -1.0) for side in self.window)
        offsets = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1)
        logarithms = jnp.asarray(np.sign(offsets) * np.log1p(np.abs(offsets)), self.param_dtype)
        x = jax.nn.relu(Linear(self.hidden, name="fc1", **like)(logarithms))
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        return Linear(self.heads, name="fc2", **like)(x).transpose(2, 0, 1)


def resize_table(table: Shaped[np.ndarray, "..."], shape: tuple[int, ...], method: str) -> Float[np.ndarray, "..."]:
    """A table for windows of another size.

    Args:
        table: `(heads, H, W)`.
        shape: the same heads, other H and W.
        method: `"bilinear"`, half-pixel centres, no antialiasing, as the official graph does it at 384 and 512 pixels
            (and `jax.image.resize`, and torch with `align_corners=False`); `"bicubic"`, the same with torch's cubic;
            `"geometric"`, linear between offsets that are taken to lie in a geometric series, dense around 0 (BEiT,
            as timm does it), such that the outermost ones meet.

    Returns:
        float64 `(heads, H, W)` of that shape.

    Raises:
        ValueError: for another number of heads or axes, or an unknown method.
    """
    if table.ndim != 3 or len(shape) != 3 or table.shape[0] != shape[0]:
        raise ValueError(f"only the height and width of a table (heads, H, W) can be resized, not {table.shape}")
    if method not in _WEIGHTS:
        raise ValueError(f"method must be one of {', '.join(map(repr, _WEIGHTS))}, got {method!r}")
    rows, columns = (_WEIGHTS[method](*sides) for sides in zip(table.shape[1:], shape[1:]))
    return np.einsum("yh,nhw,xw->nyx", rows, table.astype(np.float64), columns, optimize=True)


def _linear(positions, targets):
    """`(targets, positions)`: linear interpolation at `targets`, constant beyond the outermost positions."""
    return np.stack([np.interp(targets, positions, unit) for unit in np.eye(len(positions))], axis=1)


def _centres(source, target):
    """Where the centres of `target` pixels lie among `source` pixels."""
    return (np.arange(target) + 0.5) * source / target - 0.5


def _bilinear(source, target):
    return _linear(np.arange(source), _centres(source, target))


def _bicubic(source, target):
    """Source: Keys, "Cubic convolution interpolation for digital image processing" (1981), equation 15."""
    taps = np.floor(_centres(source, target)).astype(int)[:, None] + np.arange(-1, 3)
    x = np.abs(_centres(source, target)[:, None] - taps)
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = CUBIC * (((x - 5) * x + 8) * x - 4)
    weights = np.zeros((target, source))
    np.add.at(weights, (np.arange(target)[:, None], taps.clip(0, source - 1)), np.where(x <= 1, near, far))
    return weights


def _geometric(source, target):
    reach = target // 2
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (source // 2)) / (1 - ratio) > reach:
            high = ratio
        else:
            low = ratio
    offsets = np.cumsum(ratio ** np.arange(source // 2))
    return _linear(np.concatenate([-offsets[::-1], [0], offsets]), np.arange(-reach, reach + 1))


_WEIGHTS = {"bilinear": _bilinear, "bicubic": _bicubic, "geometric": _geometric}
