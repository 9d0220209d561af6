"""What the Routing Transformer's models share: the fields of their layers, and a stack of them over tokens."""

import re
from collections.abc import Callable
from typing import Any, get_args

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.dense import accumulator_dtype
from zoo.layers import rematerialize
from zoo.registry import nearest
from zoo.routing_transformer.blocks import Block, Kind
from zoo.routing_transformer.heads import Heads, Membership
from zoo.sequence.sequence_model import SequenceModel, check_tokens

FEED_FORWARDS = get_args(Kind)
MEMBERSHIPS = get_args(Membership)


class RoutingModel(SequenceModel):
    """A causal stack; a subclass adds `embed` and `logits`.

    With `membership="sequence"`, as published, clusters are chosen by looking at the whole row: what later tokens are
    has a part in what earlier ones attend to, and so in their logits. `"prefix"` and `"nearest"` are strictly causal,
    and with them `prefill` and `step` give what the whole row gives. They decode a `"sequence"` model with
    `"prefix"`, as the official decoder does, whose logits therefore are not those of training. `"prefix"` costs
    O(N^2) and is meant for evaluation; a model whose likelihoods are to mean something is trained with `"nearest"`.

    Documents packed into a row do not attend to each other; blocks of local heads are those of the row all the same.

    Attributes:
        width: channels of a token.
        depth: layers.
        hidden, feed_forward: inner width and kind, see `zoo.routing_transformer.blocks.FeedForward`.
        routing_heads, cluster_strided_heads, strided_heads, local_heads: of every layer; see
            `zoo.routing_transformer.heads.Heads`, also for `block`, `look`, `clusters`, `window`, `hashed`,
            `max_relative`, `local_relative`, `routing_relative`, `share_qk`, `decay`, `commitment` and `initial_count`.
            What belongs to heads that a model does not have is without effect.
        membership: who is in a cluster, see above.
        skip_first: that many layers have local heads in the place of routing heads.
        dropout: rate on the input of the stack and on what every sublayer adds.
        attention_dropout, hidden_dropout: rates on attention weights and inside the feed-forward.
    """

    width: int = 1024
    depth: int = 12
    hidden: int = 3072
    feed_forward: str = "geglu"
    routing_heads: int = 4
    cluster_strided_heads: int = 0
    strided_heads: int = 0
    local_heads: int = 4
    skip_first: int = 0
    block: int = 256
    look: int = 1
    clusters: int = 16
    window: int = 512
    hashed: bool = False
    membership: str = "sequence"
    share_qk: bool = True
    max_relative: int = 513
    local_relative: bool = True
    routing_relative: bool = True
    decay: float = 0.999
    commitment: float = 1e-4
    initial_count: float = 1.0
    dropout: float = 0.1
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0

    def heads(self, layer: int, **changes: Any) -> Heads:
        """The heads of one layer; `changes` are fields of `Heads` that are not the model's."""
        routing, strided, local = self.routing_heads, self.strided_heads, self.local_heads
        total = routing + self.cluster_strided_heads + strided + local
        names = ("block", "look", "clusters", "window", "hashed", "membership", "share_qk", "max_relative")
        names = (*names, "local_relative", "routing_relative", "decay", "commitment", "initial_count")
        fields = {name: getattr(self, name) for name in names} | {"dropout": self.attention_dropout, **changes}
        heads = Heads(routing, self.cluster_strided_heads, strided, local, self.width // total, **fields)
        return heads.without_routing() if layer < self.skip_first else heads

    def check(self) -> None:
        super().check()
        if self.membership not in MEMBERSHIPS:
            raise ValueError(f"unknown membership {self.membership!r}{nearest(self.membership, MEMBERSHIPS)}")
        if self.feed_forward not in FEED_FORWARDS:
            raise ValueError(f"unknown feed_forward {self.feed_forward!r}{nearest(self.feed_forward, FEED_FORWARDS)}")
        kinds = ("routing_heads", "cluster_strided_heads", "strided_heads", "local_heads")
        numbers = [getattr(self, kind) for kind in kinds]
        if min(numbers) < 0 or not sum(numbers) or self.width % sum(numbers):
            given = ", ".join(f"{kind}={number}" for kind, number in zip(kinds, numbers))
            raise ValueError(f"the number of heads must divide width={self.width}; got {given}")
        for name in ("depth", "hidden", "block", "clusters", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.look < 0:
            raise ValueError(f"look must be at least 0 blocks, got {self.look}")
        if not 0 <= self.skip_first <= self.depth:
            raise ValueError(f"skip_first must be from 0 to depth={self.depth}, got {self.skip_first}")
        if (self.local_relative or self.routing_relative) and self.max_relative < 1:
            raise ValueError(
                f"relative positions need max_relative of at least 1, got {self.max_relative}; or "
                "local_relative=False and routing_relative=False"
            )

    def setup(self):
        self.blocks = [self.decoder_block(layer) for layer in range(self.depth)]
        self.drop = nn.Dropout(self.dropout)

    def decoder_block(self, layer: int) -> nn.Module:
        """One layer of the causal stack."""
        return self.block_of(self.heads(layer))

    def block_of(self, heads: Heads, **options: Any) -> nn.Module:
        """A layer with these heads; `options` are fields of `Block`."""
        block = rematerialize(Block, self.remat, static_argnums=(2,))
        return block(
            heads,
            hidden=self.hidden,
            feed_forward=self.feed_forward,
            hidden_dropout=self.hidden_dropout,
            dropout=self.dropout,
            implementation=self.implementation,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            **options,
        )

    def embed(
        self, tokens: Int[Array, "B N"], first: Int[Array, ""] | int = 0, train: bool = False
    ) -> Float[Array, "B N C"]:
        """What goes into the stack for the tokens at positions `first` and on."""
        raise NotImplementedError

    def logits(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch V"]:
        """From the stack's output to the logits."""
        raise NotImplementedError

    def __call__(
        self, tokens: Int[Array, "B N"], segments: Int[Array, "B N"] | None = None, train: bool = False
    ) -> Float[Array, "B N V"]:
        check_tokens(tokens, segments)
        x = self.drop(self.embed(tokens, 0, train), deterministic=not train)
        for block in self.blocks:
            x = block(x, train, None, segments)
        return self.wide_logits(x)

    def initial_state(self, batch: int, max_length: int) -> dict[str, Any]:
        blocks = [block.initial_state(batch, max_length) for block in self.blocks]
        return {"position": jnp.zeros((), jnp.int32), "blocks": blocks}

    def prefill(self, tokens: Int[Array, "B N"], max_length: int) -> tuple[Float[Array, "B N V"], dict[str, Any]]:
        check_tokens(tokens)
        return self.continued(tokens, self.initial_state(tokens.shape[0], max_length), max_length)

    def continued(
        self, tokens: Int[Array, "B N"], state: dict[str, Any], max_length: int
    ) -> tuple[Float[Array, "B N V"], dict[str, Any]]:
        """The logits of the first tokens, and the state after them; `state` is the initial one."""
        length = tokens.shape[1]
        if length > max_length:
            raise ValueError(f"max_length {max_length} is less than the {length} tokens given")
        x, blocks = self.embed(tokens), []
        for block, before in zip(self.blocks, state["blocks"], strict=True):
            x, after = block.prefill(x, before, max_length)
            blocks.append(after)
        return self.wide_logits(x), {"position": jnp.asarray(length, jnp.int32), "blocks": blocks}

    def step(self, token: Int[Array, " B"], state: dict[str, Any]) -> tuple[Float[Array, "B V"], dict[str, Any]]:
        position, blocks = state["position"], []
        x = self.embed(token[:, None], position)[:, 0]
        for block, before in zip(self.blocks, state["blocks"], strict=True):
            x, after = block.step(x, before, position)
            blocks.append(after)
        return self.wide_logits(x), {"position": position + 1, "blocks": blocks}

    def wide_logits(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch V"]:
        """Logits in float32 (float64 for float64 models)."""
        logits = self.logits(x)
        return logits.astype(accumulator_dtype(logits.dtype))


# Matrices are split over `fsdp` on the side of the residual stream and over `tensor` on the other.
SHARDING_RULES = (
    (r".*/(q|k|v|fc1|gate|head|narrow)/kernel", ("fsdp", "tensor")),
    (r".*/(out|fc2|widen)/kernel", ("tensor", "fsdp")),
    (r".*/head_map/kernel", (None, None)),
    (r".*/(embedding|source_embedding)", ("tensor", "fsdp")),
    (r".*/(rows|columns)", (None, "fsdp")),
    (r".*/relative/(key|value)", (None, None)),
    (r".*/(bias|scale)", (None,)),
    (r"centroids/.*/(means|total|projections)", (None, None, None)),
    (r"centroids/.*/count", (None, None)),
)


def layers_of(model: SequenceModel) -> tuple[Callable[[str], int], int]:
    """What `Family.layers` wants: the embedding is 0, every layer one more, the decoder's after the encoder's."""
    encoder = getattr(model, "encoder_depth", 0)
    last = encoder + model.depth + 1

    def layer_of(path: str) -> int:
        if found := re.match(r"(encoder_)?blocks_(\d+)/", path):
            return 1 + int(found[2]) + (0 if found[1] else encoder)
        return last if path.startswith(("final_norm/", "head/", "narrow/")) else 0

    return layer_of, last
