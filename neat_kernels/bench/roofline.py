"""What each kernel of `python -m benchmarks.kernel_times` achieved, against the ceilings that the same run measured.

Bytes are those that a kernel cannot avoid: the matrices of M·K, N·K and M·N elements that it works on, once. Operations
are those of its products, r not padded. Partial sums and r-wide factors are left out, so that a point lies lower than
the device was busy, never higher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from neat_kernels.bench.shapes import LayerShape
from neat_kernels.result_file import read_result_file

EXPECTED = "a result file of benchmarks.kernel_times"
_ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
# Two kernels had this name once; where a profile counts more than one launch of it, its time is that of neither.
_SHARED = "_finish_kernel"


class Sizes(NamedTuple):
    """Of a layer: tokens, out_features, in_features, rank, and bytes of an element."""

    M: int
    N: int
    K: int
    r: int
    e: int


class Point(NamedTuple):
    """One kernel of one layer.

    Fields:
        shape: the layer.
        kernel: its name.
        flops: of a launch.
        bytes: of a launch.
        seconds: of a launch, the median.
    """

    shape: LayerShape
    kernel: str
    flops: float
    bytes: float
    seconds: float

    @property
    def intensity(self) -> float:
        """Operations for each byte."""
        return self.flops / self.bytes

    @property
    def throughput(self) -> float:
        """Operations a second."""
        return self.flops / self.seconds


class Roofline(NamedTuple):
    """Measured ceilings and the kernels under them."""

    device: str
    dtype: str
    bandwidth: float
    throughput: float
    points: list[Point]


# (operations, bytes) of a launch. In plan cublas down writes the product of the branch into y, and finish into dx.
_Work = Callable[[Sizes, bool], tuple[float, float]]
_WORK: dict[str, _Work] = {
    "_project_kernel": lambda s, cublas: (2 * s.N * s.K * s.r, s.N * s.K * s.e),
    "_weight_kernel": lambda s, cublas: (2 * s.N * s.K * s.r, s.N * s.K * s.e),
    "_down_kernel": lambda s, cublas: (
        2 * s.M * s.K * s.r + cublas * 2 * s.M * s.N * s.r,
        s.M * s.K * s.e + cublas * s.M * s.N * s.e,
    ),
    "_up_backward_kernel": lambda s, cublas: (4 * s.M * s.N * s.r, s.M * s.N * s.e),
    "_down_backward_kernel": lambda s, cublas: (2 * s.M * s.K * s.r, s.M * s.K * s.e),
    "_gemm_kernel": lambda s, cublas: _gemm(s),
    "_gemm_descriptor_kernel": lambda s, cublas: _gemm(s),
    "_crossed_kernel": lambda s, cublas: (2 * s.N * s.K * (s.M + s.r), s.N * s.K * s.e),
    "_stacked_kernel": lambda s, cublas: (2 * s.N * s.K * (s.M + s.r), s.N * s.K * s.e),
}


def _gemm(s: Sizes) -> tuple[float, float]:
    """Of apply and dgrad the mean: a profile has them under one name."""
    return 2 * s.M * s.N * s.K + s.M * (s.N + s.K) * s.r, (s.M * s.K + s.N * s.K + s.M * s.N) * s.e


def read_roofline(paths: Sequence[Path]) -> Roofline:
    """The kernels of the frozen linear and of ours with fp32 adapters, of several files the last one's of each layer.

    Args:
        paths: result files of benchmarks.kernel_times, of one device and dtype; the last one's ceilings are taken.

    Raises:
        ValueError: a file is not one, or they are of different devices or dtypes, or have no kernel to show.
    """
    contents = [read_result_file(path, EXPECTED, _checked) for path in paths]
    places = {(content["provenance"]["device"], content["dtype"]) for content in contents}
    if len(places) != 1:
        raise ValueError(f"expected kernel times of one device and dtype, got {sorted(places)}")
    ((device, dtype),) = places
    cases = {
        (case["shape"], case["contender"]): case["kernels"]
        for content in contents
        for case in content["cases"]
        if case["contender"] in ("frozen", "neat")
    }
    points = [
        point
        for (shape, name), kernels in cases.items()
        for point in _points(LayerShape.parse(shape), name, kernels, _ITEMSIZE[dtype])
    ]
    if not points:
        raise ValueError("expected kernel times of the contenders frozen or neat, got none")
    ceilings = contents[-1]["ceilings"]
    return Roofline(device, dtype, ceilings["copy bytes/s"], ceilings["bf16 GEMM FLOP/s"], points)


def _checked(content: dict[str, Any]) -> dict[str, Any]:
    _ = content["provenance"]["device"], _ITEMSIZE[content["dtype"]]
    _ = [float(content["ceilings"][name]) for name in ("copy bytes/s", "bf16 GEMM FLOP/s")]
    for case in content["cases"]:
        LayerShape.parse(case["shape"])
        _ = [(one["kernel"], float(one["launches"]), float(one["us"])) for one in case["kernels"]]
        _ = case["contender"]
    return content


def _points(shape: LayerShape, contender: str, kernels: list[dict[str, Any]], itemsize: int) -> list[Point]:
    sizes = Sizes(shape.tokens, shape.out_features, shape.in_features, shape.r, itemsize)
    if contender == "frozen":
        # Two of the vendor's GEMMs; one in pieces is two kernels, of which neither is the product.
        own = [one for one in kernels if not one["kernel"].startswith("Mem")]
        flops, moved = (
            2 * sizes.M * sizes.N * sizes.K,
            (shape.tokens * (sizes.N + sizes.K) + sizes.N * sizes.K) * itemsize,
        )
        whole = len(own) == 2 and all(one["launches"] == 1 for one in own)
        return [Point(shape, "cuBLAS", flops, moved, 1e-6 * one["us"]) for one in own] if whole else []
    names = {one["kernel"] for one in kernels}
    cublas = not names & {"_gemm_kernel", "_gemm_descriptor_kernel"}
    found = [
        Point(shape, one["kernel"].strip("_").removesuffix("_kernel"), *work(sizes, cublas), 1e-6 * one["us"])
        for one in kernels
        if (work := _WORK.get(one["kernel"])) is not None
    ]
    # In plan cublas it writes the product of the branch into dx, if its time is its own.
    for one in kernels:
        if one["kernel"] == _SHARED and one["launches"] == 1 and cublas and "_up_backward_kernel" in names:
            flops, moved = 2 * sizes.M * sizes.K * sizes.r, sizes.M * sizes.K * itemsize
            found.append(Point(shape, "up_finish", flops, moved, 1e-6 * one["us"]))
    return found
