"""What the Routing Transformer's reference and its tests share: sizes, weights, tokens."""

import numpy as np

from tests.reference.weights import pseudo_normal

VOCABULARY, LENGTH, BATCH = 64, 64, 2

# Constructor arguments of lucidrains' language model, and the fields of ours that mean the same.
MODELS = {
    "causal": (
        dict(dim=64, depth=1, heads=2, dim_head=32, causal=True, window_size=16, n_local_attn_heads=1),
        dict(width=64, depth=1, num_heads=2, head_dim=32, causal=True, window=16, local_heads=1),
    ),
    "encoder": (
        dict(
            dim=48,
            depth=2,
            heads=3,
            dim_head=16,
            causal=False,
            window_size=8,
            local_attn_window_size=16,
            n_local_attn_heads=(1, 3),
            ff_glu=True,
            emb_dim=32,
        ),
        dict(
            width=48,
            depth=2,
            num_heads=3,
            head_dim=16,
            causal=False,
            window=8,
            block=16,
            local_heads=(1, 3),
            gated=True,
            embedding_width=32,
        ),
    ),
    "reversible": (
        dict(
            dim=32,
            depth=2,
            heads=2,
            dim_head=16,
            causal=True,
            shared_qk=False,
            num_mem_kv=2,
            window_size=16,
            n_local_attn_heads=(0, 1),
            reversible=True,
            use_scale_norm=True,
            tie_embedding=True,
        ),
        dict(
            width=32,
            depth=2,
            num_heads=2,
            head_dim=16,
            causal=True,
            share_qk=False,
            memories=2,
            window=16,
            local_heads=(0, 1),
            reversible=True,
            norm="scale",
            tie_embeddings=True,
        ),
    ),
}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of a parameter or buffer, float32, from its name and shape alone."""
    normal = pseudo_normal(name, shape)
    if name.endswith("kmeans.means"):
        return (normal / np.linalg.norm(normal, axis=-1, keepdims=True)).astype(np.float32)
    if "norm." in name:
        return (float(name.endswith(("weight", ".g"))) + 0.1 * normal).astype(np.float32)
    if name.endswith("bias"):
        return (0.1 * normal).astype(np.float32)
    # Tokens of unit variance: the norms would hide the embedding otherwise.
    fan_in = 1 if name.startswith("token_emb") or "mem_" in name else shape[-1]
    return (normal / np.sqrt(fan_in)).astype(np.float32)


def tokens() -> np.ndarray:
    """`(BATCH, LENGTH)` int32."""
    return (np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) * 29 % 61 % VOCABULARY).astype(np.int32)
