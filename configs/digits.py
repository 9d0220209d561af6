"""The 1,797 real handwritten digits (8 x 8, grey) that come with scikit-learn: a whole training in about a minute.

    python -m train --config configs/digits.py:davit_nano --workdir runs/digits

The argument is the nano variant of an image family. Trains on 1,437 digits and tests on 360 drawn at random;
`test_last360_accuracy` is that of the 84 among them from the set's last part, which other people wrote. For
writers that training never sees, choose the natural split, `configs/digits.py:davit_nano,last360`: the first
1,437 train and the last 360 test.
"""

import ml_collections

MODELS = ("davit_nano", "maxvit_nano", "biformer_nano", "care_nano", "vit_nano", "dcal_nano")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Settings for one of `MODELS` (default: the first), with ",last360" for the natural split."""
    name, comma, natural = (arg or MODELS[0]).partition(",")
    if comma and natural != "last360":
        raise ValueError(f"no digits config {arg!r}; what may follow the model's name is ',last360'")
    if name not in MODELS:
        raise ValueError(f"no digits config for {name!r}; there are: {', '.join(MODELS)}")
    config = ml_collections.ConfigDict()
    config.model = dict(name=name, overrides=dict(drop_path_rate=0.1))
    config.data = dict(
        name="digits",
        split="first1437" if natural else "train",
        eval_split="last360" if natural else "test",
        extra_eval={} if natural else dict(test_last360="test_last360"),
        batch_size=64,
        eval_batch_size=360,
        mean=(0.5,),
        std=(0.5,),
    )
    config.augment = dict(pad_crop=1, rotate=10.0)
    config.loss = dict(label_smoothing=0.1)
    config.optim = dict(name="adamw", lr=3e-3, weight_decay=0.05, clip_norm=1.0, warmup_steps=100)
    if name in ("vit_nano", "dcal_nano"):
        # Without a convolution they learn too slowly by Adam.
        config.optim.update(name="muon", lr=6e-3)
    config.total_steps = 700
    config.ema = 0.995
    config.eval_every = 200
    config.log_every = 50
    config.checkpoint = dict(every_steps=200, keep=2)
    return config
