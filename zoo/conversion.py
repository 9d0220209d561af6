"""From one format of weights to another: the same tensors, bit for bit, under the same or another naming's names."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from zoo import registry
from zoo.errors import WeightsError
from zoo.formats.orbax_writer import holds_steps_only, write_checkpoint
from zoo.formats.writers import SUFFIXES, write_weights
from zoo.keymap import flatten, unflatten
from zoo.matching import Names
from zoo.pretrained import (
    OWN_NAMING,
    check_naming,
    key_map_of,
    load_pretrained,
    open_weights,
    save_pretrained,
)
from zoo.report import LoadReport

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ConvertReport:
    """What `convert` wrote; as a string, for a person.

    Attributes:
        destination: the file or directory.
        format: `"safetensors"`, `"npz"`, `"torch"` or `"orbax"`.
        naming: whose names the tensors have there.
        dtype: what floating tensors were cast to, None where every one kept its own.
        resized: leaf -> `"(3, 13, 13) -> (3, 23, 23), bilinear"`, where the new names need another shape than the
            source has; all other values are those of the source.
        source: what reading the source did.
    """

    destination: str
    format: str
    naming: str
    dtype: str | None
    resized: Mapping[str, str]
    source: LoadReport

    def to_json(self) -> str:
        """All attributes as one JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        values = f"cast to {self.dtype}" if self.dtype else "every value as in the source"
        if self.resized:
            values += f", but {len(self.resized)} resized: {next(iter(self.resized.values()))}"
        return f"{self.source}\n{self.destination}: {self.format}, names as in {self.naming}; {values}"


def convert(
    name: str,
    source: str | os.PathLike | Mapping[str, Any],
    destination: str | os.PathLike,
    *,
    naming: str | None = None,
    dtype: str | None = None,
    weights: str | None = None,
    overwrite: bool = False,
    image_size: int | tuple[int, int] | None = None,
    resize: str | None = None,
    **overrides: Any,
) -> ConvertReport:
    """Writes the weights of a model in another format, whole or not at all.

    They are held against the model as `load_pretrained` does it; what is no parameter or statistic of it (counters,
    constant tables, an optimizer's state, the other one of raw and averaged weights) is left behind.

    Args:
        name: model name or full tag.
        source: as in `load_pretrained`, but not None.
        destination: a file whose suffix is one of `zoo.formats.writers.SUFFIXES`, or, without a suffix, a checkpoint
            directory, which `load_pretrained` reads and the train loop starts from.
        naming: names in the file: a key of the family's `key_maps`, or `"zoo"` for the variables' own paths, which
            a directory always has. None keeps those of the source; from a directory, the family's first.
        dtype: one of `DTYPES`, of the floating tensors; None keeps every tensor's own.
        weights: `"ema"` or `"raw"` where the source holds both; None takes the moving average.
        overwrite: replace what is at the destination: a file, or a directory that holds nothing but steps.
        image_size, resize: as in `load_pretrained`; tables are resized only where the naming changes.
        **overrides: fields of the model.

    Raises:
        FileExistsError: the destination exists.
        WeightsError: the source cannot be read or is not of this model, or a value is too large for `dtype`.
        ValueError: for an unknown name, naming, dtype or suffix.
        OSError: the destination cannot be written.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"unknown dtype {dtype!r}{registry.nearest(str(dtype), DTYPES)}")
    target = Path(destination).expanduser()
    format = _format(target, naming)
    _check_free(target, overwrite)
    family = registry.family_of(name)
    if naming is not None:
        check_naming(family, naming)
    opened = open_weights(name, source, weights)
    model, variables, report = load_pretrained(
        name, opened, weights=weights, image_size=image_size, resize=resize, **overrides
    )
    if report.replaced:
        raise ValueError("num_classes: only the source's number or 0 can be converted, another draws a new classifier")
    if format == "orbax":
        naming = OWN_NAMING
    elif naming is None:
        naming = next(iter(family.key_maps)) if report.format == "orbax" else report.naming
    leaves = flatten(variables)
    names = Names(key_map_of(family, model, report.naming, leaves), opened, weights)
    resized = {} if naming == report.naming else report.resized
    wanted = None if dtype is None else jnp.dtype(dtype)
    if naming == report.naming and format != "orbax":
        kept = {names.full(key): names.arrays[key] for key, entry in names.entries.items() if entry.path in leaves}
        write_weights(target, {key: _deferred(key, array, wanted) for key, array in kept.items()})
    else:
        stored = {path: _stored(names, path, value, path in resized) for path, value in leaves.items()}
        if format == "orbax":
            cast = {path: _deferred(path, array, wanted)[-1]() for path, array in stored.items()}
            write_checkpoint(target, unflatten(cast), {"model": {"name": report.model}})
        else:
            save_pretrained(model, unflatten(stored), target, naming=naming, dtype=wanted)
    return ConvertReport(str(target), format, naming, dtype, dict(resized), report)


def _format(target: Path, naming: str | None) -> str:
    formats = {suffix: "torch" if suffix.startswith(".p") else suffix[1:] for suffix in SUFFIXES} | {"": "orbax"}
    if target.suffix not in formats:
        raise ValueError(
            f"destination {str(target)!r}: {target.suffix} files cannot be written, only {', '.join(SUFFIXES)} and,"
            " without a suffix, checkpoint directories"
        )
    format = formats[target.suffix]
    if format == "orbax" and naming not in (None, OWN_NAMING):
        raise ValueError(f"naming {naming!r}: a checkpoint directory holds variables under their own paths only")
    return format


def _check_free(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists; it is replaced only where overwrite is asked for")
    if target.is_dir() and not (target.suffix == "" and holds_steps_only(target)):
        raise FileExistsError(f"{target} is a directory that holds more than checkpoints: it is never replaced")
    if target.suffix == "" and not target.is_dir():
        raise FileExistsError(f"{target} is a file, a checkpoint directory does not replace it")


def _stored(names: Names, path: str, value: Any, resized: bool) -> np.ndarray:
    """A leaf in the source's dtype; as it was loaded where the source has none of its shape."""
    entry = names.key_map.rule_of_target(path)
    if entry is None:
        return np.asarray(value)
    tensors = [names.arrays[key] for key in entry.sources]
    return np.asarray(value).astype(tensors[0].dtype) if resized else entry.rule.transform.apply(*tensors)


def _deferred(
    name: str, array: np.ndarray, dtype: np.dtype | None
) -> tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]:
    """An array as `write_weights` wants it, cast if it is of a floating dtype."""
    if dtype is None or not jnp.issubdtype(array.dtype, jnp.floating):
        dtype = array.dtype

    def read() -> np.ndarray:
        with np.errstate(over="ignore"):
            cast = array.astype(dtype)
        if dtype != array.dtype and not np.array_equal(np.isfinite(cast), np.isfinite(array)):
            raise WeightsError(f"{name!r} holds values too large for dtype={dtype}")
        return cast

    return array.shape, dtype, read
