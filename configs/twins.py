"""Verification of identical twins on drawn faces: AHAN, its backbone, and its modules one by one and two by two.

    python -m train --config configs/twins.py:full --workdir runs/twins
    python -m train.compare --config configs/twins.py:ablation --workdir runs/twins_ablation [--full]
    python -m train --config configs/twins.py:published --workdir runs/nd_twins --config.data.path=DIR

The argument is one of `ROWS` and may go on with a seed, "full,1", of the model and of the batches; the faces stay. Or
it is "published", what is known of the paper's recipe, for a folder of people as `train.faces` describes it.
`test_general_accuracy` is that of pairs of people who are no twins, `test_twin_accuracy` that of twins and
`test_hard_twin_accuracy` that of the third of them who look most alike, each at the threshold that is best for
validation people, with confidence intervals over families. How much twins differ by default was set by what the
backbone alone reaches, and so were the optimizer and its learning rate, before any other row was scored on them.
"""

import ml_collections

# Row -> the modules that it has.
ROWS = {
    "backbone": (),
    "hca": ("hca",),
    "faam": ("faam",),
    "ta_pwca": ("ta_pwca",),
    "hca_faam": ("hca", "faam"),
    "hca_ta_pwca": ("hca", "ta_pwca"),
    "faam_ta_pwca": ("faam", "ta_pwca"),
    "full": ("hca", "faam", "ta_pwca"),
}
# Positions, and the weights of HCA's scales.
NO_DECAY = ("pos_embed|scale_logits",)
_SINGLE = ("hca", "faam", "ta_pwca")
_THRICE = tuple(f"{row},{seed}" for row in ("backbone", "full") for seed in range(3))

TABLES = {
    "ablation": (*_THRICE, *_SINGLE),
    "ablation_full": tuple(f"{row},{seed}" for row in ROWS for seed in range(3)),
    "quick": ("backbone", "full"),
}
# What is compared with what where both are in a table, over all seeds of each.
CONTRASTS = (("full", "backbone"), *((row, "backbone") for row in ROWS if row not in ("backbone", "full")))


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Settings for one of `ROWS`, "ROW" or "ROW,SEED" (default: `full`), or for "published"."""
    if arg == "published":
        return _published()
    row, comma, seed = (arg or "full").partition(",")
    if row not in ROWS or (comma and not seed.isdecimal()):
        raise ValueError(
            f"no twins config {arg!r}; it takes published, or ROW or ROW,SEED with one of {', '.join(ROWS)}"
        )
    modules = ROWS[row]
    config = ml_collections.ConfigDict()
    config.task = "verification"
    config.seed = int(seed or 0)
    config.model = dict(
        name="ahan_nano",
        overrides=dict(hca="hca" in modules, faam="faam" in modules, pair_probability=0.5 * ("ta_pwca" in modules)),
    )
    config.data = dict(
        name="twins",
        eval_split="validation+test",
        batch_size=64,
        eval_batch_size=192,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    # A small model from scratch does not begin to learn with the scale 64 and the margin 0.5 of large ones.
    config.verification = dict(scale=16.0, margin=0.1)
    config.optim = dict(name="muon", lr=6e-3, weight_decay=5e-4, no_decay=NO_DECAY, clip_norm=1.0, warmup_steps=100)
    config.total_steps = 1400
    config.log_every = 50
    config.checkpoint = dict(every_steps=700, keep=1)
    return config


def _published() -> ml_collections.ConfigDict:
    """AHAN as it was trained on ND-TWINS: 100 epochs of 6,336 images in batches of 4 x 64 on one GPU.

    From ImageNet-21k weights of a ViT-B/16, by Adam with a weight decay of 5e-4 (secondary source), which is that of
    torch's Adam (inferred). `total_steps` is 100 epochs of 6,336 images. Scale and margin of ArcFace, the size of the
    images and the warm-up are ours (inferred).
    """
    config = ml_collections.ConfigDict()
    config.task = "verification"
    config.model = dict(name="ahan_vit_b16", backbone="vit_base_patch16_224.augreg_in21k")
    config.data = dict(
        name="people",
        eval_split="validation+test",
        batch_size=256,
        eval_batch_size=64,
        image_size=224,
        workers=8,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    config.accum_steps = 4
    config.augment = dict(hflip=0.5, color_jitter=0.2, rotate=10.0)
    config.optim = dict(name="adam", lr=1e-4, weight_decay=5e-4, no_decay=NO_DECAY, warmup_steps=100)
    config.total_steps = 2475
    config.dtype = "bfloat16"
    config.eval_every = 250
    config.checkpoint = dict(every_steps=250, keep=2)
    return config
