"""The activations of the feature network and their derivatives.

h = σ(z)    dz = dh ∘ σ'(z)

Written out by hand because they run below autograd, inside the operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_TWO_PI = 2.0 * math.pi


class Activation(NamedTuple):
    """A pair h = forward(z) and dz = backward(dh, z); the forward never returns its argument itself."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _angle(z: Tensor) -> Tensor:
    # z - rint(z) is exact in floating point, so sin2pi stays right for |z| in the thousands, where 2πz would round.
    return (z - z.round()).mul_(_TWO_PI)


def _tanh_backward(dh: Tensor, z: Tensor) -> Tensor:
    return torch.ops.aten.tanh_backward(dh, z.tanh())


def _sigmoid_backward(dh: Tensor, z: Tensor) -> Tensor:
    return torch.ops.aten.sigmoid_backward(dh, z.sigmoid())


def _relu_backward(dh: Tensor, z: Tensor) -> Tensor:
    # Zero at NaN, as in the kernels. A choice between two tensors is several times slower on a CPU.
    return torch.ops.aten.threshold_backward(dh, z.nan_to_num(), 0)


_TABLE: dict[str, Activation] = {
    "relu": Activation(torch.relu, _relu_backward),
    "sin2pi": Activation(lambda z: _angle(z).sin_(), lambda dh, z: _angle(z).cos_().mul_(_TWO_PI).mul_(dh)),
    "sin": Activation(torch.sin, lambda dh, z: z.cos().mul_(dh)),
    "gelu": Activation(F.gelu, lambda dh, z: torch.ops.aten.gelu_backward(dh, z)),
    "gelu_tanh": Activation(
        lambda z: F.gelu(z, approximate="tanh"),
        lambda dh, z: torch.ops.aten.gelu_backward(dh, z, approximate="tanh"),
    ),
    "silu": Activation(F.silu, lambda dh, z: torch.ops.aten.silu_backward(dh, z)),
    "tanh": Activation(torch.tanh, _tanh_backward),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_backward),
    "identity": Activation(torch.clone, lambda dh, z: dh),
}


def activation(name: str) -> Activation:
    """Look up an activation by its public name."""
    return _TABLE[name]
