"""The down stage backward: dD = x̃ᵀ·dS, x̃ = x ∘ mask / (1 - p) under dropout, else x.

x [M,K], dS [M,r] in the branch dtype → dD [K,r]. Reads x once. Two ordered stages: partial sums fp32 [pieces,K,r] over
pieces of the tokens, then their sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from neat_kernels.kernels import launch
from neat_kernels.kernels.bound import run
from neat_kernels.kernels.reduce import reduce
from neat_kernels.kernels.skinny import tall_times_narrow
from neat_kernels.kernels.tiles import narrow_tile
from neat_kernels.torch_backend.dropout import threshold


@triton.jit(do_not_specialize=["M", "steps", "threshold"])
def _down_backward_kernel(
    x_ptr,
    ds_ptr,
    partial_ptr,
    seed_ptr,
    M,
    K,
    steps,
    stride_xm,
    stride_xk,
    threshold,
    R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    piece = tl.program_id(1)
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tall_times_narrow(
        x_ptr, ds_ptr, None, seed_ptr, offs_k, K, M, piece, steps, stride_xk, stride_xm, R, 1, 1, K, threshold,
        R, BLOCK_M, BLOCK_R, ds_ptr.dtype.element_ty, None, DROPOUT, PRECISION,
    )  # [BLOCK_K, BLOCK_R]  # fmt: skip
    offs, mask = narrow_tile(offs_k, K, R, BLOCK_R)
    tl.store(partial_ptr + tl.cast(piece, tl.int64) * K * R + offs, acc, mask=mask)


def down_backward(x: Tensor, dS: Tensor, seed: Tensor | None, dropout: float, dtype: torch.dtype) -> Tensor:
    """dD [K,r] in `dtype`, from a contiguous dS."""
    M, K = x.shape
    r = dS.shape[1]
    config = launch.config("columns" if seed is None else "columns dropout", x.device, r, dS.element_size())
    blocks = launch.cdiv(K, config.block_m)
    pieces, steps = launch.split(blocks, M, config.block_k, x.device)
    partial = x.new_empty((pieces, K, r), dtype=torch.float32)
    if K:
        run(
            _down_backward_kernel,
            (blocks, pieces),
            x,
            dS,
            partial,
            seed,
            M,
            K,
            steps,
            *x.stride(),
            threshold(dropout),
            R=r,
            BLOCK_K=config.block_m,
            BLOCK_M=config.block_k,
            BLOCK_R=launch.block_r(r),
            DROPOUT=seed is not None,
            PRECISION=launch.branch_precision(x.device),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return reduce(partial, x.new_empty((K, r), dtype=dtype), 1.0 / (1.0 - dropout))
