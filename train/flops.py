"""How much of the devices' arithmetic a training run uses."""

from typing import Any

import jax

from kernels.cost import cost
from kernels.devices import peak
from train.program import Program


def training_flops(program: Program, batch: dict[str, Any], platform: str | None = None) -> int:
    """Matrix operations that training on one image or token takes: three times those of the forward pass.

    What is computed again in the backward pass (`remat`) does not count, as usual for MFU.
    `platform` is the one that the program is for; None: jax's own.

    Source: Chowdhery et al. (PaLM), arXiv 2204.02311, appendix B.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    prepared = jax.eval_shape(program.task.prepare, batch, key)
    variables = program.abstract_state.training_variables()

    def forward(variables, batch, key):
        return program.task.loss(program.model, variables, batch, key)[0]

    counted = cost(forward, variables, prepared, key, platform=platform or jax.default_backend())
    return 3 * counted.matmul_flops // examples(batch)


def unit(batch: dict[str, Any]) -> str:
    """What a batch is counted in."""
    return "tokens" if "tokens" in batch else "images"


def examples(batch: dict[str, Any]) -> int:
    """How many of these a batch holds."""
    return batch["tokens"].size if "tokens" in batch else len(batch["label"])


def mfu(flops_per_second: float) -> dict[str, float]:
    """Model FLOPs utilization: the share of all devices' bfloat16 peak, `{}` where that is not known."""
    limit = peak(jax.devices()[0].device_kind)
    return {} if limit is None else {"mfu": flops_per_second / (limit.flops * jax.device_count())}
