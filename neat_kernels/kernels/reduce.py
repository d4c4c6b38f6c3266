"""The second stage of every reduction: out = scaling·Σ_i partial_i, summed in one order whatever the machine does.

partial [pieces, size] fp32 → out [size], rounded once to its dtype. Reads the partial sums once.
"""

import triton
import triton.language as tl
from torch import Tensor

from neat_kernels.kernels import launch
from neat_kernels.kernels.bound import Bound, prepared

BLOCK = 512


def block_pieces(tile: int) -> int:
    """Partial sums of a tile of so many elements to read at a time.

    Enough loads in flight to hide their latency, few enough to fit into the registers of 128 threads.
    """
    return min(8, max(1, 4096 // tile))


@triton.jit
def ordered_sum(partial_ptr, offs, mask, size, pieces, BLOCK_PIECES: tl.constexpr):
    """fp32 Σ_i partial[i, offs] for offs [BLOCK_M, BLOCK_N] of `size`, zero where not mask."""
    acc = tl.zeros(offs.shape, tl.float32)  # [BLOCK_M, BLOCK_N]
    for start in range(0, pieces, BLOCK_PIECES):
        offs_p = start + tl.arange(0, BLOCK_PIECES)
        ptrs = partial_ptr + offs_p.to(tl.int64)[:, None, None] * size + offs[None, :, :]
        tile = tl.load(ptrs, mask=(offs_p < pieces)[:, None, None] & mask[None, :, :], other=0.0)
        acc += tl.sum(tile, axis=0)  # [BLOCK_PIECES, BLOCK_M, BLOCK_N] → [BLOCK_M, BLOCK_N]
    return acc


@triton.jit
def sum_block(partial_ptr, out_ptr, pid, size, pieces, scaling, BLOCK: tl.constexpr, BLOCK_PIECES: tl.constexpr):
    """Write block `pid` of out."""
    offs = tl.cast(pid, tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    acc = ordered_sum(partial_ptr, offs, offs < size, size, pieces, BLOCK_PIECES) * scaling
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=offs < size)


@triton.jit(do_not_specialize=["pieces", "also_pieces"])
def _reduce_kernel(
    partial_ptr,
    out_ptr,
    also_partial_ptr,
    also_out_ptr,
    size,
    pieces,
    also_size,
    also_pieces,
    scaling,
    BLOCK: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
):
    pid, blocks = tl.program_id(0), tl.cdiv(size, BLOCK)
    if pid < blocks:
        sum_block(partial_ptr, out_ptr, pid, size, pieces, scaling, BLOCK, BLOCK_PIECES)
    elif also_out_ptr is not None:
        sum_block(also_partial_ptr, also_out_ptr, pid - blocks, also_size, also_pieces, 1.0, BLOCK, BLOCK_PIECES)


def reduce(
    partial: Tensor, out: Tensor, scaling: float = 1.0, also: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
) -> Tensor:
    """Sum partial [pieces, ...] over its first dimension into `out`, contiguous; beside it another one, unscaled."""
    shares, sums = also
    of_also = (0, 0) if shares is None or sums is None else (sums.numel(), shares.shape[0])
    _prepare(out.numel(), partial.shape[0], *of_also, scaling)(partial, out, shares, sums)
    return out


@prepared
def _prepare(size: int, pieces: int, also_size: int, also_pieces: int, scaling: float) -> Bound:
    return Bound(
        _reduce_kernel,
        (launch.cdiv(size, BLOCK) + launch.cdiv(also_size, BLOCK),),
        (size, pieces, also_size, also_pieces, scaling),
        BLOCK=BLOCK,
        BLOCK_PIECES=block_pieces(BLOCK),
        num_warps=4,
    )
