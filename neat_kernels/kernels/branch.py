"""The low-rank product alone, for cuBLAS to accumulate the base GEMM onto: written by the stage that makes its P.

C = scaling·(P·Qᵀ) ∘ mask + bias

P [M,r], Q [N,r] in any float dtype, rounded to P's; bias [N] → C [M,N]. Writes C once and reads nothing of its size.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from neat_kernels.kernels import launch
from neat_kernels.kernels.tiles import load_bias, low_rank_tile, narrow_tile, store_tile


class Product(NamedTuple):
    """What C takes besides P; `dtype` is C's."""

    Q: Tensor
    bias: Tensor | None
    scaling: float
    dtype: torch.dtype
    seed: Tensor | None = None
    dropout: float = 0.0

    def empty(self, M: int) -> Tensor:
        """C for M rows of P."""
        return self.Q.new_empty((M, self.Q.shape[0]), dtype=self.dtype)


def columns(blocks: int, N: int, block_n: int, device: launch.Place) -> tuple[int, int]:
    """(pieces, tiles in a piece) of C's columns, for `blocks` blocks of rows that leave some of the device idle.

    The programs of one block of rows each make P again, which is cheaper than to wait for it: what they read is in the
    L2 cache.
    """
    return launch.split(blocks, N, block_n, device, fill=1)


@triton.jit
def write_product(
    p,
    p_ptr,
    q_ptr,
    bias_ptr,
    seed_ptr,
    c_ptr,
    offs_m,
    piece,
    steps,
    M,
    N,
    stride_qn,
    stride_qr,
    stride_bias,
    scaling,
    threshold,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store p [BLOCK_M, BLOCK_R] as P's rows offs_m and, if there is a C, their piece of it: `steps` tiles of BLOCK_N.

    P [pieces,M,r] contiguous has a copy for every piece, since the programs of a block of rows do not wait for each
    other. p is read back from memory, a slice of r at a time, as the GEMM reads it.
    """
    offs, mask = narrow_tile(offs_m, M, R, BLOCK_R)
    p_ptr += tl.cast(piece, tl.int64) * M * R
    tl.store(p_ptr + offs, p.to(p_ptr.dtype.element_ty), mask=mask)
    if c_ptr is not None:
        tl.debug_barrier()
        first = piece * steps * BLOCK_N
        last = tl.minimum(first + steps * BLOCK_N, N)
        for start in tl.range(first, last, BLOCK_N, num_stages=1):
            offs_n = start + tl.arange(0, BLOCK_N)
            if bias_ptr is not None:
                # Under way beside the loads of q: one after the other they are the time of the loop.
                bias = load_bias(bias_ptr, stride_bias, offs_n, N)  # [BLOCK_N]
            tile = low_rank_tile(
                p_ptr, q_ptr, seed_ptr, offs_m, offs_n, M, N, stride_qn, stride_qr, scaling, threshold,
                R, BLOCK_R, DROPOUT, PRECISION,
            )  # [BLOCK_M, BLOCK_N]  # fmt: skip
            if bias_ptr is not None:
                tile += bias[None, :]
            store_tile(c_ptr, tile, offs_m, offs_n, M, N)
