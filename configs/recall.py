"""Generated tasks that tell sequence mixers apart: two narrow blocks, each with a short convolution.

    python -m train --config configs/recall.py:mqar,gated_deltanet --workdir runs/mqar_gdn
    python -m train.compare --config configs/recall.py:mqar --workdir runs/mqar

The argument is a task and a mixer: any of the language models without its size, such as `yaad` or `gated_deltanet_h`.
`test_accuracy` is that over the positions that the task counts; `train.recall` has the tasks. Those of `BENCH` are what
`python -m kernels.bench --suite recall` trains.
"""

import ml_collections

MIXERS = (
    *("transformer", "sliding_window", "linear_attention", "retnet", "lightning", "gla", "hgrn2", "deltanet"),
    *("gated_deltanet", "moneta", "yaad", "memora", "yaad_h", "moneta_h", "memora_h", "hgrn2_h", "gated_deltanet_h"),
)

# With so small a vocabulary random filler would repeat keys, after which no answer is right: the filler is id 0.
_MQAR = dict(num_tokens=256, random_non_queries=False)

# Task -> its data set, the positions of an example, its options, steps of training.
TASKS = {
    "mqar": ("mqar", 64, dict(_MQAR, num_kv_pairs=4), 800),
    "mqar_many": ("mqar", 128, dict(_MQAR, num_kv_pairs=16), 1000),
    "passkey": ("passkey", 128, {}, 1000),
    "selective_copy": ("selective_copy", 64, dict(memorize=8), 1000),
    "induction": ("induction", 128, {}, 1000),
    "listops": ("listops", 64, dict(max_depth=4, max_args=4), 2000),
    # For encoders and decoders: the source is another row.
    "copy": ("copy", 32, dict(symbols=16), 600),
    "sort": ("sort", 32, dict(symbols=16), 600),
}
ENCODER_DECODER = ("copy", "sort")

# Small tasks that two cores of a CPU learn in a minute, and Zoology's own examples, arXiv:2312.04927, appendix E: batch
# and steps are 64 epochs of 100,000. Passkeys at the same lengths stand beside them.
BENCH = {
    "mqar_small": ("mqar", 32, dict(_MQAR, num_kv_pairs=4), 64, 600),
    "passkey_small": ("passkey", 32, dict(num_tokens=32, digits=4), 64, 400),
    "mqar_64x4": ("mqar_zoology", 64, dict(num_kv_pairs=4), 512, 12_500),
    "mqar_128x8": ("mqar_zoology", 128, dict(num_kv_pairs=8), 512, 12_500),
    "mqar_256x16": ("mqar_zoology", 256, dict(num_kv_pairs=16), 256, 25_000),
    "mqar_512x64": ("mqar_zoology", 512, dict(num_kv_pairs=64), 128, 50_000),
    "passkey_64": ("passkey", 64, {}, 512, 12_500),
    "passkey_128": ("passkey", 128, {}, 512, 12_500),
    "passkey_256": ("passkey", 256, {}, 256, 25_000),
    "passkey_512": ("passkey", 512, {}, 128, 50_000),
}
OVERRIDES = {
    # As in configs/text.py; the values are small here, and the steps have to be larger.
    "moneta": dict(link="identity", step_limit=0.55),
    "yaad": dict(step_limit=0.08),
    # The exact interior writes the weights of every token down, at several times the cost of a step.
    "memora": dict(interior="linear"),
}
# Embeddings that enter scaled: in a thousand steps Gated DeltaNet learns 16 pairs only with them, softmax attention
# learns 4 only without. What else has a state of fixed size is treated like Gated DeltaNet, so that rows compare.
SCALED = ("linear_attention", "retnet", "lightning", "gla", "hgrn2", "deltanet", "gated_deltanet")
# Of the small tasks: memories that have as many numbers as the matrices of the others, in a state twice as large, since
# it also keeps what they were when the chunk began.
SMALL_STATE = {name: dict(memory="matrix", scale_embeddings=True) for name in ("moneta", "yaad", "memora")}
# Where it is not 3e-3. A short run at too low a rate says nothing of what a state can hold: of four pairs among 64
# tokens linear attention told 28 % after 300 steps at 3e-3 and 93 % at 1e-2, Gated DeltaNet 95 and 58 %; on a seed that
# no table has, RetNet told 27 and 96 % of the small task, Yaad 26 and 86 %. The others were not tried at another rate.
SMALL_LR = {
    "mqar_small": dict(linear_attention=1e-2, retnet=1e-2, yaad=1e-2),
    "passkey_small": dict(linear_attention=1e-2),
}
# Of two blocks, where three to one does not go.
PATTERNS = {"hgrn2_h": "HA", "gated_deltanet_h": "GA"}

TABLES = {
    "mqar": (
        *("mqar,transformer", "mqar,gated_deltanet", "mqar,linear_attention", "mqar,moneta"),
        *("mqar_many,transformer", "mqar_many,gated_deltanet", "mqar_many,linear_attention"),
    ),
    "tasks": tuple(f"{task},{mixer}" for task in TASKS if task not in ENCODER_DECODER for mixer in MIXERS),
    "encoder_decoder": ("copy,routing_transformer_seq2seq", "sort,routing_transformer_seq2seq"),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Settings for a task and a mixer, "TASK,MIXER" (default: `mqar,gated_deltanet`)."""
    task, comma, mixer = (arg or "mqar,gated_deltanet").partition(",")
    both = task in ENCODER_DECODER
    mixers = ("routing_transformer_seq2seq",) if both else MIXERS
    if task not in {**TASKS, **BENCH} or not comma or mixer not in mixers:
        raise ValueError(
            f"no recall config {arg!r}; it takes TASK,MIXER: one of {', '.join((*TASKS, *BENCH))}, and for {task!r} "
            "one of " + ", ".join(mixers)
        )
    if task in BENCH:
        name, length, options, batch_size, steps = BENCH[task]
    else:
        (name, length, options, steps), batch_size = TASKS[task], 64
    config = ml_collections.ConfigDict()
    config.task = "next_token"
    config.model = dict(name=f"{mixer}_nano")
    config.model.overrides = {} if both else dict(width=64, depth=2, num_heads=2, mlp_hidden=128, conv_width=4)
    config.model.overrides.update(OVERRIDES.get(mixer.removesuffix("_h"), {}))
    if mixer in SCALED:
        config.model.overrides.scale_embeddings = True
    if mixer in PATTERNS:
        config.model.overrides.mixers = PATTERNS[mixer]
    config.data = dict(
        name=name,
        eval_split="test",
        length=length,
        options=options,
        examples=200_000,
        batch_size=batch_size,
        eval_batch_size=250,
    )
    config.optim = dict(name="adamw", lr=3e-3, b2=0.98, weight_decay=0.01, clip_norm=1.0, warmup_steps=50)
    if both:
        config.optim.lr = 1e-3
    config.total_steps = steps
    config.eval_every = 200
    config.log_every = 50
    config.checkpoint = dict(every_steps=1000, keep=1)
    if (task, mixer) == ("mqar", "moneta"):
        config.total_steps = 1200
    if (task, mixer) == ("mqar", "transformer"):
        config.data.batch_size, config.total_steps, config.eval_every = 128, 300, 100
    if task in BENCH:
        _bench(config, task, mixer)
    return config


def _bench(config: ml_collections.ConfigDict, task: str, mixer: str) -> None:
    """The settings of a benchmark; Zoology's blocks, appendix E, mix tokens and nothing else."""
    config.data.examples = 100_000
    # Divides over many devices.
    config.data.eval_batch_size = 256
    config.eval_every = 0
    config.log_every = 100
    if task.endswith("_small"):
        config.model.overrides.update(SMALL_STATE.get(mixer, {}))
        config.optim.lr = SMALL_LR[task].get(mixer, 3e-3)
        return
    config.model.overrides.mlp_hidden = 0
    config.model.overrides.dropout_rate = 0.1
    config.data.eval_examples = 3000
    config.optim = dict(name="adamw", lr=1e-3, weight_decay=0.1)
    config.checkpoint.every_steps = 5000
