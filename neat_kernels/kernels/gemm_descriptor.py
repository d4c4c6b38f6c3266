"""The GEMM of gemm.py on tensor descriptors (TMA), on sm_90 and sm_100: the same equation and the same bytes.

C = A·B + scaling·(P·Qᵀ) ∘ mask + bias

A [M,K] and B [K,N] (W, or Wᵀ by the rows of W) with contiguous rows, C [M,N]; every base and row 16-byte aligned. What
a tile has beyond its matrix, the hardware reads as zero and never writes. A persistent program takes one tile of C
after another, so that the loads of the next run beside the stores of the last.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from neat_kernels.kernels import launch
from neat_kernels.kernels.bound import Bound, Described
from neat_kernels.kernels.configs import NARROW, Config
from neat_kernels.kernels.tiles import add_bias, low_rank_tile
from neat_kernels.torch_backend.dropout import threshold as keep_threshold

# Tile rows that walk down together, so that their tiles of B stay in the L2 cache.
GROUP_M = 8


@triton.jit(do_not_specialize=["M", "threshold"])
def _gemm_descriptor_kernel(
    a_desc,
    b_desc,
    c_desc,
    p_ptr,
    q_ptr,
    bias_ptr,
    seed_ptr,
    M,
    N,
    K,
    stride_qn,
    stride_qr,
    stride_bias,
    scaling,
    threshold,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    FLATTEN: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0), flatten=FLATTEN):
        pid_m, pid_n = tl.swizzle2d(tile // blocks_n, tile % blocks_n, blocks_m, blocks_n, GROUP_M)
        first_m, first_n = pid_m * BLOCK_M, pid_n * BLOCK_N
        offs_m, offs_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
        acc = low_rank_tile(
            p_ptr, q_ptr, seed_ptr, offs_m, offs_n, M, N, stride_qn, stride_qr, scaling, threshold,
            R, BLOCK_R, DROPOUT, PRECISION,
        )  # [BLOCK_M, BLOCK_N]  # fmt: skip
        if bias_ptr is not None:
            acc = add_bias(acc, bias_ptr, stride_bias, offs_n, N)
        for start in range(0, K, BLOCK_K):
            a = a_desc.load([first_m, start])  # [BLOCK_M, BLOCK_K]
            b = b_desc.load([first_n, start]).T if TRANSPOSED else b_desc.load([start, first_n])  # [BLOCK_K, BLOCK_N]
            acc = tl.dot(a, b, acc, input_precision="ieee")
        c_desc.store([first_m, first_n], acc.to(c_desc.dtype))


class GemmCall(NamedTuple):
    """What a launch of the GEMM is prepared by, whichever of its two kernels runs; strides of A, B, Q and bias."""

    place: launch.Target
    M: int
    N: int
    K: int
    r: int
    strides: tuple[int, ...]
    dtype: torch.dtype
    branch_dtype: torch.dtype
    scaling: float
    masked: bool
    dropout: float

    def config(self, stage: str) -> Config:
        """The configuration of a stage; an fp32 branch has one table, masked or not, whatever the width of C."""
        if self.branch_dtype.itemsize == 2:
            if self.masked:
                stage += " dropout"
            elif stage == "gemm descriptor" and self.N <= NARROW:
                stage += " narrow"
        return launch.config(stage, self.place, self.r, self.branch_dtype.itemsize)

    @property
    def branch(self) -> tuple[float, int]:
        """The numbers of the branch: scaling, with 1 / (1 - q) under dropout, and the mask's threshold."""
        return self.scaling / (1.0 - self.dropout), keep_threshold(self.dropout)


def fits(call: GemmCall) -> bool:
    """Whether the device has descriptors, and they can say where A, B (or its transpose) and C lie.

    Every base must be 16-byte aligned besides.
    """
    N, K, dtype = call.N, call.K, call.dtype
    stride_am, stride_ak, stride_bk, stride_bn, *_ = call.strides
    rows_of_B = (stride_bn, stride_bk, K) if stride_bk == 1 else (stride_bk, stride_bn, N)
    matrices = (stride_am, stride_ak, K), rows_of_B, (N, 1, N)
    return launch.has_descriptors(call.place) and all(_has_aligned_rows(*matrix, dtype.itemsize) for matrix in matrices)


def _has_aligned_rows(stride: int, along: int, length: int, itemsize: int) -> bool:
    # Rows that overlap, as an expanded tensor's, are no matrix to the hardware.
    return along == 1 and stride >= length > 0 and stride * itemsize % 16 == 0


def on_descriptors(call: GemmCall) -> Callable[..., None]:
    """The launch for a call that fits, of A, B, P, Q, bias, seed and C; A, B and C must be aligned."""
    place, M, N, K, r, strides, dtype, *_ = call
    config = call.config("gemm descriptor")
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    tiles = launch.cdiv(M, block_m) * launch.cdiv(N, block_n)
    programs = max(1, min(tiles, place.multiprocessors)) if config.persistent else tiles
    stride_am, _, stride_bk, stride_bn, *rest = strides
    transposed = stride_bk == 1
    of_B = ((N, K), stride_bn, (block_n, block_k)) if transposed else ((K, N), stride_bk, (block_k, block_n))
    a_desc = Described(dtype, (M, K), stride_am, (block_m, block_k))
    b_desc = Described(dtype, *of_B)
    c_desc = Described(dtype, (M, N), N, (block_m, block_n))
    bound = Bound(
        _gemm_descriptor_kernel,
        (programs,),
        (M, N, K, *rest, *call.branch),
        R=r,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_R=launch.block_r(r),
        GROUP_M=GROUP_M,
        TRANSPOSED=transposed,
        FLATTEN=config.persistent,
        DROPOUT=call.masked,
        PRECISION=launch.branch_precision(place),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )

    def run(A: Tensor, B: Tensor, P: Tensor, Q: Tensor, bias: Tensor | None, seed: Tensor | None, C: Tensor) -> None:
        bound(a_desc(A), b_desc(B), c_desc(C), P, Q, bias, seed)

    return run
