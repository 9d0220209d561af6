"""ImageNet-1k by each paper's recipe; the argument is any image model of the zoo.

    python -m train --config configs/imagenet.py:davit_tiny --workdir gs://bucket/davit_tiny \\
        --config.data.path=gs://bucket/tfds

davit_tiny should reach 82.8 % top-1 (the paper's figure; not yet trained here). Any TFDS data set with
features `image` and `label` takes its place with --config.data.name=tfds:NAME.
"""

import ml_collections

TRAIN_EXAMPLES = 1_281_167
BATCH_SIZE = 1024


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Settings for the model `arg` (default: davit_tiny)."""
    config = _davit()
    config.model.name = arg or "davit_tiny"
    return config


def _davit() -> ml_collections.ConfigDict:
    """The defaults of the official train script with its README's options (github.com/dingmyu/davit)."""
    epoch = TRAIN_EXAMPLES // BATCH_SIZE
    config = ml_collections.ConfigDict()
    config.model = dict(overrides=dict(drop_path_rate=0.1, drop_path_schedule="official"))
    config.data = dict(
        name="tfds:imagenet2012",
        split="train",
        eval_split="validation",
        batch_size=BATCH_SIZE,
        image_size=224,
        crop_pct=0.95,
        interpolation="bicubic",
        workers=16,
    )
    config.augment = dict(
        random_resized_crop=True,
        scale=(0.08, 1.0),
        hflip=0.5,
        color_jitter=0.4,
        randaugment="rand-m9-mstd0.5-inc1",
        erase_prob=0.25,
        erase_mode="pixel",
        mixup=0.8,
        cutmix=1.0,
        mix_switch_prob=0.5,
    )
    config.loss = dict(label_smoothing=0.1)
    config.optim = dict(
        name="adamw",
        lr=1e-3,
        eps=1e-8,
        weight_decay=0.05,
        clip_norm=1.0,
        schedule="cosine",
        warmup_steps=5 * epoch,
        warmup_lr=1e-6,
        end_lr=1e-5,
        cooldown_steps=10 * epoch,
    )
    config.total_steps = 310 * epoch
    config.eval_every = 5 * epoch
    config.log_every = 50
    config.checkpoint = dict(every_steps=epoch, keep=3)
    config.dtype = "bfloat16"
    return config
