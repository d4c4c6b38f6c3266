"""The down stage backward: dD = x̃ᵀ·dS, x̃ = x ∘ mask / (1 - q) under dropout, else x.

x [M,K], dS [M,r] in the branch dtype → dD [K,r]. Reads x once. Two ordered stages: partial sums fp32 [pieces,K,r] over
pieces of the tokens, then their sum, which a kernel that runs anyway may take; a single piece in fp32, without a mask,
is dD itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from neat_kernels.kernels import launch
from neat_kernels.kernels.bound import Bound, prepared
from neat_kernels.kernels.reduce import Parts
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
        R, BLOCK_M, BLOCK_R, ds_ptr.dtype.element_ty, None, DROPOUT, PRECISION, False,
    )  # [BLOCK_K, BLOCK_R]  # fmt: skip
    offs, mask = narrow_tile(offs_k, K, R, BLOCK_R)
    tl.store(partial_ptr + tl.cast(piece, tl.int64) * K * R + offs, acc, mask=mask)


def down_backward(x: Tensor, dS: Tensor, seed: Tensor | None, dropout: float, dtype: torch.dtype) -> Tensor:
    """dD [K,r] in `dtype`, from a contiguous dS."""
    return down_backward_parts(x, dS, seed, dropout).total(dtype)


def down_backward_parts(x: Tensor, dS: Tensor, seed: Tensor | None, dropout: float) -> Parts:
    """dD in partial sums [pieces,K,r], from a contiguous dS."""
    (M, K), r = x.shape, dS.shape[1]
    pieces, bound = _prepare(launch.target(x.device), M, K, x.stride(), r, dS.element_size(), seed is not None, dropout)
    partial = x.new_empty((pieces, K, r), dtype=torch.float32)
    bound(x, dS, partial, seed)
    return Parts(partial, 1.0 / (1.0 - dropout))


@prepared
def _prepare(
    place: launch.Target, M: int, K: int, x_stride: tuple[int, int], r: int, itemsize: int, masked: bool, dropout: float
) -> tuple[int, Bound]:
    """Pieces of M, and the launch."""
    config = launch.config("columns dropout" if masked else "columns", place, r, itemsize)
    blocks = launch.cdiv(K, config.block_m)
    pieces, steps = launch.split(blocks, M, config.block_k, place)
    return pieces, Bound(
        _down_backward_kernel,
        (blocks, pieces),
        (M, K, steps, *x_stride, threshold(dropout)),
        R=r,
        BLOCK_K=config.block_m,
        BLOCK_M=config.block_k,
        BLOCK_R=launch.block_r(r),
        DROPOUT=masked,
        PRECISION=launch.branch_precision(place),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
