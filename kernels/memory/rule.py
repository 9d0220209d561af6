"""A memory as four choices: architecture, attentional bias, retention gate, learning algorithm."""

import dataclasses

from kernels.memory.bias import BIASES, DotProduct, Huber, LpError, ShiftRobust, SquaredError
from kernels.memory.modules import MEMORIES, MLP, Matrix, Vector
from kernels.memory.options import by_name, check_name
from kernels.memory.proximal import ElasticNet, ElasticNetFTRL, FDivergence
from kernels.memory.retention import Bregman, Decay, Entropy, LqStability, NoRetention, Retention

RETENTIONS = {
    "none": NoRetention,
    "decay": Decay,
    "kl": Entropy,
    "f_divergence": FDivergence,
    "elastic_net": ElasticNet,
    "elastic_net_ftrl": ElasticNetFTRL,
    "lq": LqStability,
    "bregman": Bregman,
}
Memory = Vector | Matrix | MLP
Bias = DotProduct | SquaredError | LpError | Huber | ShiftRobust


@dataclasses.dataclass(frozen=True)
class MemoryRule:
    """What `kernels.memory.miras` learns with: the four choices of Miras, each a name or an instance with options.

    Attributes:
        memory: `"vector"`, `"matrix"`, `"mlp"`; see `kernels.memory.modules`.
        bias: `"dot"`, `"l2"`, `"lp"`, `"l1"`, `"huber_norm"`, `"huber_coord"`, `"huber_switch"`, `"shift_robust"`;
            see `kernels.memory.bias`.
        retention: `"none"`, `"decay"`, `"kl"`, `"f_divergence"`, `"elastic_net"`, `"elastic_net_ftrl"`, `"lq"`,
            `"bregman"`; see `kernels.memory.retention` and `kernels.memory.proximal`.
        algorithm: `"gradient"`, or `"momentum"`: S_t = mu_t S_{t-1} - step_t gradient_t and
            state_t = alpha_t state_{t-1} + S_t, as in Titans, for gates with an additive update.
        read: a token reads the memory `"after"` it has written, or `"before"`.

    Raises:
        ValueError: for an unknown name, or choices that do not go together.

    Source: Miras (arXiv:2504.13173), sections 3 to 5; momentum as in Titans (arXiv:2501.00663), section 3.1.
    """

    memory: Memory | str = "mlp"
    bias: Bias | str = "l2"
    retention: Retention | str = "decay"
    algorithm: str = "gradient"
    read: str = "after"

    def __post_init__(self):
        for name, table, kinds in (
            ("memory", MEMORIES, (Vector, Matrix, MLP)),
            ("bias", BIASES, (DotProduct, SquaredError, LpError, Huber, ShiftRobust)),
            ("retention", RETENTIONS, (Retention,)),
        ):
            object.__setattr__(self, name, by_name(name, getattr(self, name), table, kinds))
        check_name("algorithm", self.algorithm, ("gradient", "momentum"))
        check_name("read", self.read, ("after", "before"))
        gate = self.retention
        if self.algorithm == "momentum" and not (gate.additive and not gate.lags):
            raise ValueError(
                f"algorithm 'momentum' needs a retention whose update is linear in its state, which {gate} is not; "
                "take algorithm='gradient', or another retention such as 'decay'"
            )
        if gate.lags and self.read == "before":
            raise ValueError("retention Entropy(interior='linear') has read='after' only; take interior='dual'")
        slices = getattr(gate, "slices", "fan_in")
        if isinstance(self.memory, Vector) and slices != "fan_in":
            raise ValueError(f"memory 'vector' is one slice: slices must be 'fan_in', got {slices!r}")
