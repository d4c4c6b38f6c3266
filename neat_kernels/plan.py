"""From (device, dtype, requested backend) to the plan that runs it, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from neat_kernels.torch_backend.gemm import casts_blocks
from neat_kernels.vocabulary import BACKENDS, check_choice

_NO_TRITON = "this version of neat-kernels has no Triton kernels"


class BackendUnavailableError(RuntimeError):
    """An explicitly requested backend cannot run here; nothing was computed on another one instead."""


@dataclass(frozen=True)
class Plan:
    """The way one call runs: backend, plan of the base GEMM, and why they were chosen."""

    backend: str
    base_gemm: str
    reason: str

    def __str__(self) -> str:
        return f"backend={self.backend}, base GEMM={self.base_gemm}: {self.reason}"


def available_backends() -> dict[str, str | None]:
    """Every backend by name: None if it can run in this process, else the reason why it cannot."""
    return {"torch": None, "triton": _NO_TRITON}


def choose_backend(requested: str, device: torch.device) -> str:
    """The backend that `requested` means for tensors on `device`.

    Args:
        requested: "auto", or a backend that must run.
        device: where the tensors are.

    Returns:
        The name of a backend that can run; "auto" takes "torch", the only one in this version.

    Raises:
        ValueError: `requested` is no backend.
        BackendUnavailableError: an explicit request cannot be met.
    """
    check_choice("backend", requested, BACKENDS)
    if requested == "auto":
        return "torch"
    reason = available_backends()[requested]
    if reason is not None:
        raise BackendUnavailableError(f"backend={requested!r} was requested for tensors on {device}, but {reason}")
    return requested


def make_plan(device: torch.device, dtype: torch.dtype, requested: str) -> Plan:
    """The plan that an input of this dtype on this device would take, for `FusedNeatLinear.explain`."""
    backend = choose_backend(requested, device)
    asked = "requested" if requested != "auto" else f"chosen by auto, since {_NO_TRITON}"
    if casts_blocks(device, dtype):
        gemm = f"fp32 casts of row blocks, since this CPU has no fast {str(dtype).removeprefix('torch.')} GEMM"
        return Plan(backend, "blocks", f"{asked}; {gemm}")
    return Plan(backend, "native", f"{asked}; torch's GEMM accumulates onto the low-rank product")
