"""A layer under few tokens, where reading W is what takes the time: one read of it each way serves both sides.

forward: x·Wᵀ and Z        backward: dy·W and dA        W [N,K], x [M,K], dy [M,N], M + r up to 128

Both are P = T·Vᵀ and a product with a narrow F, for V [rows,length] = W (forward) or Wᵀ (backward) and T = x or dy:
V·F [rows,r] with F [length,r] = Aᵀ or dZ (in), Vᵀ·F [length,r] with F [rows,r] = Aᵀ or dZ (out).
Partial sums in fp32, added in order by small_tokens.py, features.py and reduce.py: P [pieces,M,rows],
V·F [pieces,rows,r], Vᵀ·F [blocks,length,r]. Reads W once; the last of the partial sums is 2r / BLOCK_M of its bytes.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from neat_kernels.kernels import launch
from neat_kernels.kernels.activations import act_backward
from neat_kernels.kernels.bound import run
from neat_kernels.kernels.down_backward import down_backward
from neat_kernels.kernels.features import feature_dtype, finish_features
from neat_kernels.kernels.features_backward import through_chain
from neat_kernels.kernels.reduce import reduce
from neat_kernels.kernels.small_tokens import down_partial, finish_tokens
from neat_kernels.kernels.up_backward import up_backward
from neat_kernels.torch_backend.low_rank import Branch


@triton.jit
def _narrow(f_ptr, z_ptr, wide, inside, stride_f, stride_fr, R: tl.constexpr, BLOCK_R: tl.constexpr, ACT: tl.constexpr):
    """F[wide, :r] [len(wide), BLOCK_R], zero beyond r; times σ'(Z), Z contiguous, if ACT is not None."""
    offs_r = tl.arange(0, BLOCK_R)
    mask = inside[:, None] & (offs_r < R)[None, :]
    f = tl.load(f_ptr + wide[:, None] * stride_f + offs_r[None, :] * stride_fr, mask=mask, other=0.0)
    if ACT is not None:
        z = tl.load(z_ptr + wide[:, None] * R + offs_r[None, :], mask=mask, other=0.0)
        f = act_backward(f.to(tl.float32), z, ACT)
    return f


@triton.jit(do_not_specialize=["tokens"])
def _small_batch_kernel(
    v_ptr,
    t_ptr,
    f_ptr,
    z_ptr,
    p_ptr,
    q_ptr,
    rows,
    length,
    tokens,
    steps,
    stride_vm,
    stride_vl,
    stride_tm,
    stride_tl,
    stride_f,
    stride_fr,
    stride_q,
    stride_qr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COMPUTE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CROSSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid, piece = tl.program_id(0), tl.program_id(1)
    offs_m, offs_t, offs_r = pid * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_R)
    wide_m, mask_m, mask_t, mask_r = offs_m.to(tl.int64), offs_m < rows, offs_t < tokens, offs_r < R
    c: tl.constexpr = t_ptr.dtype.element_ty
    first = piece * steps * BLOCK_L
    last = tl.minimum(first + steps * BLOCK_L, length)
    p = tl.zeros((BLOCK_M, BLOCK_T), tl.float32)
    if CROSSED:
        f = _narrow(f_ptr, z_ptr, wide_m, mask_m, stride_f, stride_fr, R, BLOCK_R, ACTIVATION).to(COMPUTE)
        plane = tl.cast(length, tl.int64) * R
    else:
        q = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        plane = tl.cast(rows, tl.int64) * R
    for start in range(first, last, BLOCK_L):
        wide_l = (start + tl.arange(0, BLOCK_L)).to(tl.int64)
        mask_l = wide_l < last
        v_ptrs = v_ptr + wide_m[:, None] * stride_vm + wide_l[None, :] * stride_vl
        v = tl.load(v_ptrs, mask=mask_m[:, None] & mask_l[None, :], other=0.0)  # [BLOCK_M, BLOCK_L]
        t_ptrs = t_ptr + wide_l[:, None] * stride_tl + offs_t.to(tl.int64)[None, :] * stride_tm
        t = tl.load(t_ptrs, mask=mask_l[:, None] & mask_t[None, :], other=0.0)  # [BLOCK_L, BLOCK_T]
        p = tl.dot(v.to(c), t, p, input_precision="ieee")
        if CROSSED:
            part = tl.dot(tl.trans(v).to(COMPUTE), f, input_precision=PRECISION)  # [BLOCK_L, BLOCK_R]
            q_ptrs = q_ptr + pid * plane + wide_l[:, None] * stride_q + offs_r[None, :] * stride_qr
            tl.store(q_ptrs, part, mask=mask_l[:, None] & mask_r[None, :])
        else:
            f = _narrow(f_ptr, z_ptr, wide_l, mask_l, stride_f, stride_fr, R, BLOCK_R, ACTIVATION)
            q = tl.dot(v.to(COMPUTE), f.to(COMPUTE), q, input_precision=PRECISION)
    p_ptrs = p_ptr + (tl.cast(piece, tl.int64) * tokens + offs_t[None, :]) * rows + wide_m[:, None]
    tl.store(p_ptrs, p, mask=mask_m[:, None] & mask_t[None, :])
    if not CROSSED:
        q_ptrs = q_ptr + piece * plane + wide_m[:, None] * stride_q + offs_r[None, :] * stride_qr
        tl.store(q_ptrs, q, mask=mask_m[:, None] & mask_r[None, :])


class Operands(NamedTuple):
    """What reads of W are shared by: V [rows,length] and T [M,length] of P = T·Vᵀ, F of the narrow product.

    Fields:
        V: W or Wᵀ.
        T: x or dy, in the dtype in which it is multiplied.
        F: [rows,r] if crossed, else [length,r].
        Z: fp32, F's shape, contiguous, where F is dH and misses σ'(Z).
        activation: σ, or None where Z is.
        compute: in which V and F are multiplied.
        crossed: whether the narrow product is Vᵀ·F, else V·F.
    """

    V: Tensor
    T: Tensor
    F: Tensor
    Z: Tensor | None
    activation: str | None
    compute: torch.dtype
    crossed: bool


def read_once(given: Operands, transposed: bool) -> tuple[Tensor, Tensor]:
    """Partial sums of P [pieces,M,rows] and of the narrow product [pieces,·,r], or [pieces,r,·] if transposed."""
    V, T, F, Z, activation, compute, crossed = given
    (rows, length), M, r = V.shape, T.shape[0], F.shape[1]
    block_t = launch.block_r(M)
    config = launch.config("small_batch", V.device, max(block_t, r), compute.itemsize)
    blocks = launch.cdiv(rows, config.block_m)
    pieces, steps = launch.split(blocks, length, config.block_k, V.device)
    P = V.new_empty((pieces, M, rows), dtype=torch.float32)
    narrow_pieces, narrow_rows = (blocks, length) if crossed else (pieces, rows)
    shape = (r, narrow_rows) if transposed else (narrow_rows, r)
    Q = V.new_empty((narrow_pieces, *shape), dtype=torch.float32)
    run(
        _small_batch_kernel,
        (blocks, pieces),
        V,
        T,
        F,
        Z,
        P,
        Q,
        rows,
        length,
        M,
        steps,
        *V.stride(),
        *T.stride(),
        *F.stride(),
        *((1, narrow_rows) if transposed else (r, 1)),
        R=r,
        BLOCK_M=config.block_m,
        BLOCK_L=config.block_k,
        BLOCK_T=block_t,
        BLOCK_R=launch.block_r(r),
        COMPUTE=launch.TRITON_DTYPES[compute],
        ACTIVATION=activation,
        CROSSED=crossed,
        PRECISION=launch.branch_precision(V.device),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return P, Q


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    chain: Tensor | None,
    seed: Tensor | None,
    orientation: str,
    activation: str,
    branch: Branch,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [M,N] in x's dtype, S [M,r] in the branch dtype, H and Z fp32 [rows,r], contiguous."""
    with launch.on(x.device):
        crossed = orientation == "out"
        chain = None if chain is None else chain.contiguous()
        P, Q = read_once(Operands(weight, x, A.t(), None, None, feature_dtype(weight, A), crossed), transposed=False)
        H, Z = finish_features(Q, chain, activation)
        D, U = (H, B) if crossed else (B, H)
        c = branch.compute_dtype or x.dtype
        shares = down_partial(x, D, seed, branch.dropout, c)
        S = shares.new_empty(shares.shape[1:], dtype=c)
        y = finish_tokens(P, S, shares, U, bias, branch.scaling, x.dtype)
        return y, S, H, Z


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    B: Tensor,
    chain: Tensor | None,
    S: Tensor | None,
    H: Tensor,
    Z: Tensor,
    seed: Tensor | None,
    orientation: str,
    activation: str,
    branch: Branch,
    dA_dtype: torch.dtype,
    dB_dtype: torch.dtype | None,
    need_dchain: bool,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dA, dB, dchain and dbias; empty tensors stand for those that nobody asked for beside dx and dA."""
    with launch.on(dy.device):
        crossed = orientation == "out"
        (D, U), (dD_dtype, dU_dtype) = ((H, B), (Z.dtype, dB_dtype)) if crossed else ((B, H), (dB_dtype, Z.dtype))
        c = branch.compute_dtype or dy.dtype
        S = None if S is None else S.contiguous()
        dS, dU, dbias, _ = up_backward(dy, U, S, branch.scaling, c, dU_dtype, dbias_dtype)
        assert dS is not None
        dD = None
        if dD_dtype is not None:
            assert x is not None
            dD = down_backward(x, dS, seed, branch.dropout, dD_dtype)
        dZ, dB = (dD, dU) if crossed else (dU, dD)
        assert dZ is not None
        through: str | None = activation
        shares = None
        if chain is not None:
            dZ, shares = through_chain(dZ, Z, chain.contiguous(), activation, need_dchain)
            through = None
        P, Q = read_once(Operands(weight.t(), dy, dZ, Z, through, torch.float32, crossed), transposed=True)
        dA = reduce(Q, dy.new_empty(Q.shape[1:], dtype=dA_dtype))
        dchain = None
        if shares is not None:
            assert chain is not None
            dchain = reduce(shares, torch.empty_like(chain, memory_format=torch.contiguous_format))
        dx = finish_tokens(P, dS, None, D, None, 1.0, dy.dtype, seed, branch.dropout)
    dB, dchain, dbias = (dy.new_empty(0) if gradient is None else gradient for gradient in (dB, dchain, dbias))
    return dx, dA, dB, dchain, dbias
