"""The token side and its backward on Triton kernels: the composition of the stages.

S = x̃·D            y  = x·Wᵀ + bias + s·S·Uᵀ            x̃ = x ∘ mask / (1 - p) under dropout, else x
dS = s·dy·U        dU = s·dyᵀ·S      dx = dy·W + (dS·Dᵀ) ∘ mask / (1 - p)      dD = x̃ᵀ·dS      dbias = Σ dy

The functions are those of neat_kernels.torch_backend.low_rank, argument for argument.
"""

from __future__ import annotations

from torch import Tensor

from neat_kernels.kernels import launch
from neat_kernels.kernels.apply import apply
from neat_kernels.kernels.branch import Product
from neat_kernels.kernels.dgrad import dgrad
from neat_kernels.kernels.down import down
from neat_kernels.kernels.down_backward import down_backward
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
    dx, ddown = dy.new_empty(0), dy.new_empty(0)
    with launch.on(dy.device):
        S = None if S is None else S.contiguous()
        U = U if needs.dx or needs.ddown is not None else None
        c = branch.compute_dtype or dy.dtype
        product = None
        if needs.dx and (weight is None or gemm_plans(branch.backend)[1] == "cublas"):
            assert D is not None
            product = Product(D, None, 1.0, dy.dtype, seed, branch.dropout)
        dS, dup, dbias, onto = up_backward(dy, U, S, branch.scaling, c, needs.dup, needs.dbias, product)
        if needs.dx and weight is None:
            assert onto is not None
            dx = onto
        elif needs.dx:
            assert weight is not None
            assert D is not None
            assert dS is not None
            dx = dgrad(dy, weight.to(dy.dtype), dS, D, seed, branch.dropout, onto)
        if needs.ddown is not None:
            assert x is not None
            assert dS is not None
            ddown = down_backward(x, dS, seed, branch.dropout, needs.ddown)
    return dx, ddown, dy.new_empty(0) if dup is None else dup, dy.new_empty(0) if dbias is None else dbias
