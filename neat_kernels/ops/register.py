"""How an operator of this package is registered: implementation, fake kernel, autograd, autocast."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_AUTOCAST_KEYS = ("AutocastCPU", "AutocastCUDA", "AutocastXPU", "AutocastMPS")
_LIB = torch.library.Library("neat_kernels", "DEF")

# The implementation of every operator by its bare name.
KERNELS: dict[str, Callable[..., Any]] = {}


@functools.cache
def implementation(stage: str, backend: str) -> ModuleType:
    """The module that runs a stage; the kernels are imported by their first call, since Triton takes a second to."""
    package = "torch_backend" if backend == "torch" else "kernels"
    return importlib.import_module(f"neat_kernels.{package}.{stage}")


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    cast_first: Callable[[Tensor], Tensor] | None = None,
) -> Callable[..., Any]:
    """Define an operator.

    Args:
        schema: name, arguments and returns, without the namespace.
        kernel: the implementation on every device.
        fake: shapes and dtypes of what it returns.
        backward: of ctx and the outputs' gradients, as torch.library.register_autograd takes it; None for an operator
            that cannot be differentiated.
        setup_context: of ctx, inputs and output, which saves what backward needs.
        cast_first: what autocast does with the first argument; the operator itself runs outside autocast.

    Returns:
        The operator.
    """
    name = schema.partition("(")[0]
    KERNELS[name] = kernel
    _LIB.define(schema)
    op = getattr(torch.ops.neat_kernels, name).default
    _LIB.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"neat_kernels::{name}", fake, lib=_LIB)
    _LIB.impl(name, _differentiable(name, op, backward or _refuse_double_backward, setup_context), "Autograd")
    for key in _AUTOCAST_KEYS:
        _LIB.impl(name, _outside_autocast(op, cast_first), key)
    return op


def _differentiable(
    name: str, op: Any, backward: Callable[..., Any], setup_context: Callable[..., None] | None
) -> Callable[..., Any]:
    """The operator's kernel of the key Autograd: that of torch.library.register_autograd, with less Python a call."""

    def forward(ctx: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*inputs)
        if setup_context is not None:
            setup_context(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    node = type(f"NeatKernels_{name}", (torch.autograd.Function,), members)

    def kernel(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
            return node.apply(*inputs)  # type: ignore[attr-defined]
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    return kernel


def in_backward(op: Callable[..., Any], *args: Any) -> Any:
    """op(*args) for the backward of another operator: past the key Autograd, unless a graph of it is asked for."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "double backward through the fused path is not supported; neat_kernels.reference is twice differentiable"
    )


def _outside_autocast(op: Any, cast_first: Callable[[Tensor], Tensor] | None) -> Callable[..., Any]:
    def kernel(first: Tensor, *args: Any) -> Any:
        first = first if cast_first is None else cast_first(first)
        with torch.autocast(first.device.type, enabled=False):
            return op(first, *args)

    return kernel


def as_rows(t: Tensor) -> Tensor:
    """t [..., n] as [M, n]; operators do this themselves, below autograd, which would make nodes of it."""
    return t if t.ndim == 2 else t.reshape(-1, t.shape[-1])


def with_columns(rows: Tensor, like: Tensor) -> Tensor:
    """rows [M, n] as [..., n], with the leading dimensions of `like`."""
    return rows if like.ndim == 2 else rows.view(*like.shape[:-1], rows.shape[1])


def refuse_trainable_weight(op: str) -> None:
    """Raise: W asks for a gradient."""
    raise RuntimeError(
        f"neat_kernels::{op} computes no gradient for the frozen weight: call weight.requires_grad_(False)"
    )
