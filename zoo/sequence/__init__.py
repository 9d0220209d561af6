"""Language models: token mixers, the block they share, the models made of it, tokenizers, generation."""

from zoo.sequence import baselines, miras  # noqa: F401
