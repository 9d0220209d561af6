"""FLOPs and bytes of a function, counted on its jaxpr: the one counter for benchmarks, MFU and planning.

XLA's own `cost_analysis` counts the body of a loop once whatever its length, needs a compilation, and depends on
what the compiler made of the program. Here a loop counts as often as it runs, and nothing is compiled.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from kernels.cost_rules import Counts, count, is_known
from kernels.dispatch import PLATFORMS, only_for

# Primitives that only run a function, and under which name they hold it.
CALLS = {
    "closed_call": "call_jaxpr",
    "composite": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "jit": "jaxpr",
    "remat2": "jaxpr",
    "shard_map": "jaxpr",
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a function costs; integers throughout.

    Attributes:
        flops: operations other than transcendental ones, a multiply-add being two.
        transcendentals: values of exp, log, sqrt, tanh, power and the like.
        bytes: operands and results of every primitive, nothing fused: an upper bound on the traffic.
        io_bytes: the arguments that are read, the constants and the results, each moved once: the lower bound.
        matmul_flops: the part of `flops` in matrix products and convolutions, and what Pallas kernels declare: ours
            declare their products.
        by_primitive: the same four counts for every primitive, by its name.
        by_scope: the same four counts by where they belong, a path of `jax.named_scope`s; flax makes one of the
            names of a module's submodules and methods.
    """

    flops: int
    transcendentals: int
    bytes: int
    io_bytes: int
    matmul_flops: int
    by_primitive: dict[str, Counts]
    by_scope: dict[str, Counts]


def cost(
    fn: Callable[..., Any], *args: Any, platform: str = "cpu", while_trips: int | None = None, **kwargs: Any
) -> Cost:
    """Counts what `fn(*args, **kwargs)` costs, without compiling or running it.

    Results that nobody reads are not counted, as XLA removes them (but for those of a loop's body, which counts
    whole); otherwise every primitive counts as often as it runs. A scan counts its length times, a `while_loop`
    (and a `fori_loop` with traced bounds) as often as its bounds say where they are constants, a conditional as
    its most expensive branch, a `platform_dependent` as the branch of `platform`, a `shard_map` as one shard
    times the number of shards: the total over the devices. What each primitive counts is in
    `kernels.cost_rules`.

    Args:
        fn: a function of arrays, jitted, differentiated or plain.
        *args, **kwargs: its arguments; arrays, or `jax.ShapeDtypeStruct`s in their place.
        platform: the one of whose program the cost is wanted: `"cpu"`, `"cuda"` (also as `"gpu"`), `"rocm"`
            or `"tpu"`.
        while_trips: how often each loop runs whose number of rounds cannot be read off.

    Raises:
        ValueError: for a primitive that has no rule, all of them named; a loop with an unknown number of
            rounds; a `pallas_call` without a `cost_estimate`; an unknown platform.
    """
    platform = {"gpu": "cuda"}.get(platform, platform)
    if platform not in PLATFORMS:
        close = difflib.get_close_matches(str(platform), PLATFORMS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(map(repr, PLATFORMS))}"
        raise ValueError(f"cost: unknown platform {platform!r}; {hint}")
    with only_for(platform):
        closed = jax.make_jaxpr(fn)(*args, **kwargs)
    counter = _Counter(platform, while_trips)
    tally, read = counter.jaxpr(closed, [True] * len(closed.out_avals), {})
    if counter.unknown:
        raise ValueError(
            f"cost: no rule for the primitives {', '.join(sorted(counter.unknown))}; add them to kernels.cost_rules"
        )
    total = sum(tally.values(), Counts())
    arguments = [aval for aval, is_read in zip(closed.in_avals, read) if is_read]
    edges = [*arguments, *map(jax.typeof, closed.consts), *closed.out_avals]
    return Cost(
        flops=total.flops,
        transcendentals=total.transcendentals,
        bytes=total.bytes,
        io_bytes=tree_bytes(edges),
        matmul_flops=total.matmul_flops,
        by_primitive=_grouped((primitive, counts) for (_, primitive), counts in tally.items()),
        by_scope=_grouped((scope, counts) for (scope, _), counts in tally.items()),
    )


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, or `jax.ShapeDtypeStruct`s."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


# By scope and primitive.
Tally = dict[tuple[str, str], Counts]


def _is_integer(atom) -> bool:
    return atom.aval.shape == () and jnp.issubdtype(atom.aval.dtype, jnp.integer)


def _merge(tally: Tally, other: Tally, times: int = 1, scope: str = "") -> None:
    """Adds `other`, `times` over, as what happens inside `scope`."""
    for (inner, primitive), counts in other.items():
        key = "/".join(filter(None, (scope, inner))), primitive
        tally[key] = tally.get(key, Counts()) + counts * times


def _grouped(items: Iterable[tuple[str, Counts]]) -> dict[str, Counts]:
    """Sums by name, in the order of the names."""
    sums: dict[str, Counts] = {}
    for name, counts in items:
        sums[name] = sums.get(name, Counts()) + counts
    return dict(sorted(sums.items()))


class _Counter:
    """The walk: `jaxpr` goes through equations, the other methods through what contains jaxprs."""

    def __init__(self, platform: str, while_trips: int | None):
        self.platform, self.while_trips = platform, while_trips
        self.unknown: set[str] = set()

    def jaxpr(self, closed, wanted: list[bool], known: dict[int, int]) -> tuple[Tally, list[bool]]:
        """Counts of one jaxpr, and which of its arguments they read.

        Args:
            closed: the jaxpr, with or without constants of its own.
            wanted: which of its results are read by anyone.
            known: arguments, by position, that are integers known beforehand.
        """
        jaxpr = getattr(closed, "jaxpr", closed)
        values = {jaxpr.invars[position]: value for position, value in known.items()}
        for variable, constant in zip(jaxpr.constvars, getattr(closed, "consts", ())):
            if _is_integer(variable):
                values[variable] = int(constant)

        def value_of(atom) -> int | None:
            if isinstance(atom, Literal):
                return int(atom.val) if _is_integer(atom) else None
            return values.get(atom)

        live = {atom for atom, want in zip(jaxpr.outvars, wanted) if want and not isinstance(atom, Literal)}
        tally: Tally = {}
        for eqn in reversed(jaxpr.eqns):
            outputs = [variable in live for variable in eqn.outvars]
            if not any(outputs) and not eqn.effects:
                continue
            inner, inputs = self.equation(eqn, outputs, [value_of(atom) for atom in eqn.invars])
            _merge(tally, inner, scope=str(eqn.source_info.name_stack))
            live.update(a for a, read in zip(eqn.invars, inputs) if read and not isinstance(a, Literal))
        return tally, [variable in live for variable in jaxpr.invars]

    def equation(self, eqn, wanted: list[bool], known: list[int | None]) -> tuple[Tally, list[bool]]:
        name = eqn.primitive.name
        every = [True] * len(eqn.invars)
        if name in CALLS:
            positions = {i: value for i, value in enumerate(known) if value is not None}
            tally, inputs = self.jaxpr(eqn.params[CALLS[name]], wanted, positions)
            if name == "shard_map":
                mesh = eqn.params["mesh"].shape
                shards = math.prod(mesh[axis] for axis in eqn.params["newly_manual_axes"])
                tally = {key: counts * shards for key, counts in tally.items()}
            return tally, inputs
        if name == "cond":
            return self.cond(eqn, wanted)
        if name == "scan":
            return self.loop((eqn.params["jaxpr"], eqn.params["length"])), every
        if name == "while":
            trips = self.trips(eqn, known)
            body, condition = eqn.params["body_jaxpr"], eqn.params["cond_jaxpr"]
            return self.loop((body, trips), (condition, trips + 1)), every
        if name == "pallas_call":
            return {("", name): _kernel_counts(eqn)}, every
        if not is_known(eqn):
            self.unknown.add(name)
            return {}, every
        return {("", name): count(eqn)}, every

    def loop(self, *parts) -> Tally:
        tally: Tally = {}
        for closed, times in parts:
            inner, _ = self.jaxpr(closed, [True] * len(closed.out_avals), {})
            _merge(tally, inner, times)
        return tally

    def cond(self, eqn, wanted: list[bool]) -> tuple[Tally, list[bool]]:
        branches = eqn.params["branches"]
        platforms = eqn.params.get("branches_platforms")
        if platforms is not None:
            matching = [i for i, names in enumerate(platforms) if names is None or self.platform in names]
            if not matching:
                raise ValueError(
                    f"cost: a platform_dependent has no branch for {self.platform!r}, only for "
                    + ", ".join(name for names in platforms for name in names)
                )
            tally, inputs = self.jaxpr(branches[matching[0]], wanted, {})
            return tally, [False, *inputs]
        counted = [self.jaxpr(branch, wanted, {}) for branch in branches]

        def expense(tally: Tally):
            total = sum(tally.values(), Counts())
            return total.flops + total.transcendentals, total.bytes

        worst = max((tally for tally, _ in counted), key=expense)
        return worst, [True, *(any(reads) for reads in zip(*(inputs for _, inputs in counted)))]

    def trips(self, eqn, known: list[int | None]) -> int:
        trips = _constant_trips(eqn, known)
        if trips is None:
            trips = self.while_trips
        if trips is None:
            carried = ", ".join(variable.aval.str_short() for variable in eqn.outvars)
            raise ValueError(
                f"cost: the number of rounds of the while_loop over ({carried}) cannot be read off; "
                "pass while_trips=, or give fori_loop constant bounds"
            )
        return trips


def _constant_trips(eqn, known: list[int | None]) -> int | None:
    """The rounds of a loop that counts a carried integer by a constant up or down to a constant."""
    params = eqn.params
    condition, body = (getattr(params[name], "jaxpr", params[name]) for name in ("cond_jaxpr", "body_jaxpr"))
    constants, skip = params["cond_nconsts"], params["body_nconsts"]
    start = known[constants + skip :]
    if len(condition.eqns) != 1 or condition.eqns[0].outvars[0] is not condition.outvars[0]:
        return None
    comparison = condition.eqns[0].primitive.name
    if comparison not in ("lt", "le", "gt", "ge"):
        return None

    def step(carried: int) -> int | None:
        """What every round adds to a carried value, 0 if it stays, None if that is unknown."""
        before, after = body.invars[skip + carried], body.outvars[carried]
        if after is before:
            return 0
        for made in body.eqns:
            if made.outvars[0] is after and made.primitive.name in ("add", "sub"):
                value, change = made.invars
                if value is before and isinstance(change, Literal) and _is_integer(change):
                    return int(change.val) if made.primitive.name == "add" else -int(change.val)
        return None

    def operand(atom) -> tuple[int, int] | None:
        """First value and step of one side of the comparison."""
        if isinstance(atom, Literal):
            return (int(atom.val), 0) if _is_integer(atom) else None
        position = next(i for i, variable in enumerate(condition.invars) if variable is atom)
        if position < constants:
            first, change = known[position], 0
        else:
            first, change = start[position - constants], step(position - constants)
        return None if first is None or change is None else (first, change)

    operands = [operand(atom) for atom in condition.eqns[0].invars]
    if None in operands:
        return None
    (a, da), (b, db) = operands
    if comparison in ("gt", "ge"):
        (a, da), (b, db) = (b, db), (a, da)
    # The loop now goes on while a < b, or a <= b, and every round closes the distance by da - db.
    distance, closing = b - a + (comparison in ("le", "ge")), da - db
    if distance <= 0:
        return 0
    return -(-distance // closing) if closing > 0 else None


def _kernel_counts(eqn) -> Counts:
    estimate, name = eqn.params["cost_estimate"], eqn.params["name"]
    if estimate is None:
        raise ValueError(f"cost: the Pallas kernel {name!r} declares no cost_estimate; pass one to its pallas_call")
    flops = int(estimate.flops)
    return Counts(flops, int(estimate.transcendentals), int(estimate.bytes_accessed), flops)
