"""The token side and its backward, in torch operations and the products of gemm.

S = x̃·D            y  = x·Wᵀ + bias + s·S·Uᵀ            x̃ = x ∘ mask / (1 - q) under dropout, else x
dS = s·dy·U        dU = s·dyᵀ·S      dx = dy·W + (dS·Dᵀ) ∘ mask / (1 - q)      dD = x̃ᵀ·dS      dbias = Σ dy

x, dy [M,K], [M,N]; W [N,K]; D [K,r]; U [N,r]. D, U, S and dS are rounded to the branch dtype c (x's unless
compute_dtype says otherwise) before any product over tokens; gradients leave their accumulator in their parameter's
dtype.

Two plans for the base GEMM. Native: the branch is written first, in x's dtype, and torch's GEMM accumulates onto it;
for half tokens on a CPU it is the other way round. In half precision the first of the two is rounded once more than in
the reference. Blocks: where the CPU has no half GEMM, fp32 casts of row blocks, with one rounding at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from neat_kernels.torch_backend.dropout import keep_mask
from neat_kernels.torch_backend.gemm import (
    casts_blocks,
    multiplies_halves,
    row_blocks,
    rows_times,
    rows_times_rounded,
    scaled_,
    transposed,
    transposed_times,
)
from neat_kernels.vocabulary import HALF_DTYPES, wide_dtype

# Tokens whose fp32 casts are alive at once in the blocks plan: enough rows for full GEMM speed, few enough for the
# cache.
_TOKEN_BLOCK = 512


class Branch(NamedTuple):
    """What the token side takes besides tensors: the same values in forward and backward."""

    scaling: float
    dropout: float
    compute_dtype: torch.dtype | None
    backend: str = "torch"


class Needs(NamedTuple):
    """Which gradients to compute; a dtype stands for the parameter that asks."""

    dx: bool
    ddown: torch.dtype | None
    dup: torch.dtype | None
    dbias: torch.dtype | None


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, seed: Tensor | None, branch: Branch
) -> tuple[Tensor, Tensor]:
    """y [M,N] in x's dtype and S [M,r] in the branch dtype."""
    c = branch.compute_dtype or x.dtype
    S = _down(x, down.to(c), seed, branch)
    if casts_blocks(x.device, x.dtype):
        return _apply_in_blocks(x, weight, bias, S, up.to(c), branch.scaling), S
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if c != x.dtype:
        y = torch.nn.functional.linear(x, weight, bias)
        return _add_wide(y, S, up.to(c).t(), branch.scaling), S
    return native(x, weight, bias, S, up.to(c), branch.scaling), S


def native(x: Tensor, weight: Tensor, bias: Tensor | None, S: Tensor, U: Tensor, scaling: float) -> Tensor:
    """y [M,N] where torch multiplies x's dtype, and S and U have it or hold its values in fp32."""
    if x.device.type == "cpu" and x.dtype in HALF_DTYPES:
        y = torch.nn.functional.linear(x, weight, bias)
        if multiplies_halves(x):
            return y.addmm_(S.to(x.dtype), U.to(x.dtype).t(), alpha=scaling)
        return y.copy_(y.float().addmm_(S.float(), U.float().t(), alpha=scaling))
    # alpha inside the product keeps s·S·Uᵀ + bias at one rounding; with beta=0 the zero is never read.
    y = torch.addmm(x.new_zeros(()) if bias is None else bias, S, U.t(), beta=bias is not None, alpha=scaling)
    return y.addmm_(x, weight.t())


def add(
    x: Tensor, base: Tensor, down: Tensor, up: Tensor, seed: Tensor | None, branch: Branch
) -> tuple[Tensor, Tensor]:
    """base + s·S·Uᵀ [M,N] in base's dtype and S [M,r] in the branch dtype; base is read and left alone."""
    c = branch.compute_dtype or x.dtype
    S = _down(x, down.to(c), seed, branch)
    if c == base.dtype and not casts_blocks(x.device, c):
        return torch.addmm(base, S, up.to(c).t(), alpha=branch.scaling), S
    wide = torch.promote_types(wide_dtype(base), c)
    return _add_wide(base.clone(), S.to(wide), up.to(c).to(wide).t(), branch.scaling), S


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    S: Tensor | None,
    seed: Tensor | None,
    branch: Branch,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, ddown, dup and dbias; empty tensors stand for gradients that nobody asked for. No W: dx of the branch."""
    c = branch.compute_dtype or dy.dtype
    wide = wide_dtype(dy)
    dx, ddown, dup, dbias = (dy.new_empty(0) for _ in range(4))
    if needs.dx or needs.ddown is not None:
        assert up is not None
        dS = rows_times_rounded(dy, up.to(c), c, branch.scaling)
    if needs.dx:
        assert down is not None
        if weight is None:
            dx = _branch_dgrad(dS, down.to(c), seed, branch, dy.dtype)
        else:
            dx = _dgrad(dy, weight, dS, down.to(c), seed, branch)
    if needs.ddown is not None:
        assert x is not None
        ddown = transposed(_down_backward(x, dS, seed, branch), needs.ddown)
    if needs.dup is not None:
        assert S is not None
        dup = transposed(scaled_(transposed_times(dy, S, wide), branch.scaling), needs.dup)
    if needs.dbias is not None:
        dbias = dy.sum(0, dtype=wide).to(needs.dbias)
    return dx, ddown, dup, dbias


def _token_blocks(rows: int) -> Iterator[slice]:
    for start in range(0, rows, _TOKEN_BLOCK):
        yield slice(start, min(start + _TOKEN_BLOCK, rows))


def _drop_(t: Tensor, seed: Tensor | None, rows: slice, dropout: float) -> Tensor:
    if seed is None:
        return t
    mask = keep_mask(seed, rows, t.shape[1], dropout)
    return t.mul_(1.0 / (1.0 - dropout)).masked_fill_(mask.logical_not_(), 0.0)


def _down(x: Tensor, D: Tensor, seed: Tensor | None, branch: Branch) -> Tensor:
    if seed is None:
        return rows_times_rounded(x, D, D.dtype)
    wide = wide_dtype(x)
    S = x.new_empty((x.shape[0], D.shape[1]), dtype=D.dtype)
    for rows in _token_blocks(x.shape[0]):
        S[rows] = rows_times(_drop_(x[rows].to(wide, copy=True), seed, rows, branch.dropout), D, wide)
    return S


def _down_backward(x: Tensor, dS: Tensor, seed: Tensor | None, branch: Branch) -> Tensor:
    """dDᵀ [r,K]."""
    wide = wide_dtype(x)
    if seed is None:
        return transposed_times(x, dS, wide)
    dD = x.new_zeros((dS.shape[1], x.shape[1]), dtype=wide)
    for rows in _token_blocks(x.shape[0]):
        dropped = _drop_(x[rows].to(wide, copy=True), seed, rows, branch.dropout)
        dD.add_(transposed_times(dropped, dS[rows], wide))
    return dD


def _dgrad(dy: Tensor, weight: Tensor, dS: Tensor, D: Tensor, seed: Tensor | None, branch: Branch) -> Tensor:
    if casts_blocks(dy.device, dy.dtype):
        return _dgrad_in_blocks(dy, weight, dS, D, seed, branch)
    weight = weight.to(dy.dtype)
    if D.dtype != dy.dtype:
        dx = torch.mm(dy, weight)
        return _add_wide(dx, dS, D.t(), 1.0, seed, branch.dropout)
    if seed is None and dy.device.type == "cpu" and dy.dtype in HALF_DTYPES:
        # oneDNN accumulates few columns onto a product for less than a product onto few columns.
        return torch.mm(dy, weight).addmm_(dS, D.t())
    return _branch_dgrad(dS, D, seed, branch, dy.dtype).addmm_(dy, weight)


def _branch_dgrad(dS: Tensor, D: Tensor, seed: Tensor | None, branch: Branch, dtype: torch.dtype) -> Tensor:
    """(dS·Dᵀ) ∘ mask / (1 - q) [M,K]."""
    dx = torch.mm(dS, D.t())
    for rows in _token_blocks(dx.shape[0]) if seed is not None else ():
        _drop_(dx[rows], seed, rows, branch.dropout)
    return dx.to(dtype)


def _add_wide(
    base: Tensor, P: Tensor, Qt: Tensor, scaling: float, seed: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """base += scaling·P·Qt with the sum in the branch dtype, wider than base, one block of tokens at a time."""
    for rows in _token_blocks(base.shape[0]):
        product = _drop_(torch.mm(P[rows], Qt).mul_(scaling), seed, rows, dropout)
        base[rows] = product.add_(base[rows])
    return base


def _apply_in_blocks(x: Tensor, weight: Tensor, bias: Tensor | None, S: Tensor, U: Tensor, scaling: float) -> Tensor:
    y = x.new_empty((x.shape[0], weight.shape[0]))
    Ut = U.float().t()
    for rows in _token_blocks(x.shape[0]):
        acc = torch.mm(S[rows].float(), Ut).mul_(scaling)
        if bias is not None:
            acc.add_(bias)
        wide_x = x[rows].float()
        for features in row_blocks(weight.shape[0], weight.shape[1], 4):
            acc[:, features].addmm_(wide_x, _cast_block(weight, features, x.dtype).t())
        y[rows] = acc
    return y


def _dgrad_in_blocks(dy: Tensor, weight: Tensor, dS: Tensor, D: Tensor, seed: Tensor | None, branch: Branch) -> Tensor:
    dx = dy.new_empty((dy.shape[0], weight.shape[1]))
    Dt = D.float().t()
    for rows in _token_blocks(dy.shape[0]):
        acc = _drop_(torch.mm(dS[rows].float(), Dt), seed, rows, branch.dropout)
        wide_dy = dy[rows].float()
        for features in row_blocks(weight.shape[0], weight.shape[1], 4):
            acc.addmm_(wide_dy[:, features], _cast_block(weight, features, dy.dtype))
        dx[rows] = acc
    return dx


def _cast_block(weight: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    # Under autocast W is fp32 and is rounded to x's dtype first, as F.linear rounds it.
    return weight[rows].to(dtype).float()
