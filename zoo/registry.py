"""Which models there are: families, their variants, and the published weights of each.

A family file (`zoo/davit.py`, ...) ends by calling `register`; everything else looks names up here.
"""

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn

from zoo.keymap import KeyMap

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class PretrainedCfg:
    """What a set of published weights expects of its input, and where it comes from.

    Attributes:
        tag: full name, `"<model>.<weights>"`, as timm spells it where timm has it.
        image_size: side of the square input in pixels that the weights were evaluated at.
        num_classes: width of the classifier in the file; 0 when the file holds none.
        mean, std: per channel, for inputs scaled to [0, 1].
        crop_pct: share of the resized image's side that the centre crop keeps.
        crop_mode: how the image is made to fit, see `zoo.preprocess.eval_transform`.
        interpolation: `"bicubic"` or `"bilinear"`, PIL's filter for the resize.
        naming: the key map of the family that reads the file.
        hub_id: repository on the Hugging Face hub, None where there is none.
        filenames: names to try in that repository, best first.
        license: licence of the weights as their publisher states it.
        source: address of the code or page that published them.
        sha256: digest of the file, only where a cited source states it.
        availability: whether the file can be had.
    """

    tag: str
    image_size: int
    num_classes: int
    naming: str
    license: str
    source: str
    hub_id: str | None = None
    filenames: tuple[str, ...] = ("model.safetensors",)
    in_chans: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_pct: float = 0.95
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    sha256: str | None = None
    availability: Literal["published", "never released", "link dead"] = "published"


@dataclasses.dataclass(frozen=True)
class Family:
    """One paper: its Flax module, the variants of it, and how foreign weights map onto it.

    Attributes:
        name: short name of the family, e.g. `"davit"`.
        module: the class, an `ImageModel` or a `SequenceModel`; its dataclass fields are what `create_model`
            accepts.
        variants: model name -> the fields in which it differs from the class's defaults.
        pretrained: weights by full tag.
        key_maps: naming scheme -> function from a model to its `KeyMap`; the first is the default for saving.
        sharding_rules: `(regex, axes)` pairs over parameter paths, first match wins; `axes` names one mesh
            axis (or None) per dimension of the parameter.
        evaluated: which weights its authors evaluate where their files hold both, `"ema"` or `"raw"`.
        layers: from a model to `(layer_of, last)`, for layer-wise learning rates: `layer_of(path)` is 0 at the
            input and `last` at the head; `path` is a parameter's without the leading `params/`.
    """

    name: str
    module: type[nn.Module]
    variants: Mapping[str, Mapping[str, Any]]
    pretrained: Mapping[str, PretrainedCfg]
    key_maps: Mapping[str, Callable[[nn.Module], KeyMap]]
    sharding_rules: tuple[tuple[str, tuple[str | None, ...]], ...]
    layers: Callable[[nn.Module], tuple[Callable[[str], int], int]]
    evaluated: Literal["ema", "raw"] = "ema"


_FAMILIES: dict[str, Family] = {}
_FAMILY_OF: dict[str, Family] = {}


def register(family: Family) -> None:
    """Makes a family's variants known by name.

    Raises:
        ValueError: if the family or one of its variants is registered already, or a tag names no variant.
    """
    if family.name in _FAMILIES:
        raise ValueError(f"family {family.name!r} is registered twice")
    for name in family.variants:
        if name in _FAMILY_OF:
            raise ValueError(f"model {name!r} is registered by {_FAMILY_OF[name].name!r} and {family.name!r}")
    for tag in family.pretrained:
        if tag.partition(".")[0] not in family.variants:
            raise ValueError(f"weights {tag!r} belong to no variant of family {family.name!r}")
    _FAMILIES[family.name] = family
    _FAMILY_OF.update(dict.fromkeys(family.variants, family))


def families() -> tuple[Family, ...]:
    """All families in the order in which they were registered."""
    return tuple(_FAMILIES.values())


# Names that an error lists.
MOST_KNOWN = 60


def nearest(name: str, known) -> str:
    """`"; did you mean 'x'?"`, or the list of what there is when nothing is near, cut off where it is long."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    more = f" and {len(known) - MOST_KNOWN:,} more" if len(known) > MOST_KNOWN else ""
    return f"; known: {', '.join(known[:MOST_KNOWN])}{more}"


def split_tag(name: str) -> tuple[str, str | None]:
    """Splits `"davit_tiny.msft_in1k"` into the model's name and the full tag (None for a bare name).

    Raises:
        ValueError: for an unknown model, or an unknown weight tag of a known model.
    """
    model, dot, _ = name.partition(".")
    if model not in _FAMILY_OF:
        raise ValueError(f"unknown model {model!r}{nearest(model, _FAMILY_OF)}")
    if not dot:
        return model, None
    tags = [tag for tag in _FAMILY_OF[model].pretrained if tag.partition(".")[0] == model]
    if name not in tags:
        raise ValueError(f"unknown weights {name!r}" + (nearest(name, tags) if tags else f"; {model} has none"))
    return model, name


def family_of(name: str) -> Family:
    """The family of a model name or full tag; an unknown name raises `ValueError` with the nearest."""
    return _FAMILY_OF[split_tag(name)[0]]


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """Sorted names of the models that match a shell-style pattern.

    Args:
        pattern: e.g. `"davit*"`.
        pretrained: list the full tags of published weights (`"davit_tiny.msft_in1k"`) instead of models.
    """
    names = [tag for f in families() for tag in f.pretrained] if pretrained else list(_FAMILY_OF)
    return sorted(fnmatch.filter(names, pattern))


def pretrained_cfg(tag: str) -> PretrainedCfg:
    """Input size, mean, std, crop, interpolation, licence, source and digest of published weights.

    A bare model name stands for its tag where it has exactly one.

    Raises:
        ValueError: for an unknown name, or a bare one that has no weights or several.
    """
    model, full = split_tag(tag)
    family = _FAMILY_OF[model]
    if full is None:
        tags = [t for t in family.pretrained if t.partition(".")[0] == model]
        if len(tags) != 1:
            found = ", ".join(tags) if tags else "none"
            raise ValueError(f"{tag!r} names no single set of weights; its tags: {found}")
        full = tags[0]
    return family.pretrained[full]


def create_model(name: str, **overrides: Any) -> nn.Module:
    """Builds a model by name; a `flax.linen.Module` with no parameters yet.

    Args:
        name: a name of `list_models()`, with or without a weight tag. A tag sets `num_classes` and
            `in_chans` to those of its weights; nothing is loaded (see `load_pretrained`).
        **overrides: fields of the family's module: of all `dtype`, `param_dtype`, `implementation`, `remat`; of an
            image model `num_classes`, `in_chans`, `image_size`, `features_only`, `drop_path_rate`, of a sequence
            model `vocab_size` and `length`; and others.

    Raises:
        ValueError: for an unknown model or weight tag, with the nearest names; for fields that do not fit one
            another or an `image_size` that the model cannot take, with the nearest that it can.
        TypeError: for an unknown override, with the nearest field.
    """
    model, tag = split_tag(name)
    family = _FAMILY_OF[model]
    known = {f.name for f in dataclasses.fields(family.module)} - {"parent", "name"}
    for key in overrides:
        if key not in known:
            raise TypeError(f"{model} takes no argument {key!r}{nearest(key, known)}")
    fields = dict(family.variants[model])
    if tag is not None:
        cfg = family.pretrained[tag]
        fields.update(num_classes=cfg.num_classes, in_chans=cfg.in_chans)
    model = family.module(**{**fields, **overrides})
    model.check()
    return model
