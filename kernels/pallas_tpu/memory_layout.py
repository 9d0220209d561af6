"""How operands and states of `kernels.pallas_tpu.memory` lie, and which part of them a program has.

Operands are `(B, H * c, N)` as in `kernels.pallas_tpu.scan`, and turned where they are used; what a token has one
number of is a row of `(B, groups, rows, N)`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import memory_plan, tuning

LANES = 128


def block_tokens(chunk: int) -> int:
    """Tokens of a program."""
    blocks = tuning.blocks("memory", "tpu", dict(tokens=LANES), chunk=chunk)
    return max(chunk, blocks["tokens"])


def _group(heads: int, shapes) -> int:
    """Heads of a program: what waits for one head's products is filled with another's."""
    default = dict(heads=2 if max(map(max, shapes.values())) <= 256 else 1)
    blocks = tuning.blocks("memory_heads", "tpu", default, **{n: tuning.bucket(max(s)) for n, s in shapes.items()})
    return math.gcd(heads, blocks["heads"])


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Static sizes of a call.

    Attributes:
        wide: channels of each operand that has one row or more for each of its channels.
        rows: those of which a token and head have one number.
        states: shapes of a head's states.
        group: heads of a program; block: its tokens.
    """

    call: memory_plan.Call
    batch: int
    tokens: int
    heads: int
    wide: dict[str, int]
    rows: tuple[str, ...]
    states: dict[str, tuple[int, int]]
    group: int
    block: int
    narrow: bool
    backward: bool = False

    @property
    def blocks(self) -> int:
        return self.tokens // self.block

    @property
    def chunks(self) -> int:
        """Of a block."""
        return self.block // self.call.chunk

    def index(self, block):
        return self.blocks - 1 - block if self.backward else block

    def wide_spec(self, channels: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, self.group * channels, self.block), lambda b, g, c: (b, g, self.index(c)))

    @property
    def padded_rows(self) -> int:
        """Rows of a group's `rows`, whole tiles."""
        return -(-len(self.rows) * self.group // 8) * 8

    @property
    def rows_spec(self) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, self.padded_rows, self.block), lambda b, g, c: (b, g, 0, self.index(c)))

    def state_spec(self, name: str) -> pl.BlockSpec:
        """The group's heads of a state `(B, H, R, C)`."""
        return pl.BlockSpec((1, self.group, *self.states[name]), lambda b, g, c: (b, g, 0, 0))

    def kept_spec(self, name: str) -> pl.BlockSpec:
        """A block's of states `(B, H, blocks, R, C)`."""
        return pl.BlockSpec((1, self.group, 1, *self.states[name]), lambda b, g, c: (b, g, self.index(c), 0, 0))


def shapes_of(call, operands, states, backward=False) -> Shapes:
    batch, tokens, heads, _ = operands["query"].shape
    states = {name: x.shape[2:] for name, x in states.items()}
    channels = {name: x.shape[-1] for name, x in operands.items()}
    return Shapes(
        call=call,
        batch=batch,
        tokens=tokens,
        heads=heads,
        wide={name: c for name, c in channels.items() if c > 1},
        rows=tuple(name for name, c in channels.items() if c == 1),
        states=states,
        group=_group(heads, states),
        block=block_tokens(call.chunk),
        narrow=operands["query"].dtype == jnp.bfloat16,
        backward=backward,
    )


def packed(shapes, operands):
    """The `rows`, each `(B, N, H or 1, 1)`, as `(B, groups, rows, N)`."""
    groups = (shapes.batch, shapes.heads // shapes.group, shapes.group, shapes.tokens)
    whole = (shapes.batch, shapes.tokens, shapes.heads)
    rows = [jnp.broadcast_to(operands[n][..., 0], whole).transpose(0, 2, 1).reshape(groups) for n in shapes.rows]
    filler = jnp.zeros((*groups[:2], shapes.padded_rows - len(rows) * shapes.group, shapes.tokens), jnp.float32)
    return jnp.concatenate([*rows, filler], 2)


def unpacked(shapes, packed):
    """The inverse."""
    whole = (shapes.batch, shapes.heads, shapes.tokens)
    parts = (packed[:, :, i * shapes.group : (i + 1) * shapes.group] for i in range(len(shapes.rows)))
    return {name: x.reshape(whole).transpose(0, 2, 1)[..., None] for name, x in zip(shapes.rows, parts)}


def of_states(shapes, prefix, states):
    return {f"{prefix}_{name}": (x, shapes.state_spec(name)) for name, x in states.items()}


def state_structs(shapes, prefix, blocks=None):
    lead = (shapes.batch, shapes.heads, *(() if blocks is None else (blocks,)))
    spec = shapes.state_spec if blocks is None else shapes.kept_spec
    return {
        f"{prefix}_{name}": (jax.ShapeDtypeStruct((*lead, *shape), jnp.float32), spec(name))
        for name, shape in shapes.states.items()
    }


def named_states(found, prefix, shapes):
    return {name: found[f"{prefix}_{name}"] for name in shapes.states}
