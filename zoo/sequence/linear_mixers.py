"""Token mixers with a state of fixed size: linear attention and its gated and delta-rule relatives.

They differ in how they project, decay and write; what they share (heads, convolutions, norm, gate, state) is in
`Recurrent`, so that a comparison of two is one of these.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import decay
from kernels.delta import delta_rule
from kernels.gated_linear import gated_linear_attention
from kernels.linear import FEATURE_MAPS
from kernels.rotary import rotary
from zoo.sequence.mixers import Mixer, RMSNorm, Rows, split_heads, unit_norm


class Recurrent(Mixer):
    """Heads that keep a matrix: projections, `mix`, a norm per head, a gate, the output projection.

    Attributes:
        key_ratio, value_ratio: widths of all heads' keys and values over the width of the model.
        chunk_size: tokens that are computed at once; does not change what is computed.
        gated: whether the output is multiplied by a gate computed from the input; None: as the mixer's paper has it.
        clear_every: tokens after which the memory is emptied, to see what it is worth; 0: never.
    """

    key_ratio: float = 1.0
    value_ratio: float = 1.0
    chunk_size: int = 64
    gated: bool | None = None
    clear_every: int = 0

    # As the paper has it: the gate, and its activation.
    own_gate = True
    gate_activation = staticmethod(jax.nn.silu)

    def check(self) -> None:
        super().check()
        for name in ("key", "value"):
            width = getattr(self, f"{name}_width")
            if width < 1 or width % self.num_heads:
                raise ValueError(
                    f"{name}_ratio {getattr(self, f'{name}_ratio')} of width {self.width} is {width} channels, which "
                    f"num_heads {self.num_heads} must divide"
                )
        if self.chunk_size < 1 or self.clear_every < 0:
            raise ValueError(
                f"chunk_size must be at least 1 and clear_every at least 0, got {self.chunk_size} and "
                f"{self.clear_every}"
            )

    @property
    def key_width(self) -> int:
        """Channels of the keys of all heads."""
        return round(self.key_ratio * self.width)

    @property
    def value_width(self) -> int:
        """Channels of the values of all heads."""
        return round(self.value_ratio * self.width)

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], rows: Rows, state: Any = None) -> tuple[Float[Array, "B N C"], Any]:
        past, remembered, heads = state or {}, {}, {}
        for name, width in self.projections().items():
            y = self.linear(width, name)(x)
            y, remembered[f"{name}_conv"] = self.convolve(y, name, rows, past.get(f"{name}_conv"))
            heads[name] = split_heads(y, self.num_heads)
        options = dict(
            chunk_size=self.chunk_size,
            form="chunk" if state is None else "recurrent",
            initial_state=carried(self, past.get("memory"), rows, len(x)),
            return_state=True,
            segments=cleared(rows, x.shape[:2], self.clear_every),
            implementation=self.implementation,
        )
        y, memory = self.mix(x, heads, rows, options)
        y = RMSNorm(dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(y)
        y = y.reshape(*x.shape[:-1], -1)
        if self.own_gate if self.gated is None else self.gated:
            y = y * self.gate_activation(self.linear(self.value_width, "gate")(x))
        wanted = rows.max_length is not None or state is not None
        return self.linear(self.width, "out")(y), {"memory": memory, **remembered} if wanted else None

    def projections(self) -> dict[str, int]:
        """The widths of what is projected, convolved and split into heads."""
        return {"q": self.key_width, "k": self.key_width, "v": self.value_width}

    def mix(self, x: Float[Array, "B N C"], heads: dict[str, Any], rows: Rows, options: dict[str, Any]) -> Any:
        """From the heads' projections to the output `(B, N, H, E)` and the memory."""
        raise NotImplementedError

    def initial_state(self, batch: int, max_length: int) -> dict[str, Any]:
        shape = (batch, self.num_heads, self.key_width // self.num_heads, self.value_width // self.num_heads)
        convs = {f"{name}_conv": self.conv_state(batch, width) for name, width in self.projections().items()}
        return {"memory": jnp.zeros(shape, self.state_dtype), **convs}


def cleared(rows: Rows, shape: tuple[int, int], every: int) -> Int[Array, "B N"] | None:
    """The segments of the rows, cut after every so many tokens of a document; as they are for 0."""
    if not every:
        return rows.segments
    spans = jnp.broadcast_to(rows.positions // every, shape)
    if rows.segments is None:
        return spans
    return rows.segments * (shape[1] // every + 1) + spans


def carried(mixer: Mixer, memory: Any, rows: Rows, batch: int) -> Any:
    """The memory that the next token finds, empty where it is the first after a clearing."""
    if memory is None or not mixer.clear_every:
        return memory
    empties = rows.positions[0] % mixer.clear_every == 0
    fresh = mixer.initial_state(batch, 1)["memory"]
    return jax.tree.map(lambda empty, full: jnp.where(empties, empty, full), fresh, memory)


class LinearAttention(Recurrent):
    """Linear attention that forgets nothing; the norm per head takes the place of the normaliser.

    Attributes:
        feature_map: of queries and keys, see `kernels.linear`.

    Source: Katharopoulos et al. (arXiv:2006.16236); the norm is that of Qin et al. (arXiv:2210.10340).
    """

    feature_map: str = "elu1"

    def mix(self, x, heads, rows, options):
        phi = FEATURE_MAPS[self.feature_map]
        query, key = phi(heads["q"]), phi(heads["k"])
        return gated_linear_attention(query, key, heads["v"], **options)


class Retention(Recurrent):
    """RetNet: a decay fixed per head, rotary positions on queries and keys.

    Attributes:
        rope_base: of the rotary positions.

    Source: Sun et al. (arXiv:2307.08621), section 2, with the norm per head that makes its own scalings immaterial.
    """

    rope_base: float = 10000.0

    def mix(self, x, heads, rows, options):
        query, key = (rotary(heads[name], rows.positions, base=self.rope_base) for name in ("q", "k"))
        return gated_linear_attention(query, key, heads["v"], decay.retnet(self.num_heads), **options)


class Lightning(Recurrent):
    """TransNormerLLM's attention: SiLU on queries, keys and values, a decay fixed per head and layer.

    The first block also has rotary positions, the others the decay alone.

    Attributes:
        slopes: whose decays: `"lightning"` (the published code), `"transnormer"` (the paper's formula) or `"fla"`.
        rope_base: of the first block's rotary positions.

    Source: Qin et al. (arXiv:2307.14995, section 3; arXiv:2405.17381, section 4).
    """

    slopes: str = "lightning"
    rope_base: float = 10000.0

    gate_activation = staticmethod(jax.nn.sigmoid)

    def mix(self, x, heads, rows, options):
        query, key, value = (jax.nn.silu(heads[name]) for name in ("q", "k", "v"))
        if self.layer == 0:
            query, key = (rotary(y, rows.positions, base=self.rope_base) for y in (query, key))
        log_decay = getattr(decay, self.slopes)(self.num_heads, self.layer, self.depth)
        return gated_linear_attention(query, key, value, log_decay, scale=1.0, **options)


class GatedLinearAttention(Recurrent):
    """GLA: every key channel is forgotten at a rate of its own, computed from the token.

    Attributes:
        gate_rank: of the map to the rates; gate_divisor: what their logarithms are divided by.

    Source: Yang et al. (arXiv:2312.06635), section 4.
    """

    gate_rank: int = 16
    gate_divisor: float = 16.0

    def mix(self, x, heads, rows, options):
        rates = self.linear(self.key_width, "decay_up", use_bias=True)(self.linear(self.gate_rank, "decay_down")(x))
        log_decay = jax.nn.log_sigmoid(rates.astype(self.state_dtype)) / self.gate_divisor
        return gated_linear_attention(
            heads["q"], heads["k"], heads["v"], split_heads(log_decay, self.num_heads), **options
        )


class HGRN2(Recurrent):
    """HGRN-2: forget gates above a bound that grows with depth, keys that are what the gates leave.

    The bound is that of `bounds`, which the model owns; there is no gate on the output.

    Source: Qin et al. (arXiv:2404.07904), section 3.
    """

    own_gate = False

    def projections(self) -> dict[str, int]:
        return {"q": self.key_width, "f": self.key_width, "v": self.value_width}

    def mix(self, x, heads, rows, options):
        logits = heads["f"].astype(self.state_dtype)
        log_decay = jax.nn.log_sigmoid(logits)
        key = jax.nn.sigmoid(-logits)
        if self.layer:
            bound = split_heads(rows.bounds[self.layer].astype(self.state_dtype), self.num_heads)
            log_decay = jnp.logaddexp(jnp.log(bound), jnp.log1p(-bound) + log_decay)
            key = (1 - bound) * key
        query = jax.nn.silu(heads["q"])
        return gated_linear_attention(query, key.astype(query.dtype), heads["v"], log_decay, **options)


def forget_bounds(table: Float[Array, "layers C"]) -> Float[Array, "layers C"]:
    """HGRN-2's lower bounds of the forget gates: 0 in the first layer, growing from layer to layer, below 1."""
    shares = jax.nn.softmax(table, axis=0)
    return jnp.cumsum(shares, axis=0) - shares[0]


class DeltaNet(Recurrent):
    """The delta rule: a token's value takes the place of what its key recalls.

    Attributes:
        negative_eigenvalues: writes with a strength of up to 2, which turns what a key recalls around.

    Source: Yang et al. (arXiv:2406.06484), section 3.
    """

    negative_eigenvalues: bool = False

    own_conv_width = 4
    own_gate = False

    def mix(self, x, heads, rows, options):
        return self.write(x, heads, None, options)

    def write(self, x, heads, log_decay, options):
        """The delta rule with unit keys and queries."""
        strength = jax.nn.sigmoid(self.linear(self.num_heads, "strength")(x).astype(self.state_dtype))
        if self.negative_eigenvalues:
            strength = 2 * strength
        query, key, value = (heads[name] if self.taps else jax.nn.silu(heads[name]) for name in ("q", "k", "v"))
        return delta_rule(unit_norm(query), unit_norm(key), value, strength, log_decay, **options)


def decay_rate_init(key, shape, dtype=jnp.float32):
    """The logarithm of a rate drawn from U(0, 16)."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1e-3, 16.0))


def time_step_init(key, shape, dtype=jnp.float32):
    """softplus's inverse of a time step drawn log-uniformly from [1e-3, 0.1]."""
    step = jnp.exp(jax.random.uniform(key, shape, dtype, jnp.log(1e-3), jnp.log(0.1)))
    return step + jnp.log(-jnp.expm1(-jnp.maximum(step, 1e-4)))


class GatedDeltaNet(DeltaNet):
    """The delta rule on a memory that decays by a share computed from the token.

    Source: Yang et al. (arXiv:2412.06464), section 3; the decay's parametrisation is Mamba-2's (arXiv:2405.21060).
    """

    own_gate = True

    def mix(self, x, heads, rows, options):
        steps = self.linear(self.num_heads, "time_step")(x).astype(self.state_dtype)
        shift = self.param("time_step_bias", time_step_init, (self.num_heads,), self.param_dtype)
        rate = self.param("decay_rate", decay_rate_init, (self.num_heads,), self.param_dtype)
        log_decay = -jnp.exp(rate) * jax.nn.softplus(steps + shift)
        return self.write(x, heads, log_decay, options)
