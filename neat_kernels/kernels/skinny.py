"""The product of a tall matrix and a narrow one, the device function behind every stage that reduces to rank r.

P = V·Q    V [rows, length] is x, W, dy or a transpose of one; Q [length, r] a factor
"""

import triton
import triton.language as tl

from neat_kernels.kernels.activations import act_backward
from neat_kernels.kernels.dropout import kept


@triton.jit
def narrow_dot(v, q, acc, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, PIECES: tl.constexpr):
    """acc + v·q, both rounded to COMPUTE, for a tile v of a large matrix and a tile q of a narrow one.

    With PIECES a bf16 v under fp32 takes three bf16 products, which hold all 24 bits of q in pieces of 8: as exact as
    fp32, half the cost of three TF32 products, and nothing is done to the large operand.
    """
    if PIECES and COMPUTE == tl.float32 and v.dtype == tl.bfloat16:
        wide = q.to(tl.float32)
        high = wide.to(tl.bfloat16)
        rest = wide - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(v, low, acc, input_precision="ieee")
        acc = tl.dot(v, middle, acc, input_precision="ieee")
        return tl.dot(v, high, acc, input_precision="ieee")
    else:
        return tl.dot(v.to(COMPUTE), q.to(COMPUTE), acc, input_precision=PRECISION)


@triton.jit
def tall_times_narrow(
    v_ptr,
    q_ptr,
    z_ptr,
    seed_ptr,
    offs_m,
    rows,
    length,
    piece,
    steps,
    stride_vm,
    stride_vl,
    stride_ql,
    stride_qr,
    index_m,
    index_l,
    threshold,
    R: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COMPUTE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECES: tl.constexpr,
):
    """fp32 [len(offs_m), BLOCK_R] = V[offs_m, piece]·Q[piece, :r], zero beyond r.

    A piece of the reduction is `steps` tiles of BLOCK_L; the last one ends at `length`. ACTIVATION, if not None: Q is
    dH and is multiplied by σ'(Z), Z [length, r] contiguous. DROPOUT: V is masked; its element (m, l) has index
    m·index_m + l·index_l. Both operands are rounded to COMPUTE.
    """
    first = piece * steps * BLOCK_L
    last = tl.minimum(first + steps * BLOCK_L, length)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = offs_m < rows
    mask_r = offs_r < R
    wide_m = offs_m.to(tl.int64)
    wide_l = (first + tl.arange(0, BLOCK_L)).to(tl.int64)
    v_ptrs = v_ptr + wide_m[:, None] * stride_vm + wide_l[None, :] * stride_vl  # [BLOCK_M, BLOCK_L]
    q_ptrs = q_ptr + wide_l[:, None] * stride_ql + offs_r[None, :] * stride_qr  # [BLOCK_L, BLOCK_R]
    acc = tl.zeros((offs_m.shape[0], BLOCK_R), tl.float32)  # [BLOCK_M, BLOCK_R]
    for start in range(first, last, BLOCK_L):
        offs_l = start + tl.arange(0, BLOCK_L)
        mask_l = offs_l < last
        v = tl.load(v_ptrs, mask=mask_m[:, None] & mask_l[None, :], other=0.0)  # [BLOCK_M, BLOCK_L]
        q = tl.load(q_ptrs, mask=mask_l[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_L, BLOCK_R]
        if ACTIVATION is not None:
            z_ptrs = z_ptr + offs_l.to(tl.int64)[:, None] * R + offs_r[None, :]
            z = tl.load(z_ptrs, mask=mask_l[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_L, BLOCK_R]
            q = act_backward(q.to(tl.float32), z, ACTIVATION)
        if DROPOUT:
            index = wide_m[:, None] * index_m + offs_l.to(tl.int64)[None, :] * index_l
            v = kept(v, seed_ptr, index, threshold)
        acc = narrow_dot(v, q, acc, COMPUTE, PRECISION, PIECES)
        v_ptrs += BLOCK_L * tl.cast(stride_vl, tl.int64)
        q_ptrs += BLOCK_L * tl.cast(stride_ql, tl.int64)
    return acc
