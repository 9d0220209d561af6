"""Writes `routing_transformer.npz`: lucidrains' language model in float64, its weights given by `routing.py`.

    pip install routing-transformer==1.6.1 local-attention==1.11.2 torch
    python -m tests.reference.make_routing_transformer

Older versions of local-attention have a learned table where this one rotates. The flag `initted` is set, or the
first forward pass would draw the centroids anew. Written with torch 2.13.0.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from routing_transformer import RoutingTransformerLM
from routing_transformer.routing_transformer import Kmeans, find_modules

from tests.reference import routing
from tests.reference.weights import pseudo_normal, sample

OUTPUT_SAMPLES, GRADIENT_SAMPLES = 256, 32


def build(options: dict) -> tuple[torch.nn.Module, dict[str, list[int]]]:
    """The model with its weights, and the shapes of all that a checkpoint holds."""
    model = RoutingTransformerLM(
        num_tokens=routing.VOCABULARY, max_seq_len=routing.LENGTH, _register_kmeans_update=False, **options
    ).double()
    for name, tensor in model.state_dict().items():
        # A tied embedding goes by two names; the last one would win.
        named = "token_emb.weight" if name == "out.tensor" else name
        if tensor.dtype == torch.bool:
            tensor.fill_(True)
        elif math.prod(tensor.shape) and not name.endswith(("inv_freq", "sinu_pos_emb.emb")):
            tensor.copy_(torch.from_numpy(routing.weight(named, tuple(tensor.shape))))
    return model, {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def record(options: dict) -> dict[str, np.ndarray]:
    """What one model gives."""
    model, shapes = build(options)
    # All dropout rates are 0, so that training differs by the centroids only, and these move when they are told to.
    # Reversible layers have no gradient otherwise.
    model.train()
    tokens = torch.from_numpy(routing.tokens()).long()
    logits, loss = model(tokens)
    direction = torch.from_numpy(pseudo_normal("direction", tuple(logits.shape)))
    (logits * direction).sum().backward()
    out = logits.detach().numpy()
    entries = {
        "shapes": np.asarray(json.dumps(shapes)),
        "logits": sample("logits", out, OUTPUT_SAMPLES).astype(np.float32),
        "mean_rms": np.asarray([out.mean(), np.sqrt(np.square(out).mean())]),
        "loss": loss.detach().numpy(),
    }
    # A parameter that nothing reads has no gradient.
    gradients = {n: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for n, p in model.named_parameters()}
    entries["gradient_norms"] = np.asarray([np.linalg.norm(gradients[name]) for name in sorted(gradients)])
    for name, gradient in gradients.items():
        if gradient.size:
            entries[f"gradient/{name}"] = sample(name, gradient, GRADIENT_SAMPLES).astype(np.float32)

    model.update_kmeans()
    for layer, kmeans in enumerate(find_modules(model, Kmeans)):
        entries[f"means/{layer}"] = kmeans.means.numpy().astype(np.float32)
    return entries


def main() -> None:
    entries = {}
    for name, (options, _) in routing.MODELS.items():
        entries |= {f"{name}/{key}": value for key, value in record(options).items()}
    np.savez_compressed(Path(__file__).with_name("routing_transformer.npz"), **entries)


if __name__ == "__main__":
    main()
