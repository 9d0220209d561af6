"""What a compiled program says of itself: its collectives, its traffic, and how often its loops run.

Read from `compiled.as_text()`. XLA's own counts take the body of a loop once; here it counts as often as it runs.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator

# Bits of the element types of HLO whose names do not end in them.
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b(pred|token|opaque|[a-z]+\d+[a-z0-9]*)\[([\d,<= ]*)\](\{[^{}]*\})?")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-$]+) .*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-$]+)|branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')

# What moves nothing: names for parts, and what only holds other instructions.
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("after-all", "opt-barrier", "partition-id", "replica-id", "iota"),
)
COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
# What a device hands to its host for the network between slices; XLA writes it as pairs of a send and a receive.
ACROSS_SLICES = "across slices"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: its name, the text of its type, its opcode, the names of its operands, all that follows."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


@dataclasses.dataclass(frozen=True)
class Collective:
    """What one kind of collective does in one run of the program, on one device.

    Attributes:
        count: how often it runs.
        bytes: of what is gathered, reduced or exchanged, whole: the result of an all-gather, the operand of a
            reduce-scatter, the array itself otherwise.
        sent: the part of them that a device has to send at least: of n devices 2 (n - 1) / n of an all-reduce's
            bytes, all of a permutation's, (n - 1) / n of the others'.
    """

    count: int
    bytes: int
    sent: int

    def and_then(self, times: int, size: int, sent: float) -> "Collective":
        """This and one more instruction, of so many bytes, that runs so often."""
        return Collective(self.count + times, self.bytes + times * size, self.sent + round(times * sent))


NONE = Collective(0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Summary:
    """A whole program.

    Attributes:
        collectives: by their kinds, the names of HLO, and `ACROSS_SLICES`.
        bytes: what instructions read from the device's main memory and write to it: operands and results of each, a
            fusion being one, but for those that stay in the memory on the chip. Of an array that is only sliced the
            slices count, of one that is updated in place the update.
        unknown_loops: loops whose number of rounds cannot be read off; what is in them counts once.
    """

    collectives: dict[str, Collective]
    bytes: int
    unknown_loops: int


def summary(text: str, devices: int) -> Summary:
    """Counts a compiled program.

    Args:
        text: `compiled.as_text()`.
        devices: how many run it; a collective that names no groups is over all of them.
    """
    program = _Program(text)
    found: dict[str, Collective] = {}
    moved = 0
    for instruction, times, scope, is_fused in program.executed():
        if not is_fused:
            moved += times * program.traffic(instruction, scope)
        kind = instruction.opcode.removesuffix("-start")
        if kind == "send" and "xla_megascale_runtime" in instruction.attributes:
            size = array_bytes(instruction.type)[0]
            found[ACROSS_SLICES] = found.get(ACROSS_SLICES, NONE).and_then(times, size, size)
        if kind not in COLLECTIVES:
            continue
        size, ways = _payload(instruction, kind), _ways(instruction.attributes, devices)
        if kind == "reduce-scatter":
            size *= ways
        # The compiler writes a reduce-scatter as a fusion of this name.
        if kind == "all-reduce" and scope.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        share = 1.0 if kind == "collective-permute" else (ways - 1) / ways * (1 + (kind == "all-reduce"))
        found[kind] = found.get(kind, NONE).and_then(times, size, size * share)
    return Summary(dict(sorted(found.items())), moved, program.unknown_loops)


def array_bytes(type_text: str) -> list[int]:
    """The sizes of the arrays of a type, `"(f32[8,4]{1,0}, u32[])"`, without what a layout pads."""
    return [size for size, _ in _arrays(type_text)]


def _arrays(type_text: str) -> list[tuple[int, bool]]:
    """The arrays of a type: their bytes, and whether they lie in main memory."""
    sizes = []
    for kind, dims, layout in _ARRAY.findall(type_text):
        width = _BITS.get(kind)
        if width is None:
            width = int(re.search(r"\d+", kind)[0])
        count = math.prod(int(re.sub(r"\D", "", d)) for d in dims.split(",") if d.strip())
        sizes.append((-(-count * width // 8), "S(" not in layout))
    return sizes


def _payload(instruction: Instruction, kind: str) -> int:
    """The bytes of what a collective results in; the result of a `-start` holds its operand before it."""
    sizes = array_bytes(instruction.type)
    if instruction.opcode.endswith("-start"):
        if kind == "collective-permute":
            # Operand, result and two words of context.
            sizes = sizes[1:2]
        elif instruction.type.startswith("((") or kind == "all-gather":
            sizes = sizes[len(sizes) // 2 :]
    return sum(sizes)


def _ways(attributes: str, devices: int) -> int:
    """How many devices take part in each group of a collective."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return len(listed[1].split(","))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes)
    return int(iota[2]) if iota else devices


class _Program:
    """The computations of a program by name, and the walk through them."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self.unknown_loops = 0
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if line[:1] in ("%", "E") or (line[:1].isalpha() and line.endswith("{") and " = " not in line):
                head = _HEAD.match(line)
                if head and not line.startswith("HloModule"):
                    current = self.computations.setdefault(head[2], {})
                    self.entry = head[2] if head[1] else self.entry
            elif line.startswith(" ") and " = " in line:
                instruction = _instruction(line)
                if instruction is not None:
                    current[instruction.name] = instruction

    def executed(self) -> Iterator[tuple[Instruction, int, str, bool]]:
        """Every instruction, how often it runs, the name of its computation, and whether it is part of another one.

        Each branch of a conditional counts as if it were taken.
        """
        stack = [(self.entry, 1, False)]
        while stack:
            name, times, is_fused = stack.pop()
            for instruction in self.computations.get(name, {}).values():
                yield instruction, times, name, is_fused
                part = is_fused or instruction.opcode not in ("while", "conditional", "call")
                rounds = 1
                if instruction.opcode == "while":
                    found = self.trips(instruction, name)
                    self.unknown_loops += found is None
                    rounds = 1 if found is None else found
                for one, several in _CALLED.findall(instruction.attributes):
                    for called in (one, *re.findall(r"[\w.\-$]+", several)):
                        if called in self.computations:
                            stack.append((called, times * rounds, part))

    def traffic(self, instruction: Instruction, scope: str) -> int:
        """The bytes that one run of an instruction reads from main memory and writes to it."""
        opcode, computation = instruction.opcode, self.computations[scope]
        if opcode in _FREE or opcode.endswith("-done"):
            return 0
        if opcode.endswith("-start") and opcode.removesuffix("-start") not in COLLECTIVES:
            # Source and destination come first; what is moved has the size of the smaller one.
            ends = _arrays(instruction.type)[:2]
            return min((size for size, _ in ends), default=0) * sum(in_memory for _, in_memory in ends)
        types = [computation[name].type if name in computation else "" for name in instruction.operands]
        read = [sum(size for size, in_memory in _arrays(text) if in_memory) for text in types]
        written = sum(size for size, in_memory in _arrays(instruction.type) if in_memory)
        if opcode.endswith("-start"):
            return sum(read) * 2
        if opcode in ("dynamic-slice", "slice", "gather"):
            return min(read[0], written) + written + sum(read[1:])
        if opcode == "dynamic-update-slice":
            return 2 * read[1] if read[0] else read[1]
        called = re.search(r"calls=%?([\w.\-$]+)", instruction.attributes) if opcode == "fusion" else None
        if called and called[1] in self.computations:
            inside = self.computations[called[1]]
            read = [size and _part_read(inside, place, size) for place, size in enumerate(read)]
            written = min(written, _part_written(inside) or written)
        return sum(read) + written

    def trips(self, loop: Instruction, scope: str) -> int | None:
        """The rounds of a loop that counts an integer of its state up to a bound, None where that is not its form."""
        known = _TRIPS.search(loop.attributes)
        if known:
            return int(known[1])
        condition, body = (
            self.computations.get(re.search(rf"\b{part}=%?([\w.\-$]+)", loop.attributes)[1], {})
            for part in ("condition", "body")
        )
        test = next((i for i in condition.values() if i.opcode == "compare"), None)
        if test is None or "direction=L" not in test.attributes:
            return None
        first = self.computations[scope].get(loop.operands[0])
        root = next((i for i in body.values() if i.root), None)
        if first is None or first.opcode != "tuple" or root is None or root.opcode != "tuple":
            return None

        def at_first(position: int) -> int | None:
            return self.number(first.operands[position], scope)

        counter = _position(condition.get(test.operands[0]))
        last = self.constant(test.operands[1], condition, at_first)
        start = None if counter is None else at_first(counter)
        step = None if counter is None else self.increment(root.operands[counter], body, counter)
        if None in (last, start, step) or step <= 0:
            return None
        return max(0, -(-(last + ("direction=LE" in test.attributes) - start) // step))

    def increment(self, name: str, body: dict[str, Instruction], counter: int) -> int | None:
        """By how much a round raises the counter."""
        made = _through(name, body)
        if made is not None and made.opcode == "fusion" and len(made.operands) <= 2:
            called = self.computations.get(re.search(r"calls=%?([\w.\-$]+)", made.attributes)[1], {})
            made, body = next((i for i in called.values() if i.root), None), called
        if made is None or made.opcode != "add":
            return None
        constants = [self.constant(operand, body, lambda _: None) for operand in made.operands]
        return next((value for value in constants if value is not None), None)

    def number(self, name: str, scope: str) -> int | None:
        """A constant of a computation."""
        return self.constant(name, self.computations[scope], lambda _: None)

    @staticmethod
    def constant(name: str, computation: dict[str, Instruction], of_state: Callable[[int], int | None]) -> int | None:
        """The value of an integer that is a constant, or one of the loop's state that `of_state` knows."""
        made = _through(name, computation)
        if made is None:
            return None
        position = _position(made)
        if position is not None:
            return of_state(position)
        if made.opcode == "constant" and made.operands and re.fullmatch(r"-?\d+", made.operands[0]):
            return int(made.operands[0])
        return None


def _part_read(fused: dict[str, Instruction], place: int, size: int) -> int:
    """How many bytes a fusion reads of an operand of this size: of one that it only slices, the slices."""
    name = next((i.name for i in fused.values() if i.opcode == "parameter" and i.operands == (str(place),)), None)
    total = 0
    for user in fused.values():
        if name in user.operands:
            if user.opcode == "dynamic-update-slice" and user.operands[0] == name and name not in user.operands[1:]:
                continue
            if user.opcode not in ("dynamic-slice", "slice", "gather") or user.operands[0] != name:
                return size
            total += sum(array_bytes(user.type))
    return min(size, total)


def _part_written(fused: dict[str, Instruction]) -> int:
    """How many bytes a fusion writes that updates an array in place; 0 for another one."""
    root = next((i for i in fused.values() if i.root), None)
    made = root and _through(root.name, fused)
    if made is None or made.opcode != "dynamic-update-slice" or made.operands[1] not in fused:
        return 0
    return sum(array_bytes(fused[made.operands[1]].type))


def _position(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    return int(re.search(r"index=(\d+)", instruction.attributes)[1])


def _through(name: str, computation: dict[str, Instruction]) -> Instruction | None:
    """What made a value, through copies of it."""
    made = computation.get(name)
    while made is not None and made.opcode in ("copy", "copy-done", "copy-start", "bitcast", "convert", "reshape"):
        made = computation.get(made.operands[0])
    return made


def _closing(text: str, start: int) -> int:
    """The place of the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text)


def _instruction(line: str) -> Instruction | None:
    left, _, right = line.strip().partition(" = ")
    root, name = left.startswith("ROOT "), left.removeprefix("ROOT ").lstrip("%")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.find(" ")
    opcode = re.compile(r"\s*([a-z][\w\-]*)\(").match(right, end)
    if end <= 0 or opcode is None:
        return None
    close = _closing(right, opcode.end() - 1)
    inside = re.sub(r"/\*.*?\*/|\{[^{}]*\}", "", right[opcode.end() : close])
    operands = tuple(part.split()[-1].lstrip("%") for part in inside.split(",") if part.strip())
    return Instruction(name, right[:end], opcode[1], operands, right[close + 1 :], root)
