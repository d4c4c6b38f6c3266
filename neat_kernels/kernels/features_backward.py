"""Backward of the features: dZ through g, the gradients of the r×r chain, and dA from one read of W.

dA = (W·dZ)ᵀ [r,N] (out) or dZᵀ·W [r,K] (in);  dH, Z fp32 [rows,r];  chain, dchain [2p,r,r]

Without a chain dZ = dH∘σ'(Z) is taken on the fly and never stored. With one, a first kernel writes dZ and, a block of
rows at a time, partial sums of dchain; programs of the kernel for dA add them, or the ordered sum where A is frozen.
The first one reads dH once, and so adds partial sums of it on load; that for dA reads it in every program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from neat_kernels.kernels import launch
from neat_kernels.kernels.bound import Bound, prepared
from neat_kernels.kernels.chain import chain_backward
from neat_kernels.kernels.reduce import BLOCK, Parts, Sum, block_pieces, ordered_sum, reduce, sum_block
from neat_kernels.kernels.skinny import tall_times_narrow
from neat_kernels.kernels.tiles import narrow_tile


@triton.jit(do_not_specialize=["pieces"])
def _chain_backward_kernel(
    dh_ptr,
    z_ptr,
    chain_ptr,
    dz_ptr,
    dchain_ptr,
    trace_ptr,
    rows,
    pieces,
    stride_dhm,
    stride_dhr,
    scaling,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    NEED_DCHAIN: tl.constexpr,
):
    pid = tl.program_id(0)
    offs_m = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    offs, mask = narrow_tile(offs_m, rows, R, BLOCK_R)
    offs_dh = offs_m.to(tl.int64)[:, None] * stride_dhm + offs_r[None, :] * stride_dhr
    plane = tl.cast(rows, tl.int64) * R
    dh = ordered_sum(dh_ptr, offs_dh, mask, plane, pieces, BLOCK_PIECES) * scaling  # [BLOCK_M, BLOCK_R]
    z = tl.load(z_ptr + offs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_R]
    share_ptr = dchain_ptr
    if NEED_DCHAIN:
        share_ptr = dchain_ptr + tl.cast(pid, tl.int64) * 2 * DEPTH * R * R
    dz = chain_backward(
        dh, z, chain_ptr, share_ptr, trace_ptr, offs_m, rows,
        R, BLOCK_R, DEPTH, ACTIVATION, PRECISION, NEED_DCHAIN,
    )  # [BLOCK_M, BLOCK_R]  # fmt: skip
    tl.store(dz_ptr + offs, dz, mask=mask)


@triton.jit
def _weight_kernel(
    w_ptr,
    dh_ptr,
    z_ptr,
    da_ptr,
    shares_ptr,
    dchain_ptr,
    rows,
    length,
    blocks,
    steps,
    size,
    shares,
    stride_wm,
    stride_wl,
    stride_dhl,
    stride_dhr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECES: tl.constexpr,
):
    pid, piece = tl.program_id(0), tl.program_id(1)
    if pid < blocks:
        offs_m = pid * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_r = tl.arange(0, BLOCK_R)
        acc = tall_times_narrow(
            w_ptr, dh_ptr, z_ptr, None, offs_m, rows, length, piece, steps,
            stride_wm, stride_wl, stride_dhl, stride_dhr, 0, 0, 0,
            R, BLOCK_L, BLOCK_R, tl.float32, ACTIVATION, False, PRECISION, PIECES,
        )  # [BLOCK_M, BLOCK_R]  # fmt: skip
        da_ptrs = da_ptr + tl.cast(piece, tl.int64) * rows * R + offs_r.to(tl.int64)[None, :] * rows + offs_m[:, None]
        tl.store(da_ptrs, acc.to(da_ptr.dtype.element_ty), mask=(offs_m < rows)[:, None] & (offs_r < R)[None, :])
    elif piece == 0:
        if dchain_ptr is not None:
            sum_block(shares_ptr, dchain_ptr, pid - blocks, size, shares, 1.0, BLOCK, BLOCK_PIECES)


# How many partial sums of dH there are, None where it is whole, the strides of its rows and columns, and the scaling.
_OfDH = tuple[int | None, int, int, float]


def features_backward(
    dH: Tensor | Parts,
    weight: Tensor | None,
    Z: Tensor,
    chain: Tensor | None,
    orientation: str,
    activation: str,
    dA_dtype: torch.dtype | None,
    need_dchain: bool,
    left: Sum | None = None,
) -> tuple[Tensor, Tensor]:
    """dA and dchain, empty where they are not needed; takes the sum that another stage has left, too."""
    Z, shares, dchain = Z.contiguous(), None, None
    if chain is None:
        dZ = dH.total(torch.float32) if isinstance(dH, Parts) else dH
    else:
        chain = chain.contiguous()
        dZ, shares = through_chain(dH, Z, chain, activation, need_dchain)
        dchain = torch.empty_like(chain) if need_dchain else None
    dA, last = None, None
    if dA_dtype is not None:
        assert weight is not None
        W = weight.t() if orientation == "in" else weight
        dA, last = _weight_gradient(dZ, W, Z, activation if chain is None else None, dA_dtype, shares, dchain)
    elif shares is not None:
        assert dchain is not None
        last = Sum(shares, dchain)
    reduce(left, last)
    return Z.new_empty(0) if dA is None else dA, Z.new_empty(0) if dchain is None else dchain


def through_chain(
    dH: Tensor | Parts, Z: Tensor, chain: Tensor, activation: str, need_dchain: bool
) -> tuple[Tensor, Tensor | None]:
    """dZ, and the share that every block of its rows has in dchain."""
    rows, r = Z.shape
    depth = chain.shape[0] // 2
    if isinstance(dH, Parts):
        given = dH.partial
        of_dH: _OfDH = (given.shape[0], given.stride(1), given.stride(2), dH.scaling)
    else:
        given, of_dH = dH, (None, dH.stride(0), dH.stride(1), 1.0)
    blocks, bound = _prepare_chain(launch.target(Z.device), rows, r, of_dH, activation, depth, need_dchain)
    dZ = torch.empty_like(Z)
    shares = Z.new_empty((blocks, *chain.shape)) if need_dchain else None
    bound(given, Z, chain, dZ, shares, Z.new_empty((2 * depth + 1, rows, r)))
    return dZ, shares


@prepared
def _prepare_chain(
    place: launch.Target,
    rows: int,
    r: int,
    of_dH: _OfDH,
    activation: str,
    depth: int,
    need_dchain: bool,
) -> tuple[int, Bound]:
    """Blocks of rows, and the launch."""
    config = launch.config("chain", place, r, 4)
    blocks = launch.cdiv(rows, config.block_m)
    pieces, *strides, scaling = of_dH
    return blocks, Bound(
        _chain_backward_kernel,
        (blocks,),
        (rows, pieces or 1, *strides, scaling),
        R=r,
        BLOCK_M=config.block_m,
        BLOCK_R=launch.block_r(r),
        BLOCK_PIECES=1 if pieces is None else block_pieces(config.block_m * launch.block_r(r)),
        ACTIVATION=activation,
        DEPTH=depth,
        PRECISION=launch.branch_precision(place),
        NEED_DCHAIN=need_dchain,
        num_warps=config.num_warps,
    )


def _weight_gradient(
    dZ: Tensor,
    W: Tensor,
    Z: Tensor,
    activation: str | None,
    dtype: torch.dtype,
    shares: Tensor | None,
    dchain: Tensor | None,
) -> tuple[Tensor, Sum | None]:
    """(W·(dZ∘σ'(Z)))ᵀ [r,rows] for W [rows,length], and the sum that is left of it; adds the shares of dchain.

    dZ is taken as it is where activation is None.
    """
    (rows, length), r = W.shape, dZ.shape[1]
    of_dchain = (0, 0) if dchain is None or shares is None else (dchain.numel(), shares.shape[0])
    strides = (*W.stride(), *dZ.stride())
    pieces, bound = _prepare_weight(launch.target(W.device), rows, length, r, strides, activation, of_dchain)
    dA = W.new_empty((r, rows), dtype=dtype)
    partial = dA if pieces == 1 else W.new_empty((pieces, r, rows), dtype=torch.float32)
    bound(W, dZ, Z, partial, shares, dchain)
    return dA, None if pieces == 1 else Sum(partial, dA)


@prepared
def _prepare_weight(
    place: launch.Target,
    rows: int,
    length: int,
    r: int,
    strides: tuple[int, int, int, int],
    activation: str | None,
    of_dchain: tuple[int, int],
) -> tuple[int, Bound]:
    """Pieces of the reduction, and the launch; strides of W and dZ, elements of dchain and the number of its shares."""
    config, blocks, pieces, steps = launch.walk(rows, length, strides[1] == 1, r, 4, place)
    sums = launch.cdiv(of_dchain[0], BLOCK)
    return pieces, Bound(
        _weight_kernel,
        (blocks + sums, pieces),
        (rows, length, blocks, steps, *of_dchain, *strides),
        R=r,
        BLOCK_M=config.block_m,
        BLOCK_L=config.block_k,
        BLOCK_R=launch.block_r(r),
        ACTIVATION=activation,
        BLOCK=BLOCK,
        BLOCK_PIECES=block_pieces(BLOCK),
        PRECISION=launch.branch_precision(place),
        PIECES=launch.takes_pieces(place),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
