"""The GEMM of gemm.py on tensor descriptors (TMA), on sm_90 and sm_100: the same equation and the same bytes.

C = A·B + scaling·(P·Qᵀ) ∘ mask + bias

A [M,K] and B [K,N] (W, or Wᵀ by the rows of W) with contiguous rows, C [M,N]; every base and row 16-byte aligned. What
a tile has beyond its matrix, the hardware reads as zero and never writes. A persistent program takes one tile of C
after another, so that the loads of the next run beside the stores of the last.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from neat_kernels.kernels import launch
from neat_kernels.kernels.bound import run
from neat_kernels.kernels.configs import Config
from neat_kernels.kernels.tiles import add_bias, low_rank_tile

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


def fits(A: Tensor, B: Tensor, C: Tensor) -> bool:
    """Whether descriptors can say where A, B (or its transpose) and C lie, and the device has them."""
    rows_of_B = B.t() if B.stride(0) == 1 else B
    return launch.has_descriptors(A.device) and all(_is_aligned(t) for t in (A, rows_of_B, C))


def _is_aligned(matrix: Tensor) -> bool:
    stride, along = matrix.stride()
    # Rows that overlap, as an expanded tensor's, are no matrix to the hardware.
    return (
        along == 1
        and stride >= matrix.shape[1] > 0
        and stride * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


def gemm_descriptor(
    A: Tensor,
    B: Tensor,
    P: Tensor,
    Q: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    C: Tensor,
    scaling: float,
    threshold: int,
    config: Config,
) -> None:
    """Write C; A, B and C must fit, C must have elements."""
    (M, K), N, r = A.shape, B.shape[1], P.shape[1]
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    tiles = launch.cdiv(M, block_m) * launch.cdiv(N, block_n)
    programs = min(tiles, launch.target(A.device).multiprocessors) if config.persistent else tiles
    transposed = B.stride(0) == 1
    b_desc = (
        TensorDescriptor.from_tensor(B.t(), [block_n, block_k])
        if transposed
        else TensorDescriptor.from_tensor(B, [block_k, block_n])
    )
    run(
        _gemm_descriptor_kernel,
        (programs,),
        TensorDescriptor.from_tensor(A, [block_m, block_k]),
        b_desc,
        TensorDescriptor.from_tensor(C, [block_m, block_n]),
        P,
        Q,
        bias,
        seed,
        M,
        N,
        K,
        *Q.stride(),
        1 if bias is None else bias.stride(0),
        scaling,
        threshold,
        R=r,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_R=launch.block_r(r),
        GROUP_M=GROUP_M,
        TRANSPOSED=transposed,
        FLATTEN=config.persistent,
        DROPOUT=seed is not None,
        PRECISION=launch.branch_precision(A.device),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
