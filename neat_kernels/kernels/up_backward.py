"""The up stage backward, from one read of dy: dS = s·dy·U, dU = s·dyᵀ·S, dbias = Σ dy.

dy [M,N], U [N,r], S [M,r] in the branch dtype c, to which U is rounded → dS [M,r] in c, dU [N,r], dbias [N]

Two ordered stages, of which up_finish.py has the second. A program owns BLOCK_N columns of dy and a tall piece of its
rows, and writes partial sums in fp32: dS [blocks,M,r], dU [pieces,N,r], dbias [pieces,N]. Reads dy once; in half
precision the partial sums of dS have 2r / BLOCK_N of its bytes and those of dU 2r / (rows of a piece).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from neat_kernels.kernels import launch
from neat_kernels.kernels.bound import Bound, prepared
from neat_kernels.kernels.branch import Product
from neat_kernels.kernels.tiles import narrow_tile
from neat_kernels.kernels.up_finish import Partial, UpGradients, finish


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
    PRECISION: tl.constexpr,
):
    pid_n, piece = tl.program_id(0), tl.program_id(1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    wide_n, mask_n = offs_n.to(tl.int64), offs_n < N
    offs_r = tl.arange(0, BLOCK_R)
    offs_u, mask_u = narrow_tile(offs_n, N, R, BLOCK_R)
    if ds_ptr is not None:
        u_ptrs = u_ptr + wide_n[:, None] * stride_un + offs_r[None, :] * stride_ur
        u = tl.load(u_ptrs, mask=mask_u, other=0.0).to(COMPUTE)  # [BLOCK_N, BLOCK_R]
    if du_ptr is not None:
        du = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    if dbias_ptr is not None:
        dbias = tl.zeros((BLOCK_N, 1 if dy_ptr.dtype.element_ty == tl.float32 else 16), tl.float32)
    first = piece * steps * BLOCK_M
    last = tl.minimum(first + steps * BLOCK_M, M)
    for start in range(first, last, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        dy_ptrs = dy_ptr + offs_m.to(tl.int64)[:, None] * stride_dym + wide_n[None, :] * stride_dyn
        dy = tl.load(dy_ptrs, mask=(offs_m < M)[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        if dbias_ptr is not None:
            if dy.dtype == tl.float32:
                dbias += tl.sum(dy, axis=0)[:, None]
            else:
                # A product with ones is exact, and spares a reduction across the warps for every tile.
                ones = tl.full((BLOCK_M, 16), 1.0, tl.float32).to(dy.dtype)
                dbias = tl.dot(tl.trans(dy), ones, dbias, input_precision="ieee")  # [BLOCK_N, 16]
        offs_s, mask_s = narrow_tile(offs_m, M, R, BLOCK_R)
        if du_ptr is not None:
            s = tl.load(s_ptr + offs_s, mask=mask_s, other=0.0)  # [BLOCK_M, BLOCK_R]
            du = tl.dot(tl.trans(dy.to(COMPUTE)), s, du, input_precision=PRECISION)
        if ds_ptr is not None:
            ds = tl.dot(dy.to(COMPUTE), u, input_precision=PRECISION)  # [BLOCK_M, BLOCK_R]
            tl.store(ds_ptr + tl.cast(pid_n, tl.int64) * M * R + offs_s, ds, mask=mask_s)
    row = tl.cast(piece, tl.int64) * N
    if du_ptr is not None:
        tl.store(du_ptr + row * R + offs_u, du, mask=mask_u)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + row + wide_n, tl.max(dbias, axis=1), mask=mask_n)


def up_backward(
    dy: Tensor,
    U: Tensor | None,
    S: Tensor | None,
    scaling: float,
    compute_dtype: torch.dtype,
    dup_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    product: Product | None = None,
) -> UpGradients:
    """dS if U is given, dU [N,r] and dbias [N] if their dtype is, contiguous; a product of dS if it is asked for."""
    M, N = dy.shape
    factor = U if U is not None else S
    r = 1 if factor is None else factor.shape[1]
    strides = (*dy.stride(), *((0, 0) if U is None else U.stride()))
    blocks, pieces, bound = _prepare(launch.target(dy.device), M, N, r, strides, compute_dtype)

    def empty(wanted: bool, *shape: int) -> Tensor | None:
        return dy.new_empty(shape, dtype=torch.float32) if wanted else None

    partial = Partial(
        empty(U is not None, blocks, M, r),
        empty(dup_dtype is not None, pieces, N, r),
        empty(dbias_dtype is not None, pieces, N),
    )
    bound(dy, U, S, *partial)
    return finish(partial, M, N, r, scaling, (compute_dtype, dup_dtype, dbias_dtype), dy.device, product)


@prepared
def _prepare(
    place: launch.Target, M: int, N: int, r: int, strides: tuple[int, ...], compute_dtype: torch.dtype
) -> tuple[int, int, Bound]:
    """Blocks of columns, pieces of rows, and the launch; strides of dy and U."""
    config = launch.config("up_backward", place, r, compute_dtype.itemsize)
    blocks = launch.cdiv(N, config.block_n)
    pieces, steps = launch.split(blocks, M, config.block_m, place, launch.up_backward_fill(place))
    return (
        blocks,
        pieces,
        Bound(
            _up_backward_kernel,
            (blocks, pieces),
            (M, N, steps, *strides),
            R=r,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_R=launch.block_r(r),
            COMPUTE=launch.TRITON_DTYPES[compute_dtype],
            PRECISION=launch.branch_precision(place),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        ),
    )
