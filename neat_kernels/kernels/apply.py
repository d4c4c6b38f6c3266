"""The apply stage: y = x·Wᵀ + bias + s·S·Uᵀ.

x [M,K], W [N,K] with any strides, S [M,r], U [N,r], bias [N] → y [M,N]. Two plans:
fused    one GEMM whose accumulator carries the low-rank product: reads x and W, writes y once, one rounding
cublas   the down stage has written s·S·Uᵀ + bias, and cuBLAS accumulates onto it: y is written, read and written again
"""

from torch import Tensor

from neat_kernels.kernels.gemm import gemm


def apply(
    x: Tensor, W: Tensor, bias: Tensor | None, S: Tensor, U: Tensor, scaling: float, product: Tensor | None
) -> Tensor:
    """y [M,N] in x's dtype; W in x's dtype. A product s·S·Uᵀ + bias that is given becomes y."""
    if product is None:
        return gemm(x, W.t(), S, U, bias, scaling=scaling)
    return product.addmm_(x, W.t())
