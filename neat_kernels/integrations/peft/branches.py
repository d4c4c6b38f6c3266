"""The fused forward of a layer of PEFT: its adapters as low-rank branches over a base layer.

y = x·Wᵀ + bias + Σ_a s_a·(x̃·D_a)·U_aᵀ

Several adapters without dropout are one branch: D = [D_1, D_2, …], U = [s_1·U_1, s_2·U_2, …].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neat_kernels import functional
from neat_kernels.integrations.peft.bases import is_only_called, packed_weight, plain_weight
from neat_kernels.integrations.peft.packed_features import packed_features
from neat_kernels.vocabulary import HALF_DTYPES, arrange, autocast_dtype


class Branch(NamedTuple):
    """s·(x̃·D)·Uᵀ: D [K,r], U [N,r], s, and the probability of dropping an element of x."""

    down: Tensor
    up: Tensor
    scaling: float
    dropout: float

    def scaled_up(self) -> Tensor:
        """s·U."""
        return self.up if self.scaling == 1.0 else self.up * self.scaling


class Network(NamedTuple):
    """One Neat adapter of a layer.

    Args:
        A: [r,N] (out) or [r,K] (in).
        B: [N,r] (out) or [K,r] (in).
        encoders: p tensors [r,r].
        decoders: p tensors [r,r].
        orientation: "out" or "in".
        activation: σ.
        scaling: s.
        dropout: probability in [0, 1).
    """

    A: Tensor
    B: Tensor
    encoders: tuple[Tensor, ...]
    decoders: tuple[Tensor, ...]
    orientation: str
    activation: str
    scaling: float
    dropout: float = 0.0

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Every tensor of the adapter."""
        return self.A, self.B, *self.encoders, *self.decoders

    @property
    def shape(self) -> dict[str, Any]:
        """What the features need besides W and A."""
        return {
            "encoders": self.encoders,
            "decoders": self.decoders,
            "orientation": self.orientation,
            "activation": self.activation,
        }

    def branch(self, features: Tensor) -> Branch:
        """The adapter as a branch, given H."""
        return Branch(*arrange(self.orientation, features, self.B), self.scaling, self.dropout)


class Settings(NamedTuple):
    """How the fused path computes.

    Args:
        compute_dtype: dtype of the branch over half inputs; None is the input's, torch.float32 is PEFT's own.
        backend: "auto", "torch" or "triton".
    """

    compute_dtype: torch.dtype | None = None
    backend: str = "auto"

    def for_tokens(self, x: Tensor) -> dict[str, Any]:
        """The keywords of the token side."""
        half = autocast_dtype(x) in HALF_DTYPES
        return {"compute_dtype": self.compute_dtype if half else None, "backend": self.backend}


class Route(NamedTuple):
    """How a layer reaches its base: `weight` where x·Wᵀ is part of the operator, else the base is called.

    Args:
        base: the layer that holds W.
        features: H of a network.
        weight: W [N,K]; None where the base must be called.
        bias: the base's.
        why: why it must be called, in words.
    """

    base: nn.Module
    features: Callable[[Network], Tensor]
    weight: Tensor | None
    bias: Tensor | None
    why: str = ""


def route(layer: Any, settings: Settings) -> Route | str:
    """The way to the base of a layer of PEFT, or why there is none but PEFT's own."""
    base: nn.Module = layer.get_base_layer()
    weight = plain_weight(base)
    if weight is not None:

        def features(network: Network) -> Tensor:
            return functional.neat_features(weight, network.A, **network.shape, backend=settings.backend)

        if base is not layer.base_layer:
            return Route(base, features, None, None, "another adapter lies between")
        if is_only_called(base):
            return Route(base, features, None, None, "hooks hang on it")
        return Route(base, features, weight, base.bias)
    packed = packed_weight(base)
    if packed is not None:
        read = "dequantised whole" if packed.whole else "dequantised in row blocks"
        return Route(base, lambda n: packed_features(base, n.A, **n.shape), None, None, f"{packed.kind}, {read}")
    return _obstacle(base)


def _obstacle(base: nn.Module) -> str:
    weight = getattr(base, "weight", None)
    if isinstance(weight, Tensor) and weight.requires_grad:
        return "its base weight is trained"
    if isinstance(weight, Tensor) and weight.is_meta:
        return "its base weight is on the meta device"
    return f"{type(base).__name__} with a weight of type {type(weight).__name__} is no base that can be fused"


def run_network(way: Route, x: Tensor, network: Network, settings: Settings, training: bool) -> Tensor:
    """y of one Neat adapter over a W that is part of the operator, features and tokens in one call."""
    assert way.weight is not None
    return functional.neat_linear(
        x,
        way.weight,
        network.A,
        network.B,
        way.bias,
        **network.shape,
        scaling=network.scaling,
        dropout=network.dropout,
        training=training,
        **settings.for_tokens(x),
    )


def run_branches(
    way: Route, x: Tensor, base: Tensor | None, branches: Sequence[Branch], settings: Settings, training: bool
) -> Tensor:
    """y of any number of branches, at least one.

    Args:
        way: how the layer reaches its base.
        x: tokens.
        base: what the base layer has made of x; None where x·Wᵀ is part of the operator.
        branches: what is added.
        settings: how it is computed.
        training: whether dropout is active.
    """
    if len(branches) > 1 and not (training and any(branch.dropout for branch in branches)):
        down = torch.cat([branch.down for branch in branches], dim=1)
        branches = [Branch(down, torch.cat([branch.scaled_up() for branch in branches], dim=1), 1.0, 0.0)]
    y = base
    for down, up, scaling, dropout in branches:
        options = {"scaling": scaling, "dropout": dropout, "training": training, **settings.for_tokens(x)}
        if y is None:
            assert way.weight is not None
            y = functional.low_rank_linear(x, way.weight, down, up, way.bias, **options)
        else:
            y = functional.low_rank_add(x, y, down, up, **options)
    assert y is not None
    return y
