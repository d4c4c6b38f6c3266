"""The gradient of x: dx = dy·W + (dS·Dᵀ) ∘ mask / (1 - p), the mask under dropout only.

dy [M,N], W [N,K] with any strides, dS [M,r], D [K,r] → dx [M,K]. The plans are those of the apply stage.
"""

from torch import Tensor

from neat_kernels.kernels.branch import branch
from neat_kernels.kernels.gemm import gemm


def dgrad(dy: Tensor, W: Tensor, dS: Tensor, D: Tensor, seed: Tensor | None, dropout: float, plan: str) -> Tensor:
    """dx [M,K] in dy's dtype; W in dy's dtype."""
    if plan == "fused":
        return gemm(dy, W, dS, D, scaling=1.0, seed=seed, dropout=dropout)
    return branch(dS, D, dtype=dy.dtype, scaling=1.0, seed=seed, dropout=dropout).addmm_(dy, W)
