"""neat_kernels::low_rank_linear: y, S = x·Wᵀ + bias + s·S·Uᵀ, x̃·D, with its backward.

neat_kernels::low_rank_add is the branch alone, onto what another layer has made of x: y, S = base + s·S·Uᵀ, x̃·D.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from neat_kernels.ops.register import (
    as_rows,
    implementation,
    in_backward,
    refuse_trainable_weight,
    register,
    with_columns,
)
from neat_kernels.torch_backend.low_rank import Branch, Needs
from neat_kernels.vocabulary import autocast_dtype


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
    branch = Branch(scaling, dropout, compute_dtype, backend)
    y, S = implementation("low_rank", backend).forward(as_rows(x), weight, bias, down, up, seed, branch)
    return with_columns(y, x), S


def fake_tokens(x: Tensor, weight: Tensor, r: int, compute_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """y and S."""
    leading = x.shape[:-1]
    # torch.Size.numel() would make a constant of a symbolic size.
    S = x.new_empty((math.prod(leading), r), dtype=compute_dtype or x.dtype)
    return x.new_empty((*leading, weight.shape[0])), S


def _fake(
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
    return fake_tokens(x, weight, down.shape[1], compute_dtype)


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
    rows = None if x is None else as_rows(x)
    dx, ddown, dup, dbias = implementation("low_rank", backend).backward(
        as_rows(dy), rows, weight, down, up, S, seed, branch, needs
    )
    return with_columns(dx, dy) if need_dx else dx, ddown, dup, dbias


def _fake_backward(
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
        assert down is not None
        dx = dy.new_empty((*dy.shape[:-1], down.shape[0]))
    if ddown_dtype is not None:
        assert x is not None
        assert up is not None
        ddown = dy.new_empty((x.shape[-1], up.shape[1]), dtype=ddown_dtype)
    if dup_dtype is not None:
        assert S is not None
        dup = dy.new_empty((dy.shape[-1], S.shape[1]), dtype=dup_dtype)
    if dbias_dtype is not None:
        dbias = dy.new_empty((dy.shape[-1],), dtype=dbias_dtype)
    return dx, ddown, dup, dbias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, down, up, seed, *ctx.branch, ctx.backend = inputs
    need_dx, need_dweight, need_dbias, need_ddown, need_dup = ctx.needs_input_grad[:5]
    if need_dweight:
        refuse_trainable_weight("low_rank_linear")
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


def _backward(ctx: Any, dy: Tensor | None, dS: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    dx, ddown, dup, dbias = in_backward(_BACKWARD, dy, *ctx.saved_tensors, *ctx.branch, *ctx.needs, ctx.backend)
    need_dx, need_ddown, need_dup, need_dbias = ctx.needs
    return (
        dx if need_dx else None,
        None,
        dbias if need_dbias is not None else None,
        ddown if need_ddown is not None else None,
        dup if need_dup is not None else None,
        *(None,) * 5,
    )


def _low_rank_add(
    x: Tensor,
    base: Tensor,
    down: Tensor,
    up: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    compute_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    branch = Branch(scaling, dropout, compute_dtype, backend)
    y, S = implementation("low_rank", backend).add(as_rows(x), as_rows(base), down, up, seed, branch)
    return with_columns(y, base), S


def _fake_add(
    x: Tensor,
    base: Tensor,
    down: Tensor,
    up: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    compute_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    S = x.new_empty((math.prod(x.shape[:-1]), down.shape[1]), dtype=compute_dtype or x.dtype)
    return base.new_empty(base.shape), S


def _setup_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, down, up, seed, *ctx.branch, ctx.backend = inputs
    need_dx, _, need_ddown, need_dup = ctx.needs_input_grad[:4]
    S = output[1]
    ctx.mark_non_differentiable(S)
    ctx.set_materialize_grads(False)
    ctx.dtype = x.dtype
    ctx.needs = need_dx, down.dtype if need_ddown else None, up.dtype if need_dup else None
    ctx.save_for_backward(
        x if need_ddown else None,
        down if need_dx else None,
        up if need_dx or need_ddown else None,
        S if need_dup else None,
        seed,
    )


def _add_backward(ctx: Any, dy: Tensor | None, dS: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    need_dx, ddown_dtype, dup_dtype = ctx.needs
    dx, ddown, dup = None, None, None
    if need_dx or ddown_dtype is not None or dup_dtype is not None:
        x, down, up, S, seed = ctx.saved_tensors
        dx, ddown, dup, _ = in_backward(
            _BACKWARD, dy.to(ctx.dtype), x, None, down, up, S, seed, *ctx.branch, *ctx.needs, None, ctx.backend
        )
    return (
        dx if need_dx else None,
        dy if ctx.needs_input_grad[1] else None,
        ddown if ddown_dtype is not None else None,
        dup if dup_dtype is not None else None,
        *(None,) * 5,
    )


def cast_tokens(x: Tensor) -> Tensor:
    """x as autocast wants it: W is cast inside the operator, so that autograd saves W itself and no copy of it."""
    return x.to(autocast_dtype(x))


_BACKWARD = register(
    "low_rank_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? down, Tensor? up, Tensor? S, Tensor? seed, "
    "float scaling, float dropout, ScalarType? compute_dtype, bool need_dx, ScalarType? ddown_dtype, "
    "ScalarType? dup_dtype, ScalarType? dbias_dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _low_rank_linear_backward,
    _fake_backward,
)
LOW_RANK_LINEAR = register(
    "low_rank_linear(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up, Tensor? seed, float scaling, "
    "float dropout, ScalarType? compute_dtype, str backend) -> (Tensor, Tensor)",
    _low_rank_linear,
    _fake,
    _backward,
    _setup,
    cast_tokens,
)
LOW_RANK_ADD = register(
    "low_rank_add(Tensor x, Tensor base, Tensor down, Tensor up, Tensor? seed, float scaling, float dropout, "
    "ScalarType? compute_dtype, str backend) -> (Tensor, Tensor)",
    _low_rank_add,
    _fake_add,
    _add_backward,
    _setup_add,
    cast_tokens,
)
