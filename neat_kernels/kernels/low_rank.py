"""The token side and its backward on Triton kernels: the composition of the stages.

S = x̃·D            y  = x·Wᵀ + bias + s·S·Uᵀ            x̃ = x ∘ mask / (1 - q) under dropout, else x
dS = s·dy·U        dU = s·dyᵀ·S      dx = dy·W + (dS·Dᵀ) ∘ mask / (1 - q)      dD = x̃ᵀ·dS      dbias = Σ dy

The functions are those of neat_kernels.torch_backend.low_rank, argument for argument.
"""

from __future__ import annotations

from torch import Tensor

from neat_kernels.kernels import launch
from neat_kernels.kernels.apply import apply
from neat_kernels.kernels.branch import Product
from neat_kernels.kernels.dgrad import dgrad
from neat_kernels.kernels.down import down
from neat_kernels.kernels.down_backward import down_backward_parts
from neat_kernels.kernels.reduce import Parts
from neat_kernels.kernels.up_backward import up_backward
from neat_kernels.plan import gemm_plans
from neat_kernels.torch_backend.low_rank import Branch, Needs


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, D: Tensor, U: Tensor, seed: Tensor | None, branch: Branch
) -> tuple[Tensor, Tensor]:
    """y [M,N] in x's dtype and S [M,r] in the branch dtype."""
    with launch.on(x.device):
        cublas = gemm_plans(branch.backend)[0] == "cublas"
        product = Product(U, bias, branch.scaling, x.dtype) if cublas else None
        S, y = down(x, D, seed, branch.dropout, branch.compute_dtype or x.dtype, product)
        return apply(x, weight.to(x.dtype), bias, S, U, branch.scaling, y), S


def add(x: Tensor, base: Tensor, D: Tensor, U: Tensor, seed: Tensor | None, branch: Branch) -> tuple[Tensor, Tensor]:
    """base + s·S·Uᵀ [M,N] in base's dtype and S [M,r] in the branch dtype; base is read and left alone."""
    with launch.on(x.device):
        product = Product(U, None, branch.scaling, x.dtype)
        S, y = down(x, D, seed, branch.dropout, branch.compute_dtype or x.dtype, product)
        assert y is not None
        return y.add_(base) if y.dtype == base.dtype else (base + y).to(base.dtype), S


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    D: Tensor | None,
    U: Tensor | None,
    S: Tensor | None,
    seed: Tensor | None,
    branch: Branch,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, ddown, dup and dbias; empty tensors stand for gradients that nobody asked for. No W: dx of the branch."""
    ddown = None
    with launch.on(dy.device):
        dx, parts, dup, dbias = backward_in_parts(dy, x, weight, D, U, S, seed, branch, needs)
        if parts is not None:
            assert needs.ddown is not None
            ddown = parts.total(needs.ddown)
    dx, ddown, dup, dbias = (dy.new_empty(0) if gradient is None else gradient for gradient in (dx, ddown, dup, dbias))
    return dx, ddown, dup, dbias


def backward_in_parts(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    D: Tensor | None,
    U: Tensor | None,
    S: Tensor | None,
    seed: Tensor | None,
    branch: Branch,
    needs: Needs,
) -> tuple[Tensor | None, Parts | None, Tensor | None, Tensor | None]:
    """dx, ddown in partial sums, dup and dbias, None where nobody asked; for a caller inside launch.on(dy.device)."""
    dx, ddown, product = None, None, None
    S = None if S is None else S.contiguous()
    U = U if needs.dx or needs.ddown is not None else None
    c = branch.compute_dtype or dy.dtype
    if needs.dx and (weight is None or gemm_plans(branch.backend)[1] == "cublas"):
        assert D is not None
        product = Product(D, None, 1.0, dy.dtype, seed, branch.dropout)
    dS, dup, dbias, onto = up_backward(dy, U, S, branch.scaling, c, needs.dup, needs.dbias, product)
    if needs.dx and weight is None:
        dx = onto
    elif needs.dx:
        assert weight is not None
        assert D is not None
        assert dS is not None
        dx = dgrad(dy, weight.to(dy.dtype), dS, D, seed, branch.dropout, onto)
    if needs.ddown is not None:
        assert x is not None
        assert dS is not None
        ddown = down_backward_parts(x, dS, seed, branch.dropout)
    return dx, ddown, dup, dbias
