"""The torch backend on a CPU without csrc, operation by operation, and a CPU's ceilings measured on the spot.

Only what the benchmarks time: orientation "out", no chain, relu, scaling 1, adapters in fp32.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from neat_kernels.model.devices import Device
from neat_kernels.model.work import HALF, Layer, Step, Work, present

_F32 = 4
_TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Larger than any cache of a machine that would run this on a CPU, by several times.
_COPIED = 256 << 20


def torch_backend(layer: Layer, casts_blocks: bool) -> Step:
    """The operations of the torch backend.

    Args:
        layer: orientation "out" without a chain.
        casts_blocks: whether the CPU has no half GEMM, so that fp32 casts of blocks are multiplied. The casts stay in
            its cache and are not counted.

    Returns:
        The step.

    Raises:
        ValueError: another orientation, or a chain.
    """
    if layer.orientation != "out" or layer.depth:
        raise ValueError(f"expected orientation 'out' and depth 0, got {layer.orientation!r} and {layer.depth}")
    unit = "fp32" if casts_blocks else layer.dtype
    return Step("neat-kernels, torch backend", _forward(layer, unit), _backward(layer, unit))


def _narrow(layer: Layer, name: str, large: int, factor: int, out: int) -> Work:
    """A product of a large matrix in the layer's dtype with an r-wide one, in fp32; sizes in elements."""
    reads = {name: large * layer.itemsize, "factor": factor * _F32}
    return Work("torch.matmul", reads, {"out": out * _F32}, 2 * large * layer.r)


def _pass(name: str, elements: int) -> Work:
    """An elementwise operation on fp32."""
    return Work(f"torch.{name}", {"in": elements * _F32}, {"out": elements * _F32}, elements)


def _base(layer: Layer, unit: str, onto: str, sizes: tuple[int, int, int]) -> Work:
    M, N, K = sizes
    e = layer.itemsize
    reads = {onto: M * N * e, "A": M * K * e, "W": layer.out_features * layer.in_features * e}
    return Work("torch.addmm_", reads, {onto: M * N * e}, 2 * M * N * K, unit)


def _forward(layer: Layer, unit: str) -> tuple[Work, ...]:
    M, N, K, r, e = layer.tokens, layer.out_features, layer.in_features, layer.r, layer.itemsize
    branch = present(S=M * r * e, U=N * r * _F32, bias=N * e if layer.bias else None)
    return (
        _narrow(layer, "W", N * K, r * N, r * K),
        _pass("copy_", K * r),
        _pass("relu", K * r),
        _narrow(layer, "x", M * K, K * r, M * r),
        Work("torch.addmm", branch, {"y": M * N * e}, 2 * M * N * r, unit),
        _base(layer, unit, "y", (M, N, K)),
    )


def _backward(layer: Layer, unit: str) -> tuple[Work, ...]:
    M, N, K, r, e = layer.tokens, layer.out_features, layer.in_features, layer.r, layer.itemsize
    return (
        _narrow(layer, "dy", M * N, N * r, M * r),
        Work("torch.mm", {"dS": M * r * e, "D": K * r * _F32}, {"dx": M * K * e}, 2 * M * K * r, unit),
        _base(layer, unit, "dx", (M, K, N)),
        _narrow(layer, "x", M * K, M * r, r * K),
        _pass("copy_", K * r),
        _narrow(layer, "dy", M * N, M * r, r * N),
        _pass("copy_", N * r),
        _pass("nan_to_num", K * r),
        Work("torch.threshold_backward", {"dH": K * r * _F32, "Z": K * r * _F32}, {"dZ": K * r * _F32}),
        _narrow(layer, "W", N * K, K * r, N * r),
        _pass("copy_", N * r),
    )


def measured_cpu(dtype: str, threads: int) -> Device:
    """This machine's CPU with the ceilings that it shows now: a copy, GEMMs in fp32 and `dtype`, a tiny operation.

    Args:
        dtype: of the layers to predict.
        threads: that torch may use meanwhile.

    Returns:
        The device. What it reaches is what was measured, so that nothing is taken off.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        source = torch.zeros(_COPIED // _F32)
        target = torch.empty_like(source)
        bandwidth = 2 * _COPIED / _fastest(lambda: target.copy_(source))
        gemms = {"fp32": _gemm("fp32"), "tf32": _gemm("fp32")}
        gemms["half"] = _gemm(dtype) if dtype in HALF else gemms["fp32"]
        one = torch.zeros(1)
        gap = _fastest(lambda: one.add_(1))
    finally:
        torch.set_num_threads(before)
    how = f"measured now, {threads} threads, the fastest of several"
    sources = {"peaks": how, "reached": how, "gap": how}
    return Device("this CPU", "", "", threads, 0, bandwidth, bandwidth, gemms, 1.0, gap, sources)


def _gemm(dtype: str) -> float:
    """Operations a second of a product of matrices; small ones where the CPU takes a scalar loop."""
    size = 1024 if dtype == "fp32" else 256
    a, b = (torch.ones(size, size, dtype=_TORCH[dtype]) for _ in range(2))
    once = 2 * size**3 / _fastest(lambda: a @ b)
    if dtype == "fp32" or once < 2e10:
        return once
    a, b = (torch.ones(2048, 2048, dtype=_TORCH[dtype]) for _ in range(2))
    return 2 * 2048**3 / _fastest(lambda: a @ b)


def _fastest(call: Callable[[], object]) -> float:
    call()
    samples: list[float] = []
    stop = time.perf_counter() + 0.5
    while len(samples) < 5 or time.perf_counter() < stop:
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return min(samples)
