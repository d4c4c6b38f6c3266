"""How fast a Triton GEMM is beside the vendor's, as data, and the reduction up to which fusing pays.

The plans of the base GEMM differ in two things: the fused one runs at the speed of a Triton GEMM, and the one of cuBLAS
writes the low-rank product once more than it would y alone (it reads it under its own arithmetic).
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

from neat_kernels.model.devices import Device

# Nobody has published it for this family: the predictions need a number, the choice of a plan does without.
_UNKNOWN = 0.9
# The layer for which the choice is made: many tokens, so that the GEMM is bound by its arithmetic. The plan must not
# depend on the number of tokens, since an operator carries it.
_NOMINAL_TOKENS = 8192
_STEP, _LONGEST = 64, 16384


class Efficiency(NamedTuple):
    """A Triton GEMM's throughput as a fraction of the vendor's, and where that was published."""

    value: float
    source: str
    known: bool


class _Curve(NamedTuple):
    """Fractions by length of the reduction, straight in its logarithm between the points, level beyond them."""

    points: tuple[tuple[int, float], ...]
    source: str


# By family and by how the GEMM loads its operands: through pointers, or through tensor descriptors (TMA).
_CURVES = {
    ("sm_90", "pointers"): _Curve(
        ((512, 0.76), (4096, 0.85)),
        "H100, fp16, M=N=8192: 217.5 of cuBLAS's 285.4 TFLOP/s at K=512 (triton pull request 5726); at K=4096 "
        "descriptors gain 13 % (triton pull request 5461), from the 95 % taken for them",
    ),
    ("sm_90", "descriptors"): _Curve(
        ((1024, 1.0), (4096, 0.95), (8192, 0.92)),
        "H100, bf16: ahead of cuBLAS up to K=1024, 95 to 97 % at 4096³, behind at 8192, as published for several "
        "Triton GEMMs; the lower end taken, 0.92 assumed",
    ),
    ("sm_80", "pointers"): _Curve(
        ((2048, 0.95),),
        "A100, fp16: 170.1 of cuBLAS's 176.1 TFLOP/s at 2944³ (triton issue 6523, triton 3.5.1); 0.95 taken for every "
        "length",
    ),
}


def triton_efficiency(arch: str, length: int, loads: str) -> Efficiency:
    """The fraction for a family of devices, a reduction over `length`, and "pointers" or "descriptors"."""
    curve = _CURVES.get((arch, loads))
    if curve is None:
        return Efficiency(_UNKNOWN, f"assumed: nothing published for {arch} and {loads}", known=False)
    return Efficiency(_interpolate(curve.points, length), curve.source, known=True)


def _interpolate(points: tuple[tuple[int, float], ...], length: int) -> float:
    if length <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in itertools.pairwise(points):
        if length <= right:
            return low + (high - low) * math.log(length / left) / math.log(right / left)
    return points[-1][1]


@functools.cache
def fused_up_to(device: Device, dtype: str) -> int | None:
    """The longest reduction, in steps of 64, up to which the model predicts the fused plan to be the faster.

    Args:
        device: of the table.
        dtype: bf16 or fp16.

    Returns:
        The length, 0 if it is never the faster; None where a Triton GEMM's speed on this family is not known.
    """
    from neat_kernels.model.steps import aligned_loads

    if not triton_efficiency(device.arch, _STEP, aligned_loads(device)).known:
        return None
    length = 0
    while length < _LONGEST and _fused_is_faster(device, dtype, length + _STEP):
        length += _STEP
    return length


def _fused_is_faster(device: Device, dtype: str, length: int) -> bool:
    from neat_kernels.model.predict import predict
    from neat_kernels.model.steps import target_of
    from neat_kernels.model.tokens import Tokens, forward
    from neat_kernels.model.work import Layer

    layer = Layer(_NOMINAL_TOKENS, length, length, dtype=dtype)
    side = Tokens(layer, target_of(device))
    fused, cublas = (sum(predict(work, device).seconds for work in forward(side, plan)) for plan in ("fused", "cublas"))
    return fused <= cublas
