"""The merge: W' = round(W + s·U·Dᵀ), in one launch.

W [N,K] with any strides, U [N,r], D [K,r] with any strides, in any float dtype → W' [N,K] in W's dtype and layout.
Product and sum are fp32, rounded once: to the nearest, or stochastically. Reads W once, writes W' once and never reads
it; a flag for each tile says whether it is finite. A half U is cast first, in a launch of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from neat_kernels.kernels import launch
from neat_kernels.kernels.bound import Bound
from neat_kernels.kernels.dropout import random_word
from neat_kernels.kernels.tiles import low_rank_tile

# Bits of the largest finite bf16 as an fp32 number: from there on, and for NaN, stochastic rounding is to the nearest.
LARGEST_BITS = tl.constexpr(0x7F7F0000)


@triton.jit
def round_stochastically(v, seed_ptr, index):
    """v fp32, its bits beyond a bf16 rounded away: the bits of neat_kernels.torch_backend.merge. index as in `kept`."""
    bits = v.to(tl.uint32, bitcast=True)
    rounded = (bits + (random_word(seed_ptr, index) >> 16)) & 0xFFFF0000
    rounded = tl.where((bits & 0x7FFFFFFF) < LARGEST_BITS, rounded, bits)
    return rounded.to(tl.float32, bitcast=True)


@triton.jit
def _merge_kernel(
    w_ptr,
    u_ptr,
    d_ptr,
    seed_ptr,
    out_ptr,
    flag_ptr,
    N,
    K,
    stride_wn,
    stride_wk,
    stride_dk,
    stride_dr,
    stride_on,
    stride_ok,
    index_n,
    index_k,
    scaling,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid, blocks_k = tl.program_id(0), tl.cdiv(K, BLOCK_K)
    offs_n = pid // blocks_k * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    wide_n, wide_k = offs_n.to(tl.int64), offs_k.to(tl.int64)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    w_ptrs = w_ptr + wide_n[:, None] * stride_wn + wide_k[None, :] * stride_wk
    w = tl.load(w_ptrs, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_K]
    delta = low_rank_tile(
        u_ptr, d_ptr, None, offs_n, offs_k, N, K, stride_dk, stride_dr, scaling, 0, R, BLOCK_R, False, PRECISION
    )  # [BLOCK_N, BLOCK_K]
    merged = w.to(tl.float32) + delta  # [BLOCK_N, BLOCK_K]
    if seed_ptr is not None:
        merged = round_stochastically(merged, seed_ptr, wide_n[:, None] * index_n + wide_k[None, :] * index_k)
    merged = merged.to(out_ptr.dtype.element_ty)  # [BLOCK_N, BLOCK_K]
    tl.store(out_ptr + wide_n[:, None] * stride_on + wide_k[None, :] * stride_ok, merged, mask=mask)
    finite = tl.abs(merged.to(tl.float32)) < float("inf")
    tl.store(flag_ptr + pid, tl.min(finite.to(tl.int32)))


def merge(weight: Tensor, D: Tensor, U: Tensor, scaling: float, seed: Tensor | None) -> tuple[Tensor, bool]:
    """W' in W's dtype and layout, and whether it is finite; a seed int64 [1] rounds stochastically, to bf16 alone."""
    merged, flags = merge_with_flags(weight, D, U, scaling, seed)
    return merged, bool(flags.all())


def merge_with_flags(
    weight: Tensor, D: Tensor, U: Tensor, scaling: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """W' as in `merge`, and for each tile whether it is finite, which the host has not waited for."""
    r, index = D.shape[1], (weight.shape[1], 1)
    merged = whole = torch.empty_like(weight)
    if weight.stride(0) < weight.stride(1):
        # As Wᵀ + s·D·Uᵀ, with the columns contiguous in memory: along the rows gfx942 stores 2 bytes at a time
        # (python -m benchmarks.gate).
        weight, merged, D, U, index = weight.t(), merged.t(), U, D, index[::-1]
    N, K = weight.shape
    config = launch.config("merge", weight.device, r, weight.element_size())
    blocks = launch.cdiv(N, config.block_m) * launch.cdiv(K, config.block_n)
    flags = weight.new_empty(blocks, dtype=torch.int32)
    if blocks == 0:
        return whole, flags
    bound = Bound(
        _merge_kernel,
        (blocks,),
        (N, K, *weight.stride(), *D.stride(), *merged.stride(), *index, scaling),
        R=r,
        BLOCK_N=config.block_m,
        BLOCK_K=config.block_n,
        BLOCK_R=launch.block_r(r),
        PRECISION=launch.branch_precision(weight.device),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    with launch.on(weight.device):
        bound(weight, U.to(torch.float32).contiguous(), D, seed, merged, flags)
    return whole, flags
