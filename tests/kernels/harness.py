"""What every kernel test shares: where it runs, one checked call, and ways to change what the host code decides."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import triton
from budget import UNIT_TF32X3, Case, assert_within_budget, branch_rounding, draw_case, evaluate
from torch import Tensor

import neat_kernels as nk
from neat_kernels.kernels import launch
from neat_kernels.vocabulary import HALF_DTYPES

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
RUNS = INTERPRETED or DEVICE.type == "cuda"

interpreter_only = pytest.mark.skipif(not INTERPRETED, reason="shows something of the interpreter alone")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TINY = (5, 7, 6, 3)


def draw(*shape: int, **options: Any) -> Case:
    """A case of tests/budget.py on the device under test."""
    return draw_case(*shape, **options).map(lambda t: t.to(DEVICE))


def fused(case: Case, frozen: Iterable[str] = (), **more: Any) -> dict[str, Tensor]:
    """y and the gradient of every leaf that is not frozen, through the kernels."""
    return evaluate(nk.functional.neat_linear, case, frozen, backend="triton", **more)


def check(case: Case, *, frozen: Iterable[str] = (), plan: str = "fused", **more: Any) -> dict[str, Tensor]:
    """Hold y and every gradient to the error budget; a plan of cuBLAS may round the branch once more."""
    results = fused(case, frozen, **more)
    eager = evaluate(nk.reference.neat_linear, case, frozen, **more)
    extra = branch_rounding(case) if plan == "cublas" and case.x.dtype in HALF_DTYPES else None
    in_pieces = not INTERPRETED and case.x.dtype == torch.float32 and launch.branch_precision(DEVICE) == "tf32x3"
    assert_within_budget(results, eager, case, extra, UNIT_TF32X3 if in_pieces else None)
    return results


def plan_for(plan: str, dtype: torch.dtype) -> str:
    """`plan` where it can run on this dtype: fp32 on a GPU has cuBLAS alone."""
    return plan if launch.target(DEVICE).arch == "interpreter" or dtype in HALF_DTYPES else "cublas"


def token_backend(plan: str, dtype: torch.dtype) -> str:
    """What the operators of the token side are told of `plan_for` a dtype."""
    return "triton:{0}:{0}".format(plan_for(plan, dtype))


def use_plan(monkeypatch: pytest.MonkeyPatch, plan: str) -> None:
    """Run both base GEMMs by `plan`, whatever the shape; fp32 on a GPU has cuBLAS alone.

    "small" is the plan of a small batch, without which no number of tokens is small (see conftest.py).
    """
    if plan == "small":
        monkeypatch.setattr("neat_kernels.plan.SMALL_BATCH", 128)
        return

    def choose(device: torch.device, dtype: torch.dtype, length: int) -> str:
        return plan_for(plan, dtype)

    monkeypatch.setattr("neat_kernels.plan.choose_gemm", choose)


def use_multiprocessors(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Split reductions as for a device of `count` multiprocessors: into many pieces for a large one, one for 0."""
    real = launch.target
    monkeypatch.setattr(launch, "target", lambda device: real(device)._replace(multiprocessors=count))


def use_seed(monkeypatch: pytest.MonkeyPatch, case: Case, dropout: float, seed: int = 0x0123456789ABCDEF) -> None:
    """Let the layer and the reference drop the same elements."""
    drawn = torch.tensor([seed], device=case.x.device)
    monkeypatch.setattr("neat_kernels.functional.draw_seed", lambda x: drawn)
    reference = nk.reference.neat_linear
    monkeypatch.setattr(nk.reference, "neat_linear", lambda *args, **kw: reference(*args, seed=drawn, **kw))
    case.options |= {"dropout": dropout, "training": True}
