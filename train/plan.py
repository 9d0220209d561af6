"""What a training step will take on devices that are not there: memory, arithmetic, traffic, collectives.

The step is the one that `train.program` trains with, compiled by the compiler that the devices will use (TPUs), or
lowered for them (GPUs, whose compiler needs one).
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from kernels import aot, compat, hlo
from kernels.cost import cost
from kernels.devices import Peak, peak
from kernels.dispatch import record_choices
from train import flops, program, sharding, stand_in
from train.sequences import SequenceSet
from train.sources import Dataset

# Passes over the matrix unit that a product of float32 takes on a TPU.
PASSES = {"default": 1, "high": 3, "highest": 6}
# "total memory required (20.00G) exceeds available HBM (15.75G)", and as it was said before.
_REFUSED = re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)")
_REFUSED_BEFORE = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")
# What the compiler may be asked for; not said, it is O2 that a training gets.
EFFORTS = ("O0", "O1", "O2", "O3")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to plan for.

    Attributes:
        topology: as it was asked for.
        kind: `jax.Device.device_kind`.
        platform: `"tpu"` or `"cuda"`.
        count: how many devices, as jax counts them.
        peak: limits of one of them, None where they are not known.
        memory: bytes that a program may have on one of them, None where that is not known.
        devices: to compile for; None for GPUs, which are only lowered for, as `abstract`.
    """

    topology: str
    kind: str
    platform: str
    count: int
    peak: Peak | None
    memory: int | None
    devices: Any = None
    abstract: Any = None

    def mesh(self, config: ml_collections.ConfigDict) -> Mesh | AbstractMesh:
        """The mesh that a config asks for."""
        if self.devices is not None:
            return sharding.make_mesh(dict(config.mesh), self.devices)
        shape = sharding.mesh_shape(dict(config.mesh), self.count)
        types = (AxisType.Auto,) * len(shape)
        return AbstractMesh(shape, sharding.AXES, axis_types=types, abstract_device=self.abstract)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training step on some devices; per device, where nothing else is said, and None where it is not known.

    Attributes:
        label: what differs from the config that was given.
        model, topology, device, devices, mesh: what runs on what.
        batch: examples of a step over all devices; accum_steps: in how many parts.
        unit: what `per_second` counts, images or tokens.
        parameters: numbers of the whole model.
        hbm_bytes_parameters, hbm_bytes_state, hbm_bytes_batch: of the parameters, of all that the step starts from
            (parameters, moments, averages), of a batch, by their shardings.
        hbm_bytes_arguments, hbm_bytes_outputs, hbm_bytes_aliased, hbm_bytes_temporaries, hbm_bytes_code: by the
            compiler.
        hbm_bytes_peak: at the worst moment, the code included; of a program that the compiler refused, what it would
            have needed. Of GPUs a lower bound.
        hbm_bytes_limit: what a program may have.
        fits: whether it does.
        flops: of the step over all devices, counted on its jaxpr; matmul_flops: the part in matrix products and
            kernels; model_flops: what counts for MFU, three forward passes.
        flops_compiler: by the compiler, the body of a loop once.
        bytes: to and from main memory, counted on the compiled program; bytes_compiler: by the compiler, which counts
            the memory on the chip too, and the body of a loop once.
        collectives: by kind, `count`, `bytes` and `sent` of `kernels.hlo.Collective`.
        unknown_loops: loops whose number of rounds is not known, counted once.
        seconds_compute, seconds_memory, seconds_interconnect: the least that each takes, at the device's peak.
        seconds: the largest of them: an estimate from below of the time of a step; bound: which it is.
        per_second: images or tokens over all devices at that; mfu: of `model_flops`.
        implementations: op -> what computes it; kernels: the kernels in the program.
        planning_seconds: that this took.
        compiler_options: that a training would not be compiled with.
        notes: what to know of the numbers.
    """

    label: str
    model: str
    topology: str
    device: str
    devices: int
    mesh: dict[str, int]
    batch: int
    accum_steps: int
    unit: str
    parameters: int
    hbm_bytes_parameters: int
    hbm_bytes_state: int
    hbm_bytes_batch: int
    hbm_bytes_limit: int | None
    flops: int | None
    matmul_flops: int | None
    model_flops: int | None
    implementations: dict[str, list[str]]
    kernels: list[str]
    hbm_bytes_arguments: int | None = None
    hbm_bytes_outputs: int | None = None
    hbm_bytes_aliased: int | None = None
    hbm_bytes_temporaries: int | None = None
    hbm_bytes_code: int | None = None
    hbm_bytes_peak: int | None = None
    fits: bool | None = None
    flops_compiler: float | None = None
    bytes: int | None = None
    bytes_compiler: float | None = None
    collectives: dict[str, dict[str, int]] | None = None
    unknown_loops: int | None = None
    seconds_compute: float | None = None
    seconds_memory: float | None = None
    seconds_interconnect: float | None = None
    seconds: float | None = None
    bound: str | None = None
    per_second: float | None = None
    mfu: float | None = None
    planning_seconds: float = 0.0
    compiler_options: dict[str, str] | None = None
    notes: tuple[str, ...] = ()


def target(topology: str) -> Target:
    """The devices that a topology names: `"v5e:16x16"`, `"v5p:4x4x4"`, `"2*v5e:16x16"` (two slices), `"h100:8"`.

    Raises:
        ValueError: for an unknown topology.
        RuntimeError: if libtpu is not installed.
    """
    name, _, shape = topology.partition(":")
    if name.lower() in aot.GPUS:
        device, count = aot.gpu_devices(topology)
        limits = peak(device.device_kind)
        return Target(topology, device.device_kind, "cuda", count, limits, limits.memory, abstract=device)
    if not re.fullmatch(r"(\d+\*)?v\d+[a-z]*", name) or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise ValueError(
            f"topology {topology!r}: a generation of TPU and a shape, such as v5e:16x16, v6e:4x8 or v5p:4x4x4, or a "
            f"kind of GPU ({', '.join(aot.GPUS)}) and how many, such as h100:8"
        )
    devices = aot.tpu_devices(topology)
    kind = devices[0].device_kind
    limits = peak(kind)
    chips = len({(getattr(device, "slice_index", 0), *device.coords) for device in devices})
    if limits is not None and len(devices) > chips and kind.lower() not in ("tpu v2", "tpu v3"):
        # Each chip is two devices here, which have half of it each.
        half = len(devices) // chips
        limits = Peak(*(value / half for value in dataclasses.astuple(limits)))
    memory = _memory_limit(devices) or (None if limits is None else int(limits.memory))
    return Target(topology, kind, "tpu", len(devices), limits, memory, devices=devices)


def _memory_limit(devices: list[Any]) -> int | None:
    """What a program may have on a device: the compiler says so when it refuses one that wants four tebibytes."""
    place = NamedSharding(Mesh(devices[:1], ("x",), axis_types=(AxisType.Auto,)), PartitionSpec())
    huge = jax.ShapeDtypeStruct((2**12, 2**30), "int8", sharding=place)
    try:
        jax.jit(lambda x: x[0, 0]).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        refused = out_of_memory(str(error))
        return refused and refused[1]
    return None


def out_of_memory(message: str) -> tuple[int, int] | None:
    """Bytes that a program wanted and could have had, of an error of the compiler; None where it is another error."""
    found = _REFUSED.search(message) or _REFUSED_BEFORE.search(message)
    if found is None:
        return None
    wanted, unit, limit, of_limit = found.groups()
    return round(float(wanted) * _UNITS[unit]), round(float(limit) * _UNITS[of_limit])


def plan(
    config: ml_collections.ConfigDict,
    on: Target,
    *,
    label: str = "",
    classes: int | None = None,
    dataset: Dataset | SequenceSet | None = None,
    effort: str | None = None,
    say: Say = lambda text: None,
) -> Plan:
    """Plans the training step of a config.

    Args:
        config: a complete config (`train.config.load`).
        on: the devices.
        label: a name for the plan.
        classes: see `train.stand_in.dataset`.
        dataset: the training split; None: what `train.stand_in.dataset` makes of the config.
        effort: one of `EFFORTS` that the compiler for a TPU makes, None for what it makes for a training.
        say: is told what is being done.

    Raises:
        ValueError, TypeError: as `train.program.build` does.
    """
    started = time.perf_counter()
    mesh = on.mesh(config)
    dataset = stand_in.dataset(config, classes) if dataset is None else dataset
    built = program.build(config, dataset, planned=mesh)
    batch = stand_in.batch(config, dataset, built.rows)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=built.replicated)
    arguments = (built.abstract_state, batch, key, built.task)
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "1 device"
    name = f"{config.model.name}, batch {config.data.batch_size} on {on.topology} ({shape})"
    say(f"tracing {name}")
    with record_choices() as choices:
        traced = built.train_step.trace(*arguments)
    # Kernels for GPUs ask the mesh in effect what they are lowered for.
    with compat.lowering_triton(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = traced.lower(lowering_platforms=(on.platform,))
    chosen: dict[str, set[str]] = {}
    for choice in choices:
        if choice.platform in (None, on.platform):
            chosen.setdefault(choice.op, set()).add(choice.implementation)
    notes: list[str] = []
    counted, model_flops = _counted(built, arguments, on.platform, notes)
    found = dict(
        label=label,
        model=config.model.name,
        topology=on.topology,
        device=on.kind,
        devices=on.count,
        mesh=dict(mesh.shape),
        batch=config.data.batch_size,
        accum_steps=config.accum_steps,
        unit=flops.unit(batch),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(built.abstract_state.params)),
        hbm_bytes_parameters=_held(built.abstract_state.params),
        hbm_bytes_state=_held((built.abstract_state, built.task)),
        hbm_bytes_batch=_held(batch),
        hbm_bytes_limit=on.memory,
        flops=counted and counted.flops,
        matmul_flops=counted and counted.matmul_flops,
        model_flops=model_flops,
        implementations={op: sorted(names) for op, names in sorted(chosen.items())},
        kernels=kernels_in(lowered.as_text()),
    )
    if on.platform == "tpu":
        say(f"compiling {name}")
        found["compiler_options"] = options = {"xla_optimization_level": f"EFFORT_{effort}"} if effort else None
        if effort:
            notes.append(
                f"compiled with effort {effort}, which a training is not: less is fused and kept on the chip, so that "
                "traffic, and the time that follows from it, are overstated, and memory somewhat"
            )
        found |= _compiled(lowered, on, notes, options)
    else:
        found |= _lowered(found, notes)
    examples = flops.examples(batch)
    found |= roofline(found, on, PASSES[config.matmul_precision] if config.dtype == "float32" else 1, examples)
    return Plan(**found, planning_seconds=round(time.perf_counter() - started, 1), notes=tuple(notes))


def _counted(built: program.Program, arguments: tuple[Any, ...], platform: str, notes: list[str]):
    """What the step costs, and its FLOPs for MFU; None for what cannot be counted."""
    try:
        # Sampling by rejection is all that runs an unknown number of times.
        counted = cost(built.train_step, *arguments, platform=platform, while_trips=1)
        return counted, flops.training_flops(built, arguments[1], platform) * flops.examples(arguments[1])
    except ValueError as error:
        notes.append(f"FLOPs are not counted: {error}")
        return None, None


def _held(tree: Any) -> int:
    """Bytes that one device holds of arrays, by their shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * getattr(leaf.dtype, "itemsize", 4)
        for leaf in jax.tree.leaves(tree)
    )


def kernels_in(text: str) -> list[str]:
    """The names of the kernels in a lowered program, sorted."""
    names = set(re.findall(r'kernel_name = "([^"]+)"', text))
    for call in re.findall(r"custom_call @__gpu\$xla\.gpu\.triton\(.*", text):
        names |= set(re.findall(r'\bname = "([^"]+)"', call)[:1])
    if "custom_call @__cudnn$fmha" in text:
        names.add("cudnn attention")
    return sorted(names)


def _compiled(lowered: Any, on: Target, notes: list[str], options: dict[str, str] | None) -> dict[str, Any]:
    """What the compiler makes of the program, or what it wants where it refuses."""
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        refused = out_of_memory(str(error))
        if refused is None:
            raise
        notes.append("the compiler refused it for want of memory, so that nothing else is known of it")
        return dict(hbm_bytes_peak=refused[0], hbm_bytes_limit=refused[1], fits=False)
    memory, counts = compiled.memory_analysis(), compiled.cost_analysis()
    parts = {
        name: getattr(memory, f"{field}_size_in_bytes")
        for name, field in dict(
            arguments="argument", outputs="output", aliased="alias", temporaries="temp", code="generated_code"
        ).items()
    }
    # The runtime allocates each of these whole. `peak_memory_in_bytes` counts the memory on the chip among them.
    highest = sum(parts.values()) - 2 * parts["aliased"]
    known = {f"hbm_bytes_{name}": size for name, size in parts.items()} | dict(
        hbm_bytes_peak=highest,
        fits=None if on.memory is None else highest <= on.memory,
        flops_compiler=counts.get("flops"),
        bytes_compiler=counts.get("bytes accessed"),
    )
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        # jaxlib does not know everything that a later libtpu writes (0.10.2 and 0.0.52 on v6e: async-update).
        notes.append(f"traffic and collectives are not known, as jaxlib cannot read the program: {error}")
        return known
    read = hlo.summary(text, on.count)
    if read.unknown_loops:
        notes.append(f"{read.unknown_loops} loops with an unknown number of rounds count once (rejection sampling)")
    if hlo.ACROSS_SLICES in read.collectives:
        notes.append("what goes across slices is in none of the least times: the network between them is not known")
    return known | dict(
        bytes=read.bytes,
        collectives={kind: dataclasses.asdict(found) for kind, found in read.collectives.items()},
        unknown_loops=read.unknown_loops,
    )


def _lowered(found: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """What is known without a compiler: what the step starts from, and the gradients, are there at one time."""
    least = found["hbm_bytes_state"] + found["hbm_bytes_batch"] + found["hbm_bytes_parameters"]
    notes.append(
        "lowered only, as compiling for a GPU needs one: activations, temporaries, traffic and collectives cannot be "
        "known, and the memory is a lower bound: the state, a batch and the gradients"
    )
    return dict(hbm_bytes_peak=least, fits=False if least > found["hbm_bytes_limit"] else None)


def roofline(found: dict[str, Any], on: Target, passes: int, examples: int) -> dict[str, Any]:
    """The least time of a step at the devices' peak, by what bounds it.

    Args:
        found: fields of a `Plan`.
        on: the devices.
        passes: over the matrix unit that a product takes.
        examples: images or tokens of a step.
    """
    if on.peak is None:
        return {}
    collectives = found.get("collectives")
    inside = {kind: each for kind, each in (collectives or {}).items() if kind != hlo.ACROSS_SLICES}
    sent = None if collectives is None else sum(each["sent"] for each in inside.values())
    each = dict(
        compute=(found["matmul_flops"], on.count * on.peak.flops / passes),
        memory=(found.get("bytes"), on.peak.bandwidth),
        interconnect=(sent, on.peak.interconnect),
    )
    times = {name: amount / rate for name, (amount, rate) in each.items() if amount is not None}
    result: dict[str, Any] = {f"seconds_{name}": value for name, value in times.items()}
    if len(times) < len(each) or not max(times.values()):
        return result
    bound = max(times, key=times.__getitem__)
    rate = examples / times[bound]
    mfu = found["model_flops"] / times[bound] / (on.count * on.peak.flops) if found["model_flops"] else None
    return result | dict(seconds=times[bound], bound=bound, per_second=rate, mfu=mfu)
