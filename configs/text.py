"""Language models of about a million parameters on the source code of Python's own standard library.

    python -m train --config configs/text.py:yaad_nano --workdir runs/yaad

The argument is the nano variant of a language model. One file in twenty is for testing, chosen by its name; which
files there are depends on the version of Python, so that numbers compare within one version only.
`test_bits_per_byte` is of all bytes of those files, each token predicted from at most the 256 before it. The tokens are
those of a vocabulary of byte pairs, about three bytes each; `--config.data.tokenizer=bytes` takes the bytes themselves.
"""

import ml_collections

MODELS = (
    *("yaad_nano", "moneta_nano", "memora_nano", "yaad_h_nano", "moneta_h_nano", "memora_h_nano"),
    *("transformer_nano", "sliding_window_nano", "linear_attention_nano", "retnet_nano", "lightning_nano"),
    *("gla_nano", "hgrn2_nano", "deltanet_nano", "gated_deltanet_nano", "hgrn2_h_nano", "gated_deltanet_h_nano"),
    "routing_transformer_nano",
)

OVERRIDES = {
    # With the printed link from states to weights, the gradients explode.
    "moneta": dict(link="identity", max_error=1.0),
    # The exact interior writes the weights of every token down, at several times the cost of a step.
    "memora": dict(interior="linear"),
}
MEMORIES = ("yaad", "moneta", "memora")
# What two cores of a CPU do in ten minutes or less, with the compilation and the evaluation; 500 where nothing is said.
STEPS = {
    **{"transformer_nano": 1050, "sliding_window_nano": 1050, "retnet_nano": 1000, "gated_deltanet_nano": 850},
    **{"yaad_nano": 700, "moneta_nano": 700, "memora_nano": 700},
}

TABLES = {
    "miras": ("transformer_nano", "gated_deltanet_nano", "yaad_nano", "moneta_nano", "memora_nano"),
    "all": MODELS,
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Settings for one of `MODELS` (default: the first)."""
    name = arg or MODELS[0]
    if name not in MODELS:
        raise ValueError(f"no text config for {name!r}; there are: {', '.join(MODELS)}")
    config = ml_collections.ConfigDict()
    config.task = "next_token"
    config.model = dict(name=name, overrides=dict(OVERRIDES.get(name.partition("_")[0], {})))
    if not name.startswith("routing_transformer"):
        config.model.overrides.scale_embeddings = True
    if name.startswith(("deltanet", "gated_deltanet", *MEMORIES)) and "_h_" not in name:
        # The papers' four taps over tokens of three bytes see so far that the memories have less left to learn.
        config.model.overrides.conv_width = 2
    config.data = dict(name="stdlib", tokenizer="python", split="train", eval_split="test", length=256)
    config.data.update(batch_size=8, eval_batch_size=32)
    config.optim = dict(name="muon", lr=8e-3, momentum=0.95, b2=0.95, weight_decay=0.1, clip_norm=1.0)
    config.optim.update(warmup_steps=100, end_lr=1e-4)
    config.total_steps = STEPS.get(name, 500)
    if name.startswith(MEMORIES):
        # More steps of fewer tokens, which memories learn from as fast.
        config.data.batch_size, config.optim.lr = 4, 6e-3
    config.log_every = 50
    config.checkpoint = dict(every_steps=500, keep=2)
    return config
