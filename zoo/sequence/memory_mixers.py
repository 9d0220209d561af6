"""Token mixers that learn at test time: Moneta, Yaad and Memora (Miras, Behrouz et al., arXiv:2504.13173).

No code of the authors is public: what the paper leaves open is a field with its options, see `kernels.memory` and
`MemoryMixer`.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Float

from kernels import memory
from kernels.memory import MLP, Matrix, MemoryRule
from kernels.rotary import rotary
from zoo.sequence.linear_mixers import carried, cleared
from zoo.sequence.mixers import Mixer, RMSNorm, Rows, split_heads, unit_norm

# Of the outer weights of a memory that begins as the identity: not 0, so that the inner ones have a gradient.
NEARLY_NOTHING = 0.01


class MemoryMixer(Mixer):
    """A memory per head that every token teaches and reads (section 5.4).

    Queries, keys and values are projected and convolved; queries and keys have unit norm and rotary positions; step
    size, retention and threshold come from the token by maps of low rank; the output is normalised per head and gated.

    The paper is silent on what follows, and these are the defaults: SiLU behind the convolutions and in the gate; the
    retention is `sigmoid(. + 4)`, the step `step_limit * sigmoid(. - 2)`, the threshold `softplus` of what begins at
    0.7 sqrt(channels of a head), about the error's norm in the beginning; each has tanh inside its map.

    The memory begins as M(x) = x, or nearly so: what it would say of a key that it was never taught drowns what it was
    taught. Recall did not begin to be learned from weights that filled its norm from the start. For the same reason the
    norm inside the memory has an epsilon that matters, the square of what counts as nothing.

    Attributes:
        memory: `"mlp"`, or `"matrix"` for the paper's ablation.
        expansion: width inside the MLP over that of a head.
        memory_epsilon: of the norm inside the MLP.
        memory_chunk: tokens whose gradients are taken at the same weights: another number is another model.
        gate_rank: of the maps to step, retention and threshold; the paper has 32 or 64.
        step_limit: largest inner step; None: 0.32 / memory_chunk, since the steps of a chunk add up.
        memory_rope: whether queries and keys are rotated; rope_base: of the rotary positions.
        read: whether a token reads `"after"` or `"before"` it writes.
        clear_every: see `zoo.sequence.linear_mixers.Recurrent`.
    """

    memory: str = "mlp"
    expansion: int = 4
    memory_epsilon: float = 1e-2
    memory_chunk: int = 16
    gate_rank: int = 32
    step_limit: float | None = None
    memory_rope: bool = True
    rope_base: float = 10000.0
    read: str = "after"
    clear_every: int = 0

    own_conv_width = 4

    @property
    def rule(self) -> MemoryRule:
        """The four choices."""
        raise NotImplementedError

    @property
    def module(self) -> MLP | Matrix:
        """The memory's architecture."""
        return Matrix() if self.memory == "matrix" else MLP(epsilon=self.memory_epsilon)

    def initial_scale(self, name: str) -> float:
        """Standard deviation of the initial memory's entries."""
        fan_in = self.head_dim * (self.expansion if name == "w1" else 1)
        return 1.0 if name == "w2" else NEARLY_NOTHING * fan_in**-0.5

    @property
    def initial_step(self) -> float:
        """What the sigmoid of the step sees in the beginning."""
        return -2.0

    @property
    def chunk(self) -> int:
        """Tokens of a chunk, of which none crosses a place where the memory is cleared."""
        return math.gcd(self.memory_chunk, self.clear_every) if self.clear_every else self.memory_chunk

    @property
    def segment_multiple(self) -> int:
        return self.memory_chunk

    def check(self) -> None:
        super().check()
        if self.memory not in ("mlp", "matrix"):
            raise ValueError(f"memory must be 'mlp' or 'matrix', got {self.memory!r}")
        for name in ("expansion", "memory_chunk", "gate_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.memory_epsilon <= 0:
            raise ValueError(f"memory_epsilon must be positive, got {self.memory_epsilon}")
        if self.step_limit is not None and self.step_limit <= 0:
            raise ValueError(f"step_limit must be positive, or None; got {self.step_limit}")
        assert self.rule

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], rows: Rows, state: Any = None) -> tuple[Float[Array, "B N C"], Any]:
        past, remembered, heads = state or {}, {}, {}
        for name in ("q", "k", "v"):
            y, remembered[f"{name}_conv"] = self.convolve(
                self.linear(self.width, name)(x), name, rows, past.get(f"{name}_conv")
            )
            heads[name] = split_heads(y if self.taps else jax.nn.silu(y), self.num_heads)
        query, key = unit_norm(heads["q"]), unit_norm(heads["k"])
        if self.memory_rope:
            query, key = (rotary(y, rows.positions, base=self.rope_base) for y in (query, key))
        limit = 0.32 / self.memory_chunk if self.step_limit is None else self.step_limit
        y, after = memory.miras(
            *(query, key, heads["v"], self._weights()),
            rule=self.rule,
            step=limit * jax.nn.sigmoid(self._gate(x, "step", self.width, self.initial_step)),
            log_retention=jax.nn.log_sigmoid(self._gate(x, "retention", self.width, 4.0)),
            threshold=self.threshold(x),
            chunk_size=self.chunk,
            form="chunk" if state is None else "recurrent",
            initial_state=carried(self, past.get("memory"), rows, len(x)),
            return_state=True,
            segments=cleared(rows, x.shape[:2], self.clear_every),
            # What `segment_multiple` demands of the data.
            aligned=True,
            implementation=self.implementation,
        )
        y = RMSNorm(dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(y).reshape(x.shape)
        y = y * jax.nn.silu(self.linear(self.width, "gate")(x))
        wanted = rows.max_length is not None or state is not None
        return self.linear(self.width, "out")(y), {"memory": after, **remembered} if wanted else None

    def threshold(self, x: Float[Array, "B N C"]) -> Float[Array, "B N H"] | Float[Array, "B N H D"] | None:
        """Where the loss turns from l2 to l1, for mixers that have such a place."""
        return None

    def _gate(self, x, name: str, features: int, begin: float):
        """A map of low rank to `features` numbers per token, about `begin` in the beginning, split into heads."""
        inner = jnp.tanh(self.linear(self.gate_rank, f"{name}_down")(x))
        up = self.linear(features, f"{name}_up", use_bias=True, bias_init=initializers.constant(begin))
        y = up(inner).astype(self.state_dtype)
        return split_heads(y, self.num_heads) if features == self.width else y

    def _shapes(self) -> dict[str, tuple[int, int, int]]:
        heads, d, hidden = self.num_heads, self.head_dim, self.expansion * self.head_dim
        if self.memory == "matrix":
            return {"w": (heads, d, d)}
        return {"w1": (heads, d, hidden), "w2": (heads, hidden, d)}

    def _weights(self):
        return {
            name: self.param(f"memory_{name}", initializers.normal(self.initial_scale(name)), shape, self.param_dtype)
            for name, shape in self._shapes().items()
        }

    def initial_state(self, batch: int, max_length: int) -> dict[str, Any]:
        convs = {f"{name}_conv": self.conv_state(batch, self.width) for name in ("q", "k", "v")}
        weights = {name: self.get_variable("params", f"memory_{name}") for name in self._shapes()}
        fresh = memory.initial_memory(weights, rule=self.rule, batch=batch, dtype=self.state_dtype)
        return {"memory": fresh, **convs}


class Moneta(MemoryMixer):
    """The l_p loss, l_q stability (section 5.3, equations 24 and 25).

    Attributes:
        p: of the loss; q: of the stability.
        max_error: `max_norm` of `kernels.memory.moneta`.
        link, normalizer: see there.
            The printed link makes a matrix the larger the smaller its state is, and can therefore not begin at nothing;
            where it was tried, with a million parameters, the gradients of training exploded. With
            `link="identity"`, the l_p loss and decay alone, it trained.
    """

    p: float = 3.0
    q: float = 4.0
    max_error: float | None = None
    link: str = "paper"
    normalizer: str = "chunk"

    @property
    def initial_step(self) -> float:
        # Unbounded, the gradient of |r|^3 is an order of magnitude larger than that of r^2 / 2 where |r| is 2 or 3.
        return -4.0 if self.max_error is None else super().initial_step

    @property
    def rule(self) -> MemoryRule:
        return memory.moneta(
            memory=self.module,
            p=self.p,
            q=self.q,
            link=self.link,
            normalizer=self.normalizer,
            max_norm=self.max_error,
            read=self.read,
        )

    def initial_scale(self, name: str) -> float:
        if self.link == "identity":
            return super().initial_scale(name)
        # The expected l_q norm of a head's matrix is then about 1, for which the link leaves it as it is; normal
        # numbers have a fourth moment of 3.
        entries = self.head_dim**2 * (1 if name == "w" else self.expansion)
        return (3 * entries) ** -0.25


class Yaad(MemoryMixer):
    """A Huber loss whose threshold each token sets, and decay (section 5.3, equation 26).

    Attributes:
        huber: `"norm"`, `"coord"` or `"switch"`, see `kernels.memory.yaad`.
    """

    huber: str = "norm"

    @property
    def rule(self) -> MemoryRule:
        return memory.yaad(memory=self.module, huber=self.huber, read=self.read)

    def threshold(self, x):
        begin = 0.7 if self.huber == "coord" else 0.7 * self.head_dim**0.5
        features = self.width if self.huber == "coord" else self.num_heads
        # softplus(y) = begin
        return jax.nn.softplus(self._gate(x, "threshold", features, math.log(math.expm1(begin))))


class Memora(MemoryMixer):
    """The l2 loss, and weights that stay on a simplex (section 5.3, equation 27).

    Attributes:
        slices, interior: see `kernels.memory.memora`.
    """

    slices: str = "fan_in"
    interior: str = "dual"

    @property
    def rule(self) -> MemoryRule:
        return memory.memora(memory=self.module, slices=self.slices, interior=self.interior, read=self.read)

    def initial_scale(self, name: str) -> float:
        return 1.0
