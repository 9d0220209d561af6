"""Cross-attention between tokens and what is chosen from, paired with, or cut out of an image."""

from kernels.cross.bilateral import asymmetry_signature, bilateral_attention
from kernels.cross.pairwise import pairwise_attention
from kernels.cross.parts import mix_scales, part_attention, pool_parts, roi_align
from kernels.cross.rollout import attention_rollout
from kernels.cross.selected import global_local_attention, select_tokens, take_tokens

__all__ = [
    "asymmetry_signature",
    "attention_rollout",
    "bilateral_attention",
    "global_local_attention",
    "mix_scales",
    "pairwise_attention",
    "part_attention",
    "pool_parts",
    "roi_align",
    "select_tokens",
    "take_tokens",
]
