"""ListOps: nested operations on lists of digits, to be computed exactly.

Source: Nangia and Bowman, "ListOps: A Diagnostic Dataset for Latent Tree Learning", arXiv:1804.06028; sizes after Tay
et al., "Long Range Arena", arXiv:2011.04006 (max_depth=10, max_args=10, 500 to 2000 tokens), which left out FIRST and
LAST.
"""

import dataclasses

import numpy as np

from train.draws import below
from train.generated import Task, need, sequence
from train.sequences import Example

# How likely an argument is an operation, where the depth allows one.
NESTED = 0.25
DIGITS = 10
OPERATORS = ("MAX", "MIN", "MED", "SM")
NAMES = (*map(str, range(DIGITS)), *(f"[{name}" for name in OPERATORS), "]", "=", "")
CLOSE, EQUALS, PADDING = DIGITS + len(OPERATORS), DIGITS + len(OPERATORS) + 1, DIGITS + len(OPERATORS) + 2
SHORTEST = 4
TRIES_TO_OPEN, TRIES = 2_000, 200_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListOps(Task):
    """An expression such as [MAX 2 9 [MIN 4 7 ] 0 ], then "=", where its value shall be told; then padding.

    Operations are MAX, MIN, MED (the median, rounded down) and SM (the sum modulo 10), of 2 to `max_args` arguments
    each. The law is that of the published generators, given that the expression is an operation of a size in
    [min_length, length - 1]. The ids are the places in `NAMES`.

    Attributes:
        min_length: least number of tokens of an expression.
        max_depth: arguments at this depth, the whole expression being at depth 1, are digits.
        max_args: most arguments of an operation.
    """

    min_length: int = SHORTEST
    max_depth: int = 10
    max_args: int = 10

    def __post_init__(self) -> None:
        need(self.max_depth >= 2, f"max_depth={self.max_depth}", "at least 2, which allows operations on digits")
        need(self.max_args >= 2, f"max_args={self.max_args}", "an operation has at least 2 arguments")
        need(
            self.length > max(self.min_length, SHORTEST),
            f"length={self.length}",
            f"at least {max(self.min_length, SHORTEST) + 1} are needed for an expression of "
            f"min_length={self.min_length} tokens (the shortest there is has {SHORTEST}) and the '=' after it",
        )
        longest = 1
        for _ in range(self.max_depth - 1):
            longest = 2 + self.max_args * longest
        need(
            longest >= self.min_length,
            f"min_length={self.min_length}",
            f"with max_depth={self.max_depth} and max_args={self.max_args} the longest expression has {longest}",
        )
        self._expression(np.random.default_rng(0), TRIES_TO_OPEN)

    @property
    def vocab_size(self) -> int:
        return len(NAMES)

    @property
    def chance(self) -> float:
        return 1 / DIGITS

    @property
    def detail(self) -> str:
        return (
            f"ListOps, {self.min_length} to {self.length - 1} tokens, depth up to {self.max_depth}; answers are not "
            "equally likely: 0 and 9 are the most common"
        )

    def draw(self, rng: np.random.Generator) -> Example:
        expression, value = self._expression(rng, TRIES)
        end = len(expression)
        tokens = np.full(self.length, PADDING)
        tokens[:end] = expression
        tokens[end] = EQUALS
        return sequence(tokens, np.full(self.length, value), np.arange(self.length) == end, used=end + 1)

    def _expression(self, rng: np.random.Generator, tries: int) -> tuple[list[int], int]:
        for _ in range(tries):
            tokens: list[int] = []
            value = self._operation(rng, 1, tokens)
            if value is not None and len(tokens) >= self.min_length:
                return tokens, value
        raise ValueError(
            f"none of {tries:,} expressions with max_depth={self.max_depth} and max_args={self.max_args} had "
            f"min_length={self.min_length} to length - 1 = {self.length - 1} tokens; a wider range, or other limits, "
            "would find one"
        )

    def _operation(self, rng: np.random.Generator, depth: int, tokens: list[int]) -> int | None:
        """Appends an operation and returns its value, or None as soon as the tokens are too many."""
        operator = below(rng, len(OPERATORS))
        tokens.append(DIGITS + operator)
        values = []
        for _ in range(2 + below(rng, self.max_args - 1)):
            # Every argument takes a token at least, and each operation that is still open its bracket.
            if len(tokens) + 1 + depth > self.length - 1:
                return None
            if depth + 1 < self.max_depth and rng.random() < NESTED:
                value = self._operation(rng, depth + 1, tokens)
                if value is None:
                    return None
            else:
                value = below(rng, DIGITS)
                tokens.append(value)
            values.append(value)
        tokens.append(CLOSE)
        return _apply(OPERATORS[operator], values)


def _apply(operator: str, values: list[int]) -> int:
    if operator == "MAX":
        return max(values)
    if operator == "MIN":
        return min(values)
    if operator == "SM":
        return sum(values) % 10
    values = sorted(values)
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) // 2
