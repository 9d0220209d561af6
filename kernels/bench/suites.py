"""Which cases a suite has, small ones for a CPU and full ones for an accelerator."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax.numpy as jnp

from kernels.bench import image_cases as image
from kernels.bench import sequence_cases as sequence
from kernels.bench.case import Case
from kernels.choices import check_choice

SIZES = ("small", "full")
DTYPES = ("float32", "bfloat16")
T = TypeVar("T")


def quick(size: str) -> list[Case]:
    """Every family once, in minutes on two CPU cores."""
    batch, side, tokens, heads, d = (2, 28, 512, 4, 32) if size == "small" else (64, 56, 4096, 8, 64)
    sizes = batch, tokens, heads, d
    return [
        image.window(batch, side, 3),
        image.window(batch, side, 2, bias=True, partition="grid"),
        image.channel(batch, side, 3),
        image.bilevel(batch, 7, side // 7, 4, 2),
        sequence.softmax(*sizes),
        sequence.softmax(*sizes, causal=True),
        sequence.softmax(*sizes, source=tokens // 4),
        sequence.local(*sizes),
        sequence.routing(*sizes),
        sequence.linear(*sizes),
        sequence.linear(*sizes, causal=True),
        sequence.gated(*sizes, decay="head"),
        sequence.gated(*sizes, decay="channel"),
        sequence.delta(*sizes),
        sequence.delta(*sizes, decay=True),
        sequence.memory(*sizes),
    ]


def kernels(size: str) -> list[Case]:
    """What there are kernels for, at the shapes of models."""
    if size == "small":
        windows, maps, scans = 2, 2, (1, 512, 4, 64)
    else:
        windows, maps, scans = 128, 128, (4, 8192, 16, 128)
    return [
        image.window(windows, 56, 3),
        image.window(windows, 56, 2, bias=True),
        image.window(windows, 56, 2, bias=True, partition="grid"),
        image.window(windows, 28, 6),
        image.window(windows, 14, 12),
        image.bilevel(maps, 7, 8, 1, 2),
        image.bilevel(maps, 7, 4, 4, 4),
        image.bilevel(maps, 7, 2, 16, 8),
        sequence.gated(*scans, decay="head"),
        sequence.gated(*scans, decay="token"),
        sequence.gated(*scans, decay="channel"),
        sequence.delta(*scans),
        sequence.delta(*scans, decay=True),
        sequence.routing(*scans),
        sequence.memory(*scans),
    ]


SEQUENCES: tuple[Callable[..., Case], ...] = (
    lambda *sizes: sequence.softmax(*sizes, causal=True),
    lambda *sizes: sequence.softmax(*sizes),
    lambda *sizes: sequence.local(*sizes),
    lambda *sizes: sequence.routing(*sizes),
    lambda *sizes: sequence.linear(*sizes, causal=True),
    lambda *sizes: sequence.linear(*sizes),
    lambda *sizes: sequence.gated(*sizes),
    lambda *sizes: sequence.gated(*sizes, decay="head"),
    lambda *sizes: sequence.gated(*sizes, decay="token"),
    lambda *sizes: sequence.gated(*sizes, decay="channel"),
    lambda *sizes: sequence.delta(*sizes),
    lambda *sizes: sequence.delta(*sizes, decay=True),
    lambda *sizes: sequence.flow(*sizes, causal=True),
    lambda *sizes: sequence.flow(*sizes),
    lambda *sizes: sequence.norm_aware(*sizes, causal=True),
    lambda *sizes: sequence.norm_aware(*sizes),
    lambda *sizes: sequence.memory(*sizes, rule="yaad"),
    lambda *sizes: sequence.memory(*sizes, rule="moneta"),
    lambda *sizes: sequence.memory(*sizes, rule="memora"),
    lambda *sizes: sequence.running_sum(*sizes),
    lambda *sizes: sequence.conv(*sizes),
)
CROSSES: tuple[Callable[..., Case], ...] = (sequence.softmax, sequence.linear, sequence.flow, sequence.norm_aware)


def variants(size: str) -> list[Case]:
    """Every variant of attention: on one feature map, and on sequences of growing length."""
    if size == "small":
        batch, side, lengths, heads, d = 2, 28, (256, 512, 1024, 2048), 2, 32
    else:
        batch, side, lengths, heads, d = 64, 28, (1024, 2048, 4096, 8192, 16384, 32768), 16, 64
    tokens = side * side
    maps = [
        image.window(batch, side, 6),
        image.window(batch, side, 6, partition="grid"),
        image.bilevel(batch, 7, side // 7, 4, 6),
        image.channel(batch, side, 6),
        image.depthwise(batch, side, 6),
        image.bilateral(batch, side, 6),
        image.pairwise(batch, side, 6),
        image.parts(batch, side, 6),
        image.global_local(batch, side, 6),
        *[as_map(make(batch, tokens, 6, 32)) for make in CROSSES],
        as_map(sequence.local(batch, tokens, 6, 32, causal=False)),
        *[as_map(make(batch, tokens, 6, 32, source=tokens // 4)) for make in CROSSES],
    ]
    return maps + [make(1, length, heads, d) for length in lengths for make in SEQUENCES]


def as_map(case: Case) -> Case:
    """A case that stands among those on feature maps, and is no point of a curve over the length."""
    return dataclasses.replace(case, family="image", length=None)


SUITES: dict[str, Callable[[str], list[Case]]] = {"quick": quick, "kernels": kernels, "variants": variants}


def name(text: str) -> str:
    """A name as it is compared: lower case, with hyphens for what is between words."""
    return "-".join(text.lower().replace("+", " ").replace("_", " ").replace("-", " ").split())


def chosen(suite: str, size: str, ops: Sequence[str] = (), shapes: Sequence[str] = ()) -> list[Case]:
    """The cases of a suite that were asked for, in its order.

    Args:
        suite: a name in `SUITES`.
        size: `"small"` or `"full"`.
        ops: public functions or variants; none for all.
        shapes: parts of a case's shape such as `"N512"` or `"8192x3"`; none for all.

    Raises:
        ValueError: for an unknown name, with the nearest one.
    """
    check_choice("suite", suite, SUITES)
    check_choice("size", size, SIZES)
    cases = SUITES[suite](size)
    known = {name(n): n for case in cases for n in (case.op, case.variant)}
    for op in ops:
        check_choice("op", name(op), known)
    wanted = {name(op) for op in ops}
    if wanted:
        cases = [case for case in cases if wanted & {name(case.op), name(case.variant)}]
    return chosen_shapes(cases, shapes, lambda case: case.shape)


def chosen_shapes(cases: Sequence[T], shapes: Sequence[str], shape_of: Callable[[T], str]) -> list[T]:
    """Those in whose shape one of the words stands; all if there are none.

    Raises:
        ValueError: for a word that is in no shape, with the nearest one.
    """
    words = [{word.rstrip(",") for word in shape_of(case).split()} for case in cases]
    for shape in shapes:
        check_choice("shape", shape, sorted(set().union(*words)))
    return [case for case, its in zip(cases, words) if not shapes or its & set(shapes)]


def checked_dtypes(dtypes: Sequence[str]) -> list[str]:
    """The names, checked.

    Raises:
        ValueError: for an unknown dtype, with the nearest one.
    """
    for dtype in dtypes:
        check_choice("dtype", dtype, DTYPES)
    return [str(jnp.dtype(dtype)) for dtype in dtypes]
