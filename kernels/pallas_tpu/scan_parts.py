"""What the TPU's recurrences are made of: how operands lie; products, masks, decays of a chunk of a head."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# What is contracted: `left @ right`, `left @ right^T`, `left^T @ right`.
NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))


class Products(NamedTuple):
    """Matrix products with float32 sums.

    Attributes:
        narrow: operands are bfloat16, and so are those of products: what was computed is rounded, as operands were.
    """

    narrow: bool

    def __call__(self, left, right, contract=NN):
        """A product whose operands may be rounded as the kernel's operands are."""
        if self.narrow:
            return _product(left.astype(jnp.bfloat16), right.astype(jnp.bfloat16), contract, None)
        return _product(left, right, contract, jax.lax.Precision.HIGHEST)

    def rounded(self, x):
        """An operand as a product takes it, in float32."""
        return x.astype(jnp.bfloat16).astype(jnp.float32) if self.narrow else x

    def of_state(self, left, right, contract=NN):
        """The same with all digits of the left one that matter, which a state has gathered over many tokens."""
        if not self.narrow:
            return self(left, right, contract)
        high, low = _halves(left)
        return self(high, right, contract) + self(low, right, contract)

    def precise(self, left, right, contract=NN):
        """The same with those of both."""
        if not self.narrow:
            return self(left, right, contract)
        high, low = _halves(right)
        return self.of_state(left, high, contract) + self(left, low, contract)


def _product(left, right, contract, precision):
    return jax.lax.dot_general(
        left, right, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _halves(x):
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def turned(x):
    """`(B, N, H, c)` as `(B, H * c, N)`."""
    batch, tokens, heads, channels = x.shape
    return x.transpose(0, 2, 3, 1).reshape(batch, heads * channels, tokens)


def turned_back(x, channels: int):
    """The inverse, of heads of `channels`."""
    batch, width, tokens = x.shape
    return x.reshape(batch, width // channels, channels, tokens).transpose(0, 3, 1, 2)


def places(rows: int, columns: int):
    """Row and column numbers of a matrix."""
    return tuple(jax.lax.broadcasted_iota(jnp.int32, (rows, columns), axis) for axis in (0, 1))


def level_mask(chunk: int, size: int):
    """Pairs, as row and column, of a token in the first half of a block of `2 * size` and one in its second half."""
    rows, columns = places(chunk, chunk)
    apart = jnp.bitwise_xor(rows, columns)
    return (rows < columns) & (apart >= size) & (apart < 2 * size)


def sizes(chunk: int) -> list[int]:
    """Halves of blocks: 1, 2, 4, ... up to half a chunk."""
    return [1 << level for level in range(chunk.bit_length() - 1)]


class Decay(NamedTuple):
    """Of a chunk of a head.

    Attributes:
        between: `(C, C)`, what is left at a column's token of what a row's has written, 0 below the diagonal.
        into: `(1, C)`, what is left at a token of the state before the chunk.
        onto: `(1, C)`, what is left at the chunk's end of what a token has written.
        total: `(1, 1)`, what is left at the chunk's end of the state before it.
    """

    between: jax.Array
    into: jax.Array | float
    onto: jax.Array | float
    total: jax.Array | float


def decay_sums(log_decay):
    """As `scan_plan.decay_sums`, of a chunk's log decays `(heads, C)`."""
    rows, columns = places(log_decay.shape[1], log_decay.shape[1])
    coarse = jnp.round(log_decay * 1024) / 1024
    until = (rows <= columns).astype(jnp.float32)
    return tuple(_product(x, until, NN, jax.lax.Precision.HIGHEST) for x in (coarse, log_decay - coarse))


def scalar_decay(chunk: int, sums) -> Decay:
    """The decay from the sums of its logarithm, a coarse and a fine one, `(1, C)`; or where there is none of None."""
    rows, columns = places(chunk, chunk)
    upper = rows <= columns
    if sums is None:
        return Decay(upper.astype(jnp.float32), 1.0, 1.0, 1.0)
    coarse, fine = sums
    coarse_columns, fine_columns = _columns(coarse, fine)
    between = jnp.exp(jnp.where(upper, (coarse - coarse_columns) + (fine - fine_columns), -jnp.inf))
    last, last_fine = coarse[:, -1:], fine[:, -1:]
    onto = jnp.exp((last - coarse) + (last_fine - fine))
    return Decay(between, jnp.exp(coarse + fine), onto, jnp.exp(last + last_fine))


def decay_gradient(pairs, into, onto, total):
    """The gradient `(1, C)` of a chunk's log decays.

    Each is in what decays across its token and in nothing else, and is summed from just that: were it all summed and
    the rest taken off, a strong decay's small gradient would be lost in what is left.

    Args:
        pairs: `(C, C)`, cotangent times value of what a column's token gets from a row's, 0 on and below the diagonal.
        into: `(1, C)`, the same of what tokens get from the state before the chunk.
        onto: `(1, C)`, the same of what tokens leave to the state after it.
        total: `(1, 1)`, the same of what the state before leaves to the state after.
    """
    rows, columns = places(*pairs.shape)
    received, left = _columns(into + pairs.sum(0, keepdims=True), onto)
    received -= pairs.sum(1, keepdims=True)
    return jnp.where(rows >= columns, received, left).sum(0, keepdims=True) + total


def _columns(*rows):
    """Rows `(1, C)`, up to eight, as columns `(C, 1)`."""
    filler = jnp.zeros((8 - len(rows), rows[0].shape[1]), jnp.float32)
    turned = jnp.concatenate((*rows, filler)).T
    return tuple(turned[:, i : i + 1] for i in range(len(rows)))
