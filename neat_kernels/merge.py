"""W + ΔW on the backend that a request means, with the rounding that was asked for."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from neat_kernels.plan import choose_backend
from neat_kernels.torch_backend import merge as torch_merge
from neat_kernels.vocabulary import ROUNDINGS, check_choice, check_int

# Seeds are the non-negative numbers of an int64.
SEEDS = 2**63


def merge(
    weight: Tensor, D: Tensor, U: Tensor, *, scaling: float, rounding: str, seed: int | None, backend: str
) -> Tensor:
    """W' = round(W + s·U·Dᵀ) as a new tensor in W's dtype and layout.

    Args:
        weight: W [N,K], with any strides.
        D: down factor [K,r].
        U: up factor [N,r].
        scaling: s.
        rounding: "nearest" or "stochastic".
        seed: of stochastic rounding; None draws one from torch's CPU generator.
        backend: "auto", "torch" or "triton".

    Raises:
        ValueError: an option is not valid, or W' is not finite.
        TypeError: the seed is no int.
        BackendUnavailableError: an explicit backend cannot run here.
    """
    check_rounding(rounding, seed, weight.dtype)
    chosen = choose_backend(backend, weight.device, (weight.dtype, D.dtype, U.dtype), D.shape[1])
    key = None
    if rounding == "stochastic":
        key = torch.tensor([draw_seed() if seed is None else seed], device=weight.device)
    merged, finite = _implementation(chosen).merge(weight, D, U, float(scaling), key)
    if not finite:
        raise ValueError("W + ΔW must be finite to be merged, got NaN or infinity: nothing was changed")
    return merged


def check_rounding(rounding: str, seed: int | None, dtype: torch.dtype) -> None:
    """Raise unless a weight of this dtype can be rounded so."""
    check_choice("rounding", rounding, ROUNDINGS)
    if rounding == "nearest":
        if seed is not None:
            raise ValueError(f"seed is for rounding='stochastic': expected None for rounding='nearest', got {seed!r}")
        return
    if dtype != torch.bfloat16:
        raise ValueError(f"rounding='stochastic' rounds to bf16: expected a torch.bfloat16 weight, got {dtype}")
    if seed is not None:
        check_int("seed", seed, 0)
        if seed >= SEEDS:
            raise ValueError(f"seed must be below 2**63, got {seed}")


def draw_seed() -> int:
    """A fresh seed from torch's CPU generator: torch.manual_seed fixes it whichever device the weight is on."""
    return int(torch.randint(SEEDS - 1, (), dtype=torch.int64, device="cpu"))


def _implementation(backend: str) -> ModuleType:
    """The module that merges; the kernels are imported by their first call, since Triton takes a second to."""
    return torch_merge if backend == "torch" else importlib.import_module("neat_kernels.kernels.merge")
