"""Writes the references of Flow-Attention and norm-aware linear attention: outputs of the published torch modules.

    git clone https://github.com/thuml/Flowformer
    git clone https://github.com/ZacharyMeng/NaLaFormer
    pip install torch timm
    PYTHONPATH=Flowformer:NaLaFormer/NaLaformer python -m tests.reference.make_flow

Operands come from `linear_operands.py` and `weights.py`, so the file holds outputs only, and of the modules only the
attention is left: projections hand on what they get, and what follows the attention does nothing. Written with torch
2.13.0, Flowformer of commit 61f5d8c and NaLaFormer of commit 1f1c10a.
"""

from pathlib import Path

import numpy as np
import torch
from Flow_Attention import Flow_Attention, Flow_Attention_Causal
from NALA import NormAwareLinearAttn, RoPE

from tests.reference.linear_operands import BATCH, CHANNELS, HEADS, TOKENS, linear_operands
from tests.reference.weights import pseudo_normal

HERE = Path(__file__).parent
SINKS = 40
GRID = (7, 10)


class Given(torch.nn.Module):
    """In place of a projection: what was given, whatever comes in."""

    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, x):
        return self.result


def flow(module, query, key, value):
    attention = module(CHANNELS * HEADS, CHANNELS * HEADS, CHANNELS * HEADS, HEADS, drop_out=0.0)
    for name in ("query_projection", "key_projection", "value_projection", "out_projection"):
        setattr(attention, name, torch.nn.Identity())
    out = attention(*(x.flatten(2) for x in (query, key, value)))
    return out.unflatten(2, (HEADS, -1)).numpy()


def norm_aware(query, key, value, *, rotate):
    width = CHANNELS * HEADS
    attention = NormAwareLinearAttn(width, HEADS)
    gate = torch.ones(BATCH, TOKENS, width)
    attention.qkvg = Given(torch.cat((query.flatten(2), key.flatten(2), value.flatten(2), gate), -1))
    attention.lepe = Given(torch.zeros(BATCH, width, *GRID))
    attention.ln = attention.act = attention.out_proj = torch.nn.Identity()
    sin, cos = RoPE(width, HEADS)(GRID)
    if not rotate:
        sin, cos = torch.zeros_like(sin), torch.ones_like(cos)
    out = attention(torch.zeros(BATCH, width, *GRID), sin, cos)
    return out.flatten(2).transpose(1, 2).unflatten(2, (HEADS, -1)).numpy()


@torch.no_grad()
def main():
    operands = {name: torch.from_numpy(x).float() for name, x in linear_operands().items()}
    query, key, value = (operands[name] for name in ("query", "key", "value"))
    wide = torch.from_numpy(pseudo_normal("norm_aware_value", key.shape)).float()
    np.savez_compressed(
        HERE / "flow.npz",
        **{
            "flow/self": flow(Flow_Attention, query, key, value),
            "flow/cross": flow(Flow_Attention, query[:, :SINKS], key, value),
            "flow/causal": flow(Flow_Attention_Causal, query, key, value),
            "norm_aware/plain": norm_aware(query, key, wide, rotate=False),
            "norm_aware/rotated": norm_aware(query, key, wide, rotate=True),
        },
    )


if __name__ == "__main__":
    main()
