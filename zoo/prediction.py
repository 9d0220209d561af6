"""From pictures to a classifier's best guesses, with the preprocessing that its weights were made with."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from zoo import registry
from zoo.formats import orbax_dir
from zoo.image_model import ImageModel
from zoo.preprocess import EvalTransform, decode, eval_transform, published_transform
from zoo.pretrained import load_pretrained
from zoo.registry import IMAGENET_MEAN, IMAGENET_STD, PretrainedCfg
from zoo.report import LoadReport
from zoo.watch import run_watched

# Images that are run together.
BATCH = 8
DIGITS, DIGITS_SIDE = tuple("0123456789"), 8


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What becomes of a picture before a model sees it.

    Attributes:
        transform: resize and crop; it has the mean of every channel too.
        std: per channel, for values in [0, 1].
        source: where these come from, for a person.
    """

    transform: EvalTransform
    std: tuple[float, ...]
    source: str = ""

    @classmethod
    def of(cls, cfg: PretrainedCfg, image_size: int | tuple[int, int] | None = None) -> "Preprocessing":
        """That of published weights; `image_size` takes the place of the one that they came with."""
        return cls(published_transform(cfg, image_size), cfg.std, f"as published with {cfg.tag}")

    @property
    def channels(self) -> int:
        """1 or 3."""
        return len(self.std)

    def normalized(self, pixels: UInt8[np.ndarray, "*b h w c"]) -> Float[np.ndarray, "*b h w c"]:
        """Pixels that were resized and cropped, as float32 of about mean 0 and variance 1."""
        values = pixels.astype(np.float32) / np.float32(255)
        return (values - np.asarray(self.transform.mean, np.float32)) / np.asarray(self.std, np.float32)

    def __str__(self) -> str:
        height, width = self.transform.size
        numbers = [" ".join(f"{value:g}" for value in values) for values in (self.transform.mean, self.std)]
        return (
            f"{height}x{width} pixels, {self.transform.crop_mode} crop {self.transform.crop_pct:g}, "
            f"{self.transform.resample.name.lower()}, mean {numbers[0]}, std {numbers[1]}: {self.source}"
        )


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A classifier's best guesses.

    Attributes:
        classes: their indices, the most probable first; of equally probable ones the lowest index.
        probabilities: of these classes, shares of 1.
        labels: their names, None where they are not known.
    """

    classes: tuple[int, ...]
    probabilities: tuple[float, ...]
    labels: tuple[str, ...] | None = None

    def __str__(self) -> str:
        rows = zip(self.classes, self.probabilities, self.labels or ("",) * len(self.classes))
        return "\n".join(f"  {100 * share:6.2f} %  {number:>5}  {label}".rstrip() for number, share, label in rows)


def predict(
    model: nn.Module,
    variables: Any,
    images: Sequence[str | os.PathLike | np.ndarray],
    preprocessing: Preprocessing | PretrainedCfg,
    *,
    top: int = 5,
    labels: Sequence[str] | None = None,
) -> list[Prediction]:
    """Classifies pictures.

    Args:
        model: a classifier of the zoo.
        variables: its variables.
        images: files in any format that PIL reads, or uint8 arrays (H, W) or (H, W, 1, 3 or 4), of any sizes.
        preprocessing: what the weights expect; `zoo.pretrained_cfg` has it for published ones.
        top: how many guesses, at most all classes.
        labels: names of all classes in order.

    Returns:
        One prediction per picture.

    Raises:
        ValueError: for a picture that cannot be read, naming it; a model without a classifier; as many labels as
            there are not classes.
    """
    if isinstance(preprocessing, PretrainedCfg):
        preprocessing = Preprocessing.of(preprocessing)
    pixels = [preprocessing.transform.pixels(read_image(image, preprocessing.channels)) for image in images]
    logits, _ = run_model(model, variables, preprocessing.normalized(np.stack(pixels)))
    return best_guesses(logits, top=top, labels=labels)


def read_image(image: str | os.PathLike | np.ndarray, channels: int) -> UInt8[np.ndarray, "H W c"]:
    """The pixels of a file or an array; what cannot be read raises `ValueError` with its name."""
    if isinstance(image, np.ndarray):
        return decode(image, channels=channels, name="the image")
    path = Path(image).expanduser()
    try:
        content = path.read_bytes()
    except IsADirectoryError:
        raise ValueError(f"{path} is a directory, not a picture") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not content:
        raise ValueError(f"{path} is empty: 0 bytes")
    return decode(content, channels=channels, name=str(path))


def run_model(
    model: nn.Module,
    variables: Any,
    images: Float[np.ndarray, "B h w c"],
    *,
    batch: int | None = None,
    watch: bool = False,
) -> tuple[Float[np.ndarray, "B classes"], dict[str, Any]]:
    """Runs normalised images.

    Args:
        model, variables, images: the last are at least one.
        batch: how many are run together; None for all, and `BATCH` at most. The last ones are filled up to it, so
            that one program serves all.
        watch: whether to look at what the model attends to.

    Returns:
        The output in float32 (float64 where it is), and with `watch` what `zoo.attention_maps` returns for all
        images, in arrays of numpy; else no maps.
    """
    count, batch = len(images), batch or min(len(images), BATCH)
    images = np.concatenate([images, np.repeat(images[-1:], -count % batch, axis=0)])
    parts = []
    for start in range(0, count, batch):
        part = jnp.asarray(images[start : start + batch])
        parts.append(jax.device_get((run_watched if watch else _run)(model, variables, part)))
    output, maps = jax.tree.map(lambda *arrays: np.concatenate(arrays)[:count], *parts)
    return np.asarray(output, np.promote_types(output.dtype, np.float32)), maps


def best_guesses(
    logits: Float[np.ndarray, "B classes"], *, top: int = 5, labels: Sequence[str] | None = None
) -> list[Prediction]:
    """The most probable classes of every row of logits; arguments as in `predict`."""
    classes = logits.shape[1]
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    if labels is not None and len(labels) != classes:
        raise ValueError(f"labels must name all {classes} classes of the model, got {len(labels)} names")
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    found = []
    for row in weights / weights.sum(axis=1, keepdims=True):
        order = [int(i) for i in np.argsort(-row, kind="stable")[:top]]
        names = None if labels is None else tuple(labels[i] for i in order)
        found.append(Prediction(tuple(order), tuple(float(row[i]) for i in order), names))
    return found


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A model with its weights and all that prediction needs beside them."""

    model: nn.Module
    variables: Any
    report: LoadReport
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None


def load_classifier(
    name: str,
    source: str | os.PathLike | Mapping[str, Any] | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    **options: Any,
) -> Classifier:
    """A model with weights, and the preprocessing that goes with them.

    That is what the config says which a run of the train loop keeps beside its checkpoints; else what published weights
    come with, those of the tag, or of the only tag of a bare name; else ImageNet's values (one half for grey) at the
    model's size.

    Args:
        name: model, or full tag.
        source: of the weights, as in `zoo.load_pretrained`.
        image_size: side, or (height, width), in place of the one that would be taken.
        **options: more of `zoo.load_pretrained`.

    Raises:
        ValueError: for a model of tokens; if the weights are a run's that trained another model; and as
            `zoo.load_pretrained` does.
    """
    model_name, tag = registry.split_tag(name)
    if not issubclass(registry.family_of(name).module, ImageModel):
        raise ValueError(f"{model_name} takes tokens, not pictures; zoo.load_language_model loads it")
    config, overrides = trained_as(name, source)
    data = config.get("data", {})
    size = image_size or data.get("image_size")
    model, variables, report = load_pretrained(name, source, image_size=size, **{**overrides, **options})
    if model.in_chans not in (1, 3):
        raise ValueError(f"{name} takes images of {model.in_chans} channels; pictures have 1 or 3")

    tags = [tag] if tag else registry.list_models(f"{model_name}.*", pretrained=True)
    cfg = registry.pretrained_cfg(tags[0]) if len(tags) == 1 else None
    digits = data.get("name") == "digits" or (model_name.endswith("_nano") and model.num_classes == len(DIGITS))
    if data:
        size = size or (DIGITS_SIDE if digits else model.input_size())
        crop_mode = data.get("crop_mode", "center")  # configs of older runs have none
        transform = eval_transform(size, data["crop_pct"], data["interpolation"], crop_mode, mean=data["mean"])
        preprocessing = Preprocessing(transform, tuple(data["std"]), "as the run was evaluated")
    elif cfg is not None and len(cfg.mean) == model.in_chans:
        preprocessing = Preprocessing.of(cfg, size)
    else:
        size = size or model.input_size(default=DIGITS_SIDE if digits else 224)
        grey = model.in_chans == 1
        mean, std = ((0.5,), (0.5,)) if grey else (IMAGENET_MEAN, IMAGENET_STD)
        transform = eval_transform(size, 1.0 if grey else 0.875, mean=mean)
        why = f"{model_name} has {len(tags)} tags" if tags else f"{model_name} has no published weights"
        preprocessing = Preprocessing(transform, std, f"{'one half' if grey else 'ImageNet values'}, as {why}")
    return Classifier(model, variables, report, preprocessing, DIGITS if digits else None)


def trained_as(
    name: str, source: str | os.PathLike | Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config of the run that these weights are of, and the model's fields that it sets; both empty for all else.

    Raises:
        ValueError: if the run trained another model than `name`.
    """
    config = {} if source is None or isinstance(source, Mapping) else run_config(source)
    model_name, trained = registry.split_tag(name)[0], config.get("model", {})
    if trained.get("name", model_name) != model_name:
        raise ValueError(f"{source} holds weights of {trained['name']}, not of {model_name}")
    return config, {field: _hashable(value) for field, value in trained.get("overrides", {}).items()}


def run_config(source: str | os.PathLike) -> dict[str, Any]:
    """The config of the run whose directory, checkpoints or step this is; empty for all else."""
    path = orbax_dir.checkpoint_path(source)
    if not path.is_dir():
        return {}
    root, step = orbax_dir.locate(path)

    def attempt(number: int) -> dict[str, Any]:
        place = root / str(number)
        return orbax_dir.verified(place, lambda: orbax_dir.read_json(place / "config"))

    try:
        found = orbax_dir.newest_good(root, attempt, step)
    except orbax_dir.CheckpointError:
        # Whoever loads the weights says what is wrong with them.
        return {}
    return {} if found is None else found[1]


@functools.partial(jax.jit, static_argnums=0)
def _run(model: nn.Module, variables: Any, images: Float[Array, "B h w c"]) -> tuple[Any, dict[str, Any]]:
    return model.apply(variables, images), {}


def _hashable(value: Any) -> Any:
    """A value of a config with tuples where JSON has lists, as fields of models want them."""
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
