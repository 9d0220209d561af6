"""Language models to compare with: softmax attention and its linear relatives in one block, and hybrids of them.

The sizes are those of `zoo.sequence.miras`, so that two models differ in their mixers alone; what the papers do
otherwise in the block (widths of keys and values, numbers of heads) is a field. Any other ratio of a hybrid is
`mixers=`: the pattern `"GGGGGGA"` is 6:1.

Source: the block is that of Llama (arXiv:2302.13971); hybrids as in arXiv:2507.06457, which finds 3:1 to 6:1 best.
"""

from zoo.registry import Family, register
from zoo.sequence.language_model import SHARDING_RULES, LanguageModel, layers_of, variants_of

register(
    Family(
        name="baselines",
        module=LanguageModel,
        variants={
            **variants_of("transformer", "A", 536),
            **variants_of("sliding_window", "W", 536),
            **variants_of("linear_attention", "N", 488),
            **variants_of("retnet", "R", 488),
            **variants_of("lightning", "T", 488),
            **variants_of("gla", "L", 480),
            **variants_of("hgrn2", "H", 536),
            **variants_of("deltanet", "D", 528),
            **variants_of("gated_deltanet", "G", 480),
            **variants_of("hgrn2_h", "HHHA", 536),
            **variants_of("gated_deltanet_h", "GGGA", 496),
        },
        pretrained={},
        key_maps={},
        sharding_rules=SHARDING_RULES,
        layers=layers_of,
    )
)
