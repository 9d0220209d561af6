"""Several processes and slices: how processes meet, where devices lie in a mesh, and which rows each process reads."""

import os
import subprocess
import sys
from unittest import mock

import jax
import pytest

from tests.runs import ROOT
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
        return sharding.batch_slices(sharding.batch_sharding(mesh), process)

    assert [of(p) for p in range(4)] == [((0, 1), 8), ((2, 3), 8), ((4, 5), 8), ((6, 7), 8)]
    assert [of(p, tensor=4) for p in range(4)] == [((0,), 2), ((0,), 2), ((1,), 2), ((1,), 2)]
    assert {of(p, sequence=8) for p in range(4)} == {((0,), 1)}


# What a scheduler tells process `i` of two.
SCHEDULERS = {
    "slurm": lambda i: dict(
        SLURM_JOB_ID="4567",
        SLURM_STEP_NODELIST="localhost",
        SLURM_STEP_NUM_NODES="1",
        SLURM_NTASKS="2",
        SLURM_PROCID=str(i),
        SLURM_LOCALID=str(i),
    ),
    "open mpi": lambda i: dict(
        OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://127.0.0.1:34911",
        OMPI_COMM_WORLD_SIZE="2",
        OMPI_COMM_WORLD_RANK=str(i),
        OMPI_COMM_WORLD_LOCAL_RANK=str(i),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_processes_meet_as_a_scheduler_says(scheduler):
    code = "from train import processes; processes.join(); import jax; print(jax.process_index(), jax.process_count())"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, **SCHEDULERS[scheduler](i)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    assert [child.communicate(timeout=120)[0].split() for child in children] == [["0", "2"], ["1", "2"]]
