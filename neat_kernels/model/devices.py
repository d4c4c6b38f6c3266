"""What a kernel can be bound by on a device, as data with the source of every number.

Peaks are the vendors'; what a kernel can reach of them is a fraction that somebody assumed, unless its source says that
it was measured.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

TERA = 1e12
MIB = 1 << 20

# Time between two dependent kernels of a stream that the host keeps filled. Not measured here.
_GAP = 2e-6
_GAP_SOURCE = "assumed: 2 µs between kernels of a stream that the host keeps filled"
# What well-tuned GEMMs and copies reach of a Hopper's peaks in this project's budgets: 790 of 989 TFLOP/s, 4.3 of 4.8
# TB/s on an H200. Assumed elsewhere for want of anything better.
_REACHED_FLOPS = 0.8
_REACHED_BYTES = 0.9


@dataclass(frozen=True, eq=False)
class Device:
    """A device as the model sees it.

    Args:
        name: what users call it.
        reported: pattern of the name that its driver reports, matched whole.
        arch: family of launch configurations, as in kernels/launch.py; "" for a CPU.
        multiprocessors: SMs or CUs.
        cache: bytes of the last cache before memory.
        peak_bandwidth: bytes a second, from the vendor.
        bandwidth: bytes a second that a kernel can reach.
        peak: operations a second by unit, from the vendor, dense: half (bf16 and fp16 with fp32 accumulation), tf32,
            and fp32 (IEEE).
        reached: fraction of `peak` that the vendor's GEMM library reaches.
        gap: seconds that every launch adds.
        sources: where the numbers come from, in words.
    """

    name: str
    reported: str
    arch: str
    multiprocessors: int
    cache: int
    peak_bandwidth: float
    bandwidth: float
    peak: dict[str, float]
    reached: float
    gap: float
    sources: dict[str, str]

    def throughput(self, unit: str) -> float:
        """Operations a second that a GEMM can reach in a unit: bf16, fp16, fp32, or tf32x3 (three TF32 products)."""
        if unit == "tf32x3":
            return self.reached * self.peak["tf32"] / 3
        return self.reached * self.peak["half" if unit in ("bf16", "fp16") else unit]


def _gpu(
    name: str,
    reported: str,
    arch: str,
    multiprocessors: int,
    cache: int,
    terabytes: float,
    peak: tuple[float, float, float],
    vendor: str,
    reached: tuple[float, float] = (_REACHED_FLOPS, _REACHED_BYTES),
    reached_source: str = "assumed: 80 % of the peak operations and 90 % of the peak bandwidth",
) -> Device:
    flops, fraction = reached
    return Device(
        name,
        reported,
        arch,
        multiprocessors,
        cache * MIB,
        terabytes * TERA,
        fraction * terabytes * TERA,
        dict(zip(("half", "tf32", "fp32"), (value * TERA for value in peak), strict=True)),
        flops,
        _GAP,
        {"peaks": vendor, "reached": reached_source, "gap": _GAP_SOURCE},
    )


# name, reported name, family, SMs, MiB of cache, TB/s, TFLOP/s (half, tf32, fp32) without sparsity
DEVICES = {
    device.name: device
    for device in (
        _gpu(
            "H200", r"NVIDIA H200", "sm_90", 132, 50, 4.8, (989.4, 494.7, 66.9),
            "NVIDIA H200 datasheet (operations halved: it states them with sparsity); SMs and L2: NVIDIA H100 "
            "Tensor Core GPU Architecture, the same die",
            (790 / 989.4, 4.3 / 4.8),
            "assumed: 790 TFLOP/s and 4.3 TB/s, the roofline of this project's budgets",
        ),
        _gpu(
            "H100", r"NVIDIA H100 80GB HBM3", "sm_90", 132, 50, 3.35, (989.4, 494.7, 66.9),
            "NVIDIA H100 Tensor Core GPU Architecture, H100 SXM5",
        ),
        _gpu(
            "A100", r"NVIDIA A100-SXM4-80GB", "sm_80", 108, 40, 2.039, (312.0, 156.0, 19.5),
            "NVIDIA A100 datasheet, 80 GB SXM; SMs and L2: NVIDIA A100 Tensor Core GPU Architecture",
        ),
        _gpu(
            "RTX 4090", r"NVIDIA GeForce RTX 4090", "sm_86", 128, 72, 1.008, (165.2, 82.6, 82.6),
            "NVIDIA Ada GPU Architecture, appendix A; half with fp32 accumulation",
        ),
        _gpu(
            "L40S", r"NVIDIA L40S", "sm_86", 142, 96, 0.864, (362.05, 183.0, 91.6),
            "NVIDIA L40S datasheet; L2: NVIDIA Ada GPU Architecture, full AD102",
        ),
        _gpu(
            "B200", r"NVIDIA B200", "sm_100", 148, 126, 8.0, (2250.0, 1100.0, 80.0),
            "NVIDIA Blackwell architecture brief, HGX B200 at 1,000 W (operations halved: it states them with "
            "sparsity); SMs and L2 as published from running devices, not in NVIDIA's brief",
        ),
        _gpu(
            "MI300X", r"AMD Instinct MI300X( OAM)?", "gfx942", 304, 256, 5.3, (1307.4, 653.7, 163.4),
            "AMD Instinct MI300X datasheet, matrix units; cache: its Infinity Cache",
            (0.55, 0.8),
            "assumed: 55 % of the peak operations (its clock falls under load) and 80 % of the peak bandwidth",
        ),
    )
}  # fmt: skip


def named(name: str) -> Device:
    """The device that users call `name`, in any case.

    Raises:
        ValueError: the table has none of that name; the message lists those that it has.
    """
    by_name = {key.lower(): device for key, device in DEVICES.items()}
    if name.lower() not in by_name:
        near = difflib.get_close_matches(name.lower(), by_name, n=1)
        hint = f"; did you mean {by_name[near[0]].name}?" if near else ""
        raise ValueError(f"expected a device the model knows ({', '.join(DEVICES)}), got {name!r}{hint}")
    return by_name[name.lower()]


def reported_as(name: str) -> Device | None:
    """The device whose driver reports `name`, or None: another product of a family has other limits."""
    return next((device for device in DEVICES.values() if re.fullmatch(device.reported, name)), None)
