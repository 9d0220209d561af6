"""The benchmark: what it counts, what it refuses to time, what it writes."""

import csv
import dataclasses
import functools
import html.parser
import json
import math
import re
import time
import xml.etree.ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels import cross
from kernels.bench import errors, measure, suites
from kernels.bench.__main__ import main
from kernels.bench.case import Case, Operand
from kernels.bench.limits import DATA_SHEET, Limits
from kernels.bench.rows import KEY, STATUSES, Row, read_json
from kernels.bench.table import WIDTH, table
from kernels.cost import cost, tree_bytes
from kernels.dispatch import Implementation, dispatch

LIMITS = Limits({"float32": 1e11, "bfloat16": 1e11}, 1e10, DATA_SHEET)
PLAN = measure.Plan(["float32"], repeats=3, target=1e-4, budget=0.1, limits=LIMITS, with_peers=False)
# Public functions that are no attention: what attention is made of, and single tokens of it.
PARTS = {
    *("merge_windows", "partition_windows", "region_descriptors", "rotary", "route_regions", "routing_step", "miras"),
    *("asymmetry_signature", "attention_rollout", "mix_scales", "pool_parts", "roi_align", "select_tokens"),
    "take_tokens",
}


def double(x, factor):
    return 2 * x * factor


def toy_case(*others: Implementation, forward=double) -> Case:
    """An op of two operands, one of them shared by the batch, whose XLA form is right; the others are what they are."""
    table = (Implementation("xla", forward), *others)
    return Case(
        op="double",
        variant="double",
        family="window",
        shape="B4 N8",
        pattern="self causal",
        operands={"x": Operand((4, 8)), "factor": Operand((8,), batched=False)},
        run=lambda implementation, x, factor: dispatch("double", table, implementation, (x, factor), {}),
        table=table,
        flops=2 * 4 * 8,
    )


def on_cpu(run, name="pallas_triton", **options):
    return Implementation(name, run, platforms=("cpu",), **options)


def measured(*others, plan=PLAN) -> dict[tuple[str, str], Row]:
    found = measure.measure([toy_case(*others)], plan)
    return {(row.implementation, row.direction): row for row in found}


@functools.cache
def every_case() -> tuple[Case, ...]:
    """Each maker of cases with each of its options."""
    cases = suites.chosen("variants", "small") + suites.chosen(
        "kernels", "small", ["window", "window + bias", "bi-level"]
    )
    return tuple(case for case in cases if case.length in (None, 256))


def counted(case, **options):
    return cost(lambda arrays: case.run("xla", **arrays), case.abstract("float32"), **options)


def test_every_variant_is_in_the_suites():
    named = {case.op for case in suites.chosen("variants", "small")}
    # What `bilevel_attention` is on an accelerator.
    public = {*kernels.__all__, *cross.__all__} - PARTS - {"block_sparse_attention"}
    assert named - {"running"} == public
    patterns = {case.pattern for case in suites.chosen("variants", "small")}
    assert patterns == {"self causal", "self noncausal", "cross noncausal"}


@pytest.mark.slow
def test_bytes_are_those_of_operands_and_results():
    for case in every_case():
        assert case.bytes("forward", "float32") == counted(case).io_bytes, case
    x, factor = 4 * 8, 8
    assert toy_case().bytes("forward", "float32") == 4 * (x + factor + x)
    # The gradient of the output comes in, those of the operands go out.
    assert toy_case().bytes("forward+backward", "float32") == 4 * (x + factor + x + x + x + factor)
    assert toy_case().bytes("forward", "bfloat16") == 2 * (x + factor + x)


def test_flops_are_those_of_the_products():
    """The XLA forms of these compute each product once and nothing that is masked away."""
    exact = [case for case in every_case() if case.pattern.endswith("noncausal") and case.variant != "local"]
    exact = [case for case in exact if case.op != "depthwise_conv2d"]
    assert len(exact) > 20
    for case in exact:
        assert counted(case).matmul_flops == case.flops, case
    both = exact[0].function("forward+backward", "xla")
    counts = cost(both, exact[0].abstract("float32"), exact[0].outputs("float32"))
    assert counts.matmul_flops == exact[0].useful_flops("forward+backward") == 3 * exact[0].flops


def test_flops_of_causal_attention_are_those_of_the_pairs_that_are_seen():
    for case in every_case():
        if case.op == "attention" and case.pattern == "self causal":
            b, n, h, d = case.operands["query"].shape
            pairs = int(np.tril(np.ones((n, n))).sum())
            assert case.flops == 2 * b * h * pairs * 2 * d


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [7, 20])
def test_flops_of_local_attention_are_those_of_the_pairs_that_are_seen(tokens, causal):
    case = suites.sequence.local(1, tokens, 2, 3, causal=causal, block=4)
    arrays = case.inputs("float32")
    _, weights = kernels.local_attention(
        **arrays, block=4, causal=causal, look_ahead=0 if causal else 1, return_weights=True
    )
    assert case.flops == 2 * int((weights > 0).sum()) * 2 * 3


@pytest.mark.parametrize("variant", ["retention", "simple GLA", "GLA", "delta", "gated delta", "no decay"])
def test_flops_of_a_recurrence_are_those_of_its_tokens_one_by_one(variant):
    case = next(c for c in suites.chosen("variants", "small", [variant]) if c.length == 256)
    b, n, h, d = case.operands["query"].shape
    run = kernels.delta_rule if "beta" in case.operands else kernels.gated_linear_attention
    found = cost(lambda arrays: run(**arrays, form="recurrent"), case.abstract("float32"))
    # Writing is no matrix product in that form: an outer product, added up.
    assert case.flops == found.matmul_flops + 2 * b * n * h * d * d


def test_flops_of_the_remaining_ones():
    by_name = {case.variant: case for case in every_case()}
    depthwise = by_name["depthwise 3x3"]
    assert depthwise.flops == counted(depthwise, platform="tpu").matmul_flops
    running = by_name["running sum"]
    assert running.flops == cost(lambda x: jnp.cumsum(x, 1), running.abstract("float32")["x"]).flops - 1 * 2 * 32
    b, n, c = by_name["short conv 4"].operands["x"].shape
    assert by_name["short conv 4"].flops == 2 * b * c * (4 * n - (3 + 2 + 1))
    # Seven products of a token with a layer: two to recall, three for the gradients, two to read.
    for rule in ("yaad", "moneta", "memora"):
        b, n, h, d = by_name[rule].operands["query"].shape
        assert by_name[rule].flops == b * n * h * 7 * 2 * d * d
    routing = by_name["routing"]
    b, n, h, d = routing.operands["query"].shape
    clusters = routing.operands["means"].shape[1]
    seen = clusters * 64 * 65 // 2
    assert routing.flops == 2 * b * h * (n * clusters * d + seen * 2 * d)


def test_the_state_of_a_recurrence_does_not_grow_and_that_of_softmax_does():
    def state(variant, length):
        cases = suites.chosen("variants", "small", [variant])
        return next(c for c in cases if c.length == length and c.state is not None).state_bytes("float32")

    assert state("softmax", 512) == 2 * state("softmax", 256) == 2 * 512 * 2 * 32 * 4
    assert state("retention", 512) == state("retention", 256) == 2 * 32 * 32 * 4


@pytest.mark.parametrize("op", ["window", "delta", "bilateral"])
def test_the_reference_in_parts_of_the_batch_is_the_reference(op, monkeypatch):
    case = {
        "window": lambda: suites.image.window(2, 14, 2, bias=True),
        "delta": lambda: suites.sequence.delta(2, 64, 2, 8),
        "bilateral": lambda: suites.image.bilateral(2, 4, 2),
    }[op]()
    operands = case.inputs("float32"), case.cotangent("float32")
    whole = errors.Reference(case, True)(*operands)
    monkeypatch.setattr(errors, "BATCH_BYTES", 1)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(errors.Reference(case, True)(*operands))):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_a_right_row_has_everything():
    row = measured(on_cpu(lambda x, factor: x * (factor + factor)))["pallas_triton", "forward+backward"]
    assert row.status == "ok" and row.reason is None and row.bit_equal
    assert 0 < row.p20_ms <= row.median_ms <= row.p80_ms and row.wall_ms > 0 and row.repeats == 3
    assert row.floor_ms == pytest.approx(1e3 * max(row.bytes / 1e10, row.flops / 1e11)) and row.bound == "memory"
    assert row.times_floor == pytest.approx(row.median_ms / row.floor_ms)
    assert row.flops_per_s == pytest.approx(row.flops / row.median_ms * 1e3)
    assert row.error < 1e-6 and row.error_gradients < 1e-6 and row.worst_gradient in ("x", "factor")
    assert row.peak_bytes >= row.bytes and row.residual_bytes >= 4 * 8 * 4 and row.compile_s > 0


def test_a_wrong_row_has_no_time():
    rows = measured(on_cpu(lambda x, factor: 2.1 * x * factor))
    assert rows["xla", "forward"].status == "ok"
    for direction in ("forward", "forward+backward"):
        row = rows["pallas_triton", direction]
        assert row.status == "wrong" and row.median_ms is row.flops_per_s is row.times_floor is None
        assert row.error == pytest.approx(0.05, rel=1e-3) and "outputs are off by 0.05" in row.reason
    assert "WRONG, no time given" in told(rows.values())


def test_a_wrong_gradient_has_no_time():
    @jax.custom_vjp
    def wrong(x, factor):
        return double(x, factor)

    wrong.defvjp(lambda x, factor: (double(x, factor), (x, factor)), lambda kept, g: (2 * g * kept[1], g.sum(0)))
    rows = measured(on_cpu(wrong))
    assert rows["pallas_triton", "forward"].status == "ok"
    row = rows["pallas_triton", "forward+backward"]
    assert row.status == "wrong" and row.worst_gradient == "factor" and "gradient of factor" in row.reason


def test_nan_is_wrong():
    row = measured(on_cpu(lambda x, factor: double(x, factor) * jnp.nan))["pallas_triton", "forward"]
    assert row.status == "wrong" and math.isnan(row.error)
    assert json.loads(json.dumps(dataclasses.asdict(row), default=str))


def test_a_row_that_is_not_served_says_why():
    refuses = on_cpu(double, unsupported=lambda *arrays: "9 tokens; it takes 10")
    row = measured(refuses)["pallas_triton", "forward"]
    assert row.status == "not supported" and "9 tokens; it takes 10" in row.reason and row.median_ms is None


def test_a_row_for_another_device_is_not_measured():
    row = measured(Implementation("pallas_tpu", double, platforms=("tpu",)))["pallas_tpu", "forward"]
    assert (row.status, row.reason, row.median_ms) == ("not measured", "runs on tpu", None)
    assert "not measured, runs on tpu: pallas_tpu (double)" in told([row])


def exhausted(*arrays):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")


def test_out_of_memory_is_a_result():
    rows = measured(on_cpu(exhausted))
    assert rows["pallas_triton", "forward"].status == "out of memory" and rows["xla", "forward"].status == "ok"


def test_what_would_not_fit_is_not_run(monkeypatch):
    monkeypatch.setattr(measure, "free_bytes", lambda device: 10)
    row = measured()["xla", "forward"]
    assert row.status == "out of memory" and "GiB are free" in row.reason


def test_what_is_too_large_in_float64_is_timed_and_marked(monkeypatch):
    monkeypatch.setattr(errors.Reference, "__call__", exhausted)
    row = measured()["xla", "forward"]
    assert row.status == "ok" and row.median_ms > 0 and row.error is None
    assert row.reason.startswith("not checked") and "not checked" in told([row])


def test_any_other_failure_is_a_result_too():
    def broken(*arrays):
        raise RuntimeError("ptxas exited with 255\nand more")

    row = measured(on_cpu(broken))["pallas_triton", "forward"]
    assert (row.status, row.reason) == ("failed", "RuntimeError: ptxas exited with 255")


def test_bits_that_change_are_noticed():
    runs = iter([jnp.ones(3), jnp.ones(3), jnp.ones(3).at[1].add(1e-7), jnp.ones(3), jnp.ones(3)])
    assert not errors.bit_equal(lambda: next(runs))
    assert errors.bit_equal(lambda: jnp.array([1, jnp.nan]))
    assert not errors.bit_equal(functools.partial(next, iter([jnp.zeros(2), -jnp.zeros(2), *[jnp.zeros(2)] * 3])))


def about():
    """What the table and the page say of a run."""
    texts = dict(device="cpu", platform="cpu", host="a host", jax="0", date="today", commit="abc", python="3")
    texts |= dict(suite="quick", method="slope", limits="both", error_bounds="little", peers={"torch": "1"})
    return texts | dict(cores=2, repeats=3, bandwidth=1e10, rates={"float32": 1e11})


def told(rows):
    text = table(about(), list(rows))
    assert max(map(len, text.splitlines())) <= WIDTH
    return re.sub(r"\s+", " ", text)


class Page(html.parser.HTMLParser):
    """Collects what a page would load, and its tables' rows."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def check_page(text):
    xml.etree.ElementTree.fromstring(text)
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object") and not {"src", "href", "xlink:href"} & set(attributes), (
            tag
        )
    assert "http" not in text and "url(" not in text and "@import" not in text
    return page


def test_the_command_writes_what_it_measured(tmp_path, capsys):
    files = {name: str(tmp_path / f"rows.{name}") for name in ("json", "csv", "html")}
    options = [part for name, file in files.items() for part in (f"--{name}", file)]
    command = ["--suite", "variants", "--ops", "running-sum,short conv 4", "--shapes", "N256,N512", "--repeats", "3"]
    assert main(command + options) == 0
    out = capsys.readouterr().out
    assert "running sum" in out and max(map(len, out.splitlines())) <= WIDTH
    found = json.loads((tmp_path / "rows.json").read_text())
    assert {"jax", "jaxlib", "python", "device", "commit", "date", "method", "limits", "peers"} <= set(found["meta"])
    assert found["meta"]["peers"].keys() == {"torch", "tokamax", "fla"}
    fields = {field.name for field in dataclasses.fields(Row)}
    assert len(found["rows"]) == 8 and all(row.keys() == fields for row in found["rows"])
    assert all(row["status"] in STATUSES for row in found["rows"])
    with open(files["csv"]) as file:
        assert [row["variant"] for row in csv.DictReader(file)] == [row["variant"] for row in found["rows"]]
    page = check_page((tmp_path / "rows.html").read_text())
    assert sum(tag == "tr" for tag, _ in page.tags) == 8 + 2
    # The same rows, as long as before: no regression, whatever the machine is doing now.
    meta, rows = read_json(files["json"])
    assert [row.key for row in rows] == [tuple(row[k] for k in KEY) for row in found["rows"]]


def test_quick_has_twenty_rows_and_the_sweep_four_lengths():
    assert 2 * sum(len(case.table) for case in suites.chosen("quick", "small")) >= 20
    lengths = {case.length for case in suites.chosen("variants", "small") if case.variant == "GLA"}
    assert len(lengths) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "quik"], "unknown suite 'quik'; did you mean 'quick'"),
        (["--ops", "retension"], "unknown op 'retension'; did you mean 'retention'"),
        (["--shapes", "N511"], "unknown shape 'N511'; did you mean 'N512'"),
        (["--dtypes", "float23"], "unknown dtype 'float23'; did you mean 'float32'"),
        (["--size", "smal"], "unknown size 'smal'; did you mean 'small'"),
        (["--against", "nowhere.json"], "nowhere.json"),
    ],
)
def test_errors_name_the_nearest(arguments, said, capsys):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"rows": 3}')
    with pytest.raises(ValueError, match="x.json is no result of this benchmark"):
        read_json(str(tmp_path / "x.json"))


def slowed(x, factor):
    def wait(x):
        time.sleep(0.05)
        return np.asarray(x)

    return jax.pure_callback(wait, jax.ShapeDtypeStruct(x.shape, x.dtype), double(x, factor), vmap_method="sequential")


def test_a_kernel_that_was_slowed_is_told_from_one_that_was_not():
    from kernels.bench.against import compare

    plan = dataclasses.replace(PLAN, directions=("forward",))
    before = measure.measure([toy_case(on_cpu(double))], plan)
    after = measure.measure([toy_case(on_cpu(slowed))], plan)
    changes = {change.row.implementation: change for change in compare(after, before)}
    assert changes["pallas_triton"].verdict == "slower" and changes["pallas_triton"].is_regression
    assert "times" in str(changes["pallas_triton"])
    assert tree_bytes(toy_case().inputs("float32")) == 4 * (4 * 8 + 8)
