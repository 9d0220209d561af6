"""What a run is made of: every key of a config with its default, and which values are valid."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

# Sections with names of their own: any plain value, or values of one type.
FREE: dict[str, type | None] = {"model.overrides": None, "data.extra_eval": str, "data.options": None}

INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")

CHOICES: dict[str, tuple[str, ...]] = {
    "task": ("classify", "next_token", "verification"),
    "data.packing": ("packed", "stream"),
    "model.resize": ("bilinear", "bicubic", "geometric"),
    "data.crop_mode": ("center", "squash", "border"),
    "data.interpolation": INTERPOLATIONS,
    "augment.interpolation": (*INTERPOLATIONS, "random"),
    "augment.erase_mode": ("pixel", "rand", "const"),
    "distill.kind": ("hard", "soft"),
    "verification.loss": ("arcface", "cosface", "adaface"),
    "verification.negative": ("hardest", "twin"),
    "optim.name": ("adam", "adamw", "lamb", "muon", "sgd"),
    "optim.schedule": ("cosine", "linear", "constant", "rsqrt"),
    "dtype": ("float32", "bfloat16", "float64"),
    "param_dtype": ("float32", "bfloat16", "float64"),
    "matmul_precision": ("default", "high", "highest"),
    "remat": ("none", "full", "dots"),
}


class ConfigError(ValueError):
    """A config that cannot be used; the message names the key, what was given and what would be accepted."""


def default() -> ml_collections.ConfigDict:
    """Every key with its default; a key whose default is None accepts None as well as its type."""
    return ml_collections.ConfigDict(
        {
            "model": {
                "name": "",  # as in zoo.list_models()
                "overrides": {},  # fields of the model that differ from its variant, e.g. drop_path_rate
                "weights": placeholder(str),  # start from: a file, a checkpoint directory, a full tag; None: fresh
                "backbone": "",  # a ViT, or its full tag, of which `weights` are (None: the tag's); "": of `name`
                "resize": placeholder(str),  # of weights made for another image size; None: as their own code does
            },
            "task": "classify",  # what is learned: loss and metrics
            "data": {
                # Images: "digits", "folder", "tfds:NAME", or "tfds" with data.path a prepared directory. Sequences:
                # "stdlib", "files", "tfds:NAME", "tfds", or a generated task, see train.text and train.recall. Faces:
                # "twins" or "people", see train.faces; their eval_split is "validation+test".
                "name": "",
                "split": "train",
                "eval_split": placeholder(str),  # its metrics are called test_*; None: none
                "extra_eval": {},  # name -> split, evaluated too and printed beside eval_split; "" leaves one out
                "path": placeholder(str),  # where the data lies, for sources that are not built in
                "length": placeholder(int),  # sequences: tokens in a row
                "tokenizer": "bytes",  # text: "bytes", or a file of `tokenizers` (.json) or sentencepiece (.model)
                "packing": "packed",  # text: how documents are laid out in rows, see train.packing
                "align": placeholder(int),  # text: documents begin at multiples of this; None: as the model wants it
                "examples": 100000,  # generated tasks: of the training split
                "eval_examples": 1000,  # generated tasks: of any other split
                "options": {},  # of the data set, such as the number of pairs of a task or the feature of a TFDS set
                "repeats": 1,  # times in a row that an epoch takes an example, each augmented differently
                "batch_size": 128,  # examples per optimizer step, over all processes and accumulation steps
                "eval_batch_size": placeholder(int),  # None: data.batch_size
                "image_size": placeholder(int),  # side that the model sees; None: the size of the data
                "workers": 0,  # reader processes per host; 0 reads in the training process
                "prefetch": 2,  # batches made ahead
                "mean": (0.485, 0.456, 0.406),  # per channel, of values in [0, 1]
                "std": (0.229, 0.224, 0.225),
                "crop_pct": 1.0,  # evaluation: share of the resized image's side that the centre crop keeps
                "crop_mode": "center",  # evaluation: see zoo.preprocess.eval_transform
                "interpolation": "bicubic",  # evaluation: filter of the resize
            },
            "augment": {
                "random_resized_crop": False,
                "scale": (0.08, 1.0),  # random_resized_crop: share of the area
                "ratio": (3 / 4, 4 / 3),  # random_resized_crop: width over height
                "interpolation": "bicubic",  # filter of resizes and rotations; "random": bilinear or bicubic
                "pad_crop": 0,  # pixels of padding on each side before a random crop to the old size
                "rotate": 0.0,  # largest angle in degrees, either way
                "hflip": 0.0,  # probability of a left-right flip
                "vflip": 0.0,  # probability of a top-bottom flip
                "color_jitter": 0.0,  # strength of random brightness, contrast and saturation
                "randaugment": "",  # timm's notation, e.g. "rand-m9-mstd0.5-inc1"; empty: off
                "erase_prob": 0.0,  # probability of random erasing
                "erase_mode": "pixel",  # fill: noise per pixel, one random colour, or the mean colour
                "mixup": 0.0,  # alpha of the Beta distribution; 0: off
                "cutmix": 0.0,  # alpha of the Beta distribution; 0: off
                "mix_prob": 1.0,  # probability that a batch is mixed at all
                "mix_switch_prob": 0.5,  # probability of cutmix where both are on
            },
            "loss": {
                "label_smoothing": 0.0,
            },
            "distill": {  # learn from a trained model too, see train.distill
                "teacher": "",  # model or full tag; "": none. A tag's mean and std apply, else those of the data
                "weights": placeholder(str),  # of the teacher: a file or a checkpoint directory; None: the tag's
                "kind": "hard",  # the teacher's first choice as label; or "soft", its probabilities
                "alpha": 0.5,  # share of the teacher in the loss
                "temperature": 1.0,  # "soft": divides the logits
            },
            "verification": {  # task "verification", see train.verification and train.identities
                "loss": "arcface",
                "scale": 64.0,
                "margin": placeholder(float),  # None: 0.5 of arcface, 0.35 of cosface, 0.4 of adaface
                "easy_margin": False,  # arcface
                "triplet_weight": 0.1,
                "triplet_margin": 0.5,
                "negative": "hardest",  # of a triplet: the hardest of all others, or the twin if it is in the batch
                "images_per_identity": 4,  # in a batch
                "twin_share": 0.75,  # of a batch's people, how many are there together with their twins
                "max_impostors": 100000,  # evaluation: pairs of people who are no twins, drawn where there are more
                "replicates": 1000,  # evaluation: of the bootstrap; 0: no confidence intervals
            },
            "optim": {
                "name": "adamw",
                "lr": 1e-3,  # at the end of the warm-up
                "weight_decay": 0.0,  # decoupled but for adam, times the learning rate; kernels and tables
                "no_decay": (),  # regexes of parameter paths that are not decayed either
                "clip_norm": placeholder(float),  # largest global norm of the gradient; None: no clipping
                "schedule": "cosine",  # see train.optim.schedule
                "warmup_steps": 0,  # linear from warmup_lr to lr
                "warmup_lr": 0.0,
                "end_lr": 0.0,  # floor
                "cooldown_steps": 0,  # steps at the floor at the end, part of total_steps
                "b1": 0.9,  # adam, adamw, lamb, muon
                "b2": 0.999,  # adam, adamw, lamb, muon
                "eps": 1e-8,  # adam, adamw, lamb, muon
                "momentum": 0.9,  # sgd; muon, whose authors take 0.95
                "layer_decay": 1.0,  # learning rate of layer i times layer_decay ** (layers - i)
            },
            "total_steps": 0,  # optimizer steps; has no default
            "accum_steps": 1,  # parts into which a batch is cut, one after another
            "ema": 0.0,  # decay of the moving average of the parameters that is evaluated; 0: off
            "seed": 0,
            "eval_every": 0,  # steps; 0 evaluates at the end only
            "log_every": 50,  # steps
            "checkpoint": {
                "every_steps": 1000,
                "keep": 3,  # newest ones kept
            },
            "mesh": {  # devices along each axis; -1 in one of them takes what is left
                "data": -1,
                "fsdp": 1,
                "tensor": 1,
                "sequence": 1,
            },
            "dtype": "float32",  # of the computation
            "param_dtype": "float32",
            "matmul_precision": "default",
            "remat": "none",  # what the backward pass recomputes: "full" keeps a block's input only
            "profile": {
                "first_step": 10,
                "steps": 0,  # steps to trace from first_step on, for TensorBoard's profiler; 0: none
            },
        }
    )


# (paths, what they must be, whether a value is that); None passes where the key allows it.
_RANGES = (
    (("data.batch_size", "data.eval_batch_size", "data.image_size"), "at least 1", lambda v: v >= 1),
    (("data.length", "data.align", "data.examples", "data.eval_examples"), "at least 1", lambda v: v >= 1),
    (
        ("data.repeats", "accum_steps", "log_every", "checkpoint.every_steps", "checkpoint.keep"),
        "at least 1",
        lambda v: v >= 1,
    ),
    (("total_steps", "eval_every", "data.workers", "data.prefetch"), "at least 0", lambda v: v >= 0),
    (("profile.first_step",), "at least 1", lambda v: v >= 1),
    (("profile.steps",), "at least 0", lambda v: v >= 0),
    (("optim.lr", "optim.warmup_lr", "optim.end_lr", "optim.weight_decay"), "at least 0", lambda v: v >= 0),
    (("optim.warmup_steps", "optim.cooldown_steps"), "at least 0", lambda v: v >= 0),
    (("augment.pad_crop", "augment.color_jitter"), "at least 0", lambda v: v >= 0),
    (("augment.mixup", "augment.cutmix"), "at least 0", lambda v: v >= 0),
    (("verification.scale",), "above 0", lambda v: v > 0),
    (
        ("verification.margin", "verification.triplet_weight", "verification.triplet_margin"),
        "at least 0",
        lambda v: v >= 0,
    ),
    (("verification.images_per_identity", "verification.max_impostors"), "at least 1", lambda v: v >= 1),
    (("verification.replicates",), "at least 0", lambda v: v >= 0),
    (("verification.twin_share",), "in [0, 1]", lambda v: 0 <= v <= 1),
    (("augment.rotate",), "in [0, 180]", lambda v: 0 <= v <= 180),
    (("distill.alpha",), "in [0, 1]", lambda v: 0 <= v <= 1),
    (("distill.temperature",), "above 0", lambda v: v > 0),
    (("optim.clip_norm",), "above 0, or None for no clipping", lambda v: v > 0),
    (("optim.eps",), "above 0", lambda v: v > 0),
    (("optim.b1", "optim.b2", "optim.momentum", "ema"), "in [0, 1)", lambda v: 0 <= v < 1),
    (("loss.label_smoothing",), "in [0, 1)", lambda v: 0 <= v < 1),
    (("optim.layer_decay", "data.crop_pct"), "in (0, 1]", lambda v: 0 < v <= 1),
    (("augment.hflip", "augment.vflip", "augment.erase_prob"), "in [0, 1]", lambda v: 0 <= v <= 1),
    (("augment.mix_prob", "augment.mix_switch_prob"), "in [0, 1]", lambda v: 0 <= v <= 1),
    (("augment.scale",), "a range within (0, 1]", lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1),
    (("augment.ratio",), "a range above 0", lambda v: len(v) == 2 and 0 < v[0] <= v[1]),
    (("data.std",), "above 0 in every channel", lambda v: len(v) > 0 and min(v) > 0),
    (("seed",), "in [0, 2**32)", lambda v: 0 <= v < 2**32),
    (
        ("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.sequence"),
        "at least 1, or -1 for the rest",
        lambda v: v >= 1 or v == -1,
    ),
)


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks the values of a complete config, each alone and those that must agree.

    What depends on the machine or the data (devices, classes) is checked where it is known.

    Raises:
        ConfigError: naming every problem, one a line.
    """
    values = flatten(config)
    problems = [
        f"{path} must be {words}, got {values[path]!r}"
        for paths, words, holds in _RANGES
        for path in paths
        if values[path] is not None and not holds(values[path])
    ]
    problems += [
        f"unknown {path} {values[path]!r}{nearest(values[path], names)}"
        for path, names in CHOICES.items()
        if values[path] is not None and values[path] not in names
    ]
    problems += [f"{path} is not set" for path in ("model.name", "data.name", "total_steps") if not values[path]]
    problems += [
        f"set {name} itself instead of model.overrides.{name}"
        for name in ("dtype", "param_dtype", "remat")
        if name in config.model.overrides
    ]
    if config.distill.weights and not config.distill.teacher:
        problems.append(f"distill.weights {config.distill.weights!r} needs distill.teacher, the model it is of")
    data, augment, optim = config.data, config.augment, config.optim
    if config.accum_steps >= 1 and data.batch_size % config.accum_steps:
        problems.append(f"accum_steps {config.accum_steps} must divide data.batch_size {data.batch_size}")
    if 0 < config.total_steps <= optim.warmup_steps + optim.cooldown_steps:
        problems.append(
            f"optim.warmup_steps {optim.warmup_steps} and optim.cooldown_steps {optim.cooldown_steps} "
            f"must leave some of total_steps {config.total_steps}"
        )
    for path in ("warmup_lr", "end_lr"):
        if optim[path] > optim.lr:
            problems.append(f"optim.{path} {optim[path]} must be at most optim.lr {optim.lr}")
    if config.task != "classify" and config.distill.teacher:
        problems.append(f"distill.teacher {config.distill.teacher!r} teaches classes; task {config.task!r} has none")
    if config.task == "verification":
        problems += _verification_problems(config)
    if len(data.mean) != len(data.std):
        problems.append(f"data.mean {data.mean} and data.std {data.std} must have a number per channel each")
    if augment.random_resized_crop and augment.pad_crop:
        problems.append("augment.random_resized_crop and augment.pad_crop are alternatives; turn one off")
    if list(config.mesh.values()).count(-1) > 1:
        problems.append(f"at most one axis of mesh may be -1, got {dict(config.mesh)}")
    for pattern in optim.no_decay:
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"optim.no_decay: {pattern!r} is not a regular expression: {error}")
    if problems:
        raise ConfigError("\n".join(problems))


def _verification_problems(config: ml_collections.ConfigDict) -> list[str]:
    """What does not go together in a verification."""
    settings, augment, problems = config.verification, config.augment, []
    multiple = config.accum_steps * settings.images_per_identity
    if multiple >= 1 and config.data.batch_size % multiple:
        problems.append(
            f"data.batch_size {config.data.batch_size} must be a multiple of accum_steps times "
            f"verification.images_per_identity, {multiple}"
        )
    if settings.triplet_weight and settings.images_per_identity == 1:
        problems.append(
            "verification.images_per_identity 1 leaves triplets without positives; set it to 2 or more, or "
            "verification.triplet_weight to 0"
        )
    # What a config of classes says of these would otherwise be dropped without a word.
    for name in ("mixup", "cutmix", "erase_prob"):
        if augment[name]:
            problems.append(f"augment.{name} {augment[name]} is for classes; task 'verification' takes 0")
    if config.loss.label_smoothing:
        problems.append(f"loss.label_smoothing {config.loss.label_smoothing} is for classes; 'verification' takes 0")
    if settings.easy_margin and settings.loss != "arcface":
        problems.append(f"verification.easy_margin is of arcface; {settings.loss!r} takes False")
    if config.model.overrides.get("num_classes"):
        problems.append(
            f"model.overrides.num_classes {config.model.overrides.num_classes}: task 'verification' compares "
            "embeddings and brings the people's weights itself; leave it out"
        )
    if config.data.repeats != 1:
        problems.append(f"data.repeats {config.data.repeats} has no meaning for batches of identities; it must be 1")
    return problems


def flatten(config: ml_collections.ConfigDict | Mapping, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value; lists as tuples, and an empty section as `{}` so that no name is lost."""
    flat = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        if isinstance(value, (Mapping, ml_collections.ConfigDict)):
            flat.update(flatten(value, f"{path}.") or {path: {}})
        else:
            flat[path] = _tuples(value)
    return flat


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known names nearest to `name`."""
    # Imported here because it pulls in JAX, which a config needs for nothing else.
    from zoo import registry

    return registry.nearest(name, known)
