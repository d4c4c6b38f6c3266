"""neat_kernels::neat_linear: the features and the token side of a layer in one call, with its backward.

y, S, H, Z;  S and what follows are low_rank_linear's with D, U = H, B (out) or B, H (in)

One call costs the host less than two do, and lets a small batch share the reads of W between both sides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neat_kernels.ops.features import fake_features, fake_features_backward
from neat_kernels.ops.low_rank import cast_tokens, fake_tokens
from neat_kernels.ops.register import (
    as_rows,
    implementation,
    in_backward,
    refuse_trainable_weight,
    register,
    with_columns,
)
from neat_kernels.plan import is_small_batch
from neat_kernels.torch_backend.low_rank import Branch
from neat_kernels.torch_backend.neat import Wanted
from neat_kernels.vocabulary import arrange


def _neat_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    chain: Tensor | None,
    seed: Tensor | None,
    orientation: str,
    activation: str,
    scaling: float,
    dropout: float,
    compute_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    branch = Branch(scaling, dropout, compute_dtype, backend)
    rows = as_rows(x)
    if is_small_batch(backend, x.device, x.dtype, orientation, rows.shape[0], A.shape[0]):
        small = implementation("small_batch", backend)
        y, S, H, Z = small.forward(rows, weight, bias, A, B, chain, seed, orientation, activation, branch)
        return with_columns(y, x), S, H, Z
    H, Z = implementation("features", backend).forward(weight, A, chain, orientation, activation)
    D, U = arrange(orientation, H, B)
    y, S = implementation("low_rank", backend).forward(rows, weight, bias, D, U, seed, branch)
    return with_columns(y, x), S, H, Z


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    chain: Tensor | None,
    seed: Tensor | None,
    orientation: str,
    activation: str,
    scaling: float,
    dropout: float,
    compute_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *fake_tokens(x, weight, A.shape[0], compute_dtype), *fake_features(weight, A, orientation)


def _neat_linear_backward(
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
    scaling: float,
    dropout: float,
    compute_dtype: torch.dtype | None,
    need_dx: bool,
    dA_dtype: torch.dtype | None,
    dB_dtype: torch.dtype | None,
    need_dchain: bool,
    dbias_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    branch = Branch(scaling, dropout, compute_dtype, backend)
    rows_of_dy, rows_of_x = as_rows(dy), None if x is None else as_rows(x)
    if (
        need_dx
        and dA_dtype is not None
        and Z is not None
        and is_small_batch(backend, dy.device, dy.dtype, orientation, rows_of_dy.shape[0], Z.shape[1])
    ):
        dx, *others = implementation("small_batch", backend).backward(
            rows_of_dy, rows_of_x, weight, B, chain, S, H, Z, seed, orientation, activation, branch,
            dA_dtype, dB_dtype, need_dchain, dbias_dtype,
        )  # fmt: skip
        return with_columns(dx, dy), *others
    dx, *others = implementation("neat", backend).backward(
        rows_of_dy, rows_of_x, weight, B, chain, S, H, Z, seed, orientation, activation, branch,
        Wanted(need_dx, dA_dtype, dB_dtype, need_dchain, dbias_dtype),
    )  # fmt: skip
    return with_columns(dx, dy) if need_dx else dx, *others


def _fake_backward(
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
    scaling: float,
    dropout: float,
    compute_dtype: torch.dtype | None,
    need_dx: bool,
    dA_dtype: torch.dtype | None,
    dB_dtype: torch.dtype | None,
    need_dchain: bool,
    dbias_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dA, dB, dchain, dbias = (dy.new_empty(0) for _ in range(5))
    if need_dx:
        assert weight is not None
        dx = dy.new_empty((*dy.shape[:-1], weight.shape[1]))
    if dA_dtype is not None or need_dchain:
        assert Z is not None
        dA, dchain = fake_features_backward(weight, Z, chain, orientation, dA_dtype, need_dchain)
    if dB_dtype is not None:
        factor = S if orientation == "out" else H
        assert factor is not None
        columns = x.shape[-1] if orientation == "in" and x is not None else dy.shape[-1]
        dB = dy.new_empty((columns, factor.shape[1]), dtype=dB_dtype)
    if dbias_dtype is not None:
        dbias = dy.new_empty((dy.shape[-1],), dtype=dbias_dtype)
    return dx, dA, dB, dchain, dbias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, A, B, chain, seed, *ctx.options, ctx.backend = inputs
    need_dx, need_dweight, need_dbias, need_dA, need_dB, need_dchain = ctx.needs_input_grad[:6]
    if need_dweight:
        refuse_trainable_weight("neat_linear")
    _, S, H, Z = output
    ctx.mark_non_differentiable(S, H, Z)
    ctx.set_materialize_grads(False)
    ctx.needs = (
        need_dx,
        A.dtype if need_dA else None,
        B.dtype if need_dB else None,
        need_dchain,
        bias.dtype if need_dbias else None,
    )
    need_dH = need_dA or need_dchain
    need_dD, need_dU = arrange(ctx.options[0], need_dH, need_dB)
    # D is read for dx, U for dS, which both dx and dD take.
    read_H, read_B = arrange(ctx.options[0], need_dx, need_dx or need_dD)
    ctx.save_for_backward(
        x if need_dD else None,
        weight if need_dx or need_dA else None,
        B if read_B else None,
        chain if need_dH else None,
        S if need_dU else None,
        H if read_H else None,
        Z if need_dH else None,
        seed,
    )


def _backward(ctx: Any, dy: Tensor | None, *rest: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 13
    dx, dA, dB, dchain, dbias = in_backward(_BACKWARD, dy, *ctx.saved_tensors, *ctx.options, *ctx.needs, ctx.backend)
    need_dx, need_dA, need_dB, need_dchain, need_dbias = ctx.needs
    return (
        dx if need_dx else None,
        None,
        dbias if need_dbias is not None else None,
        dA if need_dA is not None else None,
        dB if need_dB is not None else None,
        dchain if need_dchain else None,
        *(None,) * 7,
    )


_BACKWARD = register(
    "neat_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? B, Tensor? chain, Tensor? S, Tensor? H, "
    "Tensor? Z, Tensor? seed, str orientation, str activation, float scaling, float dropout, "
    "ScalarType? compute_dtype, bool need_dx, ScalarType? dA_dtype, ScalarType? dB_dtype, bool need_dchain, "
    "ScalarType? dbias_dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _neat_linear_backward,
    _fake_backward,
)
NEAT_LINEAR = register(
    "neat_linear(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, Tensor? chain, Tensor? seed, "
    "str orientation, str activation, float scaling, float dropout, ScalarType? compute_dtype, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _neat_linear,
    _fake,
    _backward,
    _setup,
    cast_tokens,
)
