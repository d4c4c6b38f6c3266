"""Device functions on tiles: where one of an r-wide matrix lies, the low-rank product, bias, the store."""

import triton
import triton.language as tl

from neat_kernels.kernels.dropout import kept


@triton.jit
def narrow_tile(offs_m, rows, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """Offsets int64 and mask [BLOCK_M, BLOCK_R] of the rows offs_m of a contiguous matrix [rows,r]."""
    offs_r = tl.arange(0, BLOCK_R)
    offs = offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
    return offs, (offs_m < rows)[:, None] & (offs_r < R)[None, :]


@triton.jit
def low_rank_tile(
    p_ptr,
    q_ptr,
    seed_ptr,
    offs_m,
    offs_n,
    M,
    N,
    stride_qn,
    stride_qr,
    scaling,
    threshold,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """fp32 [BLOCK_M, BLOCK_N] = scaling·(P·Qᵀ) ∘ mask."""
    c: tl.constexpr = p_ptr.dtype.element_ty
    # Three TF32 products of 128 columns at a time, unrolled, spill 10.5 KB a thread (sm_80, python -m benchmarks.gate).
    SLICE_R: tl.constexpr = BLOCK_R if c.primitive_bitwidth == 16 else min(BLOCK_R, 32)
    wide_m, wide_n = offs_m.to(tl.int64), offs_n.to(tl.int64)
    tile = tl.zeros((offs_m.shape[0], offs_n.shape[0]), tl.float32)  # [BLOCK_M, BLOCK_N]
    for start in range(0, BLOCK_R, SLICE_R):
        offs_r = start + tl.arange(0, SLICE_R)
        mask_r = offs_r < R
        p_ptrs = p_ptr + wide_m[:, None] * R + offs_r[None, :]
        q_ptrs = q_ptr + wide_n[None, :] * stride_qn + offs_r[:, None] * stride_qr
        p = tl.load(p_ptrs, mask=(offs_m < M)[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_M, SLICE_R]
        q = tl.load(q_ptrs, mask=mask_r[:, None] & (offs_n < N)[None, :], other=0.0)  # [SLICE_R, BLOCK_N]
        tile = tl.dot(p, q.to(c), tile, input_precision=PRECISION)
    tile = tile * scaling
    if DROPOUT:
        # Columns in 32 bits: as int64 they spill 208 bytes a thread (sm_100, python -m benchmarks.gate).
        index = wide_m[:, None] * N + offs_n[None, :]
        tile = kept(tile, seed_ptr, index, threshold)
    return tile


@triton.jit
def load_bias(bias_ptr, stride_bias, offs_n, N):
    """fp32 bias[offs_n], zero from N on."""
    return tl.load(bias_ptr + offs_n.to(tl.int64) * stride_bias, mask=offs_n < N, other=0.0).to(tl.float32)


@triton.jit
def add_bias(acc, bias_ptr, stride_bias, offs_n, N):
    """acc [BLOCK_M, BLOCK_N] + bias."""
    return acc + load_bias(bias_ptr, stride_bias, offs_n, N)[None, :]


@triton.jit
def store_tile(c_ptr, acc, offs_m, offs_n, M, N):
    """Round acc [BLOCK_M, BLOCK_N] to C's dtype and write it."""
    c_ptrs = c_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])
