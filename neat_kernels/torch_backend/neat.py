"""The backward of a layer: that of the token side, then that of the features.

dD, dU = dH, dB (out) or dB, dH (in)
"""

from __future__ import annotations

import torch
from torch import Tensor

from neat_kernels.torch_backend import features, low_rank
from neat_kernels.torch_backend.low_rank import Branch, Needs
from neat_kernels.vocabulary import arrange


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    B: Tensor | None,
    chain: Tensor | None,
    S: Tensor | None,
    H: Tensor | None,
    Z: Tensor | None,
    seed: Tensor | None,
    orientation: str,
    activation: str,
    branch: Branch,
    need_dx: bool,
    dA_dtype: torch.dtype | None,
    dB_dtype: torch.dtype | None,
    need_dchain: bool,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dA, dB, dchain and dbias; empty tensors stand for gradients that nobody asked for."""
    through_features = dA_dtype is not None or need_dchain
    D, U = arrange(orientation, H, B)
    of_factors = arrange(orientation, Z.dtype if through_features and Z is not None else None, dB_dtype)
    needs = Needs(need_dx, *of_factors, dbias_dtype)
    dx, dD, dU, dbias = low_rank.backward(dy, x, weight, D, U, S, seed, branch, needs)
    dH, dB = arrange(orientation, dD, dU)
    dA, dchain = dy.new_empty(0), dy.new_empty(0)
    if through_features:
        assert Z is not None
        dA, dchain = features.backward(dH, weight, Z, chain, orientation, activation, dA_dtype, need_dchain)
    return dx, dA, dB, dchain, dbias
