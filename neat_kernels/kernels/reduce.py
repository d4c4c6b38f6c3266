"""The second stage of every reduction: out = scaling·Σ_i partial_i, summed in one order whatever the machine does.

partial [pieces, size] fp32 → out [size], rounded once to its dtype. Reads the partial sums once.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
# Partial sums read at a time: enough loads in flight to hide their latency.
BLOCK_PIECES = 8


@triton.jit
def ordered_sum(partial_ptr, offs, size, pieces, BLOCK_PIECES: tl.constexpr):
    """fp32 Σ_i partial[i, offs] for offs [BLOCK] of `size`, zero where offs >= size."""
    acc = tl.zeros((offs.shape[0],), tl.float32)  # [BLOCK]
    for start in range(0, pieces, BLOCK_PIECES):
        offs_p = start + tl.arange(0, BLOCK_PIECES)
        mask = (offs_p < pieces)[:, None] & (offs < size)[None, :]
        tile = tl.load(partial_ptr + offs_p.to(tl.int64)[:, None] * size + offs[None, :], mask=mask, other=0.0)
        acc += tl.sum(tile, axis=0)  # [BLOCK_PIECES, BLOCK] → [BLOCK]
    return acc


@triton.jit
def sum_block(partial_ptr, out_ptr, pid, size, pieces, scaling, BLOCK: tl.constexpr, BLOCK_PIECES: tl.constexpr):
    """Write block `pid` of out."""
    offs = tl.cast(pid, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = ordered_sum(partial_ptr, offs, size, pieces, BLOCK_PIECES) * scaling
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=offs < size)


@triton.jit(do_not_specialize=["pieces"])
def _reduce_kernel(partial_ptr, out_ptr, size, pieces, scaling, BLOCK: tl.constexpr, BLOCK_PIECES: tl.constexpr):
    sum_block(partial_ptr, out_ptr, tl.program_id(0), size, pieces, scaling, BLOCK, BLOCK_PIECES)


def reduce(partial: Tensor, out: Tensor, scaling: float = 1.0) -> Tensor:
    """Sum partial [pieces, ...] over its first dimension into `out`, contiguous."""
    if out.numel():
        grid = (triton.cdiv(out.numel(), BLOCK),)
        _reduce_kernel[grid](
            partial, out, out.numel(), partial.shape[0], scaling, BLOCK=BLOCK, BLOCK_PIECES=BLOCK_PIECES, num_warps=4
        )
    return out
