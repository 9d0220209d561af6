"""What the accelerators can do at most, as their makers state it: the floor that times are compared with."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Peak:
    """Limits of one device, as jax counts devices.

    Attributes:
        flops: dense bfloat16 matrix operations per second, a multiply-add being two.
        bandwidth: bytes per second between the device and its main memory.
    """

    flops: float
    bandwidth: float


# By the lower-cased start of `jax.Device.device_kind`; the longest that matches counts.
PEAKS: dict[str, Peak] = {
    # cloud.google.com/tpu/docs/system-architecture-tpu-vm, per chip; v2 and v3 show each chip as two devices.
    "tpu v2": Peak(22.5e12, 0.35e12),
    "tpu v3": Peak(61.5e12, 0.45e12),
    "tpu v4": Peak(275e12, 1.2e12),
    "tpu v5 lite": Peak(197e12, 0.819e12),
    "tpu v5e": Peak(197e12, 0.819e12),
    "tpu v5": Peak(459e12, 2.765e12),
    "tpu v5p": Peak(459e12, 2.765e12),
    "tpu v6 lite": Peak(918e12, 1.64e12),
    "tpu v6e": Peak(918e12, 1.64e12),
    # NVIDIA's data sheets, without sparsity.
    "nvidia a100-sxm4-40gb": Peak(312e12, 1.555e12),
    "nvidia a100-sxm4-80gb": Peak(312e12, 2.039e12),
    "nvidia a100 80gb pcie": Peak(312e12, 1.935e12),
    "nvidia l4": Peak(121e12, 0.3e12),
    "nvidia h100 pcie": Peak(756e12, 2.0e12),
    "nvidia h100 80gb hbm3": Peak(989e12, 3.35e12),
    "nvidia h200": Peak(989e12, 4.8e12),
}


def peak(device_kind: str) -> Peak | None:
    """The limits of a device by its `device_kind`; None where they are not known, as for every CPU."""
    kind = device_kind.lower()
    known = [name for name in PEAKS if kind == name or kind.startswith(f"{name} ")]
    return PEAKS[max(known, key=len)] if known else None
