"""One read of W for two products: with the tokens of a small batch, and with a narrow factor of the features.

P = T·Vᵀ [M,rows] for V [rows,length] = W or Wᵀ and T [M,length] = x or dy, and of the narrow F = Aᵀ or dH∘σ'(Z)
stacked: V·F [rows,r] for F [length,r], reduced along the same dimension as P
crossed: Vᵀ·F [length,r] for F [rows,r], reduced along the other one

Partial sums in fp32, for others to add in order. Stacked, a program owns BLOCK_M rows and a piece of the length: P and
V·F [pieces,·,rows]. Crossed, it owns BLOCK_L columns and a tall piece of the rows, as up_backward.py does: P
[blocks,M,rows] is 2M / BLOCK_L of W's bytes in half precision, Vᵀ·F [pieces,length,r] 2r / (rows of a piece).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from neat_kernels.kernels import launch
from neat_kernels.kernels.activations import act_backward
from neat_kernels.kernels.bound import Bound, prepared
from neat_kernels.kernels.skinny import narrow_dot


@triton.jit
def _wide_tile(v_ptr, offs_m, offs_l, rows, end, stride_vm, stride_vl):
    """V[offs_m, offs_l], zero from row `rows` and from column `end` on."""
    v_ptrs = v_ptr + offs_m.to(tl.int64)[:, None] * stride_vm + offs_l.to(tl.int64)[None, :] * stride_vl
    return tl.load(v_ptrs, mask=(offs_m < rows)[:, None] & (offs_l < end)[None, :], other=0.0)


@triton.jit
def _narrow_tile(
    f_ptr, z_ptr, offs, end, stride_f, stride_fr, R: tl.constexpr, BLOCK_R: tl.constexpr, ACTIVATION: tl.constexpr
):
    """F[offs, :r], zero from row `end` on and beyond r; times σ'(Z), Z contiguous, if ACTIVATION is not None."""
    offs_r = tl.arange(0, BLOCK_R)
    wide, mask = offs.to(tl.int64), (offs < end)[:, None] & (offs_r < R)[None, :]
    f = tl.load(f_ptr + wide[:, None] * stride_f + offs_r[None, :] * stride_fr, mask=mask, other=0.0)
    if ACTIVATION is not None:
        z = tl.load(z_ptr + wide[:, None] * R + offs_r[None, :], mask=mask, other=0.0)
        f = act_backward(f.to(tl.float32), z, ACTIVATION)
    return f


@triton.jit
def _store_tokens(p_ptr, p, offs_t, offs_m, tokens, rows):
    """Write p [BLOCK_M, BLOCK_T] as columns offs_m of P [tokens,rows]."""
    p_ptrs = p_ptr + offs_t.to(tl.int64)[None, :] * rows + offs_m[:, None]
    tl.store(p_ptrs, p, mask=(offs_m < rows)[:, None] & (offs_t < tokens)[None, :])


@triton.jit
def _store_narrow(q_ptr, q, offs, rows, stride_q, stride_qr, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """Write q [len(offs), BLOCK_R] as rows offs of the narrow product [rows,r]."""
    offs_r = tl.arange(0, BLOCK_R)
    q_ptrs = q_ptr + offs.to(tl.int64)[:, None] * stride_q + offs_r.to(tl.int64)[None, :] * stride_qr
    tl.store(q_ptrs, q, mask=(offs < rows)[:, None] & (offs_r < R)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _stacked_kernel(
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
    PRECISION: tl.constexpr,
    PIECES: tl.constexpr,
):
    piece = tl.program_id(1)
    offs_m, offs_t = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_T)
    c: tl.constexpr = t_ptr.dtype.element_ty
    first = piece * steps * BLOCK_L
    last = tl.minimum(first + steps * BLOCK_L, length)
    p = tl.zeros((BLOCK_M, BLOCK_T), tl.float32)
    q = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(first, last, BLOCK_L):
        offs_l = start + tl.arange(0, BLOCK_L)
        v = _wide_tile(v_ptr, offs_m, offs_l, rows, last, stride_vm, stride_vl)  # [BLOCK_M, BLOCK_L]
        t = _wide_tile(t_ptr, offs_l, offs_t, last, tokens, stride_tl, stride_tm)  # [BLOCK_L, BLOCK_T]
        f = _narrow_tile(f_ptr, z_ptr, offs_l, last, stride_f, stride_fr, R, BLOCK_R, ACTIVATION)  # [BLOCK_L, BLOCK_R]
        p = tl.dot(v.to(c), t, p, input_precision="ieee")
        q = narrow_dot(v, f, q, COMPUTE, PRECISION, PIECES)
    wide_piece = tl.cast(piece, tl.int64)
    _store_tokens(p_ptr + wide_piece * tokens * rows, p, offs_t, offs_m, tokens, rows)
    _store_narrow(q_ptr + wide_piece * rows * R, q, offs_m, rows, stride_q, stride_qr, R, BLOCK_R)


@triton.jit(do_not_specialize=["tokens"])
def _crossed_kernel(
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
    PRECISION: tl.constexpr,
    PIECES: tl.constexpr,
):
    pid, piece = tl.program_id(0), tl.program_id(1)
    offs_l, offs_t = pid * BLOCK_L + tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_T)
    c: tl.constexpr = t_ptr.dtype.element_ty
    p_ptr += tl.cast(pid, tl.int64) * tokens * rows
    t = _wide_tile(t_ptr, offs_l, offs_t, length, tokens, stride_tl, stride_tm)  # [BLOCK_L, BLOCK_T]
    q = tl.zeros((BLOCK_L, BLOCK_R), tl.float32)
    first = piece * steps * BLOCK_M
    last = tl.minimum(first + steps * BLOCK_M, rows)
    for start in range(first, last, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        v = _wide_tile(v_ptr, offs_m, offs_l, last, length, stride_vm, stride_vl)  # [BLOCK_M, BLOCK_L]
        f = _narrow_tile(f_ptr, z_ptr, offs_m, last, stride_f, stride_fr, R, BLOCK_R, ACTIVATION)  # [BLOCK_M, BLOCK_R]
        q = narrow_dot(tl.trans(v), f, q, COMPUTE, PRECISION, PIECES)
        p = tl.dot(v.to(c), t, input_precision="ieee")  # [BLOCK_M, BLOCK_T]
        _store_tokens(p_ptr, p, offs_t, offs_m, tokens, rows)
    q_ptr += tl.cast(piece, tl.int64) * length * R
    _store_narrow(q_ptr, q, offs_l, length, stride_q, stride_qr, R, BLOCK_R)


class Operands(NamedTuple):
    """What one read of W is for.

    Fields:
        V: W or Wᵀ [rows,length].
        T: x or dy [M,length], in the dtype in which it is multiplied.
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
    """Partial sums of P [·,M,rows] and of the narrow product [·,rows or length,r], of its transpose if `transposed`."""
    V, T, F, Z, activation, compute, crossed = given
    (rows, length), M, r = V.shape, T.shape[0], F.shape[1]
    strides = (*V.stride(), *T.stride(), *F.stride())
    of_P, of_Q, bound = _prepare(
        launch.target(V.device), rows, length, M, r, strides, activation, compute, crossed, transposed
    )
    P, Q = (V.new_empty(shape, dtype=torch.float32) for shape in (of_P, of_Q))
    bound(V, T, F, Z, P, Q)
    return P, Q


@prepared
def _prepare(
    place: launch.Target,
    rows: int,
    length: int,
    M: int,
    r: int,
    strides: tuple[int, ...],
    activation: str | None,
    compute: torch.dtype,
    crossed: bool,
    transposed: bool,
) -> tuple[tuple[int, int, int], tuple[int, int, int], Bound]:
    """Shapes of the partial sums of both products, and the launch; strides of V, T and F."""
    config, blocks, pieces, steps, owned, of_tokens = launch.shared_read(
        rows, length, M, r, compute.itemsize, crossed, place
    )
    bound = Bound(
        _crossed_kernel if crossed else _stacked_kernel,
        (blocks, pieces),
        (rows, length, M, steps, *strides, *((1, owned) if transposed else (r, 1))),
        R=r,
        BLOCK_M=config.block_m,
        BLOCK_L=config.block_k,
        BLOCK_T=launch.block_r(M),
        BLOCK_R=launch.block_r(r),
        COMPUTE=launch.TRITON_DTYPES[compute],
        ACTIVATION=activation,
        PRECISION=launch.branch_precision(place),
        # Stacked with pieces, tiny matrices ended in an illegal memory access on an H200 (docs/performance-log.md).
        PIECES=crossed and launch.takes_pieces(place),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return (of_tokens, M, rows), (pieces, r, owned) if transposed else (pieces, owned, r), bound
