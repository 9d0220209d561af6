"""What the accelerators can do at most, as their makers state it: the floor that times are compared with."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Peak:
    """Limits of one device, as jax counts devices.

    Attributes:
        flops: dense bfloat16 matrix operations per second, a multiply-add being two.
        bandwidth: bytes per second between the device and its main memory.
        memory: bytes of that. A program may have a little less; the compiler says how much when it refuses one.
        interconnect: bytes per second that the device sends to its neighbours at most, by all links together: half of
            what is stated for both directions.
    """

    flops: float
    bandwidth: float
    memory: int
    interconnect: float


# By the lower-cased start of `jax.Device.device_kind`; the longest that matches counts.
PEAKS: dict[str, Peak] = {
    # cloud.google.com/tpu/docs/system-architecture-tpu-vm and the pages of each version, per chip, where memory is in
    # units of 2**30. v2 and v3 show each chip as two devices; their links are those of Jouppi et al., "A Domain-
    # Specific Supercomputer for Training Deep Neural Networks", CACM 63(7), 2020.
    "tpu v2": Peak(22.5e12, 0.35e12, 8 * GIB, 124e9),
    "tpu v3": Peak(61.5e12, 0.45e12, 16 * GIB, 164e9),
    "tpu v4": Peak(275e12, 1.2e12, 32 * GIB, 300e9),
    "tpu v5 lite": Peak(197e12, 0.819e12, 16 * GIB, 200e9),
    "tpu v5e": Peak(197e12, 0.819e12, 16 * GIB, 200e9),
    "tpu v5": Peak(459e12, 2.765e12, 95 * GIB, 600e9),
    "tpu v5p": Peak(459e12, 2.765e12, 95 * GIB, 600e9),
    # Its page says 800 GB/s for both directions; an earlier one had 3584 Gbit/s for one.
    "tpu v6 lite": Peak(918e12, 1.64e12, 32 * GIB, 400e9),
    "tpu v6e": Peak(918e12, 1.64e12, 32 * GIB, 400e9),
    # NVIDIA's data sheets, without sparsity; links are NVLink for SXM, else PCIe.
    "nvidia a100-sxm4-40gb": Peak(312e12, 1.555e12, 40 * GIB, 300e9),
    "nvidia a100-sxm4-80gb": Peak(312e12, 2.039e12, 80 * GIB, 300e9),
    "nvidia a100 80gb pcie": Peak(312e12, 1.935e12, 80 * GIB, 32e9),
    "nvidia l4": Peak(121e12, 0.3e12, 24 * GIB, 32e9),
    "nvidia h100 pcie": Peak(756e12, 2.0e12, 80 * GIB, 64e9),
    "nvidia h100 80gb hbm3": Peak(989e12, 3.35e12, 80 * GIB, 450e9),
    "nvidia h200": Peak(989e12, 4.8e12, 141 * 10**9, 450e9),
}


def peak(device_kind: str) -> Peak | None:
    """The limits of a device by its `device_kind`; None where they are not known, as for every CPU."""
    kind = device_kind.lower()
    known = [name for name in PEAKS if kind == name or kind.startswith(f"{name} ")]
    return PEAKS[max(known, key=len)] if known else None
