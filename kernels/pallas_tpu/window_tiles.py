"""How window attention on a TPU holds maps in VMEM, cuts windows out of them and puts their results back."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels import tuning
from kernels.window_plan import Geometry

# More queries than this are worked at in chunks, which bounds the weights that are held.
CHUNK = 128
# Rows of windows, and heads, that are worked at by straight code; more of them in a loop.
UNROLLED_ROWS = 16
UNROLLED_HEADS = 8
# Fewer heads than this leave units idle while one waits for another: windows are then worked at by twos.
BUSY_HEADS = 5
# Of the 64 MiB and more that every generation has; the rest is for what XLA keeps there.
VMEM = 44 << 20
MAX_BIAS = 8 << 20


def lane_tiles(channels: int) -> int:
    return -(-channels // 128)


def rows(g: Geometry) -> int:
    """Rows of a window's tile: whole tiles of bfloat16, and whole chunks."""
    unit = 16 if g.tokens <= CHUNK else CHUNK
    return -(-g.tokens // unit) * unit


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How maps are divided over programs.

    Attributes:
        g: the maps as the kernel sees them: those of the call, or their rows of windows.
        whole: the maps of the call.
        maps: that one program works at.
        strided: whether a program reads one row of windows by rows of tokens; else it reads one run of tokens.
        vmem: bytes that it takes.
    """

    g: Geometry
    whole: Geometry
    maps: int
    strided: bool
    vmem: int

    @property
    def together(self) -> int:
        """Windows that are worked at together."""
        return 2 if self.g.heads < BUSY_HEADS and self.maps * self.g.windows > 1 else 1

    @property
    def programs(self) -> int:
        return -(-self.g.batch // self.maps)

    @property
    def tokens(self) -> int:
        return self.maps * self.g.height * self.g.width

    @property
    def held(self) -> int:
        """Tokens that are held: also what the windows at the edges of the last map reach."""
        reach = (self.g.rows * self.g.window[0] - 1) * self.g.width + self.g.cols * self.g.window[1]
        return self.tokens + max(0, -(-(reach - self.g.height * self.g.width) // 8) * 8)

    @property
    def vmem_limit(self) -> int:
        return max(16 << 20, self.vmem + self.vmem // 4)

    def view(self, x) -> Any:
        """Maps, `(B, H, W, channels)`, by the dimensions that blocks are of."""
        b, h, w, c = x.shape
        if not self.strided:
            shape = (b * h * w, c)
        elif self.g.grid:
            shape = (b, self.whole.window[0], self.whole.rows, w, c)
        else:
            shape = x.shape
        return jax.ShapeDtypeStruct(shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x.reshape(shape)

    def spec(self, channels: int) -> pl.BlockSpec:
        r, (wh, w) = self.whole.rows, (self.whole.window[0], self.whole.width)
        if not self.strided:
            return pl.BlockSpec((self.tokens, channels), lambda i: (i, 0))
        if self.g.grid:
            return pl.BlockSpec((None, wh, None, w, channels), lambda i: (lax.div(i, r), 0, lax.rem(i, r), 0, 0))
        return pl.BlockSpec((None, wh, w, channels), lambda i: (lax.div(i, r), lax.rem(i, r), 0, 0))


def _vmem(g: Geometry, whole: Geometry, maps: int, strided: bool, itemsize: int, bias: bool, backward: bool) -> Blocks:
    """The division with the bytes it takes: what is transferred twice, as the kernel works meanwhile."""
    found = Blocks(g, whole, maps, strided, 0)
    qkv, out = 128 * lane_tiles(3 * g.channels), 128 * lane_tiles(g.channels)
    moved = 2 * found.tokens * itemsize * (2 * qkv + out if backward else qkv + out)
    held = found.held * 4 * (qkv + out if backward else qkv)
    tile = found.together * rows(g) * 4 * (2 * qkv + out if backward else qkv + out)
    keys = 128 * lane_tiles(rows(g))
    weights = min(rows(g), CHUNK) * keys * 4 * (8 if backward else 4)
    biases = bias * g.heads * rows(g) * keys * 4 * (4 if backward else 2)
    return dataclasses.replace(found, vmem=moved + held + tile + weights + biases)


def blocks(g: Geometry, itemsize: int, bias: bool, *, backward: bool) -> Blocks:
    """The division of maps over programs: whole tiles of tokens, at least 512 tokens if they fit easily."""
    part = g if g.grid or g.height % g.window[0] else dataclasses.replace(g, batch=g.batch * g.rows, height=g.window[0])
    tokens = part.height * part.width
    unit = 8 // math.gcd(8, tokens)
    maps = unit * max(1, 512 // (unit * tokens))

    def of(maps):
        return _vmem(part, g, min(maps, part.batch), False, itemsize, bias, backward)

    while maps > unit and of(maps).vmem > VMEM // 4:
        maps -= unit
    if of(maps).vmem > VMEM // 2 and (not g.grid or g.height % g.window[0] == 0):
        row = dataclasses.replace(g, batch=g.batch * g.rows, height=g.window[0])
        by_rows = _vmem(row, g, 1, True, itemsize, bias, backward)
        if by_rows.vmem < of(maps).vmem:
            return by_rows
    shape = dict(tokens=tuning.bucket(g.tokens), channels=g.channels, backward=backward)
    return of(tuning.blocks("window", "tpu", {"maps": maps}, **shape)["maps"])


def refusal(g: Geometry, itemsize: int, bias: bool) -> str | None:
    """Why the maps do not fit, or None."""
    if bias and g.heads * rows(g) * 128 * lane_tiles(rows(g)) * 4 > MAX_BIAS:
        return f"bias for {g.heads} heads and windows of {g.tokens} tokens takes more than {MAX_BIAS >> 20} MiB of VMEM"
    need = blocks(g, itemsize, bias, backward=True).vmem
    if need > VMEM:
        part = "a row of windows" if not g.grid or g.height % g.window[0] == 0 else "a map"
        return f"{part} takes {need >> 20} MiB of {VMEM >> 20} MiB of VMEM; smaller or narrower maps fit"
    return None


class Place(NamedTuple):
    """A window: its first token in the run, its row and column of windows, and the rows that the map has.

    `new` is false for a window that is given once more, to fill up those that are worked at together.
    """

    new: Any
    origin: Any
    r: Any
    c: Any
    height: Any


def load_run(blocks: Blocks, x, run) -> None:
    """Fills the run with the program's block."""
    for lane in range(run.shape[0]):
        lanes = slice(128 * lane, min(128 * (lane + 1), x.shape[-1]))
        width = lanes.stop - lanes.start
        if not blocks.strided:
            run[lane, : blocks.tokens, :width] = x[:, lanes].astype(run.dtype)
        else:
            for a in range(x.shape[0]):
                w = x.shape[1]
                run[lane, a * w : (a + 1) * w, :width] = x[a, :, lanes].astype(run.dtype)


def store_run(blocks: Blocks, run, out) -> None:
    """Fills the program's block of a result with the run's first channels."""
    for lane in range(lane_tiles(out.shape[-1])):
        lanes = slice(128 * lane, min(128 * (lane + 1), out.shape[-1]))
        width = lanes.stop - lanes.start
        if not blocks.strided:
            out[:, lanes] = run[lane, : blocks.tokens, :width].astype(out.dtype)
        else:
            for a in range(out.shape[0]):
                w = out.shape[1]
                out[a, :, lanes] = run[lane, a * w : (a + 1) * w, :width].astype(out.dtype)


def each_group(blocks: Blocks, visit) -> None:
    """Calls `visit(places)` for all windows of the program's maps, some at a time; those past the batch are left out.

    Windows are written in place of what was read, so one that is given twice is given so at the same time.
    """
    g, i = blocks.g, pl.program_id(0)
    count = jnp.minimum(blocks.maps, g.batch - i * blocks.maps) * g.windows
    height = g.height
    if blocks.strided and not g.grid:
        height = jnp.minimum(height, blocks.whole.height - lax.rem(i, blocks.whole.rows) * g.window[0])

    def place(w):
        new, w = w < count, jnp.minimum(w, count - 1)
        r, c = lax.div(lax.rem(w, g.windows), g.cols), lax.rem(w, g.cols)
        origin = lax.div(w, g.windows) * (g.height * g.width) + g.row(r, 0) * g.width + g.col(c, 0)
        return Place(new, origin, r, c, height)

    def step(j, _):
        visit([place(j * blocks.together + w) for w in range(blocks.together)])

    lax.fori_loop(0, lax.div(count + (blocks.together - 1), blocks.together), step, None)


def _each_row(g: Geometry, place: Place, visit) -> None:
    """Calls `visit(a, places, inside)` for every row of a window: its tokens in the run and in the window's tile."""
    (wh, ww), stride = g.window, g.cols if g.grid else 1
    down = g.width * (g.rows if g.grid else 1)

    def step(a, _=None):
        start = place.origin + a * down
        visit(a, pl.ds(start, ww, stride=stride) if stride > 1 else pl.ds(start, ww), pl.ds(a * ww, ww))

    if wh <= UNROLLED_ROWS:
        for a in range(wh):
            step(a)
    else:
        lax.fori_loop(0, wh, step, None)


def _real(g: Geometry, place: Place, a):
    """`(width of a window, 1)`: which tokens of row `a` of a window are on the map."""
    b = lax.broadcasted_iota(jnp.int32, (g.window[1], 1), 0)
    return (g.row(place.r, a) < place.height) & (g.col(place.c, b) < g.width)


def cut(blocks: Blocks, run, tile, place: Place, pad) -> None:
    """Copies a window out of the run; tokens past the edges are `pad`, `(lane tiles, 1, 128)`, or zero."""
    g = blocks.g

    def row(a, places, inside):
        for lane in range(run.shape[0]):
            x = run.at[lane][places, :]
            if blocks.whole.ragged:
                x = jnp.where(_real(g, place, a), x, 0.0 if pad is None else pad[lane])
            tile.at[lane][inside, :] = x

    _each_row(g, place, row)


def paste(blocks: Blocks, run, tile, place: Place) -> None:
    """Copies a tile to the first channels of its window in the run; what it has past the edges goes nowhere."""
    g = blocks.g

    def row(a, places, inside):
        for lane in range(tile.shape[0]):
            x = tile.at[lane][inside, :]
            if blocks.whole.ragged:
                x = jnp.where(_real(g, place, a), x, run.at[lane][places, :])
            run.at[lane][places, :] = x

    _each_row(g, place, row)


def add_filled(blocks: Blocks, tile, place: Place, total) -> None:
    """Adds a tile's tokens past the edges to the first row of `total`, `(lane tiles, 8, 128)`."""
    g = blocks.g

    def row(a, places, inside):
        for lane in range(tile.shape[0]):
            filled = jnp.where(_real(g, place, a) | ~place.new, 0.0, tile.at[lane][inside, :])
            total[lane, :1, :] += filled.sum(0, keepdims=True)

    _each_row(g, place, row)


def keys(blocks: Blocks, place: Place):
    """`(1, rows)`: which rows of a tile are keys."""
    g = blocks.g
    t = lax.broadcasted_iota(jnp.int32, (1, rows(g)), 1)
    found = t < g.tokens
    if g.masked and blocks.whole.ragged:
        a, b = lax.div(t, g.window[1]), lax.rem(t, g.window[1])
        found &= (g.row(place.r, a) < place.height) & (g.col(place.c, b) < g.width)
    return found


@dataclasses.dataclass(frozen=True)
class Lanes:
    """Where a head's channels are in a tile: `(first lane tile, first lane)` for each of q, k and v."""

    starts: tuple[tuple[Any, int], ...]
    dim: int

    def _pieces(self, part: int):
        """Lane tile, lanes, and channels of the head, of each part that lies in one lane tile."""
        tile, lane = self.starts[part]
        done = 0
        while done < self.dim:
            width = min(self.dim - done, 128 - lane)
            yield tile, slice(lane, lane + width), slice(done, done + width)
            tile, lane, done = tile + 1, 0, done + width

    def load(self, tile, part: int, chunk=slice(None)):
        pieces = [tile[lane_tile, chunk, lanes] for lane_tile, lanes, _ in self._pieces(part)]
        return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=-1)

    def store(self, tile, part: int, chunk, x) -> None:
        for lane_tile, lanes, channels in self._pieces(part):
            tile[lane_tile, chunk, lanes] = x[:, channels]


def each_head(g: Geometry, visit) -> None:
    """Calls `visit(h, chunk, lanes)` for every head and chunk of queries."""
    c, n = g.channels, rows(g)

    def head(h, lanes):
        def chunk(i, _):
            visit(h, pl.ds(pl.multiple_of(i * CHUNK, CHUNK), CHUNK), lanes)

        if n <= CHUNK:
            visit(h, slice(None), lanes)
        else:
            lax.fori_loop(0, n // CHUNK, chunk, None)

    # A loop can go over whole lane tiles only.
    if g.heads > UNROLLED_HEADS and c % 128 == 0 and 128 % g.dim == 0:

        def group(i, _):
            for j in range(128 // g.dim):
                starts = tuple((part * (c // 128) + i, j * g.dim) for part in range(3))
                head(i * (128 // g.dim) + j, Lanes(starts, g.dim))

        lax.fori_loop(0, c // 128, group, None)
    else:
        for h in range(g.heads):
            starts = tuple(divmod(part * c + h * g.dim, 128) for part in range(3))
            head(h, Lanes(starts, g.dim))
