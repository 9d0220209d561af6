"""Routing Transformer (Roy et al., TACL 2021, arXiv:2003.05997): language models.

Heads of two kinds stand side by side: local ones see a block of tokens and the block before, routing ones attend
within clusters of like tokens from anywhere in the row. Follows the official code (google-research,
`routing_transformer/`), also where it differs from the paper: norms come after the residual sum, routing heads
share queries and keys and do not scale their logits, and a further matrix follows every head.

What the row begins with is the data's business: the official code shifts its rows right and puts id 0, its padding,
in front, so that 0 is what its weights expect as the first token.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.dense import accumulator_dtype
from zoo.layers import Linear
from zoo.registry import Family, register
from zoo.routing_transformer.heads import unit_scaling_init
from zoo.routing_transformer.model import SHARDING_RULES, RoutingModel, layers_of
from zoo.routing_transformer.weights import KEY_MAPS, PRETRAINED


class RoutingTransformer(RoutingModel):
    """Language model; fields beside those of `RoutingModel`:

    Attributes:
        embedding_width: channels of the embedding, and of the input of the output projection; None: `width`.
        embedding_dropout: rate on the embedding.
        target_dropout: rate at which input tokens are replaced by token 0.
        timing_signal: adds sinusoids of the position to the embedding; none of the official configurations does.
    """

    embedding_width: int | None = None
    embedding_dropout: float = 0.0
    target_dropout: float = 0.0
    timing_signal: bool = False

    def setup(self):
        super().setup()
        dense = dict(kernel_init=unit_scaling_init, dtype=self.dtype, param_dtype=self.param_dtype)
        narrow = self.embedding_width or self.width
        self.embedding = nn.Embed(
            self.vocab_size,
            narrow,
            embedding_init=unit_scaling_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        self.embedding_drop = nn.Dropout(self.embedding_dropout)
        # Also where nothing changes in width.
        self.widen = Linear(self.width, **dense)
        if narrow != self.width:
            self.narrow = Linear(narrow, **dense)
        self.head = Linear(self.vocab_size, **dense)

    def embed(
        self, tokens: Int[Array, "B N"], first: Int[Array, ""] | int = 0, train: bool = False
    ) -> Float[Array, "B N C"]:
        if train and self.target_dropout:
            kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.target_dropout, tokens.shape)
            tokens = jnp.where(kept, tokens, 0)
        x = self.widen(self.embedding_drop(self.embedding(tokens), deterministic=not train))
        return self.timed(x, first)

    def timed(self, x: Float[Array, "B N C"], first: Int[Array, ""] | int = 0) -> Float[Array, "B N C"]:
        """Tokens with the sinusoids of their positions, if the model has them; sines first, then cosines."""
        if not self.timing_signal:
            return x
        scales = self.width // 2
        rates = jnp.exp(-math.log(1e4) / max(scales - 1, 1) * jnp.arange(scales, dtype=accumulator_dtype(x.dtype)))
        angles = (first + jnp.arange(x.shape[1]))[:, None] * rates
        signal = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
        return x + jnp.pad(signal, ((0, 0), (0, self.width % 2))).astype(x.dtype)

    def logits(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch V"]:
        return self.head(x if self.embedding_width in (None, self.width) else self.narrow(x))


# The text models' common descent: `sparse_transformer_local` in the official code.
_TEXT = dict(width=1024, hidden=3072, local_heads=8, routing_heads=0, max_relative=513)
_DROPPED = dict(attention_dropout=0.4, hidden_dropout=0.4)
_ROUTED = dict(local_heads=4, routing_heads=4, attention_dropout=0.0, hidden_dropout=0.0, depth=12)
_ENWIK8_8K = dict(_TEXT, **_DROPPED, vocab_size=256, length=8192, depth=22)
_ENWIK8_12K = dict(_ENWIK8_8K, length=12288, block=128, max_relative=257)
_WIKITEXT_LOCAL = dict(
    _TEXT,
    **_DROPPED,
    vocab_size=267735,
    length=4096,
    embedding_width=256,
    depth=14,
    embedding_dropout=0.4,
    target_dropout=0.25,
) | dict(local_heads=16)
_WIKITEXT_4K = dict(_WIKITEXT_LOCAL, local_heads=8, routing_heads=8, clusters=8, window=512)
_WIKITEXT_1K = dict(_WIKITEXT_4K, length=1024, clusters=2, depth=20, target_dropout=0.2)
_PG19 = dict(
    _TEXT,
    # What the official code asks its subword encoder for; the released vocabulary is said to have 98 thousand.
    vocab_size=32768,
    length=8192,
    depth=22,
    skip_first=21,
    clusters=16,
    window=512,
) | dict(width=1032, hidden=4096, local_heads=6, routing_heads=2)

VARIANTS = {
    "routing_transformer_enwik8_local_8k": _ENWIK8_8K,
    "routing_transformer_enwik8_8k": _ENWIK8_8K | _ROUTED | dict(clusters=16, window=512),
    "routing_transformer_enwik8_local_12k": _ENWIK8_12K,
    "routing_transformer_enwik8_12k": _ENWIK8_12K | _ROUTED | dict(clusters=48, window=256),
    "routing_transformer_wikitext103_local_4k": _WIKITEXT_LOCAL,
    "routing_transformer_wikitext103_4k": _WIKITEXT_4K,
    "routing_transformer_wikitext103_hash_4k": dict(_WIKITEXT_4K, hashed=True),
    "routing_transformer_wikitext103_1k": _WIKITEXT_1K,
    "routing_transformer_wikitext103_hash_1k": dict(_WIKITEXT_1K, hashed=True),
    "routing_transformer_pg19": _PG19,
    "routing_transformer_pg19_local": dict(_PG19, depth=24, local_heads=8, routing_heads=0, skip_first=0),
    # Ours, for bytes. Strictly causal membership, so that its bits per byte are a likelihood.
    "routing_transformer_nano": dict(
        vocab_size=257,
        length=256,
        width=128,
        depth=4,
        hidden=384,
        local_heads=2,
        routing_heads=2,
        block=32,
        clusters=8,
        window=32,
        max_relative=64,
        membership="nearest",
        dropout=0.0,
    ),
}


register(
    Family(
        name="routing_transformer",
        module=RoutingTransformer,
        variants=VARIANTS,
        pretrained=PRETRAINED,
        key_maps=KEY_MAPS,
        sharding_rules=SHARDING_RULES,
        layers=layers_of,
    )
)
