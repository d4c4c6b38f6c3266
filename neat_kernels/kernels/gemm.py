"""The base GEMM whose accumulator carries the low-rank product, shared by apply and dgrad.

C = A·B + scaling·(P·Qᵀ) ∘ mask + bias

A [M,K], B [K,N] with any strides (Wᵀ or W), P [M,r], Q [N,r] in any float dtype, rounded to P's; bias [N] → C [M,N]
Reads A and B once per tile column and row of C (neighbouring tiles share them in the L2 cache), writes C once. The
kernel here takes pointers; where the tensors and the device allow it, the one in gemm_descriptor.py runs.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from neat_kernels.kernels import launch
from neat_kernels.kernels.bound import Bound, prepared
from neat_kernels.kernels.gemm_descriptor import GROUP_M, GemmCall, fits, on_descriptors
from neat_kernels.kernels.tiles import add_bias, low_rank_tile, store_tile


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
    (M, K), N = A.shape, B.shape[1]
    C = A.new_empty((M, N))
    if C.numel() == 0:
        return C
    strides = (*A.stride(), *B.stride(), *Q.stride(), 1 if bias is None else bias.stride(0))
    place, masked = launch.target(A.device), seed is not None
    call = GemmCall(place, M, N, K, P.shape[1], strides, A.dtype, P.dtype, scaling, masked, dropout)
    is_aligned = (A.data_ptr() | B.data_ptr() | C.data_ptr()) % 16 == 0
    _prepare(call, is_aligned)(A, B, P, Q, bias, seed, C)
    return C


@prepared
def _prepare(call: GemmCall, is_aligned: bool) -> Callable[..., None]:
    if is_aligned and fits(call):
        return on_descriptors(call)
    place, M, N, K, r, strides, *_ = call
    config = call.config("gemm")
    return Bound(
        _gemm_kernel,
        (launch.cdiv(M, config.block_m) * launch.cdiv(N, config.block_n),),
        (M, N, K, *strides, *call.branch),
        R=r,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=launch.block_r(r),
        GROUP_M=GROUP_M,
        LOW_RANK_FIRST=launch.low_rank_first(place),
        DROPOUT=call.masked,
        PRECISION=launch.branch_precision(place),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
