"""Features of the frozen weight and their backward, in torch operations and the products of gemm.

out:  Z = Wᵀ·Aᵀ [K,r]      in:  Z = W·Aᵀ [N,r]      H = g(Z)
g:    h = σ(Z); p encoders: res_i = h, h = σ(h·E_iᵀ); p decoders: h = σ(h·D_iᵀ) + res_{p-1-i}
backward:  dZ through g;  dA = (W·dZ)ᵀ (out) or dZᵀ·W (in)

Z, H, dZ and every product are fp32 (float64 in float64). W is read once in each direction, in blocks if it is half.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neat_kernels.torch_backend.activations import Activation, activation
from neat_kernels.torch_backend.gemm import ieee_fp32, rows_times, transposed, transposed_times
from neat_kernels.vocabulary import wide_dtype


def forward(
    weight: Tensor, A: Tensor, chain: Tensor | None, orientation: str, activation_name: str
) -> tuple[Tensor, Tensor]:
    """H and Z, both contiguous [K,r] (out) or [N,r] (in), from W [N,K], A [r,N] or [r,K], chain [2p,r,r]."""
    wide = wide_dtype(weight, A)
    with ieee_fp32(weight.device):
        if orientation == "out":
            Z = transposed(transposed_times(weight, A.t(), wide), wide)
        else:
            Z = rows_times(weight, A.t(), wide)
    return network(Z, chain, activation_name), Z


def network(Z: Tensor, chain: Tensor | None, activation_name: str) -> Tensor:
    """H = g(Z) in Z's dtype."""
    with ieee_fp32(Z.device):
        return _chain_forward(Z, _wide_chain(chain, Z.dtype), activation(activation_name))[-1]


def network_backward(
    dH: Tensor, Z: Tensor, chain: Tensor | None, activation_name: str, need_dchain: bool
) -> tuple[Tensor, Tensor]:
    """dZ in Z's dtype and dchain [2p,r,r] in the chain's, empty where it is not needed."""
    with ieee_fp32(Z.device):
        dZ, dchain = _chain_backward(
            dH.to(Z.dtype), Z, _wide_chain(chain, Z.dtype), activation(activation_name), need_dchain
        )
    return dZ, Z.new_empty(0) if chain is None or not need_dchain else dchain.to(chain.dtype)


def backward(
    dH: Tensor,
    weight: Tensor | None,
    Z: Tensor,
    chain: Tensor | None,
    orientation: str,
    activation_name: str,
    dA_dtype: torch.dtype | None,
    need_dchain: bool,
) -> tuple[Tensor, Tensor]:
    """dA [r,N] or [r,K] and dchain [2p,r,r], each in its parameter's dtype; empty where it is not needed."""
    dZ, dchain = network_backward(dH, Z, chain, activation_name, need_dchain)
    dA = Z.new_empty(0)
    if dA_dtype is not None:
        assert weight is not None
        with ieee_fp32(Z.device):
            if orientation == "out":
                dA = transposed(rows_times(weight, dZ, Z.dtype), dA_dtype)
            else:
                dA = transposed_times(weight, dZ, Z.dtype).to(dA_dtype)
    return dA, dchain


def _wide_chain(chain: Tensor | None, wide: torch.dtype) -> list[Tensor]:
    return [] if chain is None else list(chain.to(wide))


def _chain_forward(Z: Tensor, chain: list[Tensor], act: Activation) -> list[Tensor]:
    """Every h from σ(Z) to H: 1 + 2p tensors; the first p are the residuals of the nested skips."""
    trace = [act.forward(Z)]
    depth = len(chain) // 2
    for E in chain[:depth]:
        trace.append(act.forward(trace[-1] @ E.t()))
    for i, D in enumerate(chain[depth:]):
        trace.append(act.forward(trace[-1] @ D.t()).add_(trace[depth - 1 - i]))
    return trace


def _chain_backward(
    dH: Tensor, Z: Tensor, chain: list[Tensor], act: Activation, need_dchain: bool
) -> tuple[Tensor, Tensor]:
    depth = len(chain) // 2
    trace = _chain_forward(Z, chain, act) if chain else []
    dchain: list[Tensor] = []
    dres: list[Tensor] = []
    dh = dH
    for i in reversed(range(2 * depth)):
        if i >= depth:
            dres.append(dh)
        da = act.backward(dh, trace[i] @ chain[i].t())
        if need_dchain:
            dchain.append(da.t() @ trace[i])
        dh = da @ chain[i]
        if i < depth:
            dh = dh.add_(dres[i])
    return act.backward(dh, Z), torch.stack(dchain[::-1]) if dchain else Z.new_empty(0)
