"""Whether a weight file is what it should be: a ladder of checks, none of which hides another."""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo import registry
from zoo.errors import WeightsError
from zoo.formats.readers import Source, open_source
from zoo.info import sizes
from zoo.pretrained import load_pretrained, open_weights
from zoo.report import LoadReport
from zoo.tables import table

Outcome = Literal["passed", "failed", "not checked"]

# Of logits in float32, between programs that add in another order.
ATOL = 1e-4


@dataclasses.dataclass(frozen=True)
class Rung:
    """One check.

    Attributes:
        name: `"names and shapes"`, `"counts"`, `"digest"`, `"finite"` or `"reference"`.
        outcome: `"passed"`, `"failed"` or `"not checked"`.
        detail: what was checked, with the numbers, or why it was not.
        problems: kind of problem -> one line for each tensor concerned, all of them.
    """

    name: str
    outcome: Outcome
    detail: str
    problems: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """All rungs; as a string, for a person.

    Attributes:
        name: the model or full tag that the weights were held against.
        source: path of the weights, or `"mapping"`.
        sha256: of the file, None where the weights are not one file.
        passed: whether no rung failed; one that was not checked has not.
        rungs: in the order of the ladder.
        load: what loading the weights did, None where they do not fit.
    """

    name: str
    source: str
    sha256: str | None
    passed: bool
    rungs: tuple[Rung, ...]
    load: LoadReport | None

    def to_json(self) -> str:
        """All attributes as one JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        rows = [(f"  {rung.name}", rung.outcome, rung.detail) for rung in self.rungs]
        lines = [f"{self.source} as {self.name}", *table(rows, "<<<")]
        if self.sha256:
            lines.insert(1, f"  sha256 {self.sha256}")
        problems = {kind: found for rung in self.rungs for kind, found in rung.problems.items()}
        if problems:
            lines += str(WeightsError("", problems)).splitlines()[1:]
        counts = {outcome: sum(rung.outcome == outcome for rung in self.rungs) for outcome in ("failed", "not checked")}
        verdict = "nothing failed" if self.passed else f"{counts['failed']} of {len(self.rungs)} failed"
        unchecked = f", {counts['not checked']} not checked" if counts["not checked"] else ""
        return "\n".join([*lines, verdict + unchecked])


def verify(
    name: str,
    source: str | os.PathLike | Mapping[str, Any],
    *,
    reference: str | os.PathLike | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    resize: str | None = None,
    naming: str | None = None,
    weights: str | None = None,
    **overrides: Any,
) -> VerifyReport:
    """Holds weights against a model: names and shapes, counts, digest, finite values, reference outputs.

    Every rung is climbed whatever the one below it says, as far as it can be.

    Args:
        name: a model name, or a full tag, whose classes, channels and digest the weights should then have.
        source: as in `load_pretrained`, but not None.
        reference: an `.npz` file of `images` (B, H, W, C), normalised, and the `logits` (B, classes) that are right
            for them in float32, for a model without classifier its features; `atol` in it replaces 1e-4.
        num_classes, in_chans: what the weights should have; None: what the tag or the model has.
        image_size: as in `load_pretrained`; None: that of the reference's images, if there is one.
        resize, naming, weights, **overrides: as in `load_pretrained`.

    Raises:
        WeightsError: if the source cannot be read at all.
        ValueError, TypeError: for an unknown name or option, or a reference that is none for this model.
    """
    model_name, tag = registry.split_tag(name)
    expected = None if reference is None else _read_reference(Path(reference).expanduser())
    if expected is not None and image_size is None:
        height, width = expected.images.shape[1:3]
        image_size = height if height == width else (height, width)
    given = dict(num_classes=num_classes, in_chans=in_chans, image_size=image_size)
    given = {field: value for field, value in given.items() if value is not None}
    model = registry.create_model(name, **given, **overrides)
    if expected is not None and expected.images.shape[-1] != model.in_chans:
        raise ValueError(
            f"{reference}: its images have {expected.images.shape[-1]} channels, the model takes {model.in_chans}"
        )
    opened = open_weights(name, source, weights)
    try:
        loaded, variables, report = load_pretrained(
            model_name, opened, image_size=image_size, resize=resize, naming=naming, weights=weights, **overrides
        )
    except WeightsError as error:
        return _misfit(name, tag, model, opened, error)
    rungs = (
        Rung("names and shapes", "passed", _what_fitted(report)),
        _counts(model, loaded, report),
        _digest(tag, report.sha256),
        Rung("finite", "passed", f"all {report.parameters + report.statistics:,} numbers"),
        _outputs(loaded, variables, expected),
    )
    return VerifyReport(name, report.source, report.sha256, _passed(rungs), rungs, report)


def _misfit(name: str, tag: str | None, model: nn.Module, opened: Source, error: WeightsError) -> VerifyReport:
    """What can be said of weights that do not fit the model."""
    problems = dict(error.problems)
    infinite = problems.pop("not finite", ())
    found = ", ".join(f"{len(lines)} {kind}" for kind, lines in problems.items())
    if error.problems and not problems:
        names = Rung("names and shapes", "passed", f"all of the {len(opened.arrays)} tensors")
    else:
        names = Rung("names and shapes", "failed", found or str(error), problems)
    numbers = sum(array.size for array in opened.arrays.values())
    parameters, statistics = sizes(model)
    counts = f"it holds {numbers:,} numbers, the model {parameters:,} parameters and {statistics:,} statistics"
    finite = Rung("finite", "passed", "no NaN, no infinity in the tensors that have a place in the model")
    if infinite:
        finite = Rung("finite", "failed", f"{len(infinite)} tensors", {"not finite": infinite})
    elif not error.problems:
        finite = Rung("finite", "not checked", "no tensor has a place in the model")
    rungs = (
        names,
        Rung("counts", "not checked", counts),
        _digest(tag, opened.sha256),
        finite,
        Rung("reference", "not checked", "the weights cannot be loaded"),
    )
    return VerifyReport(name, opened.path or "mapping", opened.sha256, _passed(rungs), rungs, None)


def _passed(rungs: tuple[Rung, ...]) -> bool:
    return all(rung.outcome != "failed" for rung in rungs)


def _what_fitted(report: LoadReport) -> str:
    notes = [f"{report.leaves} leaves, names as in {report.naming}"]
    if report.weights:
        notes.append(f"{report.weights} weights")
    notes += [f"{count} cast {kind}" for kind, count in Counter(report.casts.values()).items()]
    notes += [f"{count} resized {kind}" for kind, count in Counter(report.resized.values()).items()]
    if report.absent_in_source:
        notes.append(f"{len(report.absent_in_source)} filled, which this naming does not have")
    notes += [f"{len(keys)} left out ({reason})" for reason, keys in report.ignored.items()]
    return "; ".join(notes)


def _counts(model: nn.Module, loaded: nn.Module, report: LoadReport) -> Rung:
    parameters, statistics = sizes(model)
    fields = ("num_classes", "in_chans")
    differ = [
        f"{f}={getattr(loaded, f)}, not {getattr(model, f)}" for f in fields if getattr(loaded, f) != getattr(model, f)
    ]
    found = f"{report.parameters:,} parameters"
    if report.statistics or statistics:
        found += f" and {report.statistics:,} statistics"
    if (report.parameters, report.statistics) == (parameters, statistics) and not differ:
        return Rung("counts", "passed", f"{found}, as many as the model has")
    wanted = f"{parameters:,}" + (f" and {statistics:,}" if statistics else "")
    return Rung("counts", "failed", f"{found}, the model has {wanted}" + "".join(f"; {text}" for text in differ))


def _digest(tag: str | None, sha256: str | None) -> Rung:
    if sha256 is None:
        return Rung("digest", "not checked", "digest unknown: the weights are not one file")
    stated = None if tag is None else registry.pretrained_cfg(tag).sha256
    if stated is None:
        why = "none is on record for this tag" if tag else "no tag was named"
        return Rung("digest", "not checked", f"digest unknown: {why}")
    if sha256 == stated:
        return Rung("digest", "passed", "the sha256 is the one on record")
    return Rung("digest", "failed", f"the sha256 on record is {stated}")


@dataclasses.dataclass(frozen=True)
class _Reference:
    images: np.ndarray
    logits: np.ndarray
    atol: float


def _read_reference(path: Path) -> _Reference:
    arrays = open_source(path).arrays
    if missing := {"images", "logits"} - arrays.keys():
        raise ValueError(f"{path}: a reference has images and logits, {' and '.join(sorted(missing))} is not in it")
    images, logits = np.asarray(arrays["images"], np.float32), np.asarray(arrays["logits"], np.float32)
    if images.ndim != 4 or logits.ndim != 2 or len(images) != len(logits):
        raise ValueError(
            f"{path}: images must be (batch, height, width, channels) and logits (batch, classes),"
            f" got {images.shape} and {logits.shape}"
        )
    return _Reference(images, logits, float(arrays.get("atol", ATOL)))


def _outputs(model: nn.Module, variables: Mapping[str, Any], expected: _Reference | None) -> Rung:
    if expected is None:
        return Rung("reference", "not checked", "no reference activations are stored; a file of them can be given")
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(jax.jit(model.apply)(variables, jnp.asarray(expected.images)), np.float32)
    if logits.shape != expected.logits.shape:
        return Rung("reference", "failed", f"logits are {logits.shape}, those of the reference {expected.logits.shape}")
    furthest = float(np.abs(logits - expected.logits).max())
    images = "one image" if len(logits) == 1 else f"{len(logits)} images"
    detail = f"logits of {images} differ by at most {furthest:.3g}, {expected.atol:g} is allowed"
    return Rung("reference", "passed" if furthest <= expected.atol else "failed", detail)
