"""What loading weights did, for a person and for a machine."""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping

_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """Everything that happened between a source and a model's variables.

    Attributes:
        model: name of the model.
        tag: full tag of the published weights, None where the source was given without one.
        source: path of the file or directory, or `"mapping"`.
        format: of the source, as `zoo.formats.readers.Source` names it.
        sha256: digest of the file, None where there is not one file.
        digest: `"matches"` the tag's, or `"unknown"` where none is on record.
        naming: the key map that read the source.
        weights: `"ema"` or `"raw"` where the source holds both, else None.
        unwrapped: keys of outer dicts and prefixes of names that were taken off.
        beside: what else the file's outer dict held.
        leaves, parameters, statistics: how many leaves the model has, and numbers in `params` and in the
            other collections.
        num_classes, in_chans, image_size: of the model, None where it has no such field.
        casts: leaf -> `"float16 -> float32"`.
        replaced: leaves of a fresh classifier, drawn by the model's own initialisers.
        adapted: leaf -> `"3 -> 1 channels"`.
        resized: leaf -> `"(13, 13) -> (23, 23), bilinear"`.
        absent_in_source: leaf -> the constant it was filled with, since this naming does not have it.
        ignored: reason -> source keys that were left out.
    """

    model: str
    tag: str | None
    source: str
    format: str
    sha256: str | None
    digest: str
    naming: str
    weights: str | None
    unwrapped: tuple[str, ...]
    beside: tuple[str, ...]
    leaves: int
    parameters: int
    statistics: int
    num_classes: int | None
    in_chans: int | None
    image_size: int | tuple[int, int] | None
    casts: Mapping[str, str]
    replaced: tuple[str, ...]
    adapted: Mapping[str, str]
    resized: Mapping[str, str]
    absent_in_source: Mapping[str, float]
    ignored: Mapping[str, tuple[str, ...]]

    def to_json(self) -> str:
        """All attributes as one JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        statistics = f" and {self.statistics:,} statistics" if self.statistics else ""
        lines = [
            f"{self.tag or self.model} from {self.source}",
            _line("format", f"{self.format}, names as in {self.naming}"),
            _line("loaded", f"{self.leaves} leaves, {self.parameters:,} parameters{statistics}"),
        ]
        if self.sha256 is not None:
            lines.append(_line("sha256", f"{self.sha256} (digest {self.digest})"))
        if self.weights is not None:
            meaning = {"ema": "the moving average", "raw": "as trained, not the moving average"}
            lines.append(_line("weights", f"{self.weights}: {meaning[self.weights]}"))
        lines += [_line(name, ", ".join(given)) for name, given in self._lists() if given]
        for kind, count in Counter(self.casts.values()).items():
            lines.append(_line("cast", f"{kind}: {count} leaves"))
        for name, changes in (("adapted", self.adapted), ("resized", self.resized)):
            lines += [_line(name, f"{path}: {change}") for path, change in changes.items()]
        for path, value in self.absent_in_source.items():
            lines.append(_line("filled", f"{path} = {value:g}, absent in the source"))
        for reason, keys in self.ignored.items():
            shown = ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")
            lines.append(_line("ignored", f"{len(keys)} keys, {reason}: {shown}"))
        return "\n".join(lines)

    def _lists(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        sizes = {name: getattr(self, name) for name in ("num_classes", "in_chans", "image_size")}
        return (
            ("model", tuple(f"{name}={value}" for name, value in sizes.items() if value is not None)),
            ("fresh", self.replaced),
            ("unwrapped", self.unwrapped),
            ("beside", self.beside),
        )


def _line(name: str, text: str) -> str:
    return f"  {name:<10}{text}"
