"""Plans as a table for a person."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from train.plan import Plan
from zoo.tables import scaled

WIDTH = 100


def size(number: int | float | None) -> str:
    """Bytes for a person, in the binary units of the compiler: `"15.75 GiB"`."""
    return _binary(number, "B")


def _binary(number: int | float | None, unit: str) -> str:
    if number is None:
        return "not known"
    for power, letter in ((40, "Ti"), (30, "Gi"), (20, "Mi"), (10, "Ki")):
        if number >= 2**power:
            return f"{number / 2**power:.2f} {letter}{unit}"
    return f"{number:.0f} {unit}"


def _count(number: int | float | None) -> str:
    """A count with the letters of powers of a thousand."""
    if number is None:
        return "not known"
    return f"{number / 1e12:.2f} T" if number >= 1e12 else scaled(round(number))


def time(seconds: int | float | None) -> str:
    """Seconds for a person."""
    if seconds is None:
        return "not known"
    unit, scale = next(
        each for each in (("s", 1), ("ms", 1e3), ("us", 1e6)) if seconds * each[1] >= 1 or each[1] == 1e6
    )
    return f"{seconds * scale:.4g} {unit}"


def _share(number: int | float | None) -> str:
    return "not known" if number is None else f"{number:.1%}"


def _fits(plan: Plan) -> str:
    if plan.fits is None:
        return "not known"
    if not plan.fits:
        return "[bold red]NO[/]"
    return f"[bold green]yes[/], {size(plan.hbm_bytes_limit - plan.hbm_bytes_peak)} to spare"


Row = tuple[str, str, Callable[[Any], str], str]

# Name, field of a plan (none: a head), how it is written, what to know of it.
_BEFORE: tuple[Row, ...] = (
    ("batch", "batch", "{:,}".format, "examples of a step, over all chips"),
    ("memory of a chip", "", str, ""),
    ("  parameters", "hbm_bytes_parameters", size, "by their shardings"),
    ("  state", "hbm_bytes_state", size, "with moments and averages"),
    ("  arguments", "hbm_bytes_arguments", size, "state, batch, as they lie in memory"),
    ("  temporaries", "hbm_bytes_temporaries", size, "activations, gradients"),
    ("  outputs", "hbm_bytes_outputs", size, ""),
    ("  aliased", "hbm_bytes_aliased", size, "outputs in arguments' place"),
    ("  code", "hbm_bytes_code", size, ""),
    ("  peak", "hbm_bytes_peak", size, "arguments + outputs - aliased + the rest"),
    ("  limit", "hbm_bytes_limit", size, "by the compiler"),
)
_WORK: tuple[Row, ...] = (
    ("work of a step", "", str, ""),
    ("  FLOPs", "flops", _count, "kernels.cost, over all chips"),
    ("  of matrix products", "matmul_flops", _count, "and kernels, over all chips"),
    ("  FLOPs of a chip", "flops_compiler", _count, "the compiler's count, a loop's body once"),
    ("  bytes of a chip", "bytes", size, "to and from HBM, counted on compiled code"),
    ("  bytes, by compiler", "bytes_compiler", size, "on-chip memory too, a loop's body once"),
)
_TIME: tuple[Row, ...] = (
    ("least time", "", str, ""),
    ("  compute", "seconds_compute", time, "matrix products at the bfloat16 peak"),
    ("  memory", "seconds_memory", time, "HBM at its full bandwidth"),
    ("  interconnect", "seconds_interconnect", time, "all links at once"),
)


def show(plans: Sequence[Plan], stream: Any) -> None:
    """Prints to a text stream: of one plan with comments, of several side by side with ratios to the first."""
    console = Console(file=stream, width=WIDTH, highlight=False)
    first = plans[0]
    one = len(plans) == 1
    mesh = _mesh(first)
    console.print(
        f"[bold]{first.model}[/], {first.parameters:,} parameters, on {first.devices} x {first.device} "
        f"({first.topology}; {mesh})"
    )
    table = Table(box=None, pad_edge=False, show_header=not one)
    table.add_column("", no_wrap=True)
    for number, plan in enumerate(plans):
        table.add_column(plan.label.replace(",", ", "), justify="right", overflow="fold")
        if number:
            table.add_column("ratio", justify="right", no_wrap=True)
    if one:
        table.add_column("", style="dim")
    for name, numbers, texts, comment in _rows(plans):
        if all(text is None for text in texts):
            table.add_section()
            table.add_row(f"[bold]{name}[/]")
            continue
        cells = []
        for number, (value, text) in enumerate(zip(numbers, texts)):
            cells.append(text)
            if number:
                cells.append(_ratio(value, numbers[0]))
        table.add_row(name, *cells, *([comment] if one else []))
    console.print(table)
    for note in dict.fromkeys(note for plan in plans for note in plan.notes):
        of = [plan.label for plan in plans if note in plan.notes]
        which = f" ({'; '.join(of)})" if len(of) < len(plans) else ""
        console.print(f"note{which}: {note}", markup=False)
    console.print(
        "The least times are a roofline, no measurement: each resource at its full speed, all overlapped.", style="dim"
    )


def _mesh(plan: Plan) -> str:
    return " x ".join(f"{axis} {n}" for axis, n in plan.mesh.items() if n > 1) or "no axis divided"


def _ratio(value: Any, first: Any) -> str:
    if isinstance(value, (int, float)) and isinstance(first, (int, float)) and first:
        return f"{value / first:.2f}x"
    return ""


def _rows(plans: Sequence[Plan]) -> Iterable[tuple[str, list[Any], list[str | None], str]]:
    """Name, numbers, texts (all None: a head) and comment of each row."""

    def numbers(rows: Sequence[Row]):
        for name, field, write, comment in rows:
            values = [getattr(plan, field) if field else None for plan in plans]
            if not field:
                yield name, values, values, comment
            elif any(value is not None for value in values):
                yield name, values, [write(value) if value is not None else "-" for value in values], comment

    def texts(name: str, write: Callable[[Plan], str], comment: str = ""):
        return name, [None] * len(plans), [write(plan) for plan in plans], comment

    if len({str(plan.mesh) for plan in plans}) > 1:
        yield texts("mesh", _mesh)
    yield from numbers(_BEFORE)
    yield texts("  fits", _fits, "the peak is a lower bound" * (plans[0].fits is None))
    yield from numbers(_WORK)
    yield from _collectives(plans)
    yield from _implementations(plans)
    if any(plan.kernels for plan in plans):
        yield texts("kernels", lambda plan: ", ".join(plan.kernels))
    yield from numbers(_TIME)
    if any(plan.seconds is not None for plan in plans):
        yield texts("  bound by", lambda plan: plan.bound or "-")
        yield from numbers(
            (
                ("  ESTIMATED step", "seconds", time, "the largest of the three: a roofline"),
                (f"  {plans[0].unit} a second", "per_second", _count, "at that"),
                ("  MFU", "mfu", _share, "at that"),
            )
        )


def _collectives(plans: Sequence[Plan]) -> Iterable[tuple[str, list[Any], list[str | None], str]]:
    kinds = sorted({kind for plan in plans for kind in plan.collectives or {}})
    if any(plan.collectives is not None for plan in plans):
        nothing = [None] * len(plans)
        yield ("collectives of a chip" + " (none)" * (not kinds), nothing, nothing, "")
    for kind in kinds:
        found = [(plan.collectives or {}).get(kind) for plan in plans]
        texts = [f"{each['count']:,} of {size(each['bytes'])}" if each else "-" for each in found]
        comment = f"in all, {size(found[0]['sent'])} to be sent" if found[0] else ""
        yield f"  {kind}", [each and each["bytes"] for each in found], texts, comment


def _implementations(plans: Sequence[Plan]) -> Iterable[tuple[str, list[Any], list[str | None], str]]:
    nothing = [None] * len(plans)
    ops = sorted({op for plan in plans for op in plan.implementations})
    if ops:
        yield "computed by", nothing, nothing, ""
    for op in ops:
        yield f"  {op}", nothing, [", ".join(plan.implementations.get(op, ["-"])) for plan in plans], ""
