"""Routing Transformer as github.com/lucidrains/routing-transformer (1.6.1, with local-attention 1.11.2) has it.

Apart from the official code it differs in where norms stand (before the sublayers), in the positions (rotary), in
how tokens are compared with centroids and attend, and in how centroids learn; see `kernels.cluster`.
"""

from typing import Any, get_args

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.dense import accumulator_dtype
from zoo.layers import LayerNorm, Linear, normal02_init, rematerialize, torch_bias_init
from zoo.registry import Family, nearest, register
from zoo.routing_transformer.lucidrains_layers import (
    Attention,
    FeedForward,
    Norm,
    Residual,
    RotaryRoutingHeads,
    torch_linear_init,
)
from zoo.routing_transformer.lucidrains_weights import LUCIDRAINS_KEY_MAPS
from zoo.routing_transformer.model import MEMBERSHIPS, layers_of
from zoo.routing_transformer.weights import PRETRAINED
from zoo.sequence.sequence_model import SequenceModel, check_tokens


class Block(nn.Module):
    """Attention and feed-forward, each with its residual connection."""

    attention: Attention
    feed: FeedForward
    norm: Norm

    def setup(self):
        like = dict(dtype=self.attention.dtype, param_dtype=self.attention.param_dtype)
        self.residual1, self.residual2 = Residual(self.norm, **like), Residual(self.norm, **like)

    def attend(self, x: Array, train: bool, segments: Array | None) -> Array:
        """What attention adds."""
        return self.residual1.after(self.attention(self.residual1.before(x), train, segments))

    def transform(self, x: Array, train: bool = False) -> Array:
        """What the feed-forward adds."""
        return self.residual2.after(self.feed(self.residual2.before(x), train))

    def __call__(
        self,
        x: Float[Array, "S B N C"],
        train: bool,
        segments: Int[Array, "B N"] | None = None,
    ) -> Float[Array, "S B N C"]:
        """The residual stream; or the two of a reversible model, of which each takes what the other gives."""
        first, second = x[0], x[-1]
        first = first + self.attend(second, train, segments)
        if x.shape[0] == 1:
            return (first + self.transform(first, train))[None]
        return jnp.stack([first, second + self.transform(first, train)])

    def cached(self, x: Float[Array, "S B *n C"], attend: Any) -> tuple[Float[Array, "S B *n C"], Any]:
        """The same without training; `attend` takes the attention's input and gives its output and state."""
        first, second = x[0], x[-1]
        out, state = attend(self.attention, self.residual1.before(second))
        first = first + self.residual1.after(out)
        if x.shape[0] == 1:
            return (first + self.transform(first))[None], state
        return jnp.stack([first, second + self.transform(first)]), state


class RoutingTransformerLucidrains(SequenceModel):
    """`RoutingTransformerLM`; without product-key memories, experts, token shift, tied layers, layer dropout, or a
    context to attend to.

    What is said of `membership` in `zoo.routing_transformer.model.RoutingModel` holds here as well, `"sequence"` being
    what the published module has.

    Attributes:
        width, depth: channels of a token, and layers.
        num_heads, head_dim: heads of a layer, and channels of one.
        local_heads: how many of them are local, of all layers or of each.
        window: tokens in a cluster, of which there are `length / window`.
        block: tokens in a block of local heads, None: `window`; look: blocks seen on either side.
        causal: False makes an encoder.
        share_qk: queries of routing heads are their keys; None: if causal.
        memories: learned keys and values in every cluster; routing heads that are causal and do not share have at
            least one.
        gated: GELU with a gate in the feed-forward.
        embedding_width: channels of the embedding, and of the input of the output projection; None: `width`.
        tie_embeddings: the output projection is the embedding.
        norm: see `zoo.routing_transformer.lucidrains_layers.Residual`.
        reversible: two residual streams, the mean of which is the output. Here they save no memory; see `remat`.
        rotary: whether local heads have positions.
        decay, commitment: as in `zoo.routing_transformer.heads.Heads`; the published language model has their defaults
            fixed.
        attention_dropout, output_dropout, hidden_dropout: rates on attention weights, on what attention gives, and
            inside the feed-forward.
    """

    width: int = 512
    depth: int = 6
    num_heads: int = 8
    head_dim: int = 64
    local_heads: int | tuple[int, ...] = 0
    window: int = 64
    block: int | None = None
    look: int = 1
    causal: bool = True
    share_qk: bool | None = None
    membership: str = "sequence"
    memories: int = 0
    gated: bool = False
    embedding_width: int | None = None
    tie_embeddings: bool = False
    norm: str = "layer"
    reversible: bool = False
    rotary: bool = True
    decay: float = 0.999
    commitment: float = 1e-4
    attention_dropout: float = 0.0
    output_dropout: float = 0.0
    hidden_dropout: float = 0.0

    @property
    def shared(self) -> bool:
        """Whether routing heads share queries and keys."""
        return self.causal if self.share_qk is None else self.share_qk

    @property
    def memory_slots(self) -> int:
        """Learned keys of a cluster."""
        return max(self.memories, 1 if self.causal and not self.shared else 0)

    def locals_of(self, layer: int) -> int:
        """Local heads of a layer."""
        return self.local_heads if isinstance(self.local_heads, int) else self.local_heads[layer]

    def check(self) -> None:
        super().check()
        if self.membership not in MEMBERSHIPS:
            raise ValueError(f"unknown membership {self.membership!r}{nearest(self.membership, MEMBERSHIPS)}")
        if self.norm not in get_args(Norm):
            raise ValueError(f"unknown norm {self.norm!r}{nearest(self.norm, get_args(Norm))}")
        if not isinstance(self.local_heads, int) and len(self.local_heads) != self.depth:
            raise ValueError(f"local_heads must be one number or one for each of {self.depth} layers")
        if not all(0 <= self.locals_of(i) <= self.num_heads for i in range(self.depth)):
            raise ValueError(f"local_heads must be from 0 to num_heads={self.num_heads}, got {self.local_heads}")
        if self.length % self.window:
            raise ValueError(f"window={self.window} must divide length={self.length}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even to be rotated, got {self.head_dim}")

    def setup(self):
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        dense = dict(kernel_init=torch_linear_init, **like)
        narrow = self.embedding_width or self.width
        self.embedding = nn.Embed(self.vocab_size, narrow, embedding_init=normal02_init, **like)
        if narrow != self.width:
            self.widen = Linear(self.width, bias_init=torch_bias_init(narrow), **dense)
            self.narrow = Linear(narrow, bias_init=torch_bias_init(self.width), **dense)
        self.blocks = [self._block(layer) for layer in range(self.depth)]
        self.final_norm = LayerNorm(**like)
        if not self.tie_embeddings:
            self.head = Linear(self.vocab_size, bias_init=torch_bias_init(narrow), **dense)

    def _block(self, layer: int) -> nn.Module:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        local = self.locals_of(layer)
        both = dict(implementation=self.implementation, dropout=self.attention_dropout, causal=self.causal, **like)
        routing = None
        if local < self.num_heads:
            routing = RotaryRoutingHeads(
                number=self.num_heads - local,
                dim=self.head_dim,
                clusters=self.length // self.window,
                window=self.window,
                memories=self.memory_slots,
                share_qk=self.shared,
                membership=self.membership,
                decay=self.decay,
                commitment=self.commitment,
                parent=None,
                **both,
            )
        attention = Attention(
            width=self.width,
            local_heads=local,
            routing=routing,
            dim=self.head_dim,
            block=self.block or self.window,
            look=self.look,
            rotary=self.rotary,
            output_dropout=self.output_dropout,
            parent=None,
            **both,
        )
        feed = FeedForward(self.gated, self.hidden_dropout, parent=None, **like)
        return rematerialize(Block, self.remat, static_argnums=(2,))(attention, feed, self.norm)

    def __call__(
        self, tokens: Int[Array, "B N"], segments: Int[Array, "B N"] | None = None, train: bool = False
    ) -> Float[Array, "B N V"]:
        check_tokens(tokens, segments)
        x = self._streams(tokens)
        for block in self.blocks:
            x = block(x, train, segments)
        return self._logits(x)

    def initial_state(self, batch: int, max_length: int) -> dict[str, Any]:
        blocks = [block.attention.initial_state(batch, max_length) for block in self.blocks]
        return {"position": jnp.zeros((), jnp.int32), "blocks": blocks}

    def prefill(self, tokens: Int[Array, "B N"], max_length: int) -> tuple[Float[Array, "B N V"], dict[str, Any]]:
        check_tokens(tokens)
        length = tokens.shape[1]
        if length > max_length:
            raise ValueError(f"max_length {max_length} is less than the {length} tokens given")
        x, states = self._streams(tokens), []
        for block in self.blocks:
            x, state = block.cached(x, lambda attention, x: attention.prefill(x, max_length))
            states.append(state)
        return self._logits(x), {"position": jnp.asarray(length, jnp.int32), "blocks": states}

    def step(self, token: Int[Array, " B"], state: dict[str, Any]) -> tuple[Float[Array, "B V"], dict[str, Any]]:
        position, states = state["position"], []
        x = self._streams(token)
        for block, before in zip(self.blocks, state["blocks"], strict=True):
            x, after = block.cached(x, lambda attention, x, before=before: attention.step(x, before, position))
            states.append(after)
        return self._logits(x), {"position": position + 1, "blocks": states}

    def _streams(self, tokens: Int[Array, "*batch"]) -> Float[Array, "S *batch C"]:
        x = self.embedding(tokens)
        x = x if self.embedding_width in (None, self.width) else self.widen(x)
        return jnp.stack([x, x]) if self.reversible else x[None]

    def _logits(self, x: Float[Array, "S *batch C"]) -> Float[Array, "*batch V"]:
        x = x.mean(0)
        x = x if self.embedding_width in (None, self.width) else self.narrow(x)
        x = self.final_norm(x)
        logits = self.embedding.attend(x) if self.tie_embeddings else self.head(x)
        return logits.astype(accumulator_dtype(logits.dtype))


VARIANTS = {
    # The examples of the repository: bytes of enwik8, and the toy of increments.
    "routing_transformer_lucidrains_enwik8": dict(
        vocab_size=256, length=4096, window=128, local_heads=(8, 8, 8, 4, 4, 4)
    ),
    "routing_transformer_lucidrains_increment": dict(
        vocab_size=260, length=256, width=1024, depth=2, window=128, local_heads=0
    ),
    # The language model of its README, without the layers that are not here.
    "routing_transformer_lucidrains_base": dict(
        vocab_size=20000,
        length=8192,
        embedding_width=128,
        depth=12,
        window=128,
        block=256,
        local_heads=4,
        gated=True,
    ),
    # Ours, for bytes. Strictly causal membership, so that its bits per byte are a likelihood.
    "routing_transformer_lucidrains_nano": dict(
        vocab_size=257,
        length=256,
        width=128,
        depth=4,
        num_heads=4,
        head_dim=32,
        local_heads=2,
        window=32,
        membership="nearest",
    ),
}

SHARDING_RULES = (
    (r".*/(local_qkv|q|k|v|fc1|head|narrow)/kernel", ("fsdp", "tensor")),
    (r".*/(out|fc2|widen)/kernel", ("tensor", "fsdp")),
    (r".*/embedding", ("tensor", "fsdp")),
    (r".*/memory_(key|value)", (None, None, None, None)),
    (r".*/(bias|scale|factor)", (None,)),
    (r"centroids/.*/means", (None, None, None)),
    (r"centroids/.*/initted", ()),
)


register(
    Family(
        name="routing_transformer_lucidrains",
        module=RoutingTransformerLucidrains,
        variants=VARIANTS,
        pretrained=PRETRAINED,
        key_maps=LUCIDRAINS_KEY_MAPS,
        sharding_rules=SHARDING_RULES,
        layers=layers_of,
    )
)
