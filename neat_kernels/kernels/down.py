"""The down stage: S = x̃·D, x̃ = x ∘ mask / (1 - q) under dropout, else x; where cuBLAS follows, s·S·Uᵀ + bias too.

x [M,K], D [K,r] → S [M,r] in the branch dtype c, to which D is rounded first; s·S·Uᵀ + bias [M,N]. Reads x once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from neat_kernels.kernels import launch
from neat_kernels.kernels.bound import Bound, prepared
from neat_kernels.kernels.branch import Product, columns, write_product
from neat_kernels.kernels.skinny import tall_times_narrow
from neat_kernels.torch_backend.dropout import threshold


@triton.jit(do_not_specialize=["M", "steps", "threshold"])
def _down_kernel(
    x_ptr,
    d_ptr,
    s_ptr,
    u_ptr,
    bias_ptr,
    c_ptr,
    seed_ptr,
    M,
    N,
    K,
    steps,
    stride_xm,
    stride_xk,
    stride_dk,
    stride_dr,
    stride_un,
    stride_ur,
    stride_bias,
    scaling,
    threshold,
    inv_keep,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    s = tall_times_narrow(
        x_ptr, d_ptr, None, seed_ptr, offs_m, M, K, 0, tl.cdiv(K, BLOCK_K),
        stride_xm, stride_xk, stride_dk, stride_dr, K, 1, threshold,
        R, BLOCK_K, BLOCK_R, s_ptr.dtype.element_ty, None, DROPOUT, PRECISION, False,
    )  # [BLOCK_M, BLOCK_R]  # fmt: skip
    if DROPOUT:
        s = s * inv_keep
    write_product(
        s, s_ptr, u_ptr, bias_ptr, None, c_ptr, offs_m, tl.program_id(1), steps, M, N, stride_un, stride_ur,
        stride_bias, scaling, 0, R, BLOCK_N, BLOCK_R, False, PRECISION,
    )  # fmt: skip


def down(
    x: Tensor, D: Tensor, seed: Tensor | None, dropout: float, dtype: torch.dtype, product: Product | None = None
) -> tuple[Tensor, Tensor | None]:
    """S [M,r] in `dtype`, and the product [M,N] that was asked for, contiguous."""
    masked = seed is not None
    U, bias, C, of_product = None, None, None, None
    if product is not None:
        U, bias, C = product.Q, product.bias, product.empty(x.shape[0])
        of_product = (*U.shape, *U.stride(), 1 if bias is None else bias.stride(0), product.scaling)
    pieces, bound = _prepare(
        launch.target(x.device), *x.shape, x.stride(), *D.stride(), D.shape[1], dtype, masked, dropout, of_product
    )
    shape = (x.shape[0], D.shape[1])
    S = x.new_empty(shape if pieces == 1 else (pieces, *shape), dtype=dtype)
    bound(x, D, S, U, bias, C, seed)
    return S if pieces == 1 else S[0], C


@prepared
def _prepare(
    place: launch.Target,
    M: int,
    K: int,
    x_stride: tuple[int, int],
    stride_dk: int,
    stride_dr: int,
    r: int,
    dtype: torch.dtype,
    masked: bool,
    dropout: float,
    of_product: tuple[int, int, int, int, int, float] | None,
) -> tuple[int, Bound]:
    """Copies of S, and the launch; `of_product` has N, r, the strides of U and bias, and the scaling."""
    config = launch.config("down dropout" if masked else "down", place, r, dtype.itemsize)
    blocks, pieces, steps = launch.cdiv(M, config.block_m), 1, 0
    N, _, stride_un, stride_ur, stride_bias, scaling = of_product or (1, r, 0, 0, 1, 1.0)
    if of_product is not None:
        pieces, steps = columns(blocks, N, config.block_n, place)
    strides = (*x_stride, stride_dk, stride_dr, stride_un, stride_ur, stride_bias)
    return pieces, Bound(
        _down_kernel,
        (blocks, pieces),
        (M, N, K, steps, *strides, scaling, threshold(dropout), 1.0 / (1.0 - dropout)),
        R=r,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=launch.block_r(r),
        DROPOUT=masked,
        PRECISION=launch.branch_precision(place),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
