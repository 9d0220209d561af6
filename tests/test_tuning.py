"""Where block sizes come from."""

import json

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from kernels import tuning

ENTRY = dict(
    device="nvidia h100",
    op="window",
    shape={"tokens": 64},
    blocks={"windows": 4},
    median_ms=0.1,
    default_ms=0.2,
    jax="0.10.2",
    date="2026-01-01",
)


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A way to store choices for the test."""

    def store(*changes):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        file.write_text(json.dumps([ENTRY | change for change in changes]))
        found = tuning.entries(file)
        monkeypatch.setattr(tuning, "entries", lambda: found)

    return store


def on(kind):
    """Traced as for this device."""
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def chosen(**shape):
    return tuning.blocks("window", "gpu", {"windows": 1, "warps": 4}, **shape)


def test_what_is_shipped_can_be_read():
    assert all(entry.median_ms < entry.default_ms for entry in tuning.entries())


def test_a_measured_choice_serves_its_device_and_shape(stored):
    stored({}, {"device": "nvidia h100 nvl", "blocks": {"windows": 16}})
    with on("NVIDIA H100 80GB HBM3"):
        assert chosen(tokens=64) == {"windows": 4, "warps": 4}
        assert chosen(tokens=128) == {"windows": 1, "warps": 4}
    with on("NVIDIA H100 NVL"):
        assert chosen(tokens=64) == {"windows": 16, "warps": 4}
    with on("NVIDIA A100-SXM4-80GB"):
        assert chosen(tokens=64) == {"windows": 1, "warps": 4}
    assert chosen(tokens=64) == {"windows": 1, "warps": 4}


def test_the_newest_measurement_counts(stored):
    stored({"date": "2026-03-01", "blocks": {"windows": 2}}, {"date": "2026-02-01", "blocks": {"windows": 8}})
    with on("NVIDIA H100"):
        assert chosen(tokens=64)["windows"] == 2


def test_a_block_size_that_the_kernel_does_not_take_is_an_error(stored):
    stored({"blocks": {"stages": 2}})
    with on("NVIDIA H100"), pytest.raises(ValueError, match=r"has block sizes \['stages'\], the kernel takes"):
        chosen(tokens=64)


@pytest.mark.parametrize("text", ["{", '[{"device": "x"}]', "3"])
def test_a_damaged_file_is_named(tmp_path, text):
    file = tmp_path / "tuning.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="tuning.json is not a list of block sizes"):
        tuning.entries(file)


@pytest.mark.parametrize("size, power", [(0, 1), (1, 1), (2, 2), (49, 64), (64, 64), (65, 128)])
def test_buckets(size, power):
    assert tuning.bucket(size) == power
