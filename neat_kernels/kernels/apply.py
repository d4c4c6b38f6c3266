"""The apply stage: y = x·Wᵀ + bias + s·S·Uᵀ.

x [M,K], W [N,K] with any strides, S [M,r], U [N,r], bias [N] → y [M,N]. Two plans:
fused    one GEMM whose accumulator carries the low-rank product: reads x and W, writes y once, one rounding
cublas   the low-rank product first, then cuBLAS accumulates onto it: y is written, read and written again
"""

from torch import Tensor

from neat_kernels.kernels.branch import branch
from neat_kernels.kernels.gemm import gemm


def apply(x: Tensor, W: Tensor, bias: Tensor | None, S: Tensor, U: Tensor, scaling: float, plan: str) -> Tensor:
    """y [M,N] in x's dtype; W in x's dtype."""
    if plan == "fused":
        return gemm(x, W.t(), S, U, bias, scaling=scaling)
    return branch(S, U, bias, dtype=x.dtype, scaling=scaling).addmm_(x, W.t())
