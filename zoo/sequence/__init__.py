"""Language models: token mixers, the block they share, the models made of it, tokenizers, generation."""

from zoo.sequence import baselines, miras

__all__ = ["baselines", "miras"]
