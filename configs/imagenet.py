"""ImageNet-1k by each paper's recipe; the argument is any image model of the zoo.

    python -m train --config configs/imagenet.py:davit_tiny --workdir gs://bucket/davit_tiny \\
        --config.data.path=gs://bucket/tfds

None of these has been trained to the end here yet. Any TFDS data set with features `image` and `label` takes
ImageNet's place with --config.data.name=tfds:NAME. Weights to start from are given by --config.model.weights.
"""

import ml_collections

TRAIN_EXAMPLES = 1_281_167


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Settings for the model `arg` (default: davit_tiny)."""
    name = arg or "davit_tiny"
    family, _, variant = name.partition("_")
    config = RECIPES.get(family, _davit)(variant)
    config.model.name = name
    return config


def _common(epochs: int, batch_size: int) -> ml_collections.ConfigDict:
    """What all recipes agree on: AdamW, cosine, mixup, label smoothing, RandAugment, bfloat16."""
    epoch = TRAIN_EXAMPLES // batch_size
    config = ml_collections.ConfigDict()
    config.model = dict(overrides={})
    config.data = dict(
        name="tfds:imagenet2012",
        split="train",
        eval_split="validation",
        batch_size=batch_size,
        image_size=224,
        crop_pct=0.875,
        interpolation="bicubic",
        workers=16,
    )
    config.augment = dict(
        random_resized_crop=True,
        scale=(0.08, 1.0),
        hflip=0.5,
        mixup=0.8,
        mix_switch_prob=0.5,
    )
    config.loss = dict(label_smoothing=0.1)
    config.optim = dict(name="adamw", eps=1e-8, weight_decay=0.05, schedule="cosine", end_lr=1e-5)
    config.total_steps = epochs * epoch
    config.eval_every = 5 * epoch
    config.log_every = 50
    config.checkpoint = dict(every_steps=epoch, keep=3)
    config.dtype = "bfloat16"
    return config


def _deit(batch_size: int, warmup_epochs: int) -> ml_collections.ConfigDict:
    """timm's options of DeiT: 300 epochs and 10 at the floor; what DaViT, BiFormer and CARE start from."""
    config, epoch = _common(310, batch_size), TRAIN_EXAMPLES // batch_size
    config.augment.update(
        color_jitter=0.4,
        randaugment="rand-m9-mstd0.5-inc1",
        erase_prob=0.25,
        erase_mode="pixel",
        cutmix=1.0,
    )
    config.optim.update(warmup_steps=warmup_epochs * epoch, warmup_lr=1e-6, cooldown_steps=10 * epoch)
    return config


def _davit(variant: str) -> ml_collections.ConfigDict:
    """The defaults of the official train script with its README's options (github.com/dingmyu/davit)."""
    config = _deit(1024, warmup_epochs=5)
    config.model.overrides = dict(drop_path_rate=0.1, drop_path_schedule="official")
    config.data.crop_pct = 0.95
    config.optim.update(lr=1e-3, clip_norm=1.0)
    return config


def _biformer(variant: str) -> ml_collections.ConfigDict:
    """The defaults of the official train script (github.com/rayleizhu/BiFormer); no clipping, weights not averaged.

    Stochastic depth is that of the README and its issue 32; of biformer_base it is stated nowhere.
    """
    config = _deit(1024, warmup_epochs=5)
    rates = dict(small=0.15, base=0.4)
    config.model.overrides = dict(drop_path_rate=rates.get(variant, 0.1))
    config.data.repeats = 3
    config.optim.lr = 1e-3
    return config


def _care(variant: str) -> ml_collections.ConfigDict:
    """The official train script (github.com/zhouyuan888888/CARE-Transformer): 12 GPUs of 128 images each.

    It distils from RegNetY-16GF. That is no model of this zoo, so the teacher here is the DaViT of about its
    accuracy, fetched from the hub; --config.distill.teacher="" trains without one.
    """
    config = _deit(1536, warmup_epochs=20)
    config.model.overrides = dict(drop_path_rate=0.1)
    config.augment.interpolation = "random"
    config.optim.lr = 2.5e-3
    config.distill = dict(teacher="davit_tiny.msft_in1k", kind="hard", alpha=0.5)
    return config


def _maxvit(variant: str) -> ml_collections.ConfigDict:
    """The official settings (github.com/google-research/maxvit, `hp/vision_i1k.py`).

    timm's own designs (`rw`, `rmlp`), whose recipes are not known here, get the same. Names that end in 384 and 512
    get the fine-tuning of weights trained at 224, which it begins with a new classifier and this with theirs:

        --config.model.weights=maxvit_tiny_tf_224.in1k
    """
    *words, side = variant.split("_")
    finetune = side in ("384", "512")
    config = _common(30, 512) if finetune else _common(300, 4096)
    rates = dict(small=0.3, base=0.4, large=0.6, xlarge=0.7)
    rate = next((rates[word] for word in words if word in rates), 0.2)
    config.model.overrides = dict(drop_path_rate=rate, drop_path_schedule="official")
    config.data.image_size = int(side) if side.isdecimal() else 224
    config.data.crop_pct = 0.95
    config.augment.randaugment = "rand-m15-n2"
    config.optim.clip_norm = 1.0
    if "rmlp" not in words:
        # The official pattern spares names with "bias", which the tables of relative positions have.
        config.optim.no_decay = (".*relative_position_bias_table",)
    config.ema = 0.9999
    if finetune:
        config.data.update(crop_pct=1.0, crop_mode="squash", mean=(0.5,) * 3, std=(0.5,) * 3)
        config.optim.update(lr=5e-5, end_lr=5e-5, schedule="constant", weight_decay=1e-8)
    else:
        config.optim.update(lr=3e-3, warmup_steps=10_000)
    return config


def _vit(variant: str) -> ml_collections.ConfigDict:
    """DeiT's train script (github.com/facebookresearch/deit) for all sizes, at 224 pixels; DeiT III, DCAL and AHAN too.

    It distils from RegNetY-16GF, which is no model of this zoo: --config.distill.teacher=NAME names another one.
    """
    config = _deit(1024, warmup_epochs=5)
    config.model.overrides = dict(drop_path_rate=0.1)
    config.data.repeats = 3
    config.optim.update(lr=1e-3, no_decay=(".*pos_embed",))
    return config


RECIPES = dict(
    davit=_davit, maxvit=_maxvit, biformer=_biformer, care=_care, vit=_vit, deit=_vit, deit3=_vit, dcal=_vit, ahan=_vit
)
