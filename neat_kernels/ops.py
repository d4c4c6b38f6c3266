"""The operators `neat_kernels::*` of torch.library: schemas, fake kernels, autograd and autocast.

neat_kernels::features           H, Z = g(W·…), Z
neat_kernels::low_rank_linear    y, S = x·Wᵀ + bias + s·S·Uᵀ, x̃·D

Each has a backward operator of its own, so that a compiler sees two calls and no Python. The last argument names the
backend whose functions run; the choice is made above, in plan.py. Nothing is saved but x, S, W itself and r-wide
tensors.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from neat_kernels.torch_backend import features as torch_features
from neat_kernels.torch_backend import low_rank as torch_low_rank
from neat_kernels.torch_backend.low_rank import Branch, Needs
from neat_kernels.vocabulary import autocast_dtype


def _implementation(stage: str, backend: str) -> ModuleType:
    """The module that runs a stage; the kernels are imported by their first call, since Triton takes a second to."""
    if backend == "torch":
        return torch_features if stage == "features" else torch_low_rank
    return importlib.import_module(f"neat_kernels.kernels.{stage}")


_AUTOCAST_KEYS = ("AutocastCPU", "AutocastCUDA", "AutocastXPU", "AutocastMPS")

_LIB = torch.library.Library("neat_kernels", "DEF")
_LIB.define(
    "features(Tensor weight, Tensor A, Tensor? chain, str orientation, str activation, str backend) -> (Tensor, Tensor)"
)
_LIB.define(
    "features_backward(Tensor dH, Tensor? weight, Tensor Z, Tensor? chain, str orientation, str activation, "
    "ScalarType? dA_dtype, bool need_dchain, str backend) -> (Tensor, Tensor)"
)
_LIB.define(
    "low_rank_linear(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up, Tensor? seed, float scaling, "
    "float dropout, ScalarType? compute_dtype, str backend) -> (Tensor, Tensor)"
)
_LIB.define(
    "low_rank_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? down, Tensor? up, Tensor? S, Tensor? seed, "
    "float scaling, float dropout, ScalarType? compute_dtype, bool need_dx, ScalarType? ddown_dtype, "
    "ScalarType? dup_dtype, ScalarType? dbias_dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _features(
    weight: Tensor, A: Tensor, chain: Tensor | None, orientation: str, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    return _implementation("features", backend).forward(weight, A, chain, orientation, activation)


def _features_fake(
    weight: Tensor, A: Tensor, chain: Tensor | None, orientation: str, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    rows = weight.shape[1 if orientation == "out" else 0]
    dtype = torch.float64 if torch.float64 in (weight.dtype, A.dtype) else torch.float32
    return weight.new_empty((rows, A.shape[0]), dtype=dtype), weight.new_empty((rows, A.shape[0]), dtype=dtype)


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
    return _implementation("features", backend).backward(
        dH, weight, Z, chain, orientation, activation, dA_dtype, need_dchain
    )


def _features_backward_fake(
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
    dA = Z.new_empty(0)
    if dA_dtype is not None:
        assert weight is not None
        dA = Z.new_empty((Z.shape[1], weight.shape[0 if orientation == "out" else 1]), dtype=dA_dtype)
    need_dchain = need_dchain and chain is not None
    return dA, torch.empty_like(chain) if need_dchain and chain is not None else Z.new_empty(0)


def _low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    compute_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _implementation("low_rank", backend).forward(
        x, weight, bias, down, up, seed, Branch(scaling, dropout, compute_dtype, backend)
    )


def _low_rank_linear_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    compute_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    S = x.new_empty((x.shape[0], down.shape[1]), dtype=compute_dtype or x.dtype)
    return x.new_empty((x.shape[0], weight.shape[0])), S


def _low_rank_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    S: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    compute_dtype: torch.dtype | None,
    need_dx: bool,
    ddown_dtype: torch.dtype | None,
    dup_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    branch = Branch(scaling, dropout, compute_dtype, backend)
    needs = Needs(need_dx, ddown_dtype, dup_dtype, dbias_dtype)
    return _implementation("low_rank", backend).backward(dy, x, weight, down, up, S, seed, branch, needs)


def _low_rank_linear_backward_fake(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    S: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    compute_dtype: torch.dtype | None,
    need_dx: bool,
    ddown_dtype: torch.dtype | None,
    dup_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, ddown, dup, dbias = (dy.new_empty(0) for _ in range(4))
    if need_dx:
        assert weight is not None
        dx = dy.new_empty((dy.shape[0], weight.shape[1]))
    if ddown_dtype is not None:
        assert x is not None
        assert up is not None
        ddown = dy.new_empty((x.shape[1], up.shape[1]), dtype=ddown_dtype)
    if dup_dtype is not None:
        assert S is not None
        dup = dy.new_empty((dy.shape[1], S.shape[1]), dtype=dup_dtype)
    if dbias_dtype is not None:
        dbias = dy.new_empty((dy.shape[1],), dtype=dbias_dtype)
    return dx, ddown, dup, dbias


def _refuse_trainable_weight(op: str) -> None:
    raise RuntimeError(
        f"neat_kernels::{op} computes no gradient for the frozen weight: call weight.requires_grad_(False)"
    )


def _features_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weight, A, chain, ctx.orientation, ctx.activation, ctx.backend = inputs
    if ctx.needs_input_grad[0]:
        _refuse_trainable_weight("features")
    Z = output[1]
    ctx.mark_non_differentiable(Z)
    ctx.set_materialize_grads(False)
    ctx.dA_dtype = A.dtype if ctx.needs_input_grad[1] else None
    ctx.save_for_backward(weight if ctx.dA_dtype is not None else None, Z, chain)


def _features_autograd(ctx: Any, dH: Tensor | None, dZ: None) -> tuple[Tensor | None, ...]:
    if dH is None:
        return (None,) * 6
    weight, Z, chain = ctx.saved_tensors
    need_dchain = ctx.needs_input_grad[2]
    dA, dchain = torch.ops.neat_kernels.features_backward(
        dH, weight, Z, chain, ctx.orientation, ctx.activation, ctx.dA_dtype, need_dchain, ctx.backend
    )
    return None, dA if ctx.dA_dtype is not None else None, dchain if need_dchain else None, None, None, None


def _low_rank_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, down, up, seed, *ctx.branch, ctx.backend = inputs
    need_dx, need_dweight, need_dbias, need_ddown, need_dup = ctx.needs_input_grad[:5]
    if need_dweight:
        _refuse_trainable_weight("low_rank_linear")
    S = output[1]
    ctx.mark_non_differentiable(S)
    ctx.set_materialize_grads(False)
    ctx.needs = (
        need_dx,
        down.dtype if need_ddown else None,
        up.dtype if need_dup else None,
        bias.dtype if need_dbias else None,
    )
    ctx.save_for_backward(
        x if need_ddown else None,
        weight if need_dx else None,
        down if need_dx else None,
        up if need_dx or need_ddown else None,
        S if need_dup else None,
        seed,
    )


def _low_rank_linear_autograd(ctx: Any, dy: Tensor | None, dS: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    dx, ddown, dup, dbias = torch.ops.neat_kernels.low_rank_linear_backward(
        dy, *ctx.saved_tensors, *ctx.branch, *ctx.needs, ctx.backend
    )
    need_dx, need_ddown, need_dup, need_dbias = ctx.needs
    return (
        dx if need_dx else None,
        None,
        dbias if need_dbias is not None else None,
        ddown if need_ddown is not None else None,
        dup if need_dup is not None else None,
        *(None,) * 5,
    )


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "double backward through the fused path is not supported; neat_kernels.reference is twice differentiable"
    )


def _outside_autocast(name: str) -> Any:
    def kernel(first: Tensor, *args: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return getattr(torch.ops.neat_kernels, name)(first, *args)

    return kernel


def _low_rank_linear_autocast(x: Tensor, *args: Any) -> Any:
    # Only x is cast here: W is cast inside the operator, so that autograd saves W itself and no copy of it.
    return _outside_autocast("low_rank_linear")(x.to(autocast_dtype(x)), *args)


def _register(
    name: str, kernel: Any, fake: Any, backward: Any, setup_context: Any = None, autocast: Any = None
) -> None:
    _LIB.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"neat_kernels::{name}", fake, lib=_LIB)
    torch.library.register_autograd(f"neat_kernels::{name}", backward, setup_context=setup_context, lib=_LIB)
    for key in _AUTOCAST_KEYS:
        _LIB.impl(name, autocast or _outside_autocast(name), key)


_register("features", _features, _features_fake, _features_autograd, _features_setup)
_register("features_backward", _features_backward, _features_backward_fake, _refuse_double_backward)
_register(
    "low_rank_linear",
    _low_rank_linear,
    _low_rank_linear_fake,
    _low_rank_linear_autograd,
    _low_rank_linear_setup,
    _low_rank_linear_autocast,
)
_register(
    "low_rank_linear_backward", _low_rank_linear_backward, _low_rank_linear_backward_fake, _refuse_double_backward
)
