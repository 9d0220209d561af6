"""What a person sees of a sequence model's tokens as they come: text, pixels, or numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from zoo.sequence.tokenizers import Tokenizer

Ids = Sequence[int] | Int[np.ndarray, "n"]

# Token ids of tasks that have a source and a target; number n is `SPECIAL + n`.
PADDING, BEGIN, END, SPECIAL = 0, 1, 2, 3

# From an empty pixel to a full one.
SHADES = " .:-=+*#%@"
UNKNOWN = "?"


class Writer:
    """Makes characters of one row's tokens as they come."""

    def add(self, tokens: Ids) -> str:
        """What can be shown now that these tokens have come too."""
        raise NotImplementedError

    def end(self) -> str:
        """What is left to be shown."""
        return ""

    def found(self) -> dict[str, Any]:
        """All that has come, for JSON."""
        raise NotImplementedError


class TextWriter(Writer):
    """Text after a prompt. Bytes at the end that may yet become a character wait for the next ones."""

    def __init__(self, tokenizer: Tokenizer, prompt: Ids):
        self._tokenizer, self._tokens = tokenizer, [int(token) for token in prompt]
        # Some tokenizers decode a token by what stands before it, so that all is decoded together.
        self._shown = self._prompt = len(self._text())

    def _text(self) -> str:
        return self._tokenizer.decode(self._tokens).decode(errors="replace")

    def _show(self, text: str) -> str:
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new

    def add(self, tokens: Ids) -> str:
        self._tokens += [int(token) for token in tokens]
        return self._show(self._text().rstrip("\N{REPLACEMENT CHARACTER}"))

    def end(self) -> str:
        return self._show(self._text())

    def found(self) -> dict[str, Any]:
        return {"text": self._text()[self._prompt :]}


class PixelWriter(Writer):
    """Grey pixels, row by row; each is two characters wide, as characters are about twice as high.

    Question marks stand for the token that begins an image, which a model may say though no image has it.
    """

    def __init__(self, side: int, levels: int, prompt: Ids):
        self._side, self._levels = side, levels
        self._pixels, self._shown = [int(token) for token in prompt], 0

    def add(self, tokens: Ids) -> str:
        self._pixels += [int(token) for token in tokens]
        rows = len(self._pixels) // self._side
        text = "".join("\n" * (number > 0) + self._row(number) for number in range(self._shown, rows))
        self._shown = rows
        return text

    def _row(self, number: int) -> str:
        pixels = self._pixels[number * self._side : (number + 1) * self._side]
        return "".join(2 * self._shade(level) for level in pixels)

    def _shade(self, level: int) -> str:
        if level >= self._levels:
            return UNKNOWN
        return SHADES[round(level * (len(SHADES) - 1) / (self._levels - 1))]

    def found(self) -> dict[str, Any]:
        side = self._side
        return {"pixels": [self._pixels[place : place + side] for place in range(0, len(self._pixels), side)]}


class NumberWriter(Writer):
    """Numbers up to the token that ends them."""

    def __init__(self):
        self._tokens: list[int] = []
        self._shown = 0

    def add(self, tokens: Ids) -> str:
        self._tokens += [int(token) for token in tokens]
        text = " ".join(UNKNOWN if number is None else f"{number}" for number in self._numbers())
        new, self._shown = text[self._shown :], len(text)
        return new

    def _numbers(self) -> list[int | None]:
        end = self._tokens.index(END) if END in self._tokens else len(self._tokens)
        return [token - SPECIAL if token >= SPECIAL else None for token in self._tokens[:end]]

    def found(self) -> dict[str, Any]:
        return {"numbers": self._numbers(), "ended": END in self._tokens}
