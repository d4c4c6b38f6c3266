"""Products with a tall, possibly half-precision operand, accumulated in fp32 without an fp32 copy of that operand.

On a CPU csrc multiplies where it can. Elsewhere a half operand is cast in row blocks of at most 1 MiB, and on a GPU two
half operands use torch.mm(..., out_dtype=float32).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from neat_kernels import cpu
from neat_kernels.vocabulary import HALF_DTYPES, wide_dtype

BLOCK_BYTES = 1 << 20
# Up to so many tokens a half product of oneDNN costs more to set up than casts and an fp32 product cost (AMD EPYC with
# AVX-512).
FEW_TOKENS = 16
_mkldnn: Any = torch.backends.mkldnn


def row_blocks(rows: int, columns: int, itemsize: int) -> Iterator[slice]:
    """Slices of `rows` such that a block of `columns` elements of `itemsize` bytes is at most 1 MiB, or one row."""
    step = max(1, BLOCK_BYTES // max(1, columns * itemsize))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _mm_wide(a: Tensor, b: Tensor) -> bool:
    return a.is_cuda and a.dtype == b.dtype and a.dtype in HALF_DTYPES


def rows_times(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """a·b [M,r] in `wide`, for a tall a [M,K] and a narrow b [K,r], with one read of a."""
    if _mm_wide(a, b):
        return torch.mm(a, b, out_dtype=wide)
    if cpu.takes(a, b):
        return cpu.rows_times(a, b)
    b = b.to(wide)
    if a.numel() * wide.itemsize <= BLOCK_BYTES or a.dtype == wide:
        return a.to(wide) @ b
    out = a.new_empty((a.shape[0], b.shape[1]), dtype=wide)
    for rows in row_blocks(a.shape[0], a.shape[1], wide.itemsize):
        torch.mm(a[rows].to(wide), b, out=out[rows])
    return out


def rows_times_rounded(a: Tensor, b: Tensor, dtype: torch.dtype, scaling: float = 1.0) -> Tensor:
    """scaling·a·b [M,r] rounded once to `dtype` from a wide sum, for a tall a [M,K] and a narrow b [K,r].

    b has values of `dtype`, in it or in a wider one.
    """
    if a.dtype == dtype and multiplies_halves(a):
        return torch.addmm(a.new_zeros(()), a, b.to(dtype), beta=0, alpha=scaling)
    return scaled_(rows_times(a, b, wide_dtype(a)), scaling).to(dtype)


def scaled_(t: Tensor, scaling: float) -> Tensor:
    """t·scaling in place, or t itself where that is no change."""
    return t if scaling == 1.0 else t.mul_(scaling)


def transposed_times(a: Tensor, p: Tensor, wide: torch.dtype) -> Tensor:
    """pᵀ·a [r,K] in `wide`, the transpose of aᵀ·p, for a tall a [M,K] and a narrow p [M,r], with one read of a.

    On a CPU in fp32 the transposed form is the faster of the two, but for many columns of p on several threads.
    """
    if _mm_wide(a, p):
        return torch.mm(p.t(), a, out_dtype=wide)
    if cpu.takes(a, p):
        return cpu.transposed_times(a, p)
    p = p.to(wide)
    if a.dtype == wide:
        # The faster form from 32 columns on two threads, and on one the slower (AMD EPYC with AVX-512).
        return (a.t() @ p).t() if p.shape[1] >= 32 and torch.get_num_threads() > 1 else p.t() @ a
    out = a.new_zeros((p.shape[1], a.shape[1]), dtype=wide)
    for rows in row_blocks(a.shape[0], a.shape[1], wide.itemsize):
        out.addmm_(p[rows].t(), a[rows].to(wide))
    return out


def transposed(t: Tensor, dtype: torch.dtype) -> Tensor:
    """tᵀ of a matrix as a fresh contiguous tensor in `dtype`: the layout that the fake kernels promise."""
    return t.new_empty((t.shape[1], t.shape[0]), dtype=dtype).copy_(t.t())


@functools.cache
def half_gemm_is_native(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies half matrices in hardware or through oneDNN.

    Without it torch takes a scalar loop: forward + backward of a frozen 1024x1024 layer over 2048 tokens took 4.6 s in
    bf16 and 48 ms in fp32 (python -m benchmarks.layer_ratio, AMD EPYC with AVX2, 2 threads).
    """
    query = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    supported = getattr(torch.ops.mkldnn, query, None)
    return bool(supported()) if supported is not None else False


def casts_blocks(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the base GEMM should run on fp32 casts of row blocks instead of torch's own half GEMM."""
    return device.type == "cpu" and dtype in HALF_DTYPES and not half_gemm_is_native(dtype)


def multiplies_halves(a: Tensor) -> bool:
    """Whether narrow products with these tokens take a CPU's own half GEMM, which rounds its wide sum once."""
    if a.shape[0] <= FEW_TOKENS:
        return False
    return a.dtype in HALF_DTYPES and a.device.type == "cpu" and half_gemm_is_native(a.dtype)


@contextlib.contextmanager
def ieee_fp32(device: torch.device) -> Iterator[None]:
    """Inside, fp32 products on `device` are IEEE whatever the TF32 setting: Z feeds a nonlinearity."""
    backend: Any = {"cuda": torch.backends.cuda.matmul, "cpu": _mkldnn.matmul}.get(device.type)
    before = getattr(backend, "fp32_precision", "ieee")
    if before == "ieee":
        yield
        return
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before
