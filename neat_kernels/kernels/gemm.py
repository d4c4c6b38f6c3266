"""The base GEMM whose accumulator carries the low-rank product, shared by apply and dgrad.

C = A·B + scaling·(P·Qᵀ) ∘ mask + bias

A [M,K], B [K,N] with any strides (Wᵀ or W), P [M,r], Q [N,r] in any float dtype, rounded to P's; bias [N] → C [M,N]
Reads A and B once per tile column and row of C (neighbouring tiles share them in the L2 cache), writes C once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from neat_kernels.kernels import launch
from neat_kernels.kernels.dropout import kept
from neat_kernels.torch_backend.dropout import threshold as keep_threshold

# Tile rows that walk down together, so that their tiles of B stay in the L2 cache.
GROUP_M = 8


@triton.jit
def low_rank_tile(
    p_ptr,
    q_ptr,
    seed_ptr,
    offs_m,
    offs_n,
    M,
    N,
    stride_qn,
    stride_qr,
    scaling,
    threshold,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """fp32 [BLOCK_M, BLOCK_N] = scaling·(P·Qᵀ) ∘ mask."""
    c: tl.constexpr = p_ptr.dtype.element_ty
    # Three TF32 products of 128 columns at a time, unrolled, spill 10.5 KB a thread (sm_80, python -m benchmarks.gate).
    SLICE_R: tl.constexpr = BLOCK_R if c.primitive_bitwidth == 16 else min(BLOCK_R, 32)
    wide_m, wide_n = offs_m.to(tl.int64), offs_n.to(tl.int64)
    tile = tl.zeros((offs_m.shape[0], offs_n.shape[0]), tl.float32)  # [BLOCK_M, BLOCK_N]
    for start in range(0, BLOCK_R, SLICE_R):
        offs_r = start + tl.arange(0, SLICE_R)
        mask_r = offs_r < R
        p_ptrs = p_ptr + wide_m[:, None] * R + offs_r[None, :]
        q_ptrs = q_ptr + wide_n[None, :] * stride_qn + offs_r[:, None] * stride_qr
        p = tl.load(p_ptrs, mask=(offs_m < M)[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_M, SLICE_R]
        q = tl.load(q_ptrs, mask=mask_r[:, None] & (offs_n < N)[None, :], other=0.0)  # [SLICE_R, BLOCK_N]
        tile = tl.dot(p, q.to(c), tile, input_precision=PRECISION)
    tile = tile * scaling
    if DROPOUT:
        # Columns in 32 bits: as int64 they spill 208 bytes a thread (sm_100, python -m benchmarks.gate).
        index = wide_m[:, None] * N + offs_n[None, :]
        tile = kept(tile, seed_ptr, index, threshold)
    return tile


@triton.jit
def add_bias(acc, bias_ptr, stride_bias, offs_n, N):
    """acc [BLOCK_M, BLOCK_N] + bias."""
    bias = tl.load(bias_ptr + offs_n.to(tl.int64) * stride_bias, mask=offs_n < N, other=0.0)  # [BLOCK_N]
    return acc + bias.to(tl.float32)[None, :]


@triton.jit
def store_tile(c_ptr, acc, offs_m, offs_n, M, N):
    """Round acc [BLOCK_M, BLOCK_N] to C's dtype and write it."""
    c_ptrs = c_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


@triton.jit(do_not_specialize=["M", "threshold"])
def _gemm_kernel(
    a_ptr,
    b_ptr,
    p_ptr,
    q_ptr,
    bias_ptr,
    seed_ptr,
    c_ptr,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
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
    LOW_RANK_FIRST: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = tl.swizzle2d(tl.program_id(0) // blocks_n, tl.program_id(0) % blocks_n, blocks_m, blocks_n, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    wide_m, wide_n, wide_k = offs_m.to(tl.int64), offs_n.to(tl.int64), offs_k.to(tl.int64)
    a_ptrs = a_ptr + wide_m[:, None] * stride_am + wide_k[None, :] * stride_ak  # [BLOCK_M, BLOCK_K]
    b_ptrs = b_ptr + wide_k[:, None] * stride_bk + wide_n[None, :] * stride_bn  # [BLOCK_K, BLOCK_N]
    if LOW_RANK_FIRST:
        acc = low_rank_tile(
            p_ptr, q_ptr, seed_ptr, offs_m, offs_n, M, N, stride_qn, stride_qr, scaling, threshold,
            R, BLOCK_R, DROPOUT, PRECISION,
        )  # [BLOCK_M, BLOCK_N]  # fmt: skip
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    mask_m, mask_n = offs_m < M, offs_n < N
    for start in range(0, K, BLOCK_K):
        mask_k = start + offs_k < K
        a = tl.load(a_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_ptrs += BLOCK_K * tl.cast(stride_ak, tl.int64)
        b_ptrs += BLOCK_K * tl.cast(stride_bk, tl.int64)
    if not LOW_RANK_FIRST:
        acc += low_rank_tile(
            p_ptr, q_ptr, seed_ptr, offs_m, offs_n, M, N, stride_qn, stride_qr, scaling, threshold,
            R, BLOCK_R, DROPOUT, PRECISION,
        )  # [BLOCK_M, BLOCK_N]  # fmt: skip
    if bias_ptr is not None:
        acc = add_bias(acc, bias_ptr, stride_bias, offs_n, N)
    store_tile(c_ptr, acc, offs_m, offs_n, M, N)


def gemm(
    A: Tensor,
    B: Tensor,
    P: Tensor,
    Q: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float,
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """C [M,N] in A's dtype, contiguous; P must be contiguous, B in A's dtype.

    Raises:
        ValueError: A is fp32 on a GPU, where the base GEMM is cuBLAS's.
    """
    if A.dtype == torch.float32 and launch.target(A.device).arch != "interpreter":
        raise ValueError("the fused plan takes half precision on a GPU, got float32: plan cublas has the fp32 GEMM")
    (M, K), N, r = A.shape, B.shape[1], P.shape[1]
    C = A.new_empty((M, N))
    stage = "gemm dropout" if seed is not None and P.element_size() == 2 else "gemm"
    config = launch.config(stage, A.device, r, P.element_size())
    blocks = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    if blocks == 0:
        return C
    _gemm_kernel[(blocks,)](
        A,
        B,
        P,
        Q,
        bias,
        seed,
        C,
        M,
        N,
        K,
        *A.stride(),
        *B.stride(),
        *Q.stride(),
        1 if bias is None else bias.stride(0),
        scaling if seed is None else scaling / (1.0 - dropout),
        keep_threshold(dropout),
        R=r,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=launch.block_r(r),
        GROUP_M=GROUP_M,
        LOW_RANK_FIRST=launch.low_rank_first(A.device),
        DROPOUT=seed is not None,
        PRECISION=launch.branch_precision(A.device),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return C
