"""The second stage of the up stage backward: dS, dU and dbias from their partial sums, and dS·Dᵀ where cuBLAS follows.

Partial sums fp32: dS [pieces,M,r], dU [rows,N,r], dbias [rows,N] → dS [M,r], dU [N,r], dbias [N], and
C = (dS·Dᵀ) ∘ mask / (1 - q) [M,K]. Reads every partial sum once, those of dS once for each piece of C's columns.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from neat_kernels.kernels import launch
from neat_kernels.kernels.bound import Bound, prepared
from neat_kernels.kernels.branch import Product, columns, write_product
from neat_kernels.kernels.reduce import BLOCK, block_pieces, ordered_sum, sum_block
from neat_kernels.kernels.tiles import narrow_tile
from neat_kernels.torch_backend.dropout import threshold as keep_threshold


class UpGradients(NamedTuple):
    """What the up stage backward returns; None where nobody asked."""

    dS: Tensor | None
    dU: Tensor | None
    dbias: Tensor | None
    product: Tensor | None


class Partial(NamedTuple):
    """Partial sums, fp32; None where nobody asked."""

    dS: Tensor | None
    dU: Tensor | None
    dbias: Tensor | None


@triton.jit(do_not_specialize=["M", "pieces", "rows", "blocks_s", "pieces_c", "steps_c", "threshold"])
def _finish_kernel(
    ds_partial_ptr,
    du_partial_ptr,
    dbias_partial_ptr,
    ds_ptr,
    du_ptr,
    dbias_ptr,
    d_ptr,
    seed_ptr,
    c_ptr,
    M,
    N,
    K,
    pieces,
    rows,
    blocks_s,
    blocks_u,
    pieces_c,
    steps_c,
    stride_dk,
    stride_dr,
    scaling,
    scaling_c,
    threshold,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    FLAT_PIECES: tl.constexpr,
    TALL_PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    if ds_ptr is not None:
        if pid < blocks_s:
            offs_m = (pid // pieces_c) * BLOCK_M + tl.arange(0, BLOCK_M)
            offs, mask = narrow_tile(offs_m, M, R, BLOCK_R)
            plane = tl.cast(M, tl.int64) * R
            ds = ordered_sum(ds_partial_ptr, offs, mask, plane, pieces, TALL_PIECES) * scaling  # [BLOCK_M, BLOCK_R]
            write_product(
                ds, ds_ptr, d_ptr, None, seed_ptr, c_ptr, offs_m, pid % pieces_c, steps_c, M, K, stride_dk, stride_dr,
                0, scaling_c, threshold, R, BLOCK_N, BLOCK_R, DROPOUT, PRECISION,
            )  # fmt: skip
    if du_ptr is not None:
        if (pid >= blocks_s) & (pid < blocks_s + blocks_u):
            sum_block(du_partial_ptr, du_ptr, pid - blocks_s, N * R, rows, scaling, BLOCK, FLAT_PIECES)
    if dbias_ptr is not None:
        if pid >= blocks_s + blocks_u:
            sum_block(dbias_partial_ptr, dbias_ptr, pid - blocks_s - blocks_u, N, rows, 1.0, BLOCK, FLAT_PIECES)


def finish(
    partial: Partial,
    M: int,
    N: int,
    r: int,
    scaling: float,
    dtypes: tuple[torch.dtype, torch.dtype | None, torch.dtype | None],
    device: torch.device,
    product: Product | None,
) -> UpGradients:
    """dS, dU and dbias in `dtypes` where there are partial sums of them, contiguous; the product if it is asked for."""

    def empty(partial: Tensor | None, dtype: torch.dtype | None, *shape: int) -> Tensor | None:
        return None if partial is None else torch.empty(shape, dtype=dtype, device=device)

    D, C, seed, of_product = None, None, None, None
    if product is not None:
        D, C, seed = product.Q, product.empty(M), product.seed
        of_product = (D.shape[0], *D.stride(), product.scaling, product.dropout, seed is not None)
    shares = tuple(None if t is None else t.shape[0] for t in partial)
    pieces, bound = _prepare(launch.target(device), M, N, r, scaling, dtypes[0].itemsize, shares, of_product)
    dS = empty(partial.dS, dtypes[0], *((M, r) if pieces == 1 else (pieces, M, r)))
    dU, dbias = empty(partial.dU, dtypes[1], N, r), empty(partial.dbias, dtypes[2], N)
    bound(*partial, dS, dU, dbias, D, seed, C)
    return UpGradients(dS if dS is None or pieces == 1 else dS[0], dU, dbias, C)


@prepared
def _prepare(
    place: launch.Target,
    M: int,
    N: int,
    r: int,
    scaling: float,
    itemsize: int,
    shares: tuple[int | None, int | None, int | None],
    of_product: tuple[int, int, int, float, float, bool] | None,
) -> tuple[int, Bound]:
    """Copies of dS, and the launch.

    `shares` has how many partial sums there are of dS, dU and dbias, `of_product` K, the strides of D, the scaling, the
    dropout and whether there is a mask.
    """
    K, stride_dk, stride_dr, product_scaling, dropout, masked = of_product or (1, 0, 0, 1.0, 0.0, False)
    config = launch.config("finish dropout" if masked and itemsize == 2 else "finish", place, r, itemsize)
    of_dS, of_dU, of_dbias = shares
    blocks, pieces, steps = 0 if of_dS is None else launch.cdiv(M, config.block_m), 1, 0
    if of_product is not None:
        pieces, steps = columns(blocks, K, config.block_n, place)
    blocks_s = blocks * pieces
    blocks_u = 0 if of_dU is None else launch.cdiv(N * r, BLOCK)
    blocks_b = 0 if of_dbias is None else launch.cdiv(N, BLOCK)
    tall = of_dbias if of_dU is None else of_dU
    return pieces, Bound(
        _finish_kernel,
        (blocks_s + blocks_u + blocks_b,),
        (
            M,
            N,
            K,
            of_dS or 0,
            tall or 0,
            blocks_s,
            blocks_u,
            pieces,
            steps,
            stride_dk,
            stride_dr,
            scaling,
            product_scaling / (1.0 - dropout),
            keep_threshold(dropout),
        ),
        R=r,
        BLOCK=BLOCK,
        FLAT_PIECES=block_pieces(BLOCK),
        TALL_PIECES=block_pieces(config.block_m * launch.block_r(r)),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=launch.block_r(r),
        DROPOUT=masked,
        PRECISION=launch.branch_precision(place),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
