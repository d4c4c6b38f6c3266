"""The feature network g and its backward on [BLOCK_M, r] tiles, in fp32.

h = σ(Z);  p encoders: res_i = h, h = σ(h·E_iᵀ);  p decoders: h = σ(h·D_iᵀ) + res_{p-1-i}

The chain [2p,r,r] holds E_0 … E_{p-1}, D_0 … D_{p-1}, contiguous. Tiles have BLOCK_R >= r columns; those beyond r hold
σ(0), which differs from zero for sigmoid, and meet only rows of E and D that are loaded as zeros.
"""

import triton
import triton.language as tl

from neat_kernels.kernels.activations import act_backward, act_forward


@triton.jit
def _square(chain_ptr, i, stride_row, stride_column, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """The i-th r×r matrix of the chain, or its transpose by the strides [BLOCK_R, BLOCK_R], zero beyond r."""
    offs = tl.arange(0, BLOCK_R)
    mask = (offs < R)[:, None] & (offs < R)[None, :]
    ptrs = chain_ptr + i * R * R + offs[:, None] * stride_row + offs[None, :] * stride_column
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _affine(h, chain_ptr, i, R: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr):
    """h·Eᵀ for the i-th matrix E."""
    return tl.dot(h, _square(chain_ptr, i, 1, R, R, BLOCK_R), input_precision=PRECISION)


@triton.jit
def chain_forward(
    z,
    chain_ptr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DEPTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Every h from σ(Z) to H and every argument of σ from Z on, 1 + 2p tiles [BLOCK_M, BLOCK_R] of each."""
    hs = (act_forward(z, ACTIVATION),)
    zs = (z,)
    for i in tl.static_range(DEPTH):
        a = _affine(hs[i], chain_ptr, i, R, BLOCK_R, PRECISION)
        zs = zs + (a,)
        hs = hs + (act_forward(a, ACTIVATION),)
    for i in tl.static_range(DEPTH):
        a = _affine(hs[DEPTH + i], chain_ptr, DEPTH + i, R, BLOCK_R, PRECISION)
        zs = zs + (a,)
        hs = hs + (act_forward(a, ACTIVATION) + hs[DEPTH - 1 - i],)
    return hs, zs


@triton.jit
def _layer_backward(
    dh,
    h,
    a,
    chain_ptr,
    dchain_ptr,
    i,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    NEED_DCHAIN: tl.constexpr,
):
    """The gradient of h from dh, that of σ(a) for a = h·Eᵀ and the i-th matrix E; the tile's share of dE is stored."""
    da = act_backward(dh, a, ACTIVATION)
    if NEED_DCHAIN:
        offs = tl.arange(0, BLOCK_R)
        mask = (offs < R)[:, None] & (offs < R)[None, :]
        dsquare = tl.dot(tl.trans(da), h, input_precision=PRECISION)  # [BLOCK_R, BLOCK_R]
        tl.store(dchain_ptr + i * R * R + offs[:, None] * R + offs[None, :], dsquare, mask=mask)
    return tl.dot(da, _square(chain_ptr, i, R, 1, R, BLOCK_R), input_precision=PRECISION)


@triton.jit
def chain_backward(
    dh,
    z,
    chain_ptr,
    dchain_ptr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DEPTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    NEED_DCHAIN: tl.constexpr,
):
    """dZ [BLOCK_M, BLOCK_R] from dH; the tile's share of dchain [2p,r,r] is stored at dchain_ptr."""
    hs, zs = chain_forward(z, chain_ptr, R, BLOCK_R, DEPTH, ACTIVATION, PRECISION)
    dskips = ()
    for j in tl.static_range(2 * DEPTH - 1, DEPTH - 1, -1):
        dskips = dskips + (dh,)
        dh = _layer_backward(
            dh, hs[j], zs[j + 1], chain_ptr, dchain_ptr, j, R, BLOCK_R, ACTIVATION, PRECISION, NEED_DCHAIN
        )
    for j in tl.static_range(DEPTH - 1, -1, -1):
        dh = dskips[j] + _layer_backward(
            dh, hs[j], zs[j + 1], chain_ptr, dchain_ptr, j, R, BLOCK_R, ACTIVATION, PRECISION, NEED_DCHAIN
        )
    return act_backward(dh, z, ACTIVATION)
