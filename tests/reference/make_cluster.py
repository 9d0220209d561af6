"""Writes the routing attention references: outputs of lucidrains' modules in float64.

    pip install -e '.[parity]' routing-transformer==1.6.1 local-attention==1.11.2
    python -m tests.reference.make_cluster

Inputs come from `weights.py` by name, so the file holds what came out: attention with and without causal masks, shared
queries, memories, padding and a context; one round and the initial rounds of k-means; local attention with its rotary
positions, and those of routing heads. Written with torch 2.13.0; older versions of local-attention have learned
relative positions in place of the rotary ones.
"""

import inspect
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from local_attention import LocalAttention
from routing_transformer.routing_transformer import (
    FixedPositionalEmbedding,
    Kmeans,
    KmeansAttention,
    apply_rotary_pos_emb,
)

from tests.reference.weights import pseudo_normal

BATCH, HEADS, TOKENS, CONTEXT, DIM, CLUSTERS, WINDOW = 2, 2, 18, 11, 4, 3, 5
# Arguments of KmeansAttention; "context" is read by this file.
ATTENTION = {
    "causal_shared": dict(causal=True, shared_qk=True),
    "causal_shared_memory": dict(causal=True, shared_qk=True, num_mem_kv=2),
    "causal_unshared": dict(causal=True, num_mem_kv=2),
    "shared": dict(shared_qk=True),
    "unshared": dict(),
    "context": dict(receives_context=True, context_window_size=5),
}
LOCAL = {
    "causal": dict(causal=True),
    "causal_far": dict(causal=True, look_backward=2),
    "around": dict(causal=False),
}
ROUNDS = 10


def normal(name: str, *shape: int) -> torch.Tensor:
    return torch.from_numpy(pseudo_normal(name, shape))


def padding(name: str, tokens: int) -> torch.Tensor:
    """True for some 4 in 5 tokens."""
    return normal(f"{name}_mask", BATCH, tokens) > -0.85


def attention(options: dict, masked: bool) -> tuple[np.ndarray, float]:
    cross = options.get("receives_context", False)
    module = KmeansAttention(CLUSTERS, WINDOW, HEADS, DIM, **options).double().eval()
    module.kmeans.initted.fill_(True)
    means = normal("means", HEADS, CLUSTERS, DIM)
    module.kmeans.means = torch.nn.functional.normalize(means, dim=-1)
    slots = module.num_mem_kv
    if slots:
        module.mem_key.data = normal("memory_key", HEADS, CLUSTERS, slots, DIM)
        module.mem_value.data = normal("memory_value", HEADS, CLUSTERS, slots, DIM)
    keys = CONTEXT if cross else TOKENS
    query, key = normal("query", BATCH, HEADS, TOKENS, DIM), normal("key", BATCH, HEADS, keys, DIM)
    if options.get("shared_qk"):
        key = query
    masks = {}
    if masked:
        masks = dict(key_mask=padding("key", keys)) if cross else dict(query_mask=padding("key", TOKENS))
    out, loss = module(query, key, normal("value", BATCH, HEADS, keys, DIM), **masks)
    return out.detach().numpy(), float(loss)


def kmeans() -> dict[str, np.ndarray]:
    tokens = normal("tokens", BATCH, HEADS, TOKENS, DIM)
    module = Kmeans(HEADS, DIM, CLUSTERS, ema_decay=0.9, commitment=1.0).double().train()
    module.means = normal("means", HEADS, CLUSTERS, DIM)
    # Between two others, the last one is never nearest and gets no token.
    module.means[:, -1] = module.means[:, :2].mean(1)
    module.initted.fill_(True)
    record = {"kmeans/before": module.means.numpy().copy()}
    _, loss = module(tokens, True)
    module.update()
    record |= {"kmeans/after": module.means.numpy().copy(), "kmeans/loss": np.float64(loss)}

    module = Kmeans(HEADS, DIM, CLUSTERS).double()
    start = torch.tensor([3, 30, 17])
    with mock.patch.object(torch, "randperm", lambda count, device: start):
        module.init(tokens)
    return record | {"kmeans/start": start.numpy(), "kmeans/initial": module.means.numpy()}


def main() -> None:
    torch.set_grad_enabled(False)
    arrays = kmeans()
    for name, options in ATTENTION.items():
        for masked in (False, True):
            out, loss = attention(options, masked)
            key = f"attention/{name}" + ("_masked" if masked else "")
            arrays |= {f"{key}/out": out, f"{key}/loss": np.float64(loss)}
    operands = [normal(name, BATCH * HEADS, TOKENS, DIM) for name in ("query", "key", "value")]
    for name, options in LOCAL.items():
        module = LocalAttention(window_size=6, dim=DIM, **options).double()
        arrays[f"local/{name}/out"] = module(*operands).numpy()
    table = FixedPositionalEmbedding(DIM, TOKENS).double()(operands[0])
    operands = [x.reshape(BATCH, HEADS, TOKENS, DIM) for x in operands]
    for name, rotated in zip(("query", "key", "value"), apply_rotary_pos_emb(*operands, table)):
        arrays[f"rotary/{name}"] = rotated.numpy()
    path = Path(__file__).parent / "cluster.npz"
    np.savez_compressed(path, **arrays)
    print(inspect.getfile(KmeansAttention).rpartition("/")[2], path.name, path.stat().st_size, *sorted(arrays))


if __name__ == "__main__":
    main()
