"""Features of a quantised W and their backward, from row blocks that are dequantised once in each direction.

out:  Z = Wᵀ·Aᵀ = Σ_b W_bᵀ·A_bᵀ      dA_b = (W_b·dZ)ᵀ
in:   Z_b = W_b·Aᵀ                   dA = Σ_b dZ_bᵀ·W_b
H = g(Z) and dZ are those of neat_kernels.torch_backend.features. Of W's size there is one block at a time, in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neat_kernels.integrations.peft.bases import Packed, packed_weight
from neat_kernels.torch_backend.features import network, network_backward
from neat_kernels.torch_backend.gemm import ieee_fp32


def packed_features(
    base: nn.Module,
    A: Tensor,
    encoders: Sequence[Tensor],
    decoders: Sequence[Tensor],
    orientation: str,
    activation: str,
) -> Tensor:
    """H = g(Wᵀ·Aᵀ) [K,r] (out) or g(W·Aᵀ) [N,r] (in) in float32, of a quantised W.

    Args:
        base: a layer whose W [N,K] `packed_weight` knows.
        A: [r,N] (out) or [r,K] (in), any float dtype.
        encoders: p tensors [r,r].
        decoders: p tensors [r,r].
        orientation: "out" or "in".
        activation: σ.

    Raises:
        ValueError: A does not fit W.
    """
    shape = _packed(base).shape
    columns = shape[0 if orientation == "out" else 1]
    if A.ndim != 2 or A.shape[1] != columns:
        raise ValueError(f"A must be [r, {columns}] for a weight {shape}, got {tuple(A.shape)}")
    chain = torch.stack((*encoders, *decoders)) if encoders else None
    with torch.autocast(A.device.type, enabled=False):
        return _PackedFeatures.apply(A, chain, base, orientation, activation)


def _packed(base: nn.Module) -> Packed:
    packed = packed_weight(base)
    if packed is None:
        raise ValueError(f"expected a layer with a quantised weight of a known kind, got {type(base).__name__}")
    return packed


class _PackedFeatures(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, A: Tensor, chain: Tensor | None, base: nn.Module, orientation: str, activation: str
    ) -> Tensor:
        packed, wide = _packed(base), A.float()
        N, K = packed.shape
        with ieee_fp32(A.device):
            if orientation == "out":
                Z = wide.new_zeros((K, A.shape[0]))
                for rows, W in packed.blocks():
                    Z.addmm_(W.float().t(), wide[:, rows].t())
            else:
                Z = wide.new_empty((N, A.shape[0]))
                for rows, W in packed.blocks():
                    torch.mm(W.float(), wide.t(), out=Z[rows])
        ctx.save_for_backward(Z, chain)
        # The layer and not what was read of it: its scales, unpacked, would be kept until backward.
        ctx.given = base, orientation, activation, A.dtype
        return network(Z, chain, activation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dH: Tensor) -> tuple[Tensor | None, ...]:
        Z, chain = ctx.saved_tensors
        base, orientation, activation, dtype = ctx.given
        need_dA, need_dchain = ctx.needs_input_grad[:2]
        with torch.autocast(Z.device.type, enabled=False):
            dZ, dchain = network_backward(dH, Z, chain, activation, need_dchain)
            dA = _gradient_of_A(_packed(base), dZ, orientation).to(dtype) if need_dA else None
        return dA, dchain if need_dchain else None, None, None, None


def _gradient_of_A(packed: Packed, dZ: Tensor, orientation: str) -> Tensor:
    N, K = packed.shape
    with ieee_fp32(dZ.device):
        if orientation == "out":
            dA = dZ.new_empty((dZ.shape[1], N))
            for rows, W in packed.blocks():
                dA[:, rows] = (W.float() @ dZ).t()
            return dA
        dA = dZ.new_zeros((dZ.shape[1], K))
        for rows, W in packed.blocks():
            dA.addmm_(dZ[rows].t(), W.float())
        return dA
