"""Where a tile of an r-wide matrix lies in memory."""

import triton
import triton.language as tl


@triton.jit
def narrow_tile(offs_m, rows, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """Offsets int64 and mask [BLOCK_M, BLOCK_R] of the rows offs_m of a contiguous matrix [rows,r]."""
    offs_r = tl.arange(0, BLOCK_R)
    offs = offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
    return offs, (offs_m < rows)[:, None] & (offs_r < R)[None, :]
