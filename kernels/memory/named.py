"""The paper's own members of the family: Moneta, Yaad and Memora."""

from kernels.memory.bias import Huber, LpError
from kernels.memory.retention import Decay, Entropy, LqStability
from kernels.memory.rule import Memory, MemoryRule


def moneta(
    *,
    memory: Memory | str = "mlp",
    p: float = 3.0,
    q: float = 4.0,
    link: str = "paper",
    normalizer: str = "chunk",
    smooth: str = "root",
    max_norm: float | None = None,
    read: str = "after",
) -> MemoryRule:
    """Moneta: the l_p loss and l_q stability. `log_retention` optional, no threshold.

    The paper (equations 24 and 25) leaves open, and decided here is: the link from A to W, whose printed form lacks
    the elementwise power of the derivation (`link="paper"`; `"dual"` is the exact one, `"identity"` none); the norm
    that reads inside a chunk divide by (`normalizer="chunk"`, its start's, or `"token"`, slower); how the sign is
    smoothed (`smooth="root"`, or `"tanh"`); whether errors are bounded (`max_norm`, see `LpError`); whether a token
    reads what it has just written (`read="after"`, or `"before"`). Printed twice in equation 25, the step acts once.
    Learned are the A_0, which should have an l_4 norm of about 1, as normal ones of variance 1 / fan-in have; the
    effective step goes with that norm.
    """
    return MemoryRule(memory, LpError(p, smooth, max_norm=max_norm), LqStability(q, link, normalizer), read=read)


def yaad(*, memory: Memory | str = "mlp", huber: str = "norm", read: str = "after") -> MemoryRule:
    """Yaad: a Huber loss with a threshold of each token's own, and decay. `log_retention` and `threshold` required.

    The paper (equation 26) prints the `"switch"`, whose error jumps at the threshold and which did not train where it
    was tried; the default is the continuous `huber="norm"`, one threshold per token and head, and the other sound
    choice `"coord"`, where thresholds may differ between channels. A token reads `"after"` its write, or `"before"`.

    The step has to be small, and goes about as 1 / chunk_size, since the steps of a chunk, all taken at its start, add
    up: a step of .18 at chunk 16 stalled where .02 times a sigmoid trained.
    """
    return MemoryRule(memory, Huber(huber), Decay(), read=read)


def memora(
    *,
    memory: Memory | str = "mlp",
    slices: str = "fan_in",
    total: float | None = None,
    interior: str = "dual",
    read: str = "after",
) -> MemoryRule:
    """Memora: the l2 loss, and divergence and entropy on the simplex. `log_retention` optional, no threshold.

    The paper (equations 21 and 27) leaves open what sums to c, and how much that is: `slices="fan_in"` (the inputs of
    each output unit; or `"channel"`, `"matrix"`), `total=None` (a mean weight of 1; or any number). Where a slice lies
    along the channels of the retention, their mean acts. `interior="dual"` is exact and writes the weights of every
    token of a chunk down; `"linear"` is the paper's way inside a chunk, approximate and several times faster. Learned
    are logits, which must be random: with all alike no token can tell the hidden units apart.
    """
    return MemoryRule(memory, "l2", Entropy(slices, total, interior), read=read)
