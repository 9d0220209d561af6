"""Options given by name: what each of the memory's choices has in common."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def check_name(argument: str, given: Any, known: Iterable[str]) -> None:
    """Raises ValueError, with the nearest known name, unless `given` is one of `known`."""
    known = tuple(known)
    if not isinstance(given, str) or given not in known:
        close = difflib.get_close_matches(str(given), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(map(repr, known))}"
        raise ValueError(f"unknown {argument} {given!r}; {hint}")


def check_positive(**values: float) -> None:
    """Raises ValueError naming the first of `values` that is not a positive number."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def by_name(argument: str, given: Any, table: Mapping[str, Any], kinds: tuple[type, ...]) -> Any:
    """`given` itself if it is of one of `kinds`, else what the table makes of the name.

    Args:
        argument: what is chosen, for messages.
        given: an instance or a name.
        table: for every name a function without arguments.
        kinds: the classes that an instance may be of.
    """
    if isinstance(given, kinds):
        return given
    check_name(argument, given, table)
    return table[given]()
