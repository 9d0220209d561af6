"""Arguments that take names: one of a few, or several."""

import difflib
from collections.abc import Iterable


def names(text: str) -> list[str]:
    """The names in a list with commas between them."""
    return [part.strip() for part in text.split(",") if part.strip()]


def check_choice(argument: str, given, known: Iterable[str]) -> None:
    """Raises ValueError, with the nearest name, unless `given` is one of `known`."""
    known = tuple(known)
    if given not in known:
        close = difflib.get_close_matches(str(given), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(map(repr, known))}"
        raise ValueError(f"unknown {argument} {given!r}; {hint}")
