"""The 1,797 handwritten digits of scikit-learn as rows of 64 pixels of 17 levels, learned one after the other.

    python -m train --config configs/raster.py:routing_transformer_image_nano --workdir runs/raster
    python -m zoo generate routing_transformer_image_nano runs/raster --samples 8

The argument is any sequence model's nano. `test_bits_per_token` is bits per pixel.
"""

import ml_collections

MODELS = ("routing_transformer_image_nano", "transformer_nano", "gated_deltanet_nano", "yaad_nano")
TABLES = {"all": MODELS}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Settings for one of `MODELS` (default: the first)."""
    name = arg or MODELS[0]
    if name not in MODELS:
        raise ValueError(f"no raster config for {name!r}; there are: {', '.join(MODELS)}")
    config = ml_collections.ConfigDict()
    config.task = "next_token"
    config.model = dict(name=name)
    config.data = dict(name="raster:digits", eval_split="test", batch_size=64, eval_batch_size=120)
    config.optim = dict(name="adamw", lr=2e-3, b2=0.98, weight_decay=0.1, clip_norm=1.0, warmup_steps=50)
    config.total_steps = 400
    config.eval_every = 200
    config.log_every = 50
    config.checkpoint = dict(every_steps=200, keep=2)
    return config
