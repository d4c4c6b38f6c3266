"""The token side of a small batch beside its reads of W: S = x̃·D in partial sums, and the end of y and of dx.

down_partial: shares of S [shares,M,r] fp32, one piece of K each, so that few tokens fill a device. Reads x once.
finish_tokens: C = ΣP + scaling·(S·Qᵀ) ∘ mask + bias [M,N] from P [pieces,M,N]; Q = U and C = y, or S = dS, Q = D and
C = dx. Reads every P once, S or its shares once for each block of C's columns, and writes C once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from neat_kernels.kernels import launch
from neat_kernels.kernels.bound import Bound, prepared
from neat_kernels.kernels.dropout import kept
from neat_kernels.kernels.reduce import block_pieces, ordered_sum
from neat_kernels.kernels.skinny import tall_times_narrow
from neat_kernels.kernels.tiles import add_bias, narrow_tile, store_tile
from neat_kernels.torch_backend.dropout import threshold


@triton.jit(do_not_specialize=["M", "threshold"])
def _down_partial_kernel(
    x_ptr,
    d_ptr,
    s_ptr,
    seed_ptr,
    M,
    K,
    steps,
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
    COMPUTE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    piece = tl.program_id(1)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    s = tall_times_narrow(
        x_ptr, d_ptr, None, seed_ptr, offs_m, M, K, piece, steps, stride_xm, stride_xk, stride_dk, stride_dr, K, 1,
        threshold, R, BLOCK_K, BLOCK_R, COMPUTE, None, DROPOUT, PRECISION, False,
    )  # [BLOCK_M, BLOCK_R]  # fmt: skip
    if DROPOUT:
        s = s * inv_keep
    offs, mask = narrow_tile(offs_m, M, R, BLOCK_R)
    tl.store(s_ptr + tl.cast(piece, tl.int64) * M * R + offs, s, mask=mask)


@triton.jit(do_not_specialize=["M", "threshold"])
def _finish_tokens_kernel(
    partial_ptr,
    shares_ptr,
    s_ptr,
    q_ptr,
    bias_ptr,
    seed_ptr,
    c_ptr,
    M,
    N,
    pieces,
    shares,
    stride_qn,
    stride_qr,
    stride_bias,
    scaling,
    threshold,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    BLOCK_SHARES: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n, offs_r = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    wide_n, mask_n = offs_n.to(tl.int64), offs_n < N
    c: tl.constexpr = s_ptr.dtype.element_ty
    offs_s, mask_s = narrow_tile(offs_m, M, R, BLOCK_R)
    if shares_ptr is not None:
        # [BLOCK_M, BLOCK_R]
        s = ordered_sum(shares_ptr, offs_s, mask_s, tl.cast(M, tl.int64) * R, shares, BLOCK_SHARES).to(c)
        if tl.program_id(1) == 0:
            tl.store(s_ptr + offs_s, s, mask=mask_s)
    else:
        s = tl.load(s_ptr + offs_s, mask=mask_s, other=0.0)  # [BLOCK_M, BLOCK_R]
    q_ptrs = q_ptr + wide_n[None, :] * stride_qn + offs_r[:, None] * stride_qr
    q = tl.load(q_ptrs, mask=(offs_r < R)[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_R, BLOCK_N]
    acc = tl.dot(s, q.to(c), input_precision=PRECISION) * scaling  # [BLOCK_M, BLOCK_N]
    offs = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    if DROPOUT:
        acc = kept(acc, seed_ptr, offs, threshold)
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    acc += ordered_sum(partial_ptr, offs, mask, tl.cast(M, tl.int64) * N, pieces, BLOCK_PIECES)
    if bias_ptr is not None:
        acc = add_bias(acc, bias_ptr, stride_bias, offs_n, N)
    store_tile(c_ptr, acc, offs_m, offs_n, M, N)


def down_partial(x: Tensor, D: Tensor, seed: Tensor | None, dropout: float, dtype: torch.dtype) -> Tensor:
    """Shares of S = x̃·D [shares,M,r] fp32, from operands rounded to `dtype`."""
    (M, K), r = x.shape, D.shape[1]
    strides = (*x.stride(), *D.stride())
    shares, bound = _prepare_down(launch.target(x.device), M, K, r, strides, dtype, seed is not None, dropout)
    S = x.new_empty((shares, M, r), dtype=torch.float32)
    bound(x, D, S, seed)
    return S


@prepared
def _prepare_down(
    place: launch.Target,
    M: int,
    K: int,
    r: int,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    masked: bool,
    dropout: float,
) -> tuple[int, Bound]:
    """Pieces of K, and the launch; strides of x and D."""
    config = launch.config("small_down", place, r, dtype.itemsize)
    blocks = launch.cdiv(M, config.block_m)
    shares, steps = launch.split(blocks, K, config.block_k, place)
    return shares, Bound(
        _down_partial_kernel,
        (blocks, shares),
        (M, K, steps, *strides, threshold(dropout), 1.0 / (1.0 - dropout)),
        R=r,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_R=launch.block_r(r),
        COMPUTE=launch.TRITON_DTYPES[dtype],
        DROPOUT=masked,
        PRECISION=launch.branch_precision(place),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def finish_tokens(
    P: Tensor,
    S: Tensor,
    shares: Tensor | None,
    Q: Tensor,
    bias: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """C [M,N] in `dtype`, contiguous; S [M,r] contiguous is written from its shares, if there are any, else read."""
    (pieces, M, N), r = P.shape, S.shape[1]
    counts = (pieces, 0 if shares is None else shares.shape[0])
    strides = (*Q.stride(), 1 if bias is None else bias.stride(0))
    bound = _prepare_finish(
        launch.target(P.device), M, N, r, counts, strides, S.element_size(), scaling, seed is not None, dropout
    )
    C = P.new_empty((M, N), dtype=dtype)
    bound(P, shares, S, Q, bias, seed, C)
    return C


@prepared
def _prepare_finish(
    place: launch.Target,
    M: int,
    N: int,
    r: int,
    counts: tuple[int, int],
    strides: tuple[int, int, int],
    itemsize: int,
    scaling: float,
    masked: bool,
    dropout: float,
) -> Bound:
    """The launch; `counts` of P and of the shares of S, strides of Q and bias."""
    config = launch.config("small_finish", place, r, itemsize)
    return Bound(
        _finish_tokens_kernel,
        (launch.cdiv(M, config.block_m), launch.cdiv(N, config.block_n)),
        (M, N, *counts, *strides, scaling / (1.0 - dropout), threshold(dropout)),
        R=r,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=launch.block_r(r),
        BLOCK_PIECES=block_pieces(config.block_m * config.block_n),
        BLOCK_SHARES=block_pieces(config.block_m * launch.block_r(r)),
        DROPOUT=masked,
        PRECISION=launch.branch_precision(place),
        num_warps=config.num_warps,
    )
