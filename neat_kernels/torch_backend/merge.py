"""The merge on torch: W' = round(W + s·U·Dᵀ), row block by row block, rounded to the nearest or stochastically.

The function is that of neat_kernels.kernels.merge, argument for argument; of the same fp32 sum both make the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neat_kernels.torch_backend.dropout import philox
from neat_kernels.torch_backend.gemm import ieee_fp32, row_blocks
from neat_kernels.vocabulary import wide_dtype

# Bits of the largest finite bf16 as an fp32 number.
_LARGEST_BITS = 0x7F7F0000
# 64 K elements a block: the words of Philox that stochastic rounding takes are int64.
_STOCHASTIC_BYTES = 16


def round_stochastically(v: Tensor, seed: Tensor, index: Tensor) -> Tensor:
    """v fp32 rounded to bf16, up with a probability of what is cut off in units of the last place: E = v.

    bits(v) + the high 16 bits of Philox4x32-10(counter = index, key = seed), then the low 16 bits cut off. A bf16 stays
    what it is. From the largest finite bf16 on, and for NaN, v is rounded to the nearest.

    Source: Croci et al., "Stochastic rounding: implementation, error analysis and applications", 2022.
    """
    bits = v.view(torch.int32)
    rounded = (bits + (philox(seed, index) >> 16).to(torch.int32)) & ~0xFFFF
    below = (bits & 0x7FFFFFFF) < _LARGEST_BITS
    return torch.where(below, rounded, bits).view(torch.float32).to(torch.bfloat16)


def merge(weight: Tensor, D: Tensor, U: Tensor, scaling: float, seed: Tensor | None) -> tuple[Tensor, bool]:
    """W' in W's dtype and layout, and whether it is finite, with sums in fp32 (fp64).

    A seed int64 [1] rounds stochastically, to bf16 alone. What follows a row block that is not finite is not written.
    """
    wide = wide_dtype(weight, D, U)
    rows_of_D, U = D.to(wide).t().contiguous(), U.to(wide) * scaling
    merged = torch.empty_like(weight)
    rows, columns = weight.shape
    for block in row_blocks(rows, columns, wide.itemsize if seed is None else _STOCHASTIC_BYTES):
        with torch.autocast(weight.device.type, enabled=False), ieee_fp32(weight.device):
            total = torch.addmm(weight[block].to(wide), U[block], rows_of_D)
        if seed is not None:
            index = torch.arange(block.start * columns, block.stop * columns, device=weight.device)
            total = round_stochastically(total, seed, index.view(-1, columns))
        merged[block] = total
        if not torch.isfinite(merged[block]).all():
            return merged, False
    return merged, True
