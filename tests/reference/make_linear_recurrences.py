"""Writes the references of linear recurrences: outputs and last states of other projects' plain torch code.

    pip install torch einops triton fla-core==0.6.0 lightning-attn==0.0.5
    python -m tests.reference.make_linear_recurrences

Operands come from `weights.py`, so the file holds outputs only. None of this code needs a GPU, but all of it wants
triton to be importable. Written with torch 2.13.0 and triton 3.9.0.
"""

from pathlib import Path

import numpy as np
import torch
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.lightning_attn import chunk
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
from fla.ops.retention.naive import naive_retention
from fla.ops.simple_gla.naive import naive_recurrent_simple_gla
from lightning_attn.ops.torch.linear_attention import linear_attn
from lightning_attn.utils import _build_slope_tensor

from tests.reference.linear_operands import BATCH, FLA_LAYERS, HEADS, LIGHTNING_HEADS, linear_operands

HERE = Path(__file__).parent


def heads_first(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: tensor.transpose(1, 2) for name, tensor in tensors.items()}


def main():
    operands = {name: torch.from_numpy(x).float() for name, x in linear_operands().items()}
    q, k, v = (operands[name] for name in ("query", "key", "value"))
    unit, beta, scalar, channel = (operands[name] for name in ("unit_key", "beta", "scalar", "channel"))
    state = operands["state"]
    last = dict(initial_state=state.clone(), output_final_state=True)
    record = {}

    def add(name, out, final):
        record[f"{name}/out"] = out.numpy()
        if final is not None:
            record[f"{name}/state"] = final.numpy()

    add("linear", *naive_recurrent_linear_attn(q, k, v, **last))
    # The sums of the keys go in and out with a length of 1 in place of the tokens.
    sums = operands["key_sums"][:, None]
    out, (products, keys) = naive_recurrent_linear_attn(
        q.abs(), k.abs(), v, scale=1.0, initial_state=(state, sums), output_final_state=True, normalize=True
    )
    add("normalised", out, products)
    record["normalised/keys"] = keys[:, 0].numpy()
    add("simple_gla", *naive_recurrent_simple_gla(q, k, v, scalar, **last))
    add("gla", *naive_recurrent_gla(q, k, v, channel, **last))
    out = naive_retention(*heads_first(q=q, k=k, v=v).values())
    add("retention", out.transpose(1, 2), None)
    out, final = delta_rule_recurrence(
        *heads_first(q=q, k=unit, v=v, beta=beta).values(), initial_state=state.clone(), output_final_state=True
    )
    add("delta", out.transpose(1, 2), final)
    add("gated_delta", *naive_recurrent_gated_delta_rule(q, unit, v, beta, scalar, **last))

    for heads in LIGHTNING_HEADS:
        record[f"lightning/slopes{heads}"] = _build_slope_tensor(heads)[:, 0, 0].numpy()
    slopes = _build_slope_tensor(HEADS)
    out = linear_attn(*heads_first(q=q, k=k, v=v).values(), slopes)
    add("lightning", out.transpose(1, 2), None)

    # Of the GPU code only the decays are wanted, which it hands to the op that it calls.
    chunk.chunk_simple_gla = lambda **arguments: (arguments["g_gamma"], None)
    for heads, layer, layers in FLA_LAYERS:
        decay, _ = chunk.chunk_lightning_attn(torch.zeros(1, 1, heads, 1), None, None, layer, layers)
        record[f"fla/decay{heads},{layer},{layers}"] = decay.numpy()

    assert all(len(array) == BATCH for array in record.values() if array.ndim > 1)
    np.savez_compressed(HERE / "linear_recurrences.npz", **record)


if __name__ == "__main__":
    main()
