"""PEFT's PEANuT layer on the fused path: y = x·(W + ΔW)ᵀ + bias with ΔWᵀ = s·g(Wᵀ·Aᵀ)·Bᵀ, ΔW never formed."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from peft.tuners.peanut.layer import Linear

from neat_kernels.adapters.names import ACTIVATION
from neat_kernels.integrations.peft.branches import Network
from neat_kernels.integrations.peft.fused import FusedNetworks, hangs_on


class FusedPeanutLinear(FusedNetworks, Linear):
    """`peft.tuners.peanut.layer.Linear` with the same parameters, files and results.

    Over a quantised base it reads W itself, dequantised, where PEFT's class reads the codes or raises.
    """

    # PEFT's, which has no types.
    peanut_A: Any
    peanut_B: Any
    peanut_encoders: Any
    peanut_decoders: Any
    act_fn: Any
    scaling: Any

    def _known_names(self) -> Collection[str]:
        return self.peanut_A.keys()

    def _obstacle(self, name: str) -> str | None:
        if self.act_fn[name] not in ACTIVATION:
            return f"act_fn {self.act_fn[name]!r} is none of {', '.join(ACTIVATION)}"
        chain = (*self.peanut_encoders[name], *self.peanut_decoders[name])
        return hangs_on(self.peanut_A[name], self.peanut_B[name], *chain)

    def _network(self, name: str) -> Network:
        return Network(
            self.peanut_A[name].weight,
            self.peanut_B[name].weight,
            tuple(linear.weight for linear in self.peanut_encoders[name]),
            tuple(linear.weight for linear in self.peanut_decoders[name]),
            "out",
            ACTIVATION[self.act_fn[name]],
            self.scaling[name],
        )
