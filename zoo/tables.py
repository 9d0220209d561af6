"""Columns of text that line up."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """One line per row, the columns two spaces apart.

    Args:
        rows: as many cells in each as `align` has letters.
        align: for every column `"<"` (left) or `">"` (right).
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths)).rstrip() for row in rows
    ]


def scaled(number: int) -> str:
    """A count in thousands, millions or milliards, to four digits: `"28.36 M"`."""
    for power, letter in ((9, "G"), (6, "M"), (3, "k")):
        # 999,950 would be rounded to 1000.0 k.
        if number >= 0.99995 * 10**power:
            return f"{number / 10**power:#.4g} {letter}"
    return str(number)


def size(sides: Sequence[int]) -> str:
    """A shape for a person: `"224 x 224 x 3"`."""
    return " x ".join(map(str, sides))
