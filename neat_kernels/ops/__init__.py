"""The operators `neat_kernels::*` of torch.library: schemas, fake kernels, autograd and autocast.

neat_kernels::features           H, Z = g(W·…), Z
neat_kernels::low_rank_linear    y, S = x·Wᵀ + bias + s·S·Uᵀ, x̃·D
neat_kernels::low_rank_add       y, S = base + s·S·Uᵀ, x̃·D: the branch onto what another layer has made of x
neat_kernels::neat_linear        y, S, H, Z: both, for a layer whose features are not given

Each has a backward operator of its own, so that a compiler sees two calls and no Python. The last argument names the
backend whose functions run; the choice is made above, in plan.py. Nothing is saved but x, S, W itself and r-wide
tensors.
"""

from neat_kernels.ops import features, low_rank, neat  # noqa: F401  (each registers its operators)
