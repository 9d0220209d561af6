"""The search for block sizes, on a kernel whose time is known."""

import dataclasses
import json
import time

import jax
import pytest

from kernels import tune, tuning
from kernels.dispatch import Implementation, dispatch
from kernels.tune import main, neighbours, search, store
from tests.test_bench import double, toy_case
from tests.test_bench_report import row
from tests.test_tuning import ENTRY


def test_the_search_walks_to_the_fastest():
    """Fastest at 16 and 4; anything above 32 does not work."""

    def timed(blocks):
        if max(blocks.values()) > 32:
            return row(median_ms=None, status="failed")
        return row(median=1 + abs(blocks["rows"].bit_length() - 5) + abs(blocks["warps"].bit_length() - 3))

    best, found, first = search({"rows": 4, "warps": 8}, timed, time.monotonic() + 60)
    assert best == {"rows": 16, "warps": 4} and (found.median_ms, first.median_ms) == (1, 4)
    # With no time left the defaults stay.
    assert search({"rows": 4, "warps": 8}, timed, time.monotonic() - 1)[0] == {"rows": 4, "warps": 8}


def test_noise_is_no_improvement():
    best, *_ = search(
        {"rows": 4}, lambda blocks: row(median=1 - blocks["rows"] / 100, noise=0.5), time.monotonic() + 60
    )
    assert best == {"rows": 4}


def test_neighbours_are_doubled_or_halved():
    assert list(neighbours({"rows": 1, "warps": 4, "fast": True})) == [
        {"rows": 2, "warps": 4, "fast": True},
        {"rows": 1, "warps": 8, "fast": True},
        {"rows": 1, "warps": 2, "fast": True},
    ]


@pytest.fixture
def tunable():
    """A kernel that takes its block size from `kernels.tuning`, and waits long unless it is 4."""

    def run(x, factor):
        rows = tuning.blocks("toy", "gpu", {"rows": 2}, tokens=8)["rows"]

        def wait(x):
            time.sleep(2e-3 if rows == 4 else 5e-2)
            return x

        return jax.pure_callback(
            wait, jax.ShapeDtypeStruct(x.shape, x.dtype), double(x, factor), vmap_method="sequential"
        )

    @jax.custom_vjp
    def op(x, factor):
        return run(x, factor)

    op.defvjp(
        lambda x, factor: (run(x, factor), (x, factor)), lambda kept, g: (2 * g * kept[1], (2 * g * kept[0]).sum(0))
    )
    table = (Implementation("pallas_triton", op, platforms=("cpu",)), Implementation("xla", double))

    def called(implementation, x, factor):
        return dispatch("double", table, implementation, (x, factor), {})

    return dataclasses.replace(toy_case(), table=table, run=called)


def test_a_kernel_is_tuned_for_its_bucket(tunable):
    told = []
    entries = tune.tune([tunable], ["float32"], 600.0, told.append)
    assert len(entries) == 1, told
    entry = entries[0]
    assert (entry.op, entry.shape, entry.blocks) == ("toy", {"tokens": 8}, {"rows": 4})
    assert entry.median_ms < entry.default_ms


def test_what_is_stored_is_read_and_replaced(tmp_path):
    file = tmp_path / "tuning.json"
    file.write_text("[]")
    old, other = tuning.Entry(**ENTRY), tuning.Entry(**ENTRY | {"op": "gather"})
    store([old, other], file)
    assert tuning.entries(file) == (other, old)
    store([dataclasses.replace(old, blocks={"windows": 8})], file)
    assert [entry.blocks for entry in tuning.entries(file)] == [{"windows": 4}, {"windows": 8}]
    assert len(json.loads(file.read_text())) == 2


def test_a_machine_without_kernels_has_nothing_to_tune(capsys):
    assert main(["--op", "channel-attention"]) == 2
    assert "unknown op 'channel-attention'" in capsys.readouterr().err
    assert main(["--op", "retention"]) == 0
    assert "no kernel of these runs on cpu" in capsys.readouterr().out
