"""Miras: language models of Moneta, Yaad and Memora, and their hybrids with attention within a window.

The block is that of `zoo.sequence.language_model`: what the mixers do is in `zoo.sequence.memory_mixers`. Sizes
`170m`, `340m` and `780m` are those of the paper's appendix C, with a vocabulary of 32,000 and tied embeddings, with
which the numbers of parameters come closest to the labels; `1b3`, whose layout the paper does not give, is ours. The
hybrids take turns, memory and window, as Samba does (section 5.4); the paper gives no window, 2,048 is Samba's.
"""

from zoo.registry import Family, register
from zoo.sequence.language_model import SHARDING_RULES, LanguageModel, layers_of, variants_of


class MirasModel(LanguageModel):
    """A language model whose pattern has memories in it.

    Attributes, beside those of every language model: all of `zoo.sequence.memory_mixers.MemoryMixer`, `Moneta`,
    `Yaad` and `Memora`, each for the blocks that know it.
    """

    mixers: str = "Y"
    memory: str = "mlp"
    expansion: int = 4
    memory_epsilon: float = 1e-2
    memory_chunk: int = 16
    gate_rank: int = 32
    step_limit: float | None = None
    memory_rope: bool = True
    read: str = "after"
    p: float = 3.0
    q: float = 4.0
    max_error: float | None = None
    link: str = "paper"
    normalizer: str = "chunk"
    huber: str = "norm"
    slices: str = "fan_in"
    interior: str = "dual"


register(
    Family(
        name="miras",
        module=MirasModel,
        variants={
            **variants_of("moneta", "M", 360),
            **variants_of("yaad", "Y", 352),
            **variants_of("memora", "E", 360),
            **variants_of("moneta_h", "MW", 448),
            **variants_of("yaad_h", "YW", 440),
            **variants_of("memora_h", "EW", 448),
        },
        pretrained={},
        key_maps={},
        sharding_rules=SHARDING_RULES,
        layers=layers_of,
    )
)
