"""neat_kernels::features: H, Z = g(W·…), Z, with its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neat_kernels.ops.register import implementation, in_backward, refuse_trainable_weight, register


def _features(
    weight: Tensor, A: Tensor, chain: Tensor | None, orientation: str, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    return implementation("features", backend).forward(weight, A, chain, orientation, activation)


def fake_features(weight: Tensor, A: Tensor, orientation: str) -> tuple[Tensor, Tensor]:
    """H and Z."""
    rows = weight.shape[1 if orientation == "out" else 0]
    dtype = torch.float64 if torch.float64 in (weight.dtype, A.dtype) else torch.float32
    return weight.new_empty((rows, A.shape[0]), dtype=dtype), weight.new_empty((rows, A.shape[0]), dtype=dtype)


def _fake(
    weight: Tensor, A: Tensor, chain: Tensor | None, orientation: str, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    return fake_features(weight, A, orientation)


def _features_backward(
    dH: Tensor,
    weight: Tensor | None,
    Z: Tensor,
    chain: Tensor | None,
    orientation: str,
    activation: str,
    dA_dtype: torch.dtype | None,
    need_dchain: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return implementation("features", backend).backward(
        dH, weight, Z, chain, orientation, activation, dA_dtype, need_dchain
    )


def fake_features_backward(
    weight: Tensor | None,
    Z: Tensor,
    chain: Tensor | None,
    orientation: str,
    dA_dtype: torch.dtype | None,
    need_dchain: bool,
) -> tuple[Tensor, Tensor]:
    """dA and dchain, empty where nobody asked for them."""
    dA = Z.new_empty(0)
    if dA_dtype is not None:
        assert weight is not None
        dA = Z.new_empty((Z.shape[1], weight.shape[0 if orientation == "out" else 1]), dtype=dA_dtype)
    return dA, torch.empty_like(chain) if need_dchain and chain is not None else Z.new_empty(0)


def _fake_backward(
    dH: Tensor,
    weight: Tensor | None,
    Z: Tensor,
    chain: Tensor | None,
    orientation: str,
    activation: str,
    dA_dtype: torch.dtype | None,
    need_dchain: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return fake_features_backward(weight, Z, chain, orientation, dA_dtype, need_dchain)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weight, A, chain, *ctx.options = inputs
    if ctx.needs_input_grad[0]:
        refuse_trainable_weight("features")
    Z = output[1]
    ctx.mark_non_differentiable(Z)
    ctx.set_materialize_grads(False)
    ctx.dA_dtype = A.dtype if ctx.needs_input_grad[1] else None
    ctx.save_for_backward(weight if ctx.dA_dtype is not None else None, Z, chain)


def _backward(ctx: Any, dH: Tensor | None, dZ: None) -> tuple[Tensor | None, ...]:
    if dH is None:
        return (None,) * 6
    orientation, activation, backend = ctx.options
    need_dchain = ctx.needs_input_grad[2]
    dA, dchain = in_backward(
        _BACKWARD, dH, *ctx.saved_tensors, orientation, activation, ctx.dA_dtype, need_dchain, backend
    )
    return None, dA if ctx.dA_dtype is not None else None, dchain if need_dchain else None, None, None, None


_BACKWARD = register(
    "features_backward(Tensor dH, Tensor? weight, Tensor Z, Tensor? chain, str orientation, str activation, "
    "ScalarType? dA_dtype, bool need_dchain, str backend) -> (Tensor, Tensor)",
    _features_backward,
    _fake_backward,
)
FEATURES = register(
    "features(Tensor weight, Tensor A, Tensor? chain, str orientation, str activation, str backend) "
    "-> (Tensor, Tensor)",
    _features,
    _fake,
    _backward,
    _setup,
)
