"""FusedLoraLinear: a frozen linear layer and a LoRA update, on the token side of Neat."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neat_kernels import functional
from neat_kernels.base_layer import adapter_dtype, as_matrix, checked_weight
from neat_kernels.vocabulary import (
    BACKENDS,
    check_choice,
    check_compute_dtype,
    check_dropout,
    check_int,
    check_scaling,
    wide_dtype,
)


class FusedLoraLinear(nn.Module):
    """Frozen linear layer plus a low-rank update.

    y = x·Wᵀ + bias + s·x̃·lora_Aᵀ·lora_Bᵀ;  x̃ is x under dropout. lora_B starts at zero.

    Args:
        linear: nn.Linear or transformers' Conv1D; its parameters are shared and frozen.
        r: rank.
        scaling: s.
        dropout: probability in [0, 1) of dropping an element of x in the adapter branch, in training.
        compute_dtype: dtype of the adapter branch; None is the input's.
        backend: "auto", or "torch" / "triton", which runs or raises.

    Raises:
        TypeError: `linear` is neither nn.Linear nor Conv1D.
        ValueError: its weight is not a floating tensor that holds data, or an option is not valid.

    Source: arXiv 2106.09685.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        linear: nn.Module,
        *,
        r: int,
        scaling: float = 1.0,
        dropout: float = 0.0,
        compute_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        check_int("r", r, 1)
        check_scaling(scaling)
        check_dropout(dropout)
        check_compute_dtype(compute_dtype)
        check_choice("backend", backend, BACKENDS)
        weight = checked_weight(linear)
        super().__init__()
        self.transposed = not isinstance(linear, nn.Linear)
        self.weight, self.bias = linear.weight, linear.bias  # type: ignore[assignment]
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        self.r, self.scaling, self.dropout = r, scaling, dropout
        self.compute_dtype, self.backend = compute_dtype, backend
        self.out_features, self.in_features = as_matrix(weight, self.transposed).shape
        dtype = adapter_dtype(weight.dtype)
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=weight.device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=weight.device, dtype=dtype))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: [..., in_features], any rank >= 1.

        Returns:
            y [..., out_features] in x's dtype (the autocast dtype under autocast).

        Raises:
            ValueError: x does not fit the weight.
            BackendUnavailableError: an explicit backend cannot run here.
        """
        return functional.low_rank_linear(
            x,
            as_matrix(self.weight, self.transposed),
            self.lora_A.t(),
            self.lora_B,
            self.bias,
            scaling=self.scaling,
            dropout=self.dropout,
            training=self.training,
            compute_dtype=self.compute_dtype,
            backend=self.backend,
        )

    @property
    def base_weight(self) -> nn.Parameter:
        """The frozen W in the layout of the base layer."""
        return self.weight

    @torch.no_grad()
    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """The adapter with its scaling in lora_B, so that lora_B @ lora_A = ΔW.

        Returns:
            lora_A [r, in_features] and lora_B [out_features, r], float32 (float64 in float64), without a gradient.
        """
        wide = wide_dtype(self.weight, self.lora_A)
        return self.lora_A.to(wide), self.lora_B.to(wide) * self.scaling

    def extra_repr(self) -> str:
        """Sizes and options, as nn.Linear prints its own."""
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.r}, scaling={self.scaling}"
        )
        return text + (f", dropout={self.dropout}" if self.dropout else "")
