"""The feature network g and its backward on [BLOCK_M, r] tiles, in fp32.

h = σ(Z);  p encoders: res_i = h, h = σ(h·E_iᵀ);  p decoders: h = σ(h·D_iᵀ) + res_{p-1-i}

The chain [2p,r,r] holds E_0 … E_{p-1}, D_0 … D_{p-1}, contiguous; layer i is its i-th matrix. The input of every layer
lies in memory, in a trace fp32 [2p,rows,r] that one launch writes and reads (the backward adds a plane for da); a
program owns BLOCK_M of its rows. In registers a chain of r = 128 spilled, and its layers could not be a loop.

One thread reads what another wrote, hence the barriers, and loops without stages: a prefetch would pass a barrier.
"""

import triton
import triton.language as tl

from neat_kernels.kernels.activations import act_backward, act_forward
from neat_kernels.kernels.tiles import narrow_tile


@triton.jit
def _times_square(
    h_ptr,
    square_ptr,
    stride_row,
    stride_column,
    offs_m,
    rows,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h·E [BLOCK_M, BLOCK_R] for h [rows,r] in memory and an r×r matrix, transposed by its strides; zero beyond r."""
    # From r = 33 on, 32 columns spill up to 32 bytes a thread (sm_80 to sm_89 and sm_120, python -m benchmarks.gate).
    SLICE_R: tl.constexpr = min(BLOCK_R, 32) if BLOCK_R < 64 else 16
    offs_r = tl.arange(0, BLOCK_R)
    acc = tl.zeros((offs_m.shape[0], BLOCK_R), tl.float32)  # [BLOCK_M, BLOCK_R]
    for start in tl.range(0, BLOCK_R, SLICE_R, num_stages=1):
        offs_s = start + tl.arange(0, SLICE_R)
        h_ptrs = h_ptr + offs_m.to(tl.int64)[:, None] * R + offs_s[None, :]
        square_ptrs = square_ptr + offs_s[:, None] * stride_row + offs_r[None, :] * stride_column
        h = tl.load(h_ptrs, mask=(offs_m < rows)[:, None] & (offs_s < R)[None, :], other=0.0)  # [BLOCK_M, SLICE_R]
        square = tl.load(
            square_ptrs, mask=(offs_s < R)[:, None] & (offs_r < R)[None, :], other=0.0
        )  # [SLICE_R, BLOCK_R]
        acc = tl.dot(h, square.to(tl.float32), acc, input_precision=PRECISION)
    return acc


@triton.jit
def chain_forward(
    z,
    chain_ptr,
    trace_ptr,
    offs_m,
    rows,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DEPTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """H [BLOCK_M, BLOCK_R] from Z; the input of layer i is left in the trace."""
    h = act_forward(z, ACTIVATION)
    if DEPTH > 0:
        plane = tl.cast(rows, tl.int64) * R
        offs, mask = narrow_tile(offs_m, rows, R, BLOCK_R)
        for i in tl.range(0, 2 * DEPTH, num_stages=1):
            tl.store(trace_ptr + i * plane + offs, h, mask=mask)
            tl.debug_barrier()
            a = _times_square(trace_ptr + i * plane, chain_ptr + i * R * R, 1, R, offs_m, rows, R, BLOCK_R, PRECISION)
            h = act_forward(a, ACTIVATION)
            if i >= DEPTH:
                h += tl.load(trace_ptr + (2 * DEPTH - 1 - i) * plane + offs, mask=mask, other=0.0)
    return h


@triton.jit
def _square_gradient(da, h, dsquare_ptr, R: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr):
    """Store the tile's share of dE = daᵀ·h."""
    offs, mask = narrow_tile(tl.arange(0, BLOCK_R), R, R, BLOCK_R)
    dsquare = tl.dot(tl.trans(da), h, input_precision=PRECISION)  # [BLOCK_R, BLOCK_R]
    tl.store(dsquare_ptr + offs, dsquare, mask=mask)


@triton.jit
def chain_backward(
    dh,
    z,
    chain_ptr,
    dchain_ptr,
    trace_ptr,
    offs_m,
    rows,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DEPTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    NEED_DCHAIN: tl.constexpr,
):
    """dZ [BLOCK_M, BLOCK_R] from dH; the tile's share of dchain [2p,r,r] is stored at dchain_ptr.

    A decoder's input, once read, makes room in the trace for the gradient of the decoder's skip.
    """
    chain_forward(z, chain_ptr, trace_ptr, offs_m, rows, R, BLOCK_R, DEPTH, ACTIVATION, PRECISION)
    plane = tl.cast(rows, tl.int64) * R
    offs, mask = narrow_tile(offs_m, rows, R, BLOCK_R)
    da_ptr = trace_ptr + 2 * DEPTH * plane
    for j in tl.range(0, 2 * DEPTH, num_stages=1):
        i = 2 * DEPTH - 1 - j
        h_ptr, square_ptr = trace_ptr + i * plane, chain_ptr + i * R * R
        a = _times_square(h_ptr, square_ptr, 1, R, offs_m, rows, R, BLOCK_R, PRECISION)
        da = act_backward(dh, a, ACTIVATION)
        tl.store(da_ptr + offs, da, mask=mask)
        if NEED_DCHAIN:
            h = tl.load(h_ptr + offs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_R]
            _square_gradient(da, h, dchain_ptr + i * R * R, R, BLOCK_R, PRECISION)
        tl.debug_barrier()
        if i >= DEPTH:
            tl.store(h_ptr + offs, dh, mask=mask)
        dh = _times_square(da_ptr, square_ptr, R, 1, offs_m, rows, R, BLOCK_R, PRECISION)
        if i < DEPTH:
            dh += tl.load(trace_ptr + (2 * DEPTH - 1 - i) * plane + offs, mask=mask, other=0.0)
        tl.debug_barrier()
    return act_backward(dh, z, ACTIVATION)
