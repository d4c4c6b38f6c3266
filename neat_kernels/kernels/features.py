"""Features of the frozen weight: H = g(Z), Z = Wᵀ·Aᵀ (out) or W·Aᵀ (in).

W [N,K] with any strides, A [r,N] or [r,K], chain [2p,r,r] → H, Z fp32 [rows,r], rows = K (out) or N (in). Reads W once.
Where one program per block of rows leaves the device idle, the reduction is split: partial sums of Z, then one kernel
that adds them in order and applies g.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from neat_kernels.kernels import launch
from neat_kernels.kernels.bound import Bound, prepared
from neat_kernels.kernels.chain import chain_forward
from neat_kernels.kernels.features_backward import features_backward
from neat_kernels.kernels.reduce import block_pieces, ordered_sum
from neat_kernels.kernels.skinny import tall_times_narrow
from neat_kernels.kernels.tiles import narrow_tile
from neat_kernels.vocabulary import HALF_DTYPES


@triton.jit
def _project_kernel(
    w_ptr,
    a_ptr,
    chain_ptr,
    trace_ptr,
    z_ptr,
    h_ptr,
    rows,
    length,
    steps,
    stride_wm,
    stride_wl,
    stride_ar,
    stride_al,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COMPUTE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECES: tl.constexpr,
):
    piece = tl.program_id(1)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    z = tall_times_narrow(
        w_ptr, a_ptr, None, None, offs_m, rows, length, piece, steps,
        stride_wm, stride_wl, stride_al, stride_ar, 0, 0, 0,
        R, BLOCK_L, BLOCK_R, COMPUTE, None, False, PRECISION, PIECES,
    )  # [BLOCK_M, BLOCK_R]  # fmt: skip
    offs, mask = narrow_tile(offs_m, rows, R, BLOCK_R)
    tl.store(z_ptr + tl.cast(piece, tl.int64) * rows * R + offs, z, mask=mask)
    if not SPLIT:
        h = chain_forward(z, chain_ptr, trace_ptr, offs_m, rows, R, BLOCK_R, DEPTH, ACTIVATION, PRECISION)
        tl.store(h_ptr + offs, h, mask=mask)


@triton.jit
def _chain_forward_kernel(
    partial_ptr,
    chain_ptr,
    trace_ptr,
    z_ptr,
    h_ptr,
    rows,
    pieces,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs, mask = narrow_tile(offs_m, rows, R, BLOCK_R)
    z = ordered_sum(partial_ptr, offs, mask, tl.cast(rows, tl.int64) * R, pieces, BLOCK_PIECES)  # [BLOCK_M, BLOCK_R]
    tl.store(z_ptr + offs, z, mask=mask)
    h = chain_forward(z, chain_ptr, trace_ptr, offs_m, rows, R, BLOCK_R, DEPTH, ACTIVATION, PRECISION)
    tl.store(h_ptr + offs, h, mask=mask)


def forward(
    weight: Tensor, A: Tensor, chain: Tensor | None, orientation: str, activation: str
) -> tuple[Tensor, Tensor]:
    """H and Z fp32 [rows,r], contiguous."""
    with launch.on(weight.device):
        chain = None if chain is None else chain.contiguous()
        return _features(weight, A, chain, orientation, activation)


def backward(
    dH: Tensor,
    weight: Tensor | None,
    Z: Tensor,
    chain: Tensor | None,
    orientation: str,
    activation: str,
    dA_dtype: torch.dtype | None,
    need_dchain: bool,
) -> tuple[Tensor, Tensor]:
    """dA [r,N] or [r,K] in `dA_dtype` and dchain in the chain's dtype; empty where it is not needed."""
    with launch.on(dH.device):
        return features_backward(dH, weight, Z, chain, orientation, activation, dA_dtype, need_dchain)


def feature_dtype(weight: Tensor, A: Tensor) -> torch.dtype:
    """The dtype in which W and A are multiplied: theirs where they share a half type, else fp32."""
    return weight.dtype if weight.dtype == A.dtype and A.dtype in HALF_DTYPES else torch.float32


def _features(
    weight: Tensor, A: Tensor, chain: Tensor | None, orientation: str, activation: str
) -> tuple[Tensor, Tensor]:
    r = A.shape[0]
    W = weight.t() if orientation == "out" else weight
    rows = W.shape[0]
    pieces, bound = _prepare_project(
        launch.target(weight.device), *W.shape, W.stride(), A.stride(), r, feature_dtype(weight, A), activation,
        _depth(chain),
    )  # fmt: skip
    if pieces > 1:
        partial = weight.new_empty((pieces, rows, r), dtype=torch.float32)
        bound(W, A, chain, None, partial, None)
        return finish_features(partial, chain, activation)
    Z, H = (weight.new_empty((rows, r), dtype=torch.float32) for _ in range(2))
    bound(W, A, chain, _trace(chain, rows, r), Z, H)
    return H, Z


@prepared
def _prepare_project(
    place: launch.Target,
    rows: int,
    length: int,
    w_stride: tuple[int, int],
    a_stride: tuple[int, int],
    r: int,
    compute: torch.dtype,
    activation: str,
    depth: int,
) -> tuple[int, Bound]:
    """Pieces of the reduction, and the launch."""
    config, blocks, pieces, steps = launch.walk(rows, length, w_stride[1] == 1, r, compute.itemsize, place)
    return pieces, Bound(
        _project_kernel,
        (blocks, pieces),
        (rows, length, steps, *w_stride, *a_stride),
        R=r,
        BLOCK_M=config.block_m,
        BLOCK_L=config.block_k,
        BLOCK_R=launch.block_r(r),
        COMPUTE=launch.TRITON_DTYPES[compute],
        ACTIVATION=activation,
        DEPTH=depth,
        SPLIT=pieces > 1,
        PRECISION=launch.branch_precision(place),
        PIECES=launch.takes_pieces(place),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def finish_features(partial: Tensor, chain: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """H = g(Z) and Z [rows,r], the sum of its partial sums [pieces,rows,r]; chain contiguous."""
    pieces, rows, r = partial.shape
    Z, H = (partial.new_empty((rows, r)) for _ in range(2))
    bound = _prepare_finish(launch.target(partial.device), rows, pieces, r, activation, _depth(chain))
    bound(partial, chain, _trace(chain, rows, r), Z, H)
    return H, Z


@prepared
def _prepare_finish(place: launch.Target, rows: int, pieces: int, r: int, activation: str, depth: int) -> Bound:
    config = launch.config("chain", place, r, 4)
    return Bound(
        _chain_forward_kernel,
        (launch.cdiv(rows, config.block_m),),
        (rows, pieces),
        R=r,
        BLOCK_M=config.block_m,
        BLOCK_R=launch.block_r(r),
        BLOCK_PIECES=block_pieces(config.block_m * launch.block_r(r)),
        ACTIVATION=activation,
        DEPTH=depth,
        PRECISION=launch.branch_precision(place),
        num_warps=config.num_warps,
    )


def _depth(chain: Tensor | None) -> int:
    return 0 if chain is None else chain.shape[0] // 2


def _trace(chain: Tensor | None, rows: int, r: int) -> Tensor | None:
    """Room for the input of every layer of the chain."""
    return None if chain is None else chain.new_empty((chain.shape[0], rows, r), dtype=torch.float32)
