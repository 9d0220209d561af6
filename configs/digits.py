"""The 1,797 real handwritten digits (8 x 8, grey) that come with scikit-learn: a whole training in about a minute.

    python -m train --config configs/digits.py:davit_nano --workdir runs/digits

The argument is the nano variant of an image family. Trained on 1,437 digits, tested on 360 drawn at random;
`last360` is the set's own last part, written by other people, from which 288 or so are in the training set:
train with --config.data.split=first1437 --config.data.eval_split=last360 to see unseen writers.
"""

import ml_collections

MODELS = ("davit_nano",)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Settings for one of `MODELS` (default: the first)."""
    name = arg or MODELS[0]
    if name not in MODELS:
        raise ValueError(f"no digits config for {name!r}; there are: {', '.join(MODELS)}")
    config = ml_collections.ConfigDict()
    config.model = dict(name=name, overrides=dict(drop_path_rate=0.1))
    config.data = dict(
        name="digits",
        split="train",
        eval_split="test",
        batch_size=64,
        eval_batch_size=360,
        mean=(0.5,),
        std=(0.5,),
    )
    config.augment = dict(pad_crop=1)
    config.loss = dict(label_smoothing=0.1)
    config.optim = dict(name="adamw", lr=3e-3, weight_decay=0.05, clip_norm=1.0, warmup_steps=100)
    config.total_steps = 1200
    config.ema = 0.995
    config.eval_every = 300
    config.log_every = 50
    config.checkpoint = dict(every_steps=300, keep=2)
    return config
