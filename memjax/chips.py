"""What accelerators can do at their best: the peaks that utilisation is measured against.

Vendors' data sheets: dense products in bfloat16, without sparsity, and memory. Sources: the pages
of Google Cloud on each TPU version, NVIDIA's data sheets of A100, H100 and H200.
"""

import dataclasses
from collections.abc import Sequence

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """kind: how jax's `device_kind` begins. flops: floating-point operations of bfloat16 products
    in a second. memory: bytes. Both of one core of a TPU, of a whole GPU."""

    kind: str
    flops: float
    memory: float


GIB = 2**30
CHIPS = (
    Chip("TPU v4", 137.5e12, 16 * GIB),  # two cores on a chip
    Chip("TPU v5 lite", 197e12, 16 * GIB),
    Chip("TPU v5e", 197e12, 16 * GIB),
    Chip("TPU v5", 229.5e12, 47.5 * GIB),  # v5p, two cores
    Chip("TPU v6", 918e12, 32 * GIB),
    Chip("TPU7x", 1153.5e12, 96 * GIB),  # two cores
    Chip("NVIDIA A100-SXM4-40GB", 312e12, 40 * GIB),
    Chip("NVIDIA A100-PCIE-40GB", 312e12, 40 * GIB),
    Chip("NVIDIA A100", 312e12, 80 * GIB),
    Chip("NVIDIA H100 PCIe", 756e12, 80 * GIB),
    Chip("NVIDIA H100 NVL", 835e12, 94 * GIB),
    Chip("NVIDIA H100", 989.4e12, 80 * GIB),
    Chip("NVIDIA H200 NVL", 835e12, 141e9),
    Chip("NVIDIA H200", 989.4e12, 141e9),
)


def chip(device: jax.Device) -> Chip | None:
    """The figures of a device as jax counts them, of all its cores; None for one not listed."""
    for known in CHIPS:  # the longer of two names comes first
        if device.device_kind.startswith(known.kind):
            cores = getattr(device, "num_cores", 1) if device.platform == "tpu" else 1
            return Chip(device.device_kind, cores * known.flops, cores * known.memory)
    return None


def peak(devices: Sequence[jax.Device]) -> float | None:
    """Operations in a second of equal devices together; None where their chip is not listed."""
    found = chip(devices[0])
    return None if found is None else len(devices) * found.flops
