"""A layer under few tokens, where the time is that of reading W: one read of it each way serves both sides.

forward: x·Wᵀ and Z, then g, S and y        backward: dS and dU, dD, then dy·W and dA, then dx

out: V = W has P = x·Wᵀ and Z = Vᵀ·Aᵀ crossed, V = Wᵀ has P = dy·W and dA = (Vᵀ·dZ)ᵀ; in: the same, stacked
The stages, one launch each: small_reads.py reads W, features.py and reduce.py add the partial sums of Z and dA,
small_tokens.py those of S, y and dx; the rest is that of any batch.
"""

import torch
from torch import Tensor

from neat_kernels.kernels import launch
from neat_kernels.kernels.down_backward import down_backward_parts
from neat_kernels.kernels.features import feature_dtype, finish_features
from neat_kernels.kernels.features_backward import through_chain
from neat_kernels.kernels.neat import arrange_gradients
from neat_kernels.kernels.reduce import Parts, Sum, reduce
from neat_kernels.kernels.small_reads import Operands, read_once
from neat_kernels.kernels.small_tokens import down_partial, finish_tokens
from neat_kernels.kernels.up_backward import up_backward
from neat_kernels.torch_backend.low_rank import Branch
from neat_kernels.vocabulary import arrange


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
        D, U = arrange(orientation, H, B)
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
        D, U = arrange(orientation, H, B)
        dD_dtype, dU_dtype = arrange(orientation, Z.dtype, dB_dtype)
        c = branch.compute_dtype or dy.dtype
        S = None if S is None else S.contiguous()
        dS, dU, dbias, _ = up_backward(dy, U, S, branch.scaling, c, dU_dtype, dbias_dtype)
        assert dS is not None
        parts = None
        if dD_dtype is not None:
            assert x is not None
            parts = down_backward_parts(x, dS, seed, branch.dropout)
        dH, dB, left = arrange_gradients(orientation, parts, dU, dB_dtype)
        assert dH is not None
        dchain, of_dchain = None, None
        if chain is None:
            dH = dH.total(Z.dtype) if isinstance(dH, Parts) else dH
            given = Operands(weight.t(), dy, dH, Z, activation, torch.float32, crossed)
        else:
            dZ, shares = through_chain(dH, Z, chain.contiguous(), activation, need_dchain)
            given = Operands(weight.t(), dy, dZ, None, None, torch.float32, crossed)
            if shares is not None:
                dchain = torch.empty_like(chain, memory_format=torch.contiguous_format)
                of_dchain = Sum(shares, dchain)
        P, Q = read_once(given, transposed=True)
        dA = dy.new_empty(Q.shape[1:], dtype=dA_dtype)
        reduce(left, Sum(Q, dA), of_dchain)
        dx = finish_tokens(P, dS, None, D, None, 1.0, dy.dtype, seed, branch.dropout)
    dB, dchain, dbias = (dy.new_empty(0) if gradient is None else gradient for gradient in (dB, dchain, dbias))
    return dx, dA, dB, dchain, dbias
