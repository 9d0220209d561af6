"""The benchmark's arithmetic on times: percentiles, profiles, crossings, comparisons; its page; its estimates."""

import dataclasses
import gzip
import json
import math
import xml.etree.ElementTree

import jax.numpy as jnp
import pytest

from kernels.bench import against, html, suites, timing
from kernels.bench.crossover import crossovers
from kernels.bench.estimate import estimate
from kernels.bench.limits import Limits, measured
from kernels.bench.plots import Line, Mark, plot
from kernels.bench.rows import KEY, Row
from kernels.bench.suites import SEQUENCES
from tests.test_bench import about, check_page, told
from tests.tpu_child import in_tpu_process


def row(variant="GLA", length=256, median=1.0, noise=0.01, **changes) -> Row:
    median = float(median)
    given = dict(
        op=variant,
        variant=variant,
        label=f"{variant}, causal",
        family="scan",
        implementation="xla",
        device="cpu",
        platform="cpu",
        shape=f"N{length}",
        length=length,
        dtype="float32",
        pattern="self causal",
        direction="forward",
        median_ms=median,
        p20_ms=median - noise,
        p80_ms=median + noise,
        wall_ms=median,
        flops=1000 * length,
        flops_per_s=1e6 * length / median,
        bytes=100 * length,
        floor_ms=0.5,
        times_floor=2 * median,
        bound="memory",
        peak_bytes=400 * length,
        error=1e-7,
    )
    return Row(**given | changes)


def sweep(exponent, variant, factor=1.0):
    return [row(variant, n, factor * n**exponent) for n in (256, 512, 1024, 2048)]


def test_the_slope_leaves_out_what_every_sample_costs(monkeypatch):
    """A call of 3 ms behind a start of 5 ms."""
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call(i):
        clock[0] += 3e-3
        return jnp.zeros(())

    def wait(out):
        clock[0] += 5e-3

    timed = timing.Timed(call, 3, wait=wait)
    timing.take_turns([timed], repeats=4, target=0.05, budget=10.0)
    assert (
        timed.calls * 3e-3 + 5e-3 >= 0.05
        and timed.seconds == pytest.approx([3e-3] * 4)
        and timed.walls == pytest.approx([8e-3] * 4)
    )
    assert timing.percentiles(timed.seconds) == pytest.approx((3, 3, 3))


def test_rows_take_turns_on_all_their_operands():
    order = []

    def recorded(name):
        return timing.Timed(lambda i: order.append((name, i)), 2, wait=lambda out: None)

    group = [recorded("a"), recorded("b")]
    timing.take_turns(group, repeats=3, target=0.0, budget=10.0)
    sampled = order[-3 * 2 * 4 :]
    assert [name for name, _ in sampled] == (["a"] * 4 + ["b"] * 4) * 3
    assert {place for name, place in order if name == "a"} == {0, 1}


def trace(directory, events):
    names = [dict(name="process_name", pid=1, args=dict(name="/device:GPU:0"))]
    names += [dict(name="process_name", pid=2, args=dict(name="/host:CPU"))]
    file = directory / "plugins" / "host.trace.json.gz"
    file.parent.mkdir()
    with gzip.open(file, "wt") as stream:
        json.dump({"traceEvents": names + events}, stream)
    return timing.read_trace(directory)


def kernel(start, length, module, pid=1):
    return dict(ph="X", pid=pid, name="fusion", ts=start, dur=length, args=dict(hlo_module=module))


def test_a_profile_of_kernels_is_read_call_by_call(tmp_path):
    """Two calls of two kernels, which overlap in the second; other programs and the host's work do not count."""
    events = [kernel(100, 10, "jit_a"), kernel(120, 5, "jit_a"), kernel(300, 10, "jit_a"), kernel(305, 10, "jit_a")]
    events += [kernel(200, 50, "jit_b"), kernel(130, 70, "jit_a", pid=2)]
    found = trace(tmp_path, events[::-1])
    assert timing.device_seconds(found, "jit_a", 2) == pytest.approx([15e-6, 15e-6])
    assert timing.device_seconds(found, "jit_b", 1) == pytest.approx([50e-6])
    # Kernels that do not divide by the calls, and programs that are not there.
    assert timing.device_seconds(found, "jit_a", 3) is None and timing.device_seconds(found, "jit_c", 2) is None


def test_a_profile_of_whole_programs_is_taken_as_it_is(tmp_path):
    found = trace(tmp_path, [dict(ph="X", pid=1, name="jit_a(123)", ts=t, dur=d) for t, d in ((5, 3), (20, 4))])
    assert timing.device_seconds(found, "jit_a", 2) == pytest.approx([3e-6, 4e-6])


def test_the_floor_is_what_takes_longer():
    bounds = Limits({"float32": 1e12}, 1e9, "")
    assert bounds.floor(2_000_000, 1000, "float32") == (2e-6, "compute")
    assert bounds.floor(2_000_000, 8000, "float32") == (8e-6, "memory")


def test_limits_can_be_measured():
    found = measured(["float32"], copied=1 << 12, side=32)
    assert 0 < found.bandwidth < math.inf and 0 < found.flops["float32"] < math.inf


def test_a_crossing_lies_on_the_power_laws():
    """n ** 2 against 700 n: they meet at 700 tokens."""
    (found,) = crossovers(sweep(2, "softmax") + sweep(1, "GLA", 700))
    assert found.length == pytest.approx(700) and found.faster
    assert str(found) == "GLA, causal (xla, forward, float32): faster beyond 700 tokens"


def test_no_crossing_in_the_range():
    always, never = crossovers(sweep(2, "softmax") + sweep(1, "GLA", 10) + sweep(1, "delta", 9000))
    assert always.length is never.length is None and always.faster and not never.faster
    assert "faster at every length from 256 to 2048" in str(always) and "slower at every length" in str(never)


def test_softmax_out_of_memory_is_a_crossing():
    softmax = sweep(2, "softmax")
    softmax[-1] = dataclasses.replace(softmax[-1], median_ms=None, status="out of memory")
    (found,) = crossovers(softmax + sweep(1, "delta", 9000))
    assert (found.length, found.faster, found.only) == (2048, True, 2048)


def test_softmax_of_another_pattern_or_dtype_is_not_compared_with():
    assert crossovers(sweep(2, "softmax") + [dataclasses.replace(r, family="part") for r in sweep(1, "GLA")]) == []
    for change in (dict(pattern="self noncausal"), dict(dtype="bfloat16"), dict(direction="forward+backward")):
        others = [dataclasses.replace(r, **change) for r in sweep(2, "softmax")]
        assert crossovers(others + sweep(1, "GLA")) == []


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (row(median=1.0), row(median=1.2), "slower"),
        (row(median=1.2), row(median=1.0), "faster"),
        (row(median=1.0), row(median=1.04), "same"),
        # As much slower, but within what the samples of both spread.
        (row(median=1.0, noise=0.06), row(median=1.2, noise=0.06), "same"),
        (row(median=1.0, noise=0.001), row(median=1.2, noise=0.001), "slower"),
        (row(), row(median_ms=None, status="wrong"), "lost"),
        (row(), row(median_ms=None, status="out of memory"), "lost"),
        (row(), row(median_ms=None, status="not measured"), "same"),
        (row(median_ms=None, status="wrong"), row(), "found"),
    ],
)
def test_a_change_counts_beyond_the_noise(old, new, verdict):
    (change,) = against.compare([new], [old])
    assert change.verdict == verdict and change.is_regression == (verdict in ("slower", "lost"))


@pytest.mark.parametrize("name", KEY)
def test_other_rows_are_not_compared(name):
    assert against.compare([dataclasses.replace(row(), **{name: "other"})], [row()]) == []


def test_the_page_marks_the_crossing_and_has_every_row():
    rows = sweep(2, "softmax") + sweep(1, "GLA", 700) + [row("<&>", median_ms=None, status="wrong", reason="a < b")]
    text = html.page(about(), rows, crossovers(rows))
    page = check_page(text)
    of_crossings = 1 + len(crossovers(rows))
    assert sum(tag == "tr" for tag, _ in page.tags) == len(rows) + len({r.shape for r in rows}) + of_crossings
    classes = [attributes.get("class") for _, attributes in page.tags]
    assert classes.count("mark") == 1 and classes.count("plot") == 3 and "limit" in classes
    assert "faster beyond 700 tokens" in text and "a &lt; b" in text


def test_a_plot_keeps_within_its_box():
    lines = [Line(f"line {i}", [(10.0**i, 3.0**i), (10.0 ** (i + 1), 2.0)]) for i in range(12)]
    marks = [Mark(5.0, 1e-3, "here")]
    drawn = plot("title", lines, x="x", y="y", x_text=str, y_text=str, marks=marks)
    root = xml.etree.ElementTree.fromstring(drawn)
    width, height = map(float, root.get("viewBox").split()[2:])
    places = [(float(e.get("cx")), float(e.get("cy"))) for e in root.iter("circle")]
    places += [(float(e.get("x")), float(e.get("y"))) for e in root.iter("text")]
    assert len(places) > 40 and all(0 <= x <= width and 0 <= y <= height for x, y in places)
    assert plot("empty", [], x="x", y="y", x_text=str, y_text=str) == ""


def test_the_table_puts_the_fastest_first():
    text = told([row("delta", median=3.0), row("GLA", median=1.0), row("retention", median=2.0)])
    assert text.index("GLA, causal xla") < text.index("retention, causal xla") < text.index("delta, causal xla")


def estimated(shape):
    """Status, memory and estimate of retention for one TPU, at one length."""
    case = suites.sequence.gated(*shape, decay="head")
    device, bounds, rows = estimate([case], ["bfloat16"], "v5e:2x2")
    return device.device_kind, [(r.status, r.direction, r.peak_bytes, r.estimate_ms, r.floor_ms) for r in rows]


@pytest.mark.slow
def test_a_program_for_a_tpu_that_is_not_there_is_estimated():
    kind, rows = in_tpu_process(estimated, [1, 512, 2, 128])
    assert "TPU v5" in kind and [row[:2] for row in rows if row[0] == "estimate"]
    for status, _, peak_bytes, estimate_ms, floor_ms in rows:
        if status == "estimate":
            assert estimate_ms >= floor_ms > 0 and peak_bytes > 0


def test_every_sequence_variant_takes_any_length():
    assert {make(1, 256, 2, 32).length for make in SEQUENCES} == {256}
