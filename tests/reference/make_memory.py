"""Writes the reference of the MLP memories: outputs of titans-pytorch in float64, with momentum and without.

    pip install -e '.[parity]' titans-pytorch==0.5.5
    python -m tests.reference.make_memory

Its `NeuralMemory` takes a memory without buffers, a loss of one token, one scalar of step, decay and momentum for each
token, and with `chunk_size=1` and `batch_size=b` gradients at the weights of every b-th token. Inputs and weights come
from `weights.py`, so that the file holds outputs only. Written with torch 2.15.0 and titans-pytorch 0.5.5.
"""

import json
from pathlib import Path

import numpy as np
import torch
from titans_pytorch import NeuralMemory

from tests.reference.weights import pseudo_normal

HERE = Path(__file__).parent
BATCH, TOKENS, WIDTH, HIDDEN = 2, 11, 6, 24
MAX_STEP, THRESHOLD = 0.3, 1.0
PARAMETERS = {
    "to_queries.weight": (WIDTH, WIDTH),
    "to_keys.weight": (WIDTH, WIDTH),
    "to_values.weight": (WIDTH, WIDTH),
    "to_adaptive_step.0.weight": (1, WIDTH),
    "to_adaptive_step.0.bias": (1,),
    "to_decay_factor.0.weight": (1, WIDTH),
    "to_decay_factor.0.bias": (1,),
    "to_momentum.0.weight": (1, WIDTH),
    "to_momentum.0.bias": (1,),
    "w1": (WIDTH, HIDDEN),
    "w2": (HIDDEN, WIDTH),
}
CASES = {
    "l2": dict(length=4, momentum=False),
    "lp": dict(length=4, momentum=False),
    "huber_norm": dict(length=3, momentum=False),
    "every_token": dict(length=1, momentum=False),
    "momentum": dict(length=4, momentum=True),
}


def values() -> dict[str, np.ndarray]:
    """The sequence and every parameter."""
    made = {name: pseudo_normal(f"memory/{name}", shape) / shape[-1] ** 0.5 for name, shape in PARAMETERS.items()}
    return made | {"sequence": pseudo_normal("memory/sequence", (BATCH, TOKENS, WIDTH))}


class Memory(torch.nn.Module):
    """x + LN(w1 gelu(w2 x))."""

    def __init__(self):
        super().__init__()
        self.w1 = torch.nn.Parameter(torch.zeros(WIDTH, HIDDEN))
        self.w2 = torch.nn.Parameter(torch.zeros(HIDDEN, WIDTH))

    def forward(self, x):
        hidden = torch.nn.functional.gelu(x @ self.w2.mT, approximate="tanh")
        return x + torch.nn.functional.layer_norm(hidden @ self.w1.mT, (WIDTH,), eps=1e-6)


def loss(name: str, output: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    residual = output - value
    if name == "lp":
        return ((residual.square() + 1e-6) ** 1.5).sum(-1)
    if name == "huber_norm":
        size = residual.norm(dim=-1)
        return torch.where(size <= THRESHOLD, size.square() / 2, THRESHOLD * (size - THRESHOLD / 2))
    return residual.square().sum(-1) / 2


def outputs(name: str, length: int, momentum: bool) -> np.ndarray:
    made = {key: torch.from_numpy(value) for key, value in values().items()}
    module = NeuralMemory(
        WIDTH,
        chunk_size=1,
        batch_size=length,
        model=Memory(),
        store_memory_loss_fn=lambda output, value: loss(name, output, value),
        default_step_transform_max_lr=MAX_STEP,
        momentum=momentum,
        pre_rmsnorm=False,
        mem_model_norm_add_residual=False,
    ).double()
    for key, parameter in module.named_parameters():
        # The initial memory is kept once for each head, in the order of the memory's own parameters.
        source = {"memory_model_parameters.0": "w1", "memory_model_parameters.1": "w2"}.get(key, key)
        source = source.removeprefix("memory_model.")
        parameter.data.copy_(made[source].reshape(parameter.shape))
    out, _ = module(made["sequence"])
    return out.detach().numpy()


def main() -> None:
    record = {name: outputs(name, **options) for name, options in CASES.items()}
    record["shapes"] = np.asarray(json.dumps(PARAMETERS))
    np.savez_compressed(HERE / "memory_titans.npz", **record)


if __name__ == "__main__":
    main()
