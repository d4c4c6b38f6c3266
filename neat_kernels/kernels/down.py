"""The down stage: S = x̃·D, x̃ = x ∘ mask / (1 - p) under dropout, else x.

x [M,K], D [K,r] → S [M,r] in the branch dtype c, to which D is rounded first. Reads x once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from neat_kernels.kernels import launch
from neat_kernels.kernels.skinny import tall_times_narrow
from neat_kernels.kernels.tiles import narrow_tile
from neat_kernels.torch_backend.dropout import threshold


@triton.jit(do_not_specialize=["M", "threshold"])
def _down_kernel(
    x_ptr,
    d_ptr,
    s_ptr,
    seed_ptr,
    M,
    K,
    stride_xm,
    stride_xk,
    stride_dk,
    stride_dr,
    threshold,
    inv_keep,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c: tl.constexpr = s_ptr.dtype.element_ty
    acc = tall_times_narrow(
        x_ptr, d_ptr, None, seed_ptr, offs_m, M, K, 0, tl.cdiv(K, BLOCK_K),
        stride_xm, stride_xk, stride_dk, stride_dr, K, 1, threshold,
        R, BLOCK_K, BLOCK_R, c, None, DROPOUT, PRECISION,
    )  # [BLOCK_M, BLOCK_R]  # fmt: skip
    if DROPOUT:
        acc = acc * inv_keep
    offs, mask = narrow_tile(offs_m, M, R, BLOCK_R)
    tl.store(s_ptr + offs, acc.to(c), mask=mask)


def down(x: Tensor, D: Tensor, seed: Tensor | None, dropout: float, dtype: torch.dtype) -> Tensor:
    """S [M,r] in `dtype`."""
    M, K = x.shape
    r = D.shape[1]
    S = x.new_empty((M, r), dtype=dtype)
    config = launch.config("rows", x.device, r, dtype.itemsize)
    if M == 0:
        return S
    _down_kernel[(triton.cdiv(M, config.block_m),)](
        x,
        D,
        S,
        seed,
        M,
        K,
        *x.stride(),
        *D.stride(),
        threshold(dropout),
        1.0 / (1.0 - dropout),
        R=r,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_R=launch.block_r(r),
        DROPOUT=seed is not None,
        PRECISION=launch.branch_precision(x.device),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return S
