"""Routing Transformer: the official models for text, images and pairs of sequences, and lucidrains' design."""

from zoo.routing_transformer import image, lucidrains, seq2seq, text

__all__ = ["image", "lucidrains", "seq2seq", "text"]
