"""Cases in, rows out: compiled, checked against float64, and only then timed."""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from kernels import compat
from kernels.bench import errors, peers
from kernels.bench.case import DIRECTIONS, Case
from kernels.bench.limits import Limits, free_bytes
from kernels.bench.programs import compiled_case, first_line, is_out_of_memory, set_count
from kernels.bench.rows import Row
from kernels.bench.timing import PROFILER, Timed, percentiles, profile, take_turns

# What the largest caches hold: several sets of operands are larger together.
CACHE = 1 << 26


@dataclasses.dataclass(frozen=True)
class Effort:
    """Samples of a row, seconds of the shorter half of a sample, seconds after which three samples will do."""

    repeats: int
    target: float
    budget: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        dtypes: of the operands.
        repeats: samples of each row.
        target: seconds of the shorter half of a sample.
        budget: seconds for the samples of a row, once there are three.
        limits: the device's.
        directions: of `DIRECTIONS`.
        with_peers: whether to time other people's implementations.
        wanted: keys of the rows to measure, `kernels.bench.rows.Row.key`; None: all.
    """

    dtypes: Sequence[str]
    repeats: int
    target: float
    budget: float
    limits: Limits
    directions: Sequence[str] = DIRECTIONS
    with_peers: bool = True
    wanted: frozenset[tuple[Any, ...]] | None = None


def platform() -> str:
    """The default device's, one of `kernels.dispatch.PLATFORMS`."""
    backend = jax.default_backend()
    if backend != "gpu":
        return backend
    return "cuda" if compat.has_cudnn() else "rocm"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to compute a case: `compiled(case, dtype, direction, name)` gives the program."""

    name: str
    platforms: tuple[str, ...]
    compiled: Callable[[Case, str, str, str], Any]
    is_peer: bool


def candidates(case: Case, with_peers: bool) -> list[Candidate]:
    """The case's implementations, then the peers that serve it."""

    def own(name: str) -> Callable[[Case, str, str, str], Any]:
        return lambda case, dtype, direction, program: compiled_case(case, dtype, direction, name, program)

    found = [Candidate(i.name, i.platforms, own(i.name), False) for i in case.table]
    if with_peers:
        found += [Candidate(p.name, p.platforms, p.compiled, True) for p in peers.peers_of(case)]
    return found


def measure(cases: Iterable[Case], plan: Plan, tell: Callable[[str], None] = lambda line: None) -> list[Row]:
    """Rows for all cases, in their order.

    Args:
        cases: what to measure.
        plan: how.
        tell: gets a line before each group of rows.
    """
    rows: list[Row] = []
    groups = [(case, dtype) for case in cases for dtype in plan.dtypes]
    for done, (case, dtype) in enumerate(groups):
        tell(f"[{done + 1}/{len(groups)}] {case.label}, {case.shape}, {dtype}")
        rows += _Group(case, dtype, plan, len(rows)).rows()
    return rows


def blank(case: Case, dtype: str, direction: str, implementation: str, device: Any, limits: Limits) -> Row:
    """A row with all that is known before anything has run."""
    flops, moved = case.useful_flops(direction), case.bytes(direction, dtype)
    floor, bound = limits.floor(flops, moved, dtype)
    state = case.state_bytes(dtype)
    return Row(
        **{name: getattr(case, name) for name in ("op", "variant", "label", "family", "shape", "length", "pattern")},
        implementation=implementation,
        device=device.device_kind,
        platform=device.platform,
        dtype=dtype,
        direction=direction,
        flops=flops,
        bytes=moved,
        floor_ms=floor * 1e3,
        floor_source=limits.source,
        bound=bound,
        state_bytes=state,
        state_bytes_per_token=None if state is None or not case.length else state / case.length,
    )


def attempt(row: Row, run: Callable[[], Any], is_peer: bool = False) -> Any:
    """What `run` returns; what it raises becomes the row's status."""
    try:
        return run()
    except NotImplementedError as error:
        row.status, row.reason = "not supported", first_line(error)
    # Whatever a compiler or a driver raises is a result here, and the other rows are to come.
    except Exception as error:
        if is_out_of_memory(error):
            row.status = "out of memory"
        else:
            row.status = "not supported" if is_peer else "failed"
        row.reason = f"{type(error).__name__}: {first_line(error)}"
    return None


class _Group:
    """The rows of a case in one dtype: what they share, and each direction in turn."""

    def __init__(self, case: Case, dtype: str, plan: Plan, first: int):
        self.case, self.dtype, self.plan, self.first = case, dtype, plan, first
        self.device = jax.devices()[0]
        self.sets: list[tuple[Any, Any]] = []
        self.reference: tuple[Any, Any] | None = None
        self.unchecked: str | None = None

    def rows(self) -> list[Row]:
        found = []
        for direction in self.plan.directions:
            group = [
                (candidate, blank(self.case, self.dtype, direction, candidate.name, self.device, self.plan.limits))
                for candidate in candidates(self.case, self.plan.with_peers)
            ]
            if self.plan.wanted is not None:
                group = [(candidate, row) for candidate, row in group if row.key in self.plan.wanted]
            found += [row for _, row in group]
            started = []
            for candidate, row in group:
                timed = attempt(row, functools.partial(self.start, candidate, row), candidate.is_peer)
                if timed is not None:
                    started.append((row, timed))
            if started:
                time_together(started, self.plan.repeats, self.plan.target, self.plan.budget)
        return found

    def start(self, candidate: Candidate, row: Row) -> Timed | None:
        """Compiles and checks; None, with the row's status set, if there is nothing to time."""
        if platform() not in candidate.platforms:
            row.status, row.reason = "not measured", f"runs on {' and '.join(candidate.platforms)}"
            return None
        name = f"bench_{self.first}_{''.join(c if c.isalnum() else '_' for c in candidate.name)}_{row.direction[-8:]}"
        program = candidate.compiled(self.case, self.dtype, row.direction, name)
        row.compile_s, row.peak_bytes = program.compile_s, program.peak_bytes
        row.residual_bytes = program.residual_bytes
        if program.uses:
            row.blocks = {use.op: use.blocks for use in program.uses}
            row.tuned = any(use.tuned for use in program.uses)
        free = free_bytes(self.device)
        if free is not None and row.peak_bytes is not None and row.peak_bytes > free:
            row.status = "out of memory"
            row.reason = f"takes {row.peak_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            return None
        self.prepare()
        if not self.check(program, row):
            return None
        row.peak_bytes = program.peak_bytes
        return program.timed(self.sets)

    def prepare(self) -> None:
        """Operands, and what float64 makes of the first set, once for all rows."""
        if not self.sets:
            count = set_count(self.case, self.dtype, CACHE, free_bytes(self.device))
            self.sets = [
                (self.case.inputs(self.dtype, seed), self.case.cotangent(self.dtype, seed)) for seed in range(count)
            ]
            gradients = "forward+backward" in self.plan.directions
            try:
                self.reference = errors.Reference(self.case, gradients)(*self.sets[0])
            # Of float64 there is at least twice as much: what fits need not fit in it.
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self.unchecked = f"not checked: {first_line(error)}"

    def check(self, program: Any, row: Row) -> bool:
        """Whether the program is right; its errors go into the row either way."""
        outputs, gradients = program(*self.sets[0])
        row.bit_equal = errors.bit_equal(lambda: program(*self.sets[0]))
        if self.reference is None:
            row.reason = self.unchecked
            return True
        wanted, wanted_gradients = self.reference
        row.error_bound, row.gradient_bound = errors.BOUNDS[self.dtype]
        row.error_max, row.error = errors.difference(outputs, wanted)
        by_operand = {n: errors.difference(g, wanted_gradients[n])[1] for n, g in gradients.items()}
        if by_operand:
            # nan is worst of all.
            row.worst_gradient = max(by_operand, key=lambda n: (by_operand[n] != by_operand[n], by_operand[n]))
            row.error_gradients = by_operand[row.worst_gradient]
        right = row.error <= row.error_bound and not (by_operand and not row.error_gradients <= row.gradient_bound)
        if not right:
            row.status = "wrong"
            row.reason = _what_is_wrong(row)
        return right


def time_together(started: Sequence[tuple[Row, Timed]], repeats: int, target: float, budget: float) -> None:
    """Times programs in turns and fills in their rows; one that fails meanwhile fails for all of them."""
    timed = [timed for _, timed in started]
    for row, _ in started[:1]:
        attempt(row, lambda: take_turns(timed, repeats, target, budget))
        for other, _ in started[1:]:
            other.status, other.reason = row.status, row.reason
    if jax.default_backend() != "cpu":
        profile([t for row, t in started if row.status == "ok"], repeats)
    for row, t in started:
        if row.status == "ok":
            _fill(row, t)


def _fill(row: Row, timed: Timed) -> None:
    row.p20_ms, row.median_ms, row.p80_ms = percentiles(timed.seconds)
    row.wall_ms = statistics.median(timed.walls) * 1e3
    row.method, row.repeats, row.calls = timed.method, len(timed.seconds), timed.calls
    if timed.method == PROFILER:
        row.calls = 1
    if row.flops is not None:
        row.flops_per_s = row.flops / (row.median_ms / 1e3)
    if row.floor_ms is not None:
        row.times_floor = row.median_ms / row.floor_ms


def _what_is_wrong(row: Row) -> str:
    parts = []
    if not row.error <= row.error_bound:
        parts.append(f"outputs are off by {row.error:.1g} of their largest value, {row.error_bound:g} is allowed")
    if row.error_gradients is not None and not row.error_gradients <= row.gradient_bound:
        parts.append(
            f"the gradient of {row.worst_gradient} is off by {row.error_gradients:.1g} of its largest value, "
            f"{row.gradient_bound:g} is allowed"
        )
    return "; ".join(parts)
