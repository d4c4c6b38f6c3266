"""The gradient of x: dx = dy·W + (dS·Dᵀ) ∘ mask / (1 - q), the mask under dropout only.

dy [M,N], W [N,K] with any strides, dS [M,r], D [K,r] → dx [M,K]. The plans are those of the apply stage; in plan cublas
the up stage backward has written the masked dS·Dᵀ.
"""

from torch import Tensor

from neat_kernels.kernels.gemm import gemm


def dgrad(
    dy: Tensor, W: Tensor, dS: Tensor, D: Tensor, seed: Tensor | None, dropout: float, product: Tensor | None
) -> Tensor:
    """dx [M,K] in dy's dtype; W in dy's dtype. A product (dS·Dᵀ) ∘ mask / (1 - q) that is given becomes dx."""
    if product is None:
        return gemm(dy, W, dS, D, scaling=1.0, seed=seed, dropout=dropout)
    return product.addmm_(dy, W)
