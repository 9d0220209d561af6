"""Routing Transformer (arXiv:2003.05997) from a source to a target: an encoder that sees both ways, and a decoder."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Bool, Float, Int

from zoo.registry import Family, register
from zoo.routing_transformer.model import SHARDING_RULES, layers_of
from zoo.routing_transformer.text import RoutingTransformer
from zoo.routing_transformer.weights import PRETRAINED, SEQ2SEQ_KEY_MAPS
from zoo.sequence.sequence_model import check_tokens


class RoutingSeq2Seq(RoutingTransformer):
    """Encoder and decoder; all calls take the source as well:

        logits = model.apply(variables, tokens, source=source, source_mask=mask)
        state = model.apply(variables, batch, max_length, source, mask, method="initial_state")
        logits, state = model.apply(variables, tokens, max_length, source, mask, method="prefill")
        logits, state = model.apply(variables, token, state, method="step")

    Encoder layers have neither a mask nor shared queries and keys; their routing heads choose from the whole source,
    which is no leak. A decoder layer attends to the source between its self-attention and its feed-forward, with
    heads of the same kinds and numbers, without relative positions. What stands in for `membership` holds for the
    decoder's self-attention and for its routing heads over the source.

    Attributes:
        encoder_depth: layers of the encoder; `skip_first` holds for both stacks.
        source_vocab_size: tokens of the source; 0 is padding unless a mask says otherwise.
        source_length: tokens of the source that the model is made for; it takes any number.
        source_block: tokens of the source that belong to a block of the target, for local heads; None: as many as
            make equal numbers of blocks of `source_length` and `length`, which the official code demands and some
            of its configurations do not meet.
        input_dropout: rate at which channels of the embedded source are zeroed, without scaling up the rest.
    """

    encoder_depth: int = 6
    source_vocab_size: int = 32768
    source_length: int = 512
    source_block: int | None = None
    input_dropout: float = 0.0

    def check(self) -> None:
        super().check()
        if self.cluster_strided_heads or self.strided_heads:
            raise ValueError(
                "an encoder-decoder has routing and local heads only; got "
                f"cluster_strided_heads={self.cluster_strided_heads} and strided_heads={self.strided_heads}"
            )
        for name in ("encoder_depth", "source_vocab_size", "source_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def example_inputs(self, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        source = jax.ShapeDtypeStruct((batch, self.source_length), jnp.int32)
        return {**super().example_inputs(batch), "source": source}

    def setup(self):
        super().setup()
        unmasked = dict(causal=False, share_qk=False)
        self.encoder_blocks = [
            self.block_of(self.heads(layer, **unmasked, membership="sequence")) for layer in range(self.encoder_depth)
        ]
        # tensor2tensor's own initial value.
        self.source_embedding = nn.Embed(
            self.source_vocab_size,
            self.width,
            embedding_init=initializers.normal(self.width**-0.5),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )

    def decoder_block(self, layer: int) -> nn.Module:
        plain = dict(causal=False, share_qk=False, local_relative=False, routing_relative=False)
        blocks = -(-self.length // self.block)
        return self.block_of(
            self.heads(layer),
            source_heads=self.heads(layer, **plain),
            source_block=self.source_block or -(-self.source_length // blocks),
        )

    def encode(
        self, source: Int[Array, "B M"], mask: Bool[Array, "B M"] | None = None, train: bool = False
    ) -> tuple[Float[Array, "B M C"], Bool[Array, "B M"]]:
        """The encoder's output, and which of the source's tokens are no padding."""
        check_tokens(source)
        mask = source != 0 if mask is None else mask
        x = self.source_embedding(source) * self.width**0.5
        x = jnp.where(mask[..., None], x, 0)
        if train and self.input_dropout:
            kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.input_dropout, x.shape)
            x = jnp.where(kept, x, 0)
        x = self.drop(self.timed(x), deterministic=not train)
        for block in self.encoder_blocks:
            x = block(x, train, mask)
        return x, mask

    def __call__(
        self,
        tokens: Int[Array, "B N"],
        segments: Int[Array, "B N"] | None = None,
        train: bool = False,
        *,
        source: Int[Array, "B M"],
        source_mask: Bool[Array, "B M"] | None = None,
    ) -> Float[Array, "B N V"]:
        """Logits of the target, as of a language model that also reads a source.

        Args:
            tokens: `(B, N)` of the target.
            segments: must be None: a row has one source.
            train: whether the model is in training.
            source: `(B, M)`.
            source_mask: `(B, M)`, False for padding; None takes token 0 for padding.
        """
        check_tokens(tokens)
        if segments is not None:
            raise ValueError("segments: a row of an encoder-decoder is one document; leave it None")
        encoded, mask = self.encode(source, source_mask, train)
        x = self.drop(self.embed(tokens, 0, train), deterministic=not train)
        for block in self.blocks:
            x = block(x, train, None, None, encoded, mask)
        return self.wide_logits(x)

    def initial_state(
        self,
        batch: int,
        max_length: int,
        source: Int[Array, "B M"],
        source_mask: Bool[Array, "B M"] | None = None,
    ) -> dict[str, Any]:
        """The state before the first token of `batch` rows, with all that is read of their sources."""
        if source.shape[0] != batch:
            raise ValueError(f"batch must be that of source, {source.shape[0]}; got {batch}")
        encoded, mask = self.encode(source, source_mask)
        blocks = [block.initial_state(batch, max_length, encoded, mask) for block in self.blocks]
        return {"position": jnp.zeros((), jnp.int32), "blocks": blocks}

    def prefill(
        self,
        tokens: Int[Array, "B N"],
        max_length: int,
        source: Int[Array, "B M"],
        source_mask: Bool[Array, "B M"] | None = None,
    ) -> tuple[Float[Array, "B N V"], dict[str, Any]]:
        """Logits of all positions, and the state after the last token."""
        check_tokens(tokens)
        state = self.initial_state(tokens.shape[0], max_length, source, source_mask)
        return self.continued(tokens, state, max_length)


_SUMMARY = dict(width=256, hidden=3072, length=512, attention_dropout=0.1, hidden_dropout=0.1)
_LOCAL = dict(local_heads=8, routing_heads=0)
_PUBMED = dict(_SUMMARY, source_length=10240, encoder_depth=4, depth=10, block=128, max_relative=257, input_dropout=0.1)
_ARXIV = dict(_SUMMARY, encoder_depth=4, depth=8)
_MEENA = dict(_SUMMARY, width=1024, source_length=2048, encoder_depth=6, depth=15)
_TRANSLATE = dict(
    width=1024,
    hidden=4096,
    depth=6,
    local_heads=14,
    routing_heads=2,
    skip_first=4,
    window=512,
    dropout=0.3,
)


def _translate(length: int) -> dict[str, Any]:
    return dict(_TRANSLATE, length=length, source_length=length, clusters=length // 512)


# Vocabularies, which the official code leaves to the data, are ours: 32,768 subwords on both sides.
VARIANTS = {
    name: dict(vocab_size=32768, **fields)
    for name, fields in {
        "routing_transformer_pubmed": dict(
            _PUBMED, local_heads=4, routing_heads=4, skip_first=2, clusters=40, window=256
        ),
        "routing_transformer_pubmed_local": dict(_PUBMED, **_LOCAL),
        "routing_transformer_arxiv": _ARXIV
        | dict(
            width=1024,
            hidden=4096,
            source_length=24064,
            local_heads=6,
            routing_heads=2,
            clusters=47,
            window=512,
            max_relative=257,
        ),
        "routing_transformer_arxiv_local": dict(_ARXIV, **_LOCAL, source_length=24000),
        "routing_transformer_meena": _MEENA
        | dict(embedding_width=512, local_heads=6, routing_heads=2, skip_first=5, clusters=8, window=512),
        "routing_transformer_meena_local": dict(_MEENA, **_LOCAL, embedding_width=256),
        "routing_transformer_translate_512": _translate(512),
        "routing_transformer_translate_1k": _translate(1024),
        "routing_transformer_translate_2k": _translate(2048),
        "routing_transformer_translate_4k": _translate(4096),
        "routing_transformer_translate_8k": _translate(8192),
        "routing_transformer_translate_local_8k": _translate(8192)
        | dict(local_heads=16, routing_heads=0, share_qk=False, skip_first=0),
    }.items()
}
# Ours, for generated tasks of up to 32 tokens. Strictly causal membership, and positions: without them attention to
# the source could tell places by their neighbours only.
VARIANTS["routing_transformer_seq2seq_nano"] = dict(
    vocab_size=32,
    source_vocab_size=32,
    length=32,
    source_length=32,
    width=128,
    encoder_depth=2,
    depth=2,
    hidden=256,
    local_heads=2,
    routing_heads=2,
    block=8,
    clusters=4,
    window=8,
    max_relative=16,
    membership="nearest",
    timing_signal=True,
    dropout=0.0,
)


register(
    Family(
        name="routing_seq2seq",
        module=RoutingSeq2Seq,
        variants=VARIANTS,
        pretrained=PRETRAINED,
        key_maps=SEQ2SEQ_KEY_MAPS,
        sharding_rules=SHARDING_RULES,
        layers=layers_of,
    )
)
