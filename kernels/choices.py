"""Arguments that take one of a few names."""

import difflib
from collections.abc import Iterable


def check_choice(argument: str, given, known: Iterable[str]) -> None:
    """Raises ValueError, with the nearest name, unless `given` is one of `known`."""
    known = tuple(known)
    if given not in known:
        close = difflib.get_close_matches(str(given), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(map(repr, known))}"
        raise ValueError(f"unknown {argument} {given!r}; {hint}")
