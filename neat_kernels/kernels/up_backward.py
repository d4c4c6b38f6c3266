"""The up stage backward, from one read of dy: dS = s·dy·U, dU = s·dyᵀ·S, dbias = Σ dy.

dy [M,N], U [N,r], S [M,r] in the branch dtype c, to which U is rounded → dS [M,r] in c, dU [N,r], dbias [N]

Two ordered stages. A program owns BLOCK_M rows of dy and a run of its columns: it writes partial sums of dS fp32
[column pieces,M,r] and of dU and dbias fp32 [row blocks,N,r] and [row blocks,N]. One kernel then adds all three.
Reads dy once; writes and reads 2r/BLOCK_M of dy's bytes as partial sums, in half precision.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from neat_kernels.kernels import launch
from neat_kernels.kernels.reduce import BLOCK, BLOCK_PIECES, sum_block
from neat_kernels.kernels.tiles import narrow_tile


class UpGradients(NamedTuple):
    """What the stage returns; None where nobody asked."""

    dS: Tensor | None
    dU: Tensor | None
    dbias: Tensor | None


@triton.jit(do_not_specialize=["M", "steps"])
def _up_backward_kernel(
    dy_ptr,
    u_ptr,
    s_ptr,
    ds_ptr,
    du_ptr,
    dbias_ptr,
    M,
    N,
    steps,
    stride_dym,
    stride_dyn,
    stride_un,
    stride_ur,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COMPUTE: tl.constexpr,
    NEED_DS: tl.constexpr,
    NEED_DU: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid_m, piece = tl.program_id(0), tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R
    wide_m = offs_m.to(tl.int64)
    offs_s, mask_s = narrow_tile(offs_m, M, R, BLOCK_R)
    row = tl.cast(pid_m, tl.int64)
    if NEED_DS:
        ds = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if NEED_DU:
        s = tl.load(s_ptr + offs_s, mask=mask_s, other=0.0)  # [BLOCK_M, BLOCK_R]
    first = piece * steps * BLOCK_N
    last = tl.minimum(first + steps * BLOCK_N, N)
    for start in range(first, last, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        wide_n = offs_n.to(tl.int64)
        mask_n = offs_n < N
        dy_ptrs = dy_ptr + wide_m[:, None] * stride_dym + wide_n[None, :] * stride_dyn
        dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        if NEED_DS:
            u_ptrs = u_ptr + wide_n[:, None] * stride_un + offs_r[None, :] * stride_ur
            u = tl.load(u_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_N, BLOCK_R]
            ds = tl.dot(dy.to(COMPUTE), u.to(COMPUTE), ds, input_precision=PRECISION)
        if NEED_DU:
            du = tl.dot(tl.trans(dy.to(COMPUTE)), s, input_precision=PRECISION)  # [BLOCK_N, BLOCK_R]
            du_ptrs = du_ptr + (row * N + wide_n)[:, None] * R + offs_r[None, :]
            tl.store(du_ptrs, du, mask=mask_n[:, None] & mask_r[None, :])
        if NEED_DBIAS:
            dbias = tl.sum(dy.to(tl.float32), axis=0)  # [BLOCK_N]
            tl.store(dbias_ptr + row * N + wide_n, dbias, mask=mask_n)
    if NEED_DS:
        tl.store(ds_ptr + tl.cast(piece, tl.int64) * M * R + offs_s, ds, mask=mask_s)


@triton.jit(do_not_specialize=["M", "pieces", "rows", "blocks_s"])
def _finish_kernel(
    ds_partial_ptr,
    du_partial_ptr,
    dbias_partial_ptr,
    ds_ptr,
    du_ptr,
    dbias_ptr,
    M,
    N,
    pieces,
    rows,
    blocks_s,
    blocks_u,
    scaling,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    NEED_DS: tl.constexpr,
    NEED_DU: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
):
    pid = tl.program_id(0)
    if NEED_DS:
        if pid < blocks_s:
            sum_block(ds_partial_ptr, ds_ptr, pid, tl.cast(M, tl.int64) * R, pieces, scaling, BLOCK, BLOCK_PIECES)
    if NEED_DU:
        if (pid >= blocks_s) & (pid < blocks_s + blocks_u):
            sum_block(du_partial_ptr, du_ptr, pid - blocks_s, N * R, rows, scaling, BLOCK, BLOCK_PIECES)
    if NEED_DBIAS:
        if pid >= blocks_s + blocks_u:
            sum_block(dbias_partial_ptr, dbias_ptr, pid - blocks_s - blocks_u, N, rows, 1.0, BLOCK, BLOCK_PIECES)


def up_backward(
    dy: Tensor,
    U: Tensor | None,
    S: Tensor | None,
    scaling: float,
    compute_dtype: torch.dtype,
    dup_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
) -> UpGradients:
    """dS if U is given, dU [N,r] and dbias [N] if their dtype is; all contiguous."""
    M, N = dy.shape
    factor = U if U is not None else S
    r = 1 if factor is None else factor.shape[1]
    config = launch.config("up_backward", dy.device, r, compute_dtype.itemsize)
    rows = triton.cdiv(M, config.block_m)
    pieces, steps = launch.split(rows, N, config.block_n, dy.device)

    def partial(wanted: bool, *shape: int) -> Tensor | None:
        return dy.new_empty(shape, dtype=torch.float32) if wanted else None

    need = {"NEED_DS": U is not None, "NEED_DU": dup_dtype is not None, "NEED_DBIAS": dbias_dtype is not None}
    sums = (
        partial(need["NEED_DS"], pieces, M, r),
        partial(need["NEED_DU"], rows, N, r),
        partial(need["NEED_DBIAS"], rows, N),
    )
    if rows:
        _up_backward_kernel[(rows, pieces)](
            dy,
            U,
            S,
            *sums,
            M,
            N,
            steps,
            *dy.stride(),
            *((0, 0) if U is None else U.stride()),
            R=r,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_R=launch.block_r(r),
            COMPUTE=launch.TRITON_DTYPES[compute_dtype],
            PRECISION=launch.branch_precision(dy.device),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **need,
        )
    out = UpGradients(
        None if U is None else dy.new_empty((M, r), dtype=compute_dtype),
        None if dup_dtype is None else dy.new_empty((N, r), dtype=dup_dtype),
        None if dbias_dtype is None else dy.new_empty((N,), dtype=dbias_dtype),
    )
    blocks = [0 if t is None else triton.cdiv(t.numel(), BLOCK) for t in out]
    if sum(blocks):
        _finish_kernel[(sum(blocks),)](
            *sums,
            *out,
            M,
            N,
            pieces,
            rows,
            *blocks[:2],
            scaling,
            R=r,
            BLOCK=BLOCK,
            BLOCK_PIECES=BLOCK_PIECES,
            num_warps=4,
            **need,
        )
    return out
