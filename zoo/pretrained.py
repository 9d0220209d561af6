"""Any checkpoint to a model's variables, and back, by the family's key map: strict in both directions."""

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.dispatch import only_for
from zoo import hub, registry
from zoo.errors import WeightsError
from zoo.formats.readers import Source, open_source
from zoo.formats.writers import write_weights
from zoo.keymap import Entry, KeyMap, flatten, identity_map, unflatten
from zoo.matching import Loader, Names
from zoo.report import LoadReport

RESIZE_METHODS = ("bilinear", "bicubic", "geometric")

# The naming of variables stored under their own paths, which every family reads and writes.
OWN_NAMING = "zoo"


def load_pretrained(
    name: str,
    source: str | os.PathLike | Mapping[str, Any] | Source | None = None,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    resize: str | None = None,
    naming: str | None = None,
    weights: str | None = None,
    seed: int = 0,
    **overrides: Any,
) -> tuple[nn.Module, dict[str, Any], LoadReport]:
    """Builds a model with the weights of a checkpoint.

    Every leaf of the model is written exactly once and every tensor of the source is used, ignored for a reason
    that the report gives, or an error. Only a classifier that `num_classes` replaces is drawn at random.

    Args:
        name: a model name, or a full tag such as `"davit_tiny.msft_in1k"`.
        source: a `.safetensors`, `.npz` or torch file (never executed), a checkpoint directory of the train
            loop, a TensorFlow checkpoint (prefix or directory; no TensorFlow needed), or a mapping of arrays of any
            framework. A full tag fetches its weights, None those of `name`.
        num_classes: None takes the source's number, 0 leaves the classifier out, another number than the
            source's makes a fresh classifier.
        in_chans: None takes the source's number; another one adapts a three-channel input convolution as timm
            does: summed for one channel, else repeated and scaled by `3 / in_chans`.
        image_size: side, or (height, width), of the images in pixels; weights that depend on it are resized.
        resize: how such weights are resized: `"bilinear"`, `"bicubic"` or, tables of relative positions alone,
            `"geometric"`, see `zoo.relative_bias.resize_table` and `zoo.position_embedding.resize_positions`. None
            does what the reference does: bilinear for tables, bicubic for position embeddings.
        naming: the source's names, a key of the family's `key_maps` or `"zoo"` for the variables' own paths;
            None detects them.
        weights: `"ema"` or `"raw"` where the source holds both; None takes the moving average, but of BiFormer's
            files the raw weights, which its authors evaluate.
        seed: for the fresh classifier.
        **overrides: fields of the model, as in `create_model`.

    Returns:
        The model, its variables (`{"params": ...}` and other collections) in the model's `param_dtype`, and a
        report of all that was done.

    Raises:
        WeightsError: listing all that is missing, unexpected, misshapen, mistyped or not finite; or saying why
            the source cannot be read, or that its digest is not the tag's.
        ValueError, TypeError: for arguments that are wrong whatever the source.
    """
    if resize not in (None, *RESIZE_METHODS):
        raise ValueError(f"resize must be one of {', '.join(map(repr, RESIZE_METHODS))}, got {resize!r}")
    for argument, value, least in (("num_classes", num_classes, 0), ("in_chans", in_chans, 1)):
        if value is not None and value < least:
            raise ValueError(f"{argument} must be at least {least} or None, got {value}")
    model_name, tag = registry.split_tag(name)
    family = registry.family_of(model_name)
    if naming is not None:
        check_naming(family, naming)
    if image_size is not None and "image_size" in {field.name for field in dataclasses.fields(family.module)}:
        overrides["image_size"] = image_size
    asked = {"num_classes": num_classes, "in_chans": in_chans}
    overrides |= {field: value for field, value in asked.items() if value is not None}
    model = registry.create_model(model_name, **overrides)
    opened = open_weights(name, source, weights)
    digest = _check_digest(_published(name, source), opened)

    leaves = _abstract_leaves(model)
    naming = naming or _detect_naming(family, model, leaves, opened)
    names = Names(key_map_of(family, model, naming, (*leaves, *opened.arrays)), opened, weights)
    classes = names.classes(leaves)
    found = {"num_classes": classes if names.key_map.has_classifier else 0, "in_chans": names.channels(leaves)}
    special = {"num_classes": names.key_map.classifier, "in_chans": names.key_map.input_conv}
    found = {field: n for field, n in found.items() if n is not None and special[field]}
    if changed := {field: n for field, n in found.items() if asked[field] is None and n != getattr(model, field)}:
        model = registry.create_model(model_name, **overrides, **changed)
        leaves = _abstract_leaves(model)
        names = Names(key_map_of(family, model, naming, (*leaves, *opened.arrays)), opened, weights)

    headless = getattr(model, "features_only", False)
    dropped = frozenset(_abstract_leaves(model.clone(features_only=False)) if headless else ()) - leaves.keys()
    replace = num_classes not in (None, 0, classes) and not headless
    loader = Loader(names, replace_classifier=replace, resize=resize, dropped=dropped)
    variables = {path: loader.leaf(path, leaf) for path, leaf in leaves.items()}
    ignored = loader.check(
        f"{opened.path or 'the mapping'} does not fit {model_name} (read with the names of {naming!r})"
    )
    if loader.replaced:
        variables |= _initialise(model, loader.replaced, seed)
    counts = Counter()
    for path, leaf in leaves.items():
        counts[path.startswith("params/")] += leaf.size
    report = LoadReport(
        model=model_name,
        tag=tag,
        source=opened.path or "mapping",
        format=opened.format,
        sha256=opened.sha256,
        digest=digest,
        naming=naming,
        weights=names.weights,
        unwrapped=opened.unwrapped,
        beside=opened.beside,
        leaves=len(leaves),
        parameters=counts[True],
        statistics=counts[False],
        num_classes=getattr(model, "num_classes", None),
        in_chans=getattr(model, "in_chans", None),
        image_size=getattr(model, "image_size", image_size),
        casts=loader.casts,
        replaced=tuple(loader.replaced),
        adapted=loader.adapted,
        resized=loader.resized,
        absent_in_source=loader.absent,
        ignored=ignored,
    )
    return model, unflatten(variables), report


def save_pretrained(
    model: nn.Module,
    variables: Mapping[str, Any],
    path: str | os.PathLike,
    *,
    naming: str | None = None,
    dtype: Any = None,
) -> None:
    """Writes a model's variables under the names that the reference uses.

    Args:
        model: a model of the zoo.
        variables: all of its collections.
        path: a file that ends in `.safetensors`, `.npz`, `.pth` or `.pt`; a present one is replaced once the new one
            is complete.
        naming: a key of the family's `key_maps`, by default the first, or `"zoo"` for the variables' own paths.
        dtype: of the floating tensors in the file; None keeps each as it is, bit for bit.

    Raises:
        WeightsError: where the variables are not those of the model, or hold what the naming has no name for.
        ValueError: for an unknown naming, or a suffix or dtype that cannot be written.
    """
    family = _family_of_model(model)
    naming = naming or next(iter(family.key_maps), OWN_NAMING)
    check_naming(family, naming)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating dtype or None, got {dtype!r}")
    leaves, values = _abstract_leaves(model), flatten(variables)
    _check_variables(values, leaves)
    key_map = key_map_of(family, model, naming, leaves)
    arrays: dict[str, Any] = {}
    nameless = []
    for leaf, value in values.items():
        entry = key_map.rule_of_target(leaf)
        if entry is None:
            fill = key_map.fill_of(leaf)
            if fill is None or not np.all(np.asarray(value) == fill):
                nameless.append(repr(leaf) if fill is None else f"{leaf!r}, unless it is {fill:g} everywhere")
            continue
        stored = np.dtype(dtype) if dtype is not None and jnp.issubdtype(value.dtype, jnp.floating) else value.dtype
        shapes = entry.rule.transform.source_shapes(np.shape(value))
        for part, (name, shape) in enumerate(zip(entry.sources, shapes, strict=True)):
            read = functools.partial(_source_tensor, entry, part, value, stored)
            arrays[key_map.prefix + name] = (shape, np.dtype(stored), read)
    if nameless:
        others = ", ".join(repr(other) for other in (*family.key_maps, OWN_NAMING) if other != naming)
        message = f"the names of {naming!r} have no place for some leaves; naming= may be {others} instead"
        raise WeightsError(message, {"nameless": nameless})
    write_weights(path, arrays)


def _source_tensor(entry: Entry, part: int, value: Any, dtype: np.dtype) -> np.ndarray:
    """One of the source tensors that make a leaf."""
    tensor = entry.rule.transform.invert(np.asarray(value))[part]
    if tensor.dtype == dtype:
        return tensor
    with np.errstate(over="ignore"):
        cast = tensor.astype(dtype)
    if not np.array_equal(np.isfinite(cast), np.isfinite(tensor)):
        raise WeightsError(f"{entry.path!r} holds values too large for dtype={dtype}")
    return cast


def _check_variables(values: Mapping[str, Any], leaves: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    problems = {
        "missing": [f"{path!r} {leaf.shape}" for path, leaf in leaves.items() if path not in values],
        "unexpected": [f"{path!r} {np.shape(value)}" for path, value in values.items() if path not in leaves],
        "misshapen": [
            f"{path!r} is {np.shape(value)}, {leaves[path].shape} is wanted"
            for path, value in values.items()
            if path in leaves and np.shape(value) != leaves[path].shape
        ],
    }
    if any(problems.values()):
        raise WeightsError("the variables are not those of the model", problems)


def abstract_variables(model: nn.Module) -> Mapping[str, Any]:
    """Shapes and dtypes of a model's variables."""
    # The key is made inside, or it would be an array on a device; shapes are the same whatever computes them.
    with only_for("cpu"):
        return jax.eval_shape(lambda inputs: model.init(jax.random.key(0), **inputs), model.example_inputs())


def _abstract_leaves(model: nn.Module) -> dict[str, jax.ShapeDtypeStruct]:
    return flatten(abstract_variables(model))


def _initialise(model: nn.Module, paths: Iterable[str], seed: int) -> dict[str, jax.Array]:
    """These leaves as `model.init` draws them; the compiler leaves out the rest."""

    @jax.jit
    def draw(key):
        inputs = {name: jnp.zeros(like.shape, like.dtype) for name, like in model.example_inputs().items()}
        leaves = flatten(model.init(key, **inputs))
        return {path: leaves[path] for path in paths}

    return draw(jax.random.key(seed))


def check_naming(family: registry.Family, naming: str) -> None:
    """Raises `ValueError` for a naming that the family does not have, with the nearest."""
    known = (*family.key_maps, OWN_NAMING)
    if naming not in known:
        raise ValueError(f"unknown naming {naming!r} of family {family.name!r}{registry.nearest(naming, known)}")


def key_map_of(family: registry.Family, model: nn.Module, naming: str, paths: Iterable[str]) -> KeyMap:
    """The key map of a naming; `paths` are all names that the variables' own paths may be under."""
    if naming == OWN_NAMING:
        like = next(iter(family.key_maps.values()))(model) if family.key_maps else KeyMap(())
        return identity_map(frozenset(paths), like)
    return family.key_maps[naming](model)


def _detect_naming(family: registry.Family, model: nn.Module, leaves: Iterable[str], opened: Source) -> str:
    counts = {name: make(model).coverage(opened.arrays) for name, make in family.key_maps.items()}
    counts[OWN_NAMING] = len(set(leaves) & set(opened.arrays))
    best = max(counts, key=counts.__getitem__)
    if not counts[best]:
        shown = ", ".join(repr(name) for name in list(opened.arrays)[:5])
        raise WeightsError(
            f"{opened.path or 'the mapping'}: none of its {len(opened.arrays)} names is one of {family.name}'s"
            f" ({', '.join((*family.key_maps, OWN_NAMING))}): {shown}, ..."
        )
    return best


def open_weights(
    name: str, source: str | os.PathLike | Mapping[str, Any] | Source | None, weights: str | None = None
) -> Source:
    """The source of a model's weights as `load_pretrained` finds it, which takes what this returns as its source.

    Args:
        name: a model name, or a full tag.
        source, weights: as in `load_pretrained`; what is open already stays as it is.
    """
    if isinstance(source, Source):
        return source
    cfg = _published(name, source)
    fetch = source is None or isinstance(source, str) and cfg is not None and cfg.tag == source
    if not fetch:
        return open_source(source, weights, default=registry.family_of(name).evaluated)
    if cfg is None:
        tags = registry.list_models(f"{name}.*", pretrained=True)
        published = f"or name published weights: {', '.join(tags)}" if tags else "it has no published weights"
        raise ValueError(f"{name!r} alone names no weights: pass source=, {published}")
    path = hub.fetch(cfg)
    opened = open_source(path, weights, default=registry.family_of(name).evaluated)
    stated = hub.stated_digest(path)
    if stated not in (None, opened.sha256):
        raise WeightsError(
            f"{path}: damaged in the cache, its sha256 is {opened.sha256}, the hub's is {stated}: delete"
            f" {path.resolve()} and load again"
        )
    return opened


def _published(name: str, source: Any) -> registry.PretrainedCfg | None:
    """Of the tag that `source` is, else of that in `name`, if there is one."""
    tag = registry.split_tag(name)[1]
    if isinstance(source, str) and source in registry.list_models(pretrained=True):
        tag = source
    return registry.pretrained_cfg(tag) if tag else None


def _check_digest(cfg: registry.PretrainedCfg | None, opened: Source) -> str:
    if cfg is None or cfg.sha256 is None or opened.sha256 is None:
        return "unknown"
    if cfg.sha256 != opened.sha256:
        raise WeightsError(
            f"{opened.path}: sha256 is {opened.sha256}, that of {cfg.tag} is {cfg.sha256}: delete the file and"
            f" fetch it again, or name the model without its tag to load other weights"
        )
    return "matches"


def _family_of_model(model: nn.Module) -> registry.Family:
    for family in registry.families():
        if type(model) is family.module:
            return family
    raise TypeError(f"model must be a model of the zoo, got {type(model).__name__}")
