"""PEFT's LoRA layer on the token side of Neat: y = x·Wᵀ + bias + s·x̃·lora_Aᵀ·lora_Bᵀ in one operator."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from neat_kernels.integrations.peft.branches import Branch, Route, run_branches
from neat_kernels.integrations.peft.fused import FusedLayer, hangs_on


class FusedLoraLinear(FusedLayer, Linear):
    """`peft.tuners.lora.layer.Linear` with the same parameters and files, and its results up to the dropout mask.

    Variants of LoRA (DoRA and its like), adapters with a bias of their own and mixed batches run PEFT's own forward.
    """

    # PEFT's, which has no types.
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_variant: Any
    scaling: Any

    def _known_names(self) -> Collection[str]:
        return self.lora_A.keys()

    def _obstacle(self, name: str) -> str | None:
        if name in self.lora_variant:
            return f"it is the variant {type(self.lora_variant[name]).__name__}"
        if self.lora_A[name].bias is not None or self.lora_B[name].bias is not None:
            return "it has a bias of its own"
        if type(self.lora_dropout[name]) not in (nn.Dropout, nn.Identity):
            return f"its dropout is a {type(self.lora_dropout[name]).__name__}"
        return hangs_on(self.lora_A[name], self.lora_B[name])

    def _run(self, way: Route, names: list[str], x: Tensor) -> Tensor:
        branches = [self._branch(name) for name in names]
        base = self.base_layer(x) if way.weight is None else None
        return run_branches(way, x, base, branches, self._settings(), self.training)

    def _branch(self, name: str) -> Branch:
        dropout = self.lora_dropout[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return Branch(self.lora_A[name].weight.t(), self.lora_B[name].weight, float(self.scaling[name]), p)

    def _rank_and_dtype(self, names: list[str]) -> tuple[int, torch.dtype]:
        weights = [self.lora_A[name].weight for name in names]
        return sum(weight.shape[0] for weight in weights), weights[0].dtype
