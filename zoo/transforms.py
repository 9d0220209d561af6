"""Layout changes between a checkpoint's tensors and a model's leaves, each readable in both directions."""

import math
import re
from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped

Shape = tuple[int, ...]
Array = Shaped[np.ndarray, "..."]


class Transform:
    """How one or several source tensors become one leaf, and back, bit for bit."""

    def apply(self, *arrays: Array) -> Array:
        """The leaf made from the source tensors; a view where the layout allows it."""
        raise NotImplementedError

    def invert(self, array: Array) -> tuple[Array, ...]:
        """The source tensors that make this leaf."""
        raise NotImplementedError

    def target_shape(self, *shapes: Shape) -> Shape:
        """The leaf's shape for these source shapes; raises ValueError where they do not fit."""
        raise NotImplementedError

    def source_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """The source shapes for this leaf's shape; raises ValueError where it does not fit."""
        raise NotImplementedError


@dataclass(frozen=True)
class Identity(Transform):
    """The leaf is the tensor."""

    def apply(self, *arrays: Array) -> Array:
        (array,) = arrays
        return array

    def invert(self, array: Array) -> tuple[Array, ...]:
        return (array,)

    def target_shape(self, *shapes: Shape) -> Shape:
        (shape,) = shapes
        return shape

    def source_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        return (shape,)


class Axes(Transform):
    """A reshape, a permutation and a reshape, written as the axes before and after.

    `"o i h w -> h w i o"` names every axis on both sides, `1` is an axis of length one, and parentheses
    split or merge: `"(h t d) i -> i (t h d)"` with `t=3, h=heads`. Several source tensors are stacked
    along the axis before a bar: `"t | i h d -> i (t h d)"` with `t=3` takes q, k and v.

    Args:
        pattern: The axes of the source and of the leaf.
        flip: Axes whose order is reversed.
        sizes: Lengths of axes where the shapes alone do not tell; the name of another axis means its length
            (`y="x"` for a square table stored flat).
    """

    def __init__(self, pattern: str, *, flip: tuple[str, ...] = (), **sizes: int | str):
        source, _, target = pattern.partition("->")
        stack, bar, source = source.rpartition("|")
        self.pattern = pattern
        self._stack = stack.strip() if bar else None
        self._source, self._target = _groups(source), _groups(target)
        self._flip = flip
        self._sizes = {name: size for name, size in sizes.items() if isinstance(size, int)}
        self._equal = {name: size for name, size in sizes.items() if isinstance(size, str)}
        if self._stack is not None:
            if self._stack not in self._sizes:
                raise ValueError(f"pattern {pattern!r}: how many are stacked must be given as {self._stack}=")
            self._source = ((self._stack,), *self._source)
        names = [name for group in self._source for name in group]
        self._order = [name for group in self._target for name in group]
        if sorted(names) != sorted(self._order) or len(set(names)) != len(names):
            raise ValueError(f"pattern {pattern!r}: each axis must occur once on each side")
        if unknown := sorted({*sizes, *flip, *self._equal.values()} - set(names)):
            raise ValueError(f"pattern {pattern!r} has no axis {unknown[0]!r}")

    def __repr__(self) -> str:
        return f"Axes({self.pattern!r})"

    def apply(self, *arrays: Array) -> Array:
        array = arrays[0] if self._stack is None else np.stack(arrays)
        return self._rearrange(array, self._source, self._target)

    def invert(self, array: Array) -> tuple[Array, ...]:
        array = self._rearrange(array, self._target, self._source)
        return (array,) if self._stack is None else tuple(array)

    def target_shape(self, *shapes: Shape) -> Shape:
        if self._stack is None:
            (shape,) = shapes
        else:
            if len(set(shapes)) != 1:
                raise ValueError(f"shapes differ: {', '.join(map(str, shapes))}")
            shape = (len(shapes), *shapes[0])
        sizes = self._solve(shape, self._source)
        return _shape(self._target, sizes)

    def source_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        source = _shape(self._source, self._solve(shape, self._target))
        return (source,) if self._stack is None else (source[1:],) * source[0]

    def _rearrange(self, array, before, after):
        sizes = self._solve(array.shape, before)
        names = [name for group in before for name in group]
        array = array.reshape([sizes[name] for name in names])
        array = array[tuple(slice(None, None, -1 if name in self._flip else 1) for name in names)]
        order = [name for group in after for name in group]
        return array.transpose([names.index(name) for name in order]).reshape(_shape(after, sizes))

    def _solve(self, shape: Shape, groups) -> dict[str, int]:
        """The length of every axis, from the shape of one side."""
        if len(shape) != len(groups):
            raise ValueError(f"{self.pattern!r} wants {len(groups)} axes, not the shape {tuple(shape)}")
        sizes = dict(self._sizes)
        for length, group in zip(shape, groups):
            unknown = [name for name in group if name not in sizes]
            known = math.prod(sizes[name] for name in group if name in sizes)
            rest = length // known if known else 0
            # An axis tied to another has its length, so that a flat square is split by its root.
            tied = {self._equal.get(name, name) for name in unknown}
            root = round(rest ** (1 / len(unknown))) if unknown else 1
            if len(tied) > 1:
                raise ValueError(f"{self.pattern!r}: the shape {tuple(shape)} does not tell {unknown}")
            if known * root ** len(unknown) != length:
                raise ValueError(f"{self.pattern!r}: a length of {length} cannot be split into {group}")
            sizes |= {name: root for name in unknown}
        for name, other in self._equal.items():
            if sizes[name] != sizes[other]:
                raise ValueError(f"{self.pattern!r}: {name}={sizes[name]} is not {other}={sizes[other]}")
        return sizes


def _groups(side: str) -> tuple[tuple[str, ...], ...]:
    groups = []
    for merged, single in re.findall(r"\(([^)]*)\)|(\S+)", side):
        groups.append(tuple(merged.split()) if merged else () if single == "1" else (single,))
    return tuple(groups)


def _shape(groups, sizes) -> Shape:
    return tuple(math.prod(sizes[name] for name in group) for group in groups)


identity = Identity()
linear = Axes("o i -> i o")
conv = Axes("o i h w -> h w i o")
pointwise = Axes("o i 1 1 -> i o")


def head_interleaved(num_heads: int, *, bias: bool = False) -> Axes:
    """A packed torch projection whose rows go (head, [q k v], channel), as [all q, all k, all v]."""
    pattern = "(h t d) -> (t h d)" if bias else "(h t d) i -> i (t h d)"
    return Axes(pattern, t=3, h=num_heads)
