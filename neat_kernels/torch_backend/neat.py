"""The backward of a layer: that of the token side, then that of the features.

dD, dU = dH, dB (out) or dB, dH (in)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from neat_kernels.torch_backend import features, low_rank
from neat_kernels.torch_backend.low_rank import Branch, Needs
from neat_kernels.vocabulary import arrange


class Wanted(NamedTuple):
    """Which gradients of a layer to compute; a dtype stands for the parameter that asks."""

    dx: bool
    dA: torch.dtype | None
    dB: torch.dtype | None
    dchain: bool
    dbias: torch.dtype | None

    @property
    def through_features(self) -> bool:
        """Whether the gradient of H is needed."""
        return self.dA is not None or self.dchain

    def of_tokens(self, orientation: str, Z: Tensor | None) -> Needs:
        """What the token side has to compute; the gradient of H in Z's dtype."""
        of_H = Z.dtype if self.through_features and Z is not None else None
        return Needs(self.dx, *arrange(orientation, of_H, self.dB), self.dbias)


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
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dA, dB, dchain and dbias; empty tensors stand for gradients that nobody asked for."""
    D, U = arrange(orientation, H, B)
    needs = wanted.of_tokens(orientation, Z)
    dx, dD, dU, dbias = low_rank.backward(dy, x, weight, D, U, S, seed, branch, needs)
    dH, dB = arrange(orientation, dD, dU)
    dA, dchain = dy.new_empty(0), dy.new_empty(0)
    if wanted.through_features:
        assert Z is not None
        dA, dchain = features.backward(dH, weight, Z, chain, orientation, activation, wanted.dA, wanted.dchain)
    return dx, dA, dB, dchain, dbias
