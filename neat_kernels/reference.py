"""The oracle: the same layer in eager torch, on any device and float dtype, twice differentiable, with forward-mode AD.

Z = Wᵀ·Aᵀ (out) or W·Aᵀ (in);  H = g(Z);  D, U = H, B (out) or B, H (in)
S = x̃·D;  y = x·Wᵀ + bias + s·S·Uᵀ

Every product is taken in fp32 (float64 in float64) and rounded only where the layer's contract says: D, U, S and the
gradient of S to the branch dtype, y and each gradient once to their own. It casts W whole: it is for tests, not for
training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from neat_kernels.torch_backend.dropout import draw_seed, keep_mask
from neat_kernels.vocabulary import ACTIVATIONS, ORIENTATIONS, autocast_dtype, check_choice, wide_dtype

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "sin2pi": lambda z: torch.sin(2.0 * math.pi * (z - z.round().detach())),
    "sin": torch.sin,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "identity": lambda z: z,
}


def neat_features(
    weight: Tensor,
    A: Tensor,
    *,
    encoders: Sequence[Tensor] = (),
    decoders: Sequence[Tensor] = (),
    orientation: str = "out",
    activation: str = "relu",
) -> Tensor:
    """Features of the frozen weight: H = g(Wᵀ·Aᵀ) [K,r] (out) or g(W·Aᵀ) [N,r] (in), in fp32 or float64.

    Args:
        weight: W [N,K], any float dtype.
        A: [r,N] (out) or [r,K] (in).
        encoders: p tensors [r,r].
        decoders: p tensors [r,r].
        orientation: "out" or "in".
        activation: one of `neat_kernels.vocabulary.ACTIVATIONS`.

    Returns:
        H, float32, or float64 if W or A is.

    Raises:
        ValueError: an unknown orientation or activation, or encoders without as many decoders.

    Source: arXiv 2410.01870; the nested skips follow PEFT's PEANuT.
    """
    check_choice("orientation", orientation, ORIENTATIONS)
    check_choice("activation", activation, ACTIVATIONS)
    if len(encoders) != len(decoders):
        raise ValueError(f"encoders and decoders must pair up, got {len(encoders)} and {len(decoders)}")
    wide = wide_dtype(weight, A)
    act = _ACTIVATIONS[activation]
    W = weight.to(wide)
    h = act((W.t() if orientation == "out" else W) @ A.to(wide).t())
    residuals = []
    for E in encoders:
        residuals.append(h)
        h = act(h @ E.to(wide).t())
    for D in decoders:
        h = act(h @ D.to(wide).t()) + residuals.pop()
    return h


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
    training: bool = False,
    compute_dtype: torch.dtype | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x·Wᵀ + bias + s·(x̃·D)·Uᵀ.

    Args:
        x: [..., K].
        weight: W [N,K].
        down: D [K,r].
        up: U [N,r].
        bias: [N] or None.
        scaling: s.
        dropout: probability of dropping an element of x in the branch.
        training: whether dropout is active.
        compute_dtype: dtype of the branch; None is x's (the autocast dtype under autocast).
        seed: int64 [1] that keys the dropout mask; drawn when None.

    Returns:
        y [..., N] in x's dtype (the autocast dtype under autocast).
    """
    dtype = autocast_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        wide = wide_dtype(x)
        c = compute_dtype or dtype
        rows = x.reshape(-1, x.shape[-1]).to(dtype).to(wide)
        D, U = _rounded(down.to(wide), c), _rounded(up.to(wide), c)
        dropped = rows
        if training and dropout > 0.0:
            seed = draw_seed(x) if seed is None else seed
            mask = keep_mask(seed, slice(0, rows.shape[0]), rows.shape[1], dropout)
            dropped = rows * mask * (1.0 / (1.0 - dropout))
        S = _rounded(_round_gradient(dropped @ D, c), c)
        y = rows @ weight.to(dtype).to(wide).t() + scaling * (S @ U.t())
        if bias is not None:
            y = y + bias.to(wide)
        return y.to(dtype).reshape(*x.shape[:-1], weight.shape[0])


def neat_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    *,
    encoders: Sequence[Tensor] = (),
    decoders: Sequence[Tensor] = (),
    orientation: str = "out",
    activation: str = "relu",
    scaling: float = 1.0,
    dropout: float = 0.0,
    training: bool = False,
    compute_dtype: torch.dtype | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x·(W + ΔW)ᵀ + bias with ΔW = s·U·Dᵀ from the features of W; see `neat_features` and `low_rank_linear`.

    Args:
        x: [..., K].
        weight: W [N,K].
        A: [r,N] (out) or [r,K] (in).
        B: [N,r] (out) or [K,r] (in).
        bias: [N] or None.
        encoders: p tensors [r,r].
        decoders: p tensors [r,r].
        orientation: "out" or "in".
        activation: name of σ.
        scaling: s.
        dropout: probability of dropping an element of x in the branch.
        training: whether dropout is active.
        compute_dtype: dtype of the branch.
        seed: int64 [1] that keys the dropout mask.

    Returns:
        y [..., N].
    """
    with torch.autocast(x.device.type, enabled=False):
        H = neat_features(
            weight, A, encoders=encoders, decoders=decoders, orientation=orientation, activation=activation
        )
    down, up = (H, B) if orientation == "out" else (B, H)
    return low_rank_linear(
        x,
        weight,
        down,
        up,
        bias,
        scaling=scaling,
        dropout=dropout,
        training=training,
        compute_dtype=compute_dtype,
        seed=seed,
    )


def _rounded(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t rounded to `dtype` and widened again; the gradient passes through unrounded."""
    return t + (t.to(dtype).to(t.dtype) - t).detach()


def _round_gradient(t: Tensor, dtype: torch.dtype) -> Tensor:
    if t.requires_grad:
        t = t.view_as(t)
        # Forward-over-reverse calls the hook with None where a gradient is zero by structure.
        t.register_hook(lambda grad: None if grad is None else grad.to(dtype).to(grad.dtype))
    return t
