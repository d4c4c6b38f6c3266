"""The feature network g and its backward on [BLOCK_M, r] tiles, in fp32.

h = σ(Z);  p encoders: res_i = h, h = σ(h·E_iᵀ);  p decoders: h = σ(h·D_iᵀ) + res_{p-1-i}

The chain [2p,r,r] holds E_0 … E_{p-1}, D_0 … D_{p-1}, contiguous. Tiles have BLOCK_R >= r columns; those beyond r hold
σ(0), which differs from zero for sigmoid, and meet only rows of E and D that are loaded as zeros.
"""

import triton
import triton.language as tl

from neat_kernels.kernels.activations import act_backward, act_forward


@triton.jit
def _square(chain_ptr, i, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """The i-th r×r matrix of the chain [BLOCK_R, BLOCK_R], zero beyond r."""
    offs_i = tl.arange(0, BLOCK_R)
    offs_j = tl.arange(0, BLOCK_R)
    mask = (offs_i < R)[:, None] & (offs_j < R)[None, :]
    return tl.load(chain_ptr + i * R * R + offs_i[:, None] * R + offs_j[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _affine(h, square, PRECISION: tl.constexpr):
    """h·Eᵀ."""
    return tl.dot(h, tl.trans(square), input_precision=PRECISION)


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
    """Every h from σ(Z) to H, 1 + 2p tiles [BLOCK_M, BLOCK_R]."""
    trace = (act_forward(z, ACTIVATION),)
    for i in tl.static_range(DEPTH):
        a = _affine(trace[i], _square(chain_ptr, i, R, BLOCK_R), PRECISION)
        trace = trace + (act_forward(a, ACTIVATION),)  # noqa: RUF005  (triton has no unpacking)
    for i in tl.static_range(DEPTH):
        a = _affine(trace[DEPTH + i], _square(chain_ptr, DEPTH + i, R, BLOCK_R), PRECISION)
        trace = trace + (act_forward(a, ACTIVATION) + trace[DEPTH - 1 - i],)  # noqa: RUF005
    return trace


@triton.jit
def _layer_backward(
    dh,
    h,
    chain_ptr,
    dchain_ptr,
    i,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    NEED_DCHAIN: tl.constexpr,
):
    """The gradient of h from dh, that of σ(h·Eᵀ) for the i-th matrix E; the tile's share of dE is stored."""
    square = _square(chain_ptr, i, R, BLOCK_R)
    da = act_backward(dh, _affine(h, square, PRECISION), ACTIVATION)
    if NEED_DCHAIN:
        offs_i = tl.arange(0, BLOCK_R)
        offs_j = tl.arange(0, BLOCK_R)
        dsquare = tl.dot(tl.trans(da), h, input_precision=PRECISION)  # [BLOCK_R, BLOCK_R]
        mask = (offs_i < R)[:, None] & (offs_j < R)[None, :]
        tl.store(dchain_ptr + i * R * R + offs_i[:, None] * R + offs_j[None, :], dsquare, mask=mask)
    return tl.dot(da, square, input_precision=PRECISION)


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
    trace = chain_forward(z, chain_ptr, R, BLOCK_R, DEPTH, ACTIVATION, PRECISION)
    dskips = ()
    for j in tl.static_range(2 * DEPTH - 1, DEPTH - 1, -1):
        dskips = dskips + (dh,)  # noqa: RUF005
        dh = _layer_backward(
            dh, trace[j], chain_ptr, dchain_ptr, j, R, BLOCK_R, ACTIVATION, PRECISION, NEED_DCHAIN
        )
    for j in tl.static_range(DEPTH - 1, -1, -1):
        dh = dskips[j] + _layer_backward(
            dh, trace[j], chain_ptr, dchain_ptr, j, R, BLOCK_R, ACTIVATION, PRECISION, NEED_DCHAIN
        )
    return act_backward(dh, z, ACTIVATION)
