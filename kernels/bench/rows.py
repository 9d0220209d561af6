"""A row of results, and the files that rows are kept in."""

import csv
import dataclasses
import json
import math
import pathlib
from typing import Any

STATUSES = ("ok", "wrong", "not supported", "out of memory", "not measured", "failed", "estimate")
KEY = ("op", "variant", "implementation", "device", "shape", "dtype", "pattern", "direction")


@dataclasses.dataclass
class Row:
    """One implementation of one op at one shape, dtype and direction; what was not measured is None.

    Attributes:
        op: public function, or model.
        variant: its name in tables.
        label: the variant with what is special about its pattern.
        family: the heading that it stands under.
        implementation: `"xla"`, `"pallas_tpu"` and the like, or a peer's name.
        device: kind of the device.
        platform: `"cpu"`, `"gpu"` or `"tpu"`.
        shape: sizes, for a person.
        length: tokens, of a sequence.
        dtype: of the operands.
        pattern: self or cross, causal or noncausal.
        direction: `"forward"` or `"forward+backward"`, outputs and all gradients in one program; of whole models
            `"inference"` or `"training"`, a step with its update.
        status: one of `STATUSES`. Only `"ok"` rows have times.
        reason: for the other statuses; of an `"ok"` row why it could not be compared with float64.
        method: how the times were taken.
        median_ms, p20_ms, p80_ms: time of one call on the device.
        wall_ms: median of what the host waits for one call alone.
        repeats, calls: samples, and calls in the shorter half of each.
        flops: multiply-adds of the products that the mathematics needs, as two each.
        flops_per_s: these by the median.
        bytes: operands and results, each moved once.
        floor_ms: what these take at the device's limits.
        floor_source: where the limits are from.
        times_floor: the median by the floor.
        bound: which of the two limits the floor is.
        peak_bytes: operands, results and temporaries, as the compiler has planned them.
        residual_bytes: kept from the forward to the backward pass, arguments among them.
        state_bytes: what a decoder carries after these tokens.
        state_bytes_per_token: the same by the number of tokens.
        compile_s: seconds of tracing, lowering and compiling.
        error: largest difference from float64 by the largest value of the outputs.
        error_max: largest difference of the outputs.
        error_gradients: as `error`, of the worst gradient.
        worst_gradient: of which operand that is.
        error_bound, gradient_bound: what the errors may be.
        bit_equal: five runs gave the same bits.
        blocks: block sizes of the kernels in it, by kernel.
        tuned: whether any of them is a measured choice.
        estimate_ms: for a device that is not there.
        images_per_s, tokens_per_s: of whole models, by the median or the estimate.
        parameters: of whole models.
        mqar, passkey: accuracy after training on the task, the mean of `seeds` runs; `*_low` and `*_high` are the
            worst and the best of them.
        equal_state: whether the state is as large as that of most variants in the same run.
    """

    op: str
    variant: str
    label: str
    family: str
    implementation: str
    device: str
    platform: str
    shape: str
    length: int | None
    dtype: str
    pattern: str
    direction: str
    status: str = "ok"
    reason: str | None = None
    method: str | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    wall_ms: float | None = None
    repeats: int | None = None
    calls: int | None = None
    flops: int | None = None
    flops_per_s: float | None = None
    bytes: int | None = None
    floor_ms: float | None = None
    floor_source: str | None = None
    times_floor: float | None = None
    bound: str | None = None
    peak_bytes: int | None = None
    residual_bytes: int | None = None
    state_bytes: int | None = None
    state_bytes_per_token: float | None = None
    compile_s: float | None = None
    error: float | None = None
    error_max: float | None = None
    error_gradients: float | None = None
    worst_gradient: str | None = None
    error_bound: float | None = None
    gradient_bound: float | None = None
    bit_equal: bool | None = None
    blocks: dict[str, Any] | None = None
    tuned: bool | None = None
    estimate_ms: float | None = None
    images_per_s: float | None = None
    tokens_per_s: float | None = None
    parameters: int | None = None
    mqar: float | None = None
    mqar_low: float | None = None
    mqar_high: float | None = None
    passkey: float | None = None
    passkey_low: float | None = None
    passkey_high: float | None = None
    seeds: int | None = None
    equal_state: bool | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it the same row in another run."""
        return tuple(getattr(self, name) for name in KEY)


def _plain(value: Any) -> Any:
    """JSON has no infinities and no nan."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def to_dict(row: Row) -> dict[str, Any]:
    return {name: _plain(value) for name, value in dataclasses.asdict(row).items()}


def to_text(meta: dict[str, Any], rows: list[Row], indent: int | None = None) -> str:
    """Meta data and rows as JSON."""
    return json.dumps({"meta": meta, "rows": [to_dict(row) for row in rows]}, indent=indent, allow_nan=False)


def write_json(path: str, meta: dict[str, Any], rows: list[Row]) -> None:
    pathlib.Path(path).write_text(to_text(meta, rows, indent=1) + "\n")


def write_csv(path: str, rows: list[Row]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(to_dict(row) for row in rows)


def read_json(path: str) -> tuple[dict[str, Any], list[Row]]:
    """Meta data and rows of an earlier run; fields that are no longer known are left out.

    Raises:
        ValueError: for a file that is none of this benchmark's.
    """
    try:
        return from_text(pathlib.Path(path).read_text())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no result of this benchmark: {error}") from error


def from_text(text: str) -> tuple[dict[str, Any], list[Row]]:
    """What `to_text` made."""
    known = {field.name for field in dataclasses.fields(Row)}
    found = json.loads(text)
    return found["meta"], [Row(**{k: v for k, v in row.items() if k in known}) for row in found["rows"]]
