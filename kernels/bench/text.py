"""Numbers and rows as a person reads them."""

from kernels.bench.rows import Row

UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
PASS = {"forward": "forward", "forward+backward": "+backward", "inference": "inference", "training": "training"}


def short(number: int | float) -> str:
    """Three digits."""
    if number == 0:
        return "0"
    return f"{number:.0f}" if abs(number) >= 99.95 else f"{number:.3g}"


def amount(number: int | float | None, unit: str = "") -> str:
    """With a prefix: 12.3 G; a dash for None."""
    if number is None:
        return "-"
    for size, prefix in UNITS:
        if abs(number) >= 0.9995 * size:
            return f"{short(number / size)} {prefix}{unit}"
    return f"{short(number)} {unit}".rstrip()


def milliseconds(row: Row) -> str:
    """The median in three digits, an estimate marked as one, or nothing."""
    if row.median_ms is None:
        return "" if row.estimate_ms is None else f"~{_digits(row.estimate_ms)}"
    return _digits(row.median_ms)


def _digits(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 999.5 else f"{ms:#.3g}".rstrip(".")


def spread(row: Row) -> str:
    """Half of what lies between the 20th and the 80th percentile, in percent of the median."""
    if row.median_ms is None or row.median_ms == 0:
        return ""
    return f"±{50 * (row.p80_ms - row.p20_ms) / row.median_ms:.0f}%"


def error(row: Row) -> str:
    """The worse one of outputs and gradients."""
    found = [x for x in (row.error, row.error_gradients) if x is not None]
    if not found:
        return ""
    worst = found[0] if len(found) == 1 or found[0] != found[0] or found[0] > found[1] else found[1]
    return f"{float(worst):.0e}".replace("e-0", "e-").replace("e+0", "e+")


def floor(row: Row) -> str:
    """How many times its floor a row takes, and what the floor is made of."""
    return "" if row.times_floor is None else f"{short(row.times_floor)}x {row.bound}"


def speed(row: Row) -> tuple[int, float]:
    """What sorts a group's rows: those with times first, the fastest foremost."""
    time = row.median_ms if row.median_ms is not None else row.estimate_ms
    return (0, time) if time is not None else (1, 0.0)
