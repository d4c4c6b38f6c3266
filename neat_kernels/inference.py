"""A layer without gradients on a CPU, its factors given: y = x·Wᵀ + bias + s·(x·D)·Uᵀ, with little Python.

At one token the checks and the operator take the host longer than the products of the branch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neat_kernels.ops.register import as_rows, with_columns
from neat_kernels.torch_backend.gemm import casts_blocks, rows_times_rounded
from neat_kernels.torch_backend.low_rank import native
from neat_kernels.vocabulary import HALF_DTYPES


def factor_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which factors that were rounded to `dtype` are kept for inference."""
    return torch.float32 if device.type == "cpu" and dtype in HALF_DTYPES else dtype


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scaling: float,
    compute_dtype: torch.dtype | None,
    backend: str,
) -> Tensor | None:
    """y [..., N] as functional.low_rank_linear computes it, or None for a call that has to go there.

    Args:
        x: [..., K].
        weight: W [N,K].
        bias: [N] or None.
        down: D [K,r] with values of the branch dtype.
        up: U [N,r] with values of the branch dtype.
        scaling: s.
        compute_dtype: of the layer.
        backend: as of the layer.
    """
    dtype = x.dtype
    if (
        type(x) is not Tensor
        or x.device.type != "cpu"
        or weight.device.type != "cpu"
        or backend == "triton"
        or dtype != weight.dtype
        or (bias is not None and bias.dtype != dtype)
        or x.ndim == 0
        or x.shape[-1] != down.shape[0]
        or compute_dtype is not None
        or torch.is_autocast_enabled("cpu")
        or casts_blocks(x.device, dtype)
    ):
        return None
    rows = as_rows(x)
    y = native(rows, weight, bias, rows_times_rounded(rows, down, dtype), up, scaling)
    return with_columns(y, x)
