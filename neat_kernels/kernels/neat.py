"""The backward of a layer on Triton kernels: that of the token side, then that of the features, which adds up dD too.

dD, dU = dH, dB (out) or dB, dH (in)

dU is whole, dD comes in partial sums. For out the kernel of the chain, dH's only reader, adds them on load; for in the
launch that adds the partial sums of dA or of dchain. A launch of their own is what is left where there is neither.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neat_kernels.kernels import launch, low_rank
from neat_kernels.kernels.features_backward import features_backward
from neat_kernels.kernels.reduce import Parts, Sum, reduce
from neat_kernels.torch_backend.low_rank import Branch
from neat_kernels.torch_backend.neat import Wanted
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
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dA, dB, dchain and dbias; empty tensors stand for gradients that nobody asked for."""
    with launch.on(dy.device):
        D, U = arrange(orientation, H, B)
        needs = wanted.of_tokens(orientation, Z)
        dx, parts, dU, dbias = low_rank.backward_in_parts(dy, x, weight, D, U, S, seed, branch, needs)
        dH, dB, left = arrange_gradients(orientation, parts, dU, wanted.dB)
        dA, dchain = None, None
        if wanted.through_features:
            assert dH is not None
            assert Z is not None
            dA, dchain = features_backward(
                dH, weight, Z, chain, orientation, activation, wanted.dA, wanted.dchain, left
            )
        else:
            reduce(left)
    dx, dA, dB, dchain, dbias = (
        dy.new_empty(0) if gradient is None else gradient for gradient in (dx, dA, dB, dchain, dbias)
    )
    return dx, dA, dB, dchain, dbias


def arrange_gradients(
    orientation: str, dD: Parts | None, dU: Tensor | None, dB_dtype: torch.dtype | None
) -> tuple[Tensor | Parts | None, Tensor | None, Sum | None]:
    """dH and dB from the gradients of the factors, and the sum that is left to take for dB; None where nobody asked."""
    if orientation == "out":
        return dD, dU, None
    if dD is None or dB_dtype is None:
        return dU, None, None
    return dU, *dD.into(dB_dtype)
