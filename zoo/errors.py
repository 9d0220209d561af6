"""The one exception of everything that reads or writes weights."""

from collections.abc import Mapping, Sequence

_SHOWN = 20


class WeightsError(ValueError):
    """Weights that cannot be read, or do not fit the model they were meant for.

    Attributes:
        problems: kind of problem (`"missing"`, `"unexpected"`, `"misshapen"`, `"mistyped"`, `"not finite"`)
            to one line for each tensor concerned; empty where the file as a whole is the problem.
    """

    def __init__(self, message: str, problems: Mapping[str, Sequence[str]] | None = None):
        self.problems = {kind: tuple(lines) for kind, lines in (problems or {}).items() if lines}
        for kind, lines in self.problems.items():
            message += f"\n  {kind} ({len(lines)}):"
            message += "".join(f"\n    {line}" for line in lines[:_SHOWN])
            if len(lines) > _SHOWN:
                message += f"\n    ... and {len(lines) - _SHOWN} more"
        super().__init__(message)
