"""The low-rank product alone, written in C's dtype for cuBLAS to accumulate the base GEMM onto.

C = scaling·(P·Qᵀ) ∘ mask + bias

P [M,r], Q [N,r] in any float dtype, rounded to P's; bias [N] → C [M,N]. Writes C once and reads nothing of its size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from neat_kernels.kernels import launch
from neat_kernels.kernels.gemm import add_bias, low_rank_tile, store_tile
from neat_kernels.torch_backend.dropout import threshold as keep_threshold


@triton.jit(do_not_specialize=["M", "threshold"])
def _branch_kernel(
    p_ptr,
    q_ptr,
    bias_ptr,
    seed_ptr,
    c_ptr,
    M,
    N,
    stride_qn,
    stride_qr,
    stride_bias,
    scaling,
    threshold,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks_n = tl.cdiv(N, BLOCK_N)
    offs_m = (tl.program_id(0) // blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = low_rank_tile(
        p_ptr, q_ptr, seed_ptr, offs_m, offs_n, M, N, stride_qn, stride_qr, scaling, threshold,
        R, BLOCK_R, DROPOUT, PRECISION,
    )  # [BLOCK_M, BLOCK_N]  # fmt: skip
    if bias_ptr is not None:
        acc = add_bias(acc, bias_ptr, stride_bias, offs_n, N)
    store_tile(c_ptr, acc, offs_m, offs_n, M, N)


def branch(
    P: Tensor,
    Q: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype,
    scaling: float,
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """C [M,N] in `dtype`, contiguous; P must be contiguous."""
    M, N, r = P.shape[0], Q.shape[0], P.shape[1]
    C = P.new_empty((M, N), dtype=dtype)
    config = launch.config("branch", P.device, r, P.element_size())
    blocks = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    if blocks == 0:
        return C
    _branch_kernel[(blocks,)](
        P,
        Q,
        bias,
        seed,
        C,
        M,
        N,
        *Q.stride(),
        1 if bias is None else bias.stride(0),
        scaling if seed is None else scaling / (1.0 - dropout),
        keep_threshold(dropout),
        R=r,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=launch.block_r(r),
        DROPOUT=seed is not None,
        PRECISION=launch.branch_precision(P.device),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return C
