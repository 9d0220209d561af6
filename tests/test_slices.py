"""Devices in several slices or processes: which of them lie beside one another, and which rows each process reads."""

from unittest import mock

import jax
import pytest

from train import sharding


def device(number: int, *, slice_index: int = 0, process_index: int = 0):
    """As much of a device as its place in a mesh depends on."""
    fields = dict(id=number, platform="gpu", device_kind="none", slice_index=slice_index, process_index=process_index)
    return mock.create_autospec(jax.Device, instance=True, **fields)


@pytest.mark.parametrize(
    "sizes, within",
    [
        (dict(data=2, fsdp=4, tensor=1, sequence=1), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (dict(data=4, fsdp=1, tensor=2, sequence=1), [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (dict(data=1, fsdp=2, tensor=2, sequence=2), [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_only_batches_go_across_slices(sizes, within):
    devices = [device(i, slice_index=i // 4) for i in range(8)]
    mesh = sharding.make_mesh(sizes, devices)
    assert [[d.id for d in row.flat] for row in mesh.devices] == within
    # Along the last two axes all are of one slice.
    for group in mesh.devices.reshape(-1, sizes["tensor"] * sizes["sequence"]):
        assert len({one.slice_index for one in group}) == 1
    with pytest.raises(ValueError, match="does not divide over 2 slices: config.mesh.data"):
        sharding.make_mesh(dict(data=1, fsdp=1, tensor=8, sequence=1), devices)


def test_slices_of_a_batch_are_those_of_a_process_devices():
    devices = [device(i, process_index=i // 2) for i in range(8)]

    def of(process, **sizes):
        mesh = sharding.make_mesh(dict(data=-1, fsdp=1, tensor=1, sequence=1) | sizes, devices)
        return sharding.slices(sharding.batch_sharding(mesh), process)

    assert [of(p) for p in range(4)] == [((0, 1), 8), ((2, 3), 8), ((4, 5), 8), ((6, 7), 8)]
    assert [of(p, tensor=4) for p in range(4)] == [((0,), 2), ((0,), 2), ((1,), 2), ((1,), 2)]
    assert {of(p, sequence=8) for p in range(4)} == {((0,), 1)}
