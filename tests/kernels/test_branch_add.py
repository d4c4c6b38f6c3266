"""The branch onto another layer's output on the kernels: y and gradients against float64, dropout against torch."""

import pytest
import torch
from harness import DEVICE

import neat_kernels as nk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(0, 40, 24, 3), (1, 17, 33, 1), (37, 65, 29, 5), (70, 33, 130, 16)]


def drawn(tokens, in_features, out_features, r, dtype):
    g = torch.Generator().manual_seed(tokens)
    sizes = {"x": (tokens, in_features), "base": (tokens, out_features), "down": (in_features, r)}
    sizes["up"] = (out_features, r)
    half = {"x": dtype, "base": dtype}
    made = {name: torch.randn(size, generator=g, dtype=torch.float64) for name, size in sizes.items()}
    return {name: t.to(half.get(name, torch.float32)).to(DEVICE).requires_grad_() for name, t in made.items()}


def results(t, dy, **options):
    torch.manual_seed(1)
    y = nk.functional.low_rank_add(**t, scaling=0.5, **options)
    return y, *torch.autograd.grad(y, list(t.values()), dy)


@pytest.mark.parametrize("compute_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_agrees_with_torch_in_float64(shape, dtype, compute_dtype, dropout):
    t = drawn(*shape, dtype)
    dy = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    options = {"dropout": dropout, "training": dropout > 0}
    got = results(t, dy, compute_dtype=compute_dtype, backend="triton", **options)
    c = compute_dtype or dtype
    exact = {
        name: (v.to(c) if name in ("down", "up") else v).detach().double().requires_grad_() for name, v in t.items()
    }
    want = results(exact, dy.double(), backend="torch", **options)
    # S or dS, the product and the sum are rounded, each by half a unit in the last place at most; fp32 runs in TF32x3.
    bound = 3 * torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 64 * torch.finfo(dtype).eps
    for name, a, b in zip(("y", *t), got, want, strict=True):
        assert (a.double() - b).norm() <= bound * b.norm(), name
    assert got[0].dtype == dtype
