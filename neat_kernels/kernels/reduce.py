"""The second stage of every reduction: out = scaling·Σ_i partial_i, summed in one order whatever the machine does.

partial [pieces, size] fp32 → out [size], rounded once to its dtype. Reads the partial sums once. Two sums share a
launch, so that a stage may leave its own to a later one.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from neat_kernels.kernels import launch
from neat_kernels.kernels.bound import Bound, prepared

BLOCK = 512


class Sum(NamedTuple):
    """out = scaling·Σ_i partial_i, still to be taken; partial [pieces, ...] fp32 and out [...] are contiguous."""

    partial: Tensor
    out: Tensor
    scaling: float = 1.0


class Parts(NamedTuple):
    """What is scaling·Σ_i partial_i, for whoever needs it to add; partial [pieces, ...] fp32, contiguous."""

    partial: Tensor
    scaling: float

    def into(self, dtype: torch.dtype) -> tuple[Tensor, Sum | None]:
        """A tensor for the sum and how to fill it; None where it is the one partial sum itself."""
        if self.partial.shape[0] == 1 and dtype == torch.float32 and self.scaling == 1.0:
            return self.partial[0], None
        out = self.partial.new_empty(self.partial.shape[1:], dtype=dtype)
        return out, Sum(self.partial, out, self.scaling)

    def total(self, dtype: torch.dtype) -> Tensor:
        """The sum."""
        out, left = self.into(dtype)
        reduce(left)
        return out


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
    acc = ordered_sum(partial_ptr, offs, offs < size, size, pieces, BLOCK_PIECES) * scaling  # [1, BLOCK]
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
    also_scaling,
    BLOCK: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
):
    pid, blocks = tl.program_id(0), tl.cdiv(size, BLOCK)
    if pid < blocks:
        sum_block(partial_ptr, out_ptr, pid, size, pieces, scaling, BLOCK, BLOCK_PIECES)
    elif also_out_ptr is not None:
        sum_block(
            also_partial_ptr, also_out_ptr, pid - blocks, also_size, also_pieces, also_scaling, BLOCK, BLOCK_PIECES
        )


def reduce(*sums: Sum | None) -> None:
    """Take the sums, two a launch; None is none."""
    given = [one for one in sums if one is not None]
    for first, also in zip_longest(given[::2], given[1::2]):
        sizes = first.out.numel(), first.partial.shape[0]
        if also is None:
            _prepare(*sizes, 0, 0, first.scaling, 1.0)(first.partial, first.out, None, None)
        else:
            bound = _prepare(*sizes, also.out.numel(), also.partial.shape[0], first.scaling, also.scaling)
            bound(first.partial, first.out, also.partial, also.out)


@prepared
def _prepare(size: int, pieces: int, also_size: int, also_pieces: int, scaling: float, also_scaling: float) -> Bound:
    return Bound(
        _reduce_kernel,
        (launch.cdiv(size, BLOCK) + launch.cdiv(also_size, BLOCK),),
        (size, pieces, also_size, also_pieces, scaling, also_scaling),
        BLOCK=BLOCK,
        BLOCK_PIECES=block_pieces(BLOCK),
        num_warps=4,
    )
