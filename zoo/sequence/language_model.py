"""Language models of one block and many token mixers, so that two mixers differ in nothing but the mixing."""

import math
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from zoo.layers import Dtype, Linear, rematerialize
from zoo.sequence import linear_mixers, memory_mixers, mixers
from zoo.sequence.mixers import Mixer, RMSNorm, Rows, fan_in_init, residual_init
from zoo.sequence.sequence_model import SequenceModel, check_tokens, positions_of

# Letter of a pattern -> the mixer's class, and how a reader would call it.
MIXERS: dict[str, tuple[type[Mixer], str]] = {
    "A": (mixers.SoftmaxAttention, "softmax attention"),
    "W": (mixers.WindowAttention, "softmax attention within a window"),
    "N": (linear_mixers.LinearAttention, "linear attention without decay"),
    "R": (linear_mixers.Retention, "RetNet"),
    "T": (linear_mixers.Lightning, "Lightning, as in TransNormerLLM"),
    "L": (linear_mixers.GatedLinearAttention, "GLA"),
    "H": (linear_mixers.HGRN2, "HGRN-2"),
    "D": (linear_mixers.DeltaNet, "DeltaNet"),
    "G": (linear_mixers.GatedDeltaNet, "Gated DeltaNet"),
    "M": (memory_mixers.Moneta, "Moneta"),
    "Y": (memory_mixers.Yaad, "Yaad"),
    "E": (memory_mixers.Memora, "Memora"),
}


class SwiGlu(nn.Module):
    """`down(silu(gate(x)) * up(x))`, without biases."""

    hidden: int
    depth: int
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        like = dict(use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        gate, up = (Linear(self.hidden, name=name, kernel_init=fan_in_init, **like)(x) for name in ("gate", "up"))
        return Linear(x.shape[-1], name="down", kernel_init=residual_init(self.depth), **like)(jax.nn.silu(gate) * up)


class Block(nn.Module):
    """Two residual branches, each behind an RMS norm: a token mixer, and a gated MLP where it has a width."""

    mixer: Mixer
    mlp_hidden: int
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N C"], rows: Rows, state: Any = None, train: bool = False
    ) -> tuple[Float[Array, "B N C"], Any]:
        like = dict(dtype=self.mixer.dtype, param_dtype=self.mixer.param_dtype)
        y, state = self.mixer(RMSNorm(name="norm1", **like)(x), rows, state)
        x = x + nn.Dropout(self.dropout_rate, deterministic=not train)(y)
        if self.mlp_hidden:
            y = SwiGlu(self.mlp_hidden, self.mixer.depth, name="mlp", **like)(RMSNorm(name="norm2", **like)(x))
            x = x + nn.Dropout(self.dropout_rate, deterministic=not train)(y)
        return x, state

    def initial_state(self, batch: int, max_length: int) -> Any:
        """The mixer's state before the first token."""
        return self.mixer.initial_state(batch, max_length)


class LanguageModel(SequenceModel):
    """A decoder in Llama's layout whose blocks take their token mixers from a pattern.

    Attributes:
        width, depth, num_heads: channels, blocks, heads.
        mixers: a letter of `MIXERS` per block, repeated over the depth: `"A"` is a Transformer, `"GGGA"` has one
            softmax block after three of Gated DeltaNet.
        mlp_hidden: width inside the MLP; None: 8/3 of `width`, rounded up to a multiple of 32; 0: no MLP.
        conv_width: taps of the convolutions behind query, key and value; None: as each mixer's paper has it.
        key_ratio, value_ratio: widths of keys and values over `width`, of the mixers with a state of fixed size.
        chunk_size: tokens that those compute at once.
        window: tokens that a query of a `"W"` block sees.
        rope_base: of rotary positions.
        tie_embeddings: the embedding is also the output projection.
        scale_embeddings: embeddings begin with a norm of 1 and enter times `sqrt(width)`, as Gemma's do; else they
            begin with a standard deviation of 0.02 and enter as they are, as Llama's. The former learns text faster;
            for recall Gated DeltaNet wants the former, softmax attention the latter.
        dropout_rate: on the embedding and on what every branch adds.
        clear_every: empties the memories of the mixers with a state of fixed size after every so many tokens, to
            see what they are worth; 0: never.
    """

    width: int = 256
    depth: int = 4
    num_heads: int = 4
    mixers: str = "A"
    mlp_hidden: int | None = None
    conv_width: int | None = None
    key_ratio: float = 1.0
    value_ratio: float = 1.0
    chunk_size: int = 64
    window: int = 2048
    rope_base: float = 10000.0
    tie_embeddings: bool = True
    scale_embeddings: bool = False
    dropout_rate: float = 0.0
    clear_every: int = 0

    @property
    def segment_multiple(self) -> int:
        return math.lcm(*(self.mixer(i).segment_multiple for i in range(self.depth)))

    def check(self) -> None:
        super().check()
        for letter in self.mixers:
            if letter not in MIXERS:
                known = ", ".join(f"{key} ({meaning})" for key, (_, meaning) in MIXERS.items())
                raise ValueError(f"mixers {self.mixers!r}: no mixer is called {letter!r}; there are {known}")
        if not self.mixers or self.depth % len(self.mixers):
            raise ValueError(
                f"mixers {self.mixers!r} must be one letter or more whose number divides the depth, {self.depth}"
            )
        if self.width % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} must divide width {self.width}")
        for index in range(len(self.mixers)):
            self.mixer(index).check()
        if self.clear_every and not self.has_memory:
            raise ValueError(f"clear_every {self.clear_every} needs a mixer with a memory; {self.mixers!r} has none")

    @property
    def has_memory(self) -> bool:
        """Whether any block keeps a state of fixed size that `clear_every` can empty."""
        return any(hasattr(self.mixer(index), "clear_every") for index in range(len(self.mixers)))

    def mixer(self, index: int) -> Mixer:
        """The mixer of a block, unbound; its fields are those of the model that have the same names."""
        kind = MIXERS[self.mixers[index % len(self.mixers)]][0]
        names = {field.name for field in fields(kind)} & {field.name for field in fields(self)} - {"parent", "name"}
        return kind(layer=index, parent=None, **{name: getattr(self, name) for name in names})

    def setup(self) -> None:
        like = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        begin = initializers.normal(self.width**-0.5 if self.scale_embeddings else 0.02)
        self.embed = nn.Embed(self.vocab_size, self.width, embedding_init=begin, **like)
        hidden = -(-self.width * 8 // (3 * 32)) * 32 if self.mlp_hidden is None else self.mlp_hidden
        block = rematerialize(Block, self.remat, static_argnums=(4,))
        self.blocks = [block(self.mixer(i), hidden, self.dropout_rate) for i in range(self.depth)]
        self.dropout = nn.Dropout(self.dropout_rate)
        self.norm = RMSNorm(**like)
        if not self.tie_embeddings:
            self.head = Linear(self.vocab_size, use_bias=False, kernel_init=fan_in_init, **like)
        if "H" in self.mixers:
            shape = (self.depth, round(self.key_ratio * self.width))
            self.forget_bounds = self.param("forget_bounds", initializers.zeros, shape, self.param_dtype)

    def __call__(
        self, tokens: Int[Array, "B N"], segments: Int[Array, "B N"] | None = None, train: bool = False
    ) -> Float[Array, "B N V"]:
        check_tokens(tokens, segments)
        rows = Rows(positions_of(segments, tokens.shape[1]), segments, bounds=self._bounds())
        return self._walk(tokens, rows, [None] * self.depth, train)[0]

    def initial_state(self, batch: int, max_length: int) -> dict[str, Any]:
        states = [block.initial_state(batch, max_length) for block in self.blocks]
        return {"position": jnp.zeros((), jnp.int32), "blocks": states}

    def prefill(self, tokens: Int[Array, "B N"], max_length: int) -> tuple[Float[Array, "B N V"], dict[str, Any]]:
        check_tokens(tokens)
        length = tokens.shape[1]
        if length > max_length:
            raise ValueError(f"max_length {max_length} is less than the {length} tokens given")
        rows = Rows(jnp.arange(length), max_length=max_length, bounds=self._bounds())
        logits, states = self._walk(tokens, rows, [None] * self.depth, False)
        return logits, {"position": jnp.asarray(length, jnp.int32), "blocks": states}

    def step(self, token: Int[Array, " B"], state: dict[str, Any]) -> tuple[Float[Array, "B V"], dict[str, Any]]:
        position = state["position"]
        rows = Rows(position[None], bounds=self._bounds())
        logits, states = self._walk(token[:, None], rows, state["blocks"], False)
        return logits[:, 0], {"position": position + 1, "blocks": states}

    def _walk(self, tokens, rows: Rows, states, train: bool):
        x = self.embed(tokens) * (math.sqrt(self.width) if self.scale_embeddings else 1.0)
        x = self.dropout(x, deterministic=not train)
        after = []
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block(x, rows, state, train)
            after.append(state)
        x = self.norm(x)
        logits = self.embed.attend(x) if self.tie_embeddings else self.head(x)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), after

    def _bounds(self):
        return linear_mixers.forget_bounds(self.forget_bounds) if "H" in self.mixers else None


def layers_of(model: LanguageModel) -> tuple[Callable[[str], int], int]:
    """What `Family.layers` wants: the embedding is 0, every block one more, what follows them the last."""
    last = model.depth + 1

    def layer_of(path: str) -> int:
        if found := re.match(r"blocks_(\d+)/", path):
            return 1 + int(found[1])
        return 0 if path.startswith("embed/") else last

    return layer_of, last


# Matrices are split over `fsdp` on the side of the residual stream and over `tensor` on the other, by heads.
SHARDING_RULES = (
    (r"params/embed/embedding", ("tensor", "fsdp")),
    (r".*/(out|down)/kernel", ("tensor", "fsdp")),
    (r".*_down/kernel", ("fsdp", None)),
    (r".*_up/kernel", (None, "tensor")),
    (r"(.*/)?(q|k|v|f|gate|up|head|strength|time_step)/kernel", ("fsdp", "tensor")),
    (r".*/[a-z]+_conv", (None, "tensor")),
    (r".*/memory_w\d?", ("tensor", None, None)),
    (r".*_up/bias", ("tensor",)),
    (r".*/(scale|decay_rate|time_step_bias)", (None,)),
    (r"params/forget_bounds", (None, None)),
)

# What all sizes share: the paper's of Miras, appendix C; its vocabulary is not stated, 32,000 is that of Titans.
_PAPER = dict(vocab_size=32000, length=4096, num_heads=16)
SIZES = {
    "170m": dict(_PAPER, width=768, depth=12),
    "340m": dict(_PAPER, width=1024, depth=24),
    "780m": dict(_PAPER, width=1536, depth=24),
    # Ours: the paper does not give the layout of its 1.3 billion parameters.
    "1b3": dict(_PAPER, width=2048, depth=24),
}
# Ours, for bytes: about 1.12 million parameters whatever the mixer, by the width inside the MLP.
NANO = dict(vocab_size=257, length=256, num_heads=4, width=128, depth=4)


def variants_of(name: str, mixers: str, nano_hidden: int, **fields: Any) -> dict[str, dict[str, Any]]:
    """The sizes of a model: `NAME_nano` with this width inside the MLP, `NAME_170m` and on with Llama's."""
    nano = {f"{name}_nano": dict(NANO, mixers=mixers, mlp_hidden=nano_hidden, **fields)}
    return nano | {f"{name}_{size}": dict(given, mixers=mixers, **fields) for size, given in SIZES.items()}
