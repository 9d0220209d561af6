"""Planning: programs for devices that are not there, and what is told of them."""

import dataclasses
import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels import aot, compat, hlo
from kernels.devices import PEAKS
from tests.closed_forms import davit_products
from tests.datasets import PATCHES
from tests.tpu_child import in_tpu_process
from train import compile as command
from train import config, inputs, plan, program, sharding, stand_in
from zoo import create_model

DIGITS = "configs/digits.py:davit_nano"
SMALL = dict(model__overrides__depths="(1,)", model__overrides__dims="(8,)", model__overrides__num_heads="(2,)")
ROWS, COLUMNS, LOOPS = 512, 256, 7


def words(**values):
    return [f"--config.{name.replace('__', '.')}={value}" for name, value in values.items()]


def known_collectives(devices):
    """A compiled program with an all-gather, an all-reduce and, in a loop, further all-reduces, all of known size."""
    mesh = Mesh(np.array(devices), ("x",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec

    def body(a, b):
        gathered = jax.lax.all_gather(b, "x", tiled=True)
        total = jax.lax.psum(jnp.tanh(a @ gathered), "x")

        def step(carry, _):
            return jnp.tanh(jax.lax.psum(carry @ gathered.T, "x") @ gathered), None

        return jax.lax.scan(step, total, length=LOOPS)[0]

    def array(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec(*axes)))

    specs = dict(in_specs=(spec(), spec("x")), out_specs=spec(), check_vma=False)
    function = jax.jit(jax.shard_map(body, mesh=mesh, **specs))
    return function.lower(array((ROWS, ROWS)), array((ROWS, COLUMNS), "x")).compile()


def check_known_collectives(found, n, wide):
    """`wide`: bytes of a number that only a matrix product reads, which a TPU sends as bfloat16."""
    assert found["all-gather"] == dict(count=1, bytes=wide * ROWS * COLUMNS, sent=wide * ROWS * COLUMNS * (n - 1) // n)
    reduced = 4 * ROWS * COLUMNS + LOOPS * wide * ROWS * ROWS
    assert found["all-reduce"] == dict(count=1 + LOOPS, bytes=reduced, sent=2 * reduced * (n - 1) // n)


def test_collectives_are_counted_with_their_sizes_and_as_often_as_they_run():
    found = hlo.summary(known_collectives(jax.devices()).as_text(), jax.device_count())
    check_known_collectives({kind: dataclasses.asdict(each) for kind, each in found.collectives.items()}, 8, 4)
    assert found.unknown_loops == 0


TEXT = """HloModule jit_step, is_scheduled=true

%cond (p: (s32[], f32[4,8])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %bound = s32[]{:T(128)} constant(12)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%body (q: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %q = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %x = f32[4,8]{1,0:T(8,128)} get-tuple-element(%q), index=1
  %three = s32[]{:T(128)} constant(3)
  %next = s32[]{:T(128)} add(%j, %three)
  %swap = (f32[4,8]{1,0:T(8,128)S(1)}, f32[4,8]{1,0:T(8,128)}, u32[], u32[]) collective-permute-start(%x), \
source_target_pairs={{0,1},{1,0}}
  %swapped = f32[4,8]{1,0:T(8,128)} collective-permute-done(%swap)
  ROOT %t = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%next, %swapped)
}

%all-reduce-scatter.1 (y: bf16[64]) -> bf16[8] {
  %y = bf16[64]{0} parameter(0)
  %sum = bf16[64]{0} all-reduce(%y), replica_groups=[2,8]<=[16], to_apply=%add
  ROOT %slice = bf16[8]{0} dynamic-slice(%sum), dynamic_slice_sizes={8}
}

ENTRY %main (a: f32[4,8], b: bf16[64]) -> f32[4,8] {
  %a = f32[4,8]{1,0:T(8,128)} parameter(0)
  %b = bf16[64]{0} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %shard = bf16[8]{0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
  %c = f32[4,8]{1,0:T(8,128)S(1)} copy(%a)
  %state = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%zero, %a)
  %loop = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) while(%state), condition=%cond, body=%body
  ROOT %r = f32[4,8]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_loops_groups_and_fused_collectives_are_read_as_a_tpu_writes_them():
    found = hlo.summary(TEXT, 16)
    # The loop goes 0, 3, 6, 9.
    assert found.collectives["collective-permute"] == hlo.Collective(count=4, bytes=4 * 128, sent=4 * 128)
    assert found.collectives["reduce-scatter"] == hlo.Collective(count=1, bytes=128, sent=128 * 7 // 8)
    # The fusion; the copy's source alone, as its target is on the chip; in the loop the counter and the permutation.
    assert found.bytes == (128 + 16) + 128 + 4 * ((4 + 4 + 4) + 2 * 128) + 4 * (4 + 4 + 1)
    unknown = hlo.summary(TEXT.replace("constant(12)", 'custom-call(), custom_call_target="x"'), 16)
    assert unknown.unknown_loops == 1 and unknown.collectives["collective-permute"].count == 1


def test_traffic_of_a_compiled_program_is_what_its_operands_and_results_hold():
    def function(stack, x):
        return jax.lax.scan(lambda x, row: (x * row, None), x, stack)[0]

    length, width = 16, 2**16
    stack, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((length, width), (width,)))
    moved = hlo.summary(jax.jit(function).lower(stack, x).compile().as_text(), 1).bytes
    # Each round reads its row, reads x and writes it; that the state is copied now and then is the compiler's matter.
    least = 3 * length * 4 * width
    assert least <= moved < 1.5 * least


@pytest.mark.parametrize(
    "message, found",
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (30.50G) exceeds available HBM (15.75G). HLO module: jit_step.",
            (30.5 * 2**30, 15.75 * 2**30),
        ),
        ("Ran out of memory in memory space hbm. Used 512.0M of 256.0M hbm.", (2**29, 2**28)),
        ("INTERNAL: something else", None),
    ],
)
def test_a_refusal_of_the_compiler_is_read(message, found):
    assert plan.out_of_memory(message) == found


def tried_plan(batch, limit):
    """A plan of a program whose memory is linear in the batch."""
    names = [field.name for field in dataclasses.fields(plan.Plan) if field.default is dataclasses.MISSING]
    blank = {name: 0 for name in names} | dict.fromkeys(("label", "model", "topology", "device", "unit"), "")
    peak = 100 + 10 * batch
    known = dict(batch=batch, hbm_bytes_peak=peak, hbm_bytes_limit=limit, fits=peak <= limit)
    return plan.Plan(**blank | dict(mesh={}, implementations={}, kernels=[]) | known)


@pytest.mark.parametrize("start", [1, 8, 100, 5000])
@pytest.mark.parametrize("most", [0, 1, 2, 3, 17, 64, 100, 127, 1000])
def test_the_largest_batch_is_found_to_an_eighth_of_a_power_of_two(most, start):
    tried = []

    def attempt(count):
        tried.append(count)
        return tried_plan(count, 100 + 10 * most)

    found = command.largest(attempt, start)
    assert len(set(tried)) == len(tried) and min(tried) >= 1
    if most == 0:
        assert found.batch == 1 and not found.fits
    else:
        power = 2 ** (most.bit_length() - 1)
        assert found.fits and found.batch == most // (unit := max(1, power // 8)) * unit
        # Two to draw a line through, the power of two below and the one above, and what lies between them.
        assert len(tried) <= 7


def test_variants_are_split_at_the_keys():
    assert command.variant("remat=full") == ("--config.remat=full",)
    found = command.variant("mesh.data=1,model.overrides.depths=(1, 1, 2),mesh.fsdp=-1")
    assert found == ("--config.mesh.data=1", "--config.model.overrides.depths=(1, 1, 2)", "--config.mesh.fsdp=-1")
    with pytest.raises(ValueError, match="'full': write KEY=VALUE"):
        command.variant("full")


@pytest.mark.parametrize(
    "given, said",
    [
        (("h100:8", *words(remat="ful")), "unknown remat 'ful'; did you mean 'full'?"),
        (("h100:8", *words(mesh__fdsp=2)), "unknown key 'mesh.fdsp'; did you mean 'mesh.fsdp'"),
        (("h100:8", "--compare", "mesh.fdsp=2"), "unknown key 'mesh.fdsp'; did you mean 'mesh.fsdp'"),
        (("h100:8", *words(mesh__data=3)), "takes 3 devices, there are 8"),
        (("h100:8", *words(mesh__data=3)), "with the others as they are, data=8 would do"),
        (("h100:8", *words(data__batch_size=12)), "does not divide over 8 devices of the batch axes; the nearest"),
        (("h100:8", "--batch", "20"), "data.batch_size = 20 does not divide over 8 devices"),
        (("h100:8", "--batch", "auto"), "--batch auto needs a compiler"),
        (("h100", ), "a kind of GPU and how many, such as h100:8; kinds: a100"),
        (("v5e16", ), "a generation of TPU and a shape, such as v5e:16x16"),
        (("b200:8", ), "a generation of TPU and a shape, such as v5e:16x16"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_settings_is_said(given, said, capsys):
    topology, *rest = given
    assert command.main(["--config", DIGITS, "--topology", topology, *rest]) == 2
    assert said in capsys.readouterr().err


def test_without_libtpu_it_is_said_how_to_get_it(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else find(name, *rest)
    )
    assert command.main(["--config", DIGITS, "--topology", "v5e:2x2"]) == 2
    assert "needs libtpu: pip install 'attention-zoo[plan]'" in capsys.readouterr().err


def test_a_mesh_that_does_not_take_all_devices_is_told_which_would():
    with pytest.raises(ValueError, match="as they are, data=16 or fsdp=8 or tensor=2 would do"):
        sharding.mesh_shape(dict(data=32, fsdp=16, tensor=4, sequence=1), 16 * 16 * 4)
    assert sharding.mesh_shape(dict(data=-1, fsdp=16, tensor=4, sequence=1), 256) == (4, 16, 4, 1)


def test_a_step_for_gpus_is_lowered_and_counted(tmp_path, capsys):
    file = tmp_path / "plan.json"
    # Kernels compute the weights once more for the gradient.
    rest = words(model__overrides__implementation="xla", **SMALL)
    rest += ["--batch", "64", "--compare", "mesh.data=2,mesh.fsdp=4", "--json", str(file)]
    assert command.main(["--config", DIGITS, "--topology", "h100:8", *rest]) == 0
    told = capsys.readouterr()
    assert "lowered only, as compiling for a GPU needs one" in " ".join(told.out.split())
    assert max(map(len, told.out.splitlines())) <= 100
    assert "tracing davit_nano, batch 64 on h100:8 (data 8)" in told.err

    found = json.loads(file.read_text())
    model = create_model("davit_nano", num_classes=10, in_chans=1, depths=(1,), dims=(8,), num_heads=(2,))
    linear, attended, down, depthwise, stem = davit_products(model, 8)
    forward = linear + attended + down + depthwise[1] + stem[1]
    # Of the images no gradient is taken.
    assert found["matmul_flops"] == 2 * 64 * (3 * forward - stem[1])
    assert found["seconds_compute"] == pytest.approx(found["matmul_flops"] / (8 * 989e12))
    assert found["bytes"] is found["collectives"] is found["fits"] is None
    leaves = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1))))
    whole = 4 * sum(leaf.size for leaf in leaves)
    assert found["hbm_bytes_parameters"] == whole
    # AdamW's two moments, the averages, and the counters of the step.
    assert 4 * whole <= found["hbm_bytes_state"] < 4 * whole + 100
    assert found["hbm_bytes_peak"] == found["hbm_bytes_state"] + found["hbm_bytes_batch"] + whole
    (shared,) = found["variants"].values()
    # Kernels are divided by four, vectors are not.
    assert whole / 4 < shared["hbm_bytes_parameters"] < 0.4 * whole
    assert shared["flops"] == found["flops"] and shared["mesh"]["fsdp"] == 4


def test_what_computes_an_op_is_told():
    on = plan.target("h100:8")
    given = config.load(DIGITS, words(model__overrides__implementation="xla", **SMALL))
    found = plan.plan(given, on)
    assert found.implementations["window_attention"] == ["xla"]


@pytest.mark.parametrize(
    "platform, params", [("tpu", compat.tpu_params()), ("cuda", compat.triton_params(num_warps=4, num_stages=1))]
)
def test_the_names_of_kernels_are_read(platform, params):
    def body(x, out):
        out[...] = x[...] * 2

    x = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    twice = jax.jit(compat.pallas_call(body, name="twice", out_shape=x, compiler_params=params))
    mesh = plan.target("h100:1").mesh(config.load(DIGITS))
    with compat.lowering_triton(), jax.sharding.use_abstract_mesh(mesh):
        lowered = twice.trace(x).lower(lowering_platforms=(platform,))
    assert plan.kernels_in(lowered.as_text()) == ["twice"]


def batch_of(settings, dataset):
    given = stand_in.batch(settings, dataset, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    return {name: (array.shape, array.dtype) for name, array in given.items()}


def test_the_stand_in_gives_the_batches_of_the_data(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "train" / "a.txt").write_text("A text.")
    (tmp_path / "test" / "b.txt").write_text("Another.")
    text = words(data__name="files", data__path=tmp_path, data__tokenizer="bytes", data__length=64)
    patches = words(data__name="tfds", data__path=PATCHES, data__image_size=32, augment__mixup=0.5)
    for spec, given, classes in (
        ("configs/text.py:gated_deltanet_nano", text, None),
        ("configs/imagenet.py:davit_tiny", patches, 3),
        ("configs/imagenet.py:davit_tiny", patches, None),
    ):
        settings = config.load(spec, given)
        real, ours = inputs.open_dataset(settings, "train"), stand_in.dataset(settings, classes)
        assert batch_of(settings, real) == batch_of(settings, ours)
        for field in ("vocab_size", "length", "align", "packed", "source_length", "num_classes", "channels"):
            assert getattr(real, field, None) == getattr(ours, field, None), field


def test_classes_that_nobody_knows_have_to_be_said():
    settings = config.load("configs/imagenet.py:davit_tiny", words(data__name="folder", data__path="/nowhere"))
    with pytest.raises(ValueError, match="not known; say it by --classes N .*/nowhere"):
        stand_in.dataset(settings)
    assert stand_in.dataset(settings, 7).num_classes == 7
    with pytest.raises(ValueError, match="unknown data set 'foldr'; did you mean 'folder'"):
        stand_in.dataset(config.load("configs/imagenet.py:davit_tiny", words(data__name="foldr")), 7)
    faces = stand_in.dataset(config.load("configs/twins.py", words(data__name="people", data__image_size=32)), 7)
    assert faces.num_classes == 7 and list(faces.twins) == [-1] * 7


def test_a_teacher_is_planned_without_its_weights():
    given = config.load(DIGITS, words(distill__teacher="davit_nano", **SMALL))
    on = plan.target("h100:1")
    built = program.build(given, stand_in.dataset(given), planned=on.mesh(given))
    leaves = jax.tree.leaves(built.task)
    assert len(leaves) > 10 and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_the_roofline_is_the_longest_of_three_times():
    on = dataclasses.replace(plan.target("h100:8"), peak=PEAKS["tpu v5e"], count=4)
    moved = dict(all=dict(count=1, bytes=400, sent=200))
    work = dict(matmul_flops=197 * 10**12, model_flops=197 * 10**12, bytes=819 * 10**8, collectives=moved)
    found = plan.roofline(work, on, 1, 100)
    assert found["seconds_compute"] == pytest.approx(0.25) and found["seconds_memory"] == pytest.approx(0.1)
    assert found["seconds_interconnect"] == pytest.approx(1e-9)
    assert (found["bound"], found["seconds"], found["per_second"]) == ("compute", 0.25, 400)
    assert found["mfu"] == pytest.approx(1)
    assert plan.roofline(work, on, 6, 100)["seconds"] == pytest.approx(1.5)
    assert plan.roofline(work | dict(bytes=10**12), on, 1, 100)["bound"] == "memory"


def on_tpu():
    """What a child process finds with the compiler of a TPU."""
    devices = aot.tpu_devices("v5e:2x2")
    compiled = known_collectives(devices)
    memory = compiled.memory_analysis()
    found = plan._compiled(_Lowered(compiled), plan.target("v5e:2x2"), [], None)
    found["of_memory_analysis"] = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    quiet = functools.partial(command.make, DIGITS, "v5e:2x2", overrides=words(**SMALL))
    given, shared = quiet(compare=["mesh.data=1,mesh.fsdp=-1"])
    batches = [quiet(batch=batch)[0] for batch in (2**8, 2**22)]
    (slices,) = command.make(DIGITS, "2*v5e:2x2", overrides=words(**SMALL))
    return [found, *map(dataclasses.asdict, (given, shared, *batches, slices))]


@dataclasses.dataclass
class _Lowered:
    compiled: object

    def compile(self, compiler_options):
        return self.compiled


@pytest.mark.slow
def test_plans_by_the_compiler_of_a_tpu():
    known, given, shared, small, large, slices = in_tpu_process(on_tpu)
    check_known_collectives(known["collectives"], 4, 2)
    assert known["hbm_bytes_peak"] == known["of_memory_analysis"]
    # A quarter of the gathered matrix is an argument; two copies of matrices are not more than the rest.
    assert known["hbm_bytes_arguments"] == 4 * (ROWS * ROWS + ROWS * COLUMNS // 4)

    assert given["fits"] and given["hbm_bytes_limit"] == pytest.approx(15.75 * 2**30)
    assert set(given["collectives"]) == {"all-reduce"}
    # Every gradient once, and what else is summed is small.
    gradients = given["hbm_bytes_parameters"]
    assert gradients <= given["collectives"]["all-reduce"]["bytes"] < gradients + 1000
    # Outside of matrix products the counts differ.
    assert given["flops"] / 4 == pytest.approx(given["flops_compiler"], rel=0.1)
    assert shared["hbm_bytes_arguments"] < 0.7 * given["hbm_bytes_arguments"]
    assert "all-gather" in shared["collectives"]

    assert small["fits"] and not large["fits"]
    assert small["hbm_bytes_peak"] < small["hbm_bytes_limit"] < large["hbm_bytes_peak"]
    assert large["seconds"] is None and small["seconds"] > 0

    # Twice the devices, half the work of each; every gradient goes across once, each device with its share or whole, in
    # tiles of 8 x 128 numbers.
    assert slices["devices"] == 8 and slices["fits"]
    across = slices["collectives"][hlo.ACROSS_SLICES]
    assert gradients / 4 <= across["sent"] < gradients + 8 * 128 * 4 * across["count"]
    assert slices["seconds_compute"] == pytest.approx(given["seconds_compute"] / 2)
    assert any("across slices" in note for note in slices["notes"])
