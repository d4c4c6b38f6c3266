"""The branch alone, onto another layer's output: numbers against float64, gradients, what it refuses."""

import itertools

import pytest
import torch

import neat_kernels as nk

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def drawn(dtype, base_dtype=None, tokens=(3, 5), K=19, N=23, r=4):
    g = torch.Generator().manual_seed(7)
    sizes = {"x": (*tokens, K), "base": (*tokens, N), "down": (K, r), "up": (N, r)}
    made = {name: torch.randn(size, generator=g, dtype=torch.float64) for name, size in sizes.items()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    to = {"x": dtype, "base": base_dtype or dtype, "down": wide, "up": wide}
    return {name: t.to(to[name]).requires_grad_() for name, t in made.items()}


def truth(t, compute_dtype, dtype, scaling):
    """y in float64, with D and U rounded to the branch dtype as every product over tokens has them."""
    c = compute_dtype or dtype
    D, U = (t[name].detach().to(c).double() for name in ("down", "up"))
    return t["base"].double() + scaling * (t["x"].double() @ D) @ U.t(), D, U


@pytest.mark.parametrize("compute_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_float64(dtype, compute_dtype):
    compute_dtype = None if dtype == torch.float64 else compute_dtype
    t = drawn(dtype)
    y = nk.functional.low_rank_add(**t, scaling=0.5, compute_dtype=compute_dtype)
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(dtype)
    y.backward(dy)
    expected, D, U = truth(t, compute_dtype, dtype, 0.5)
    dS = 0.5 * dy.double() @ U
    rows = t["x"].detach().double().flatten(0, 1)
    wanted = {
        "base": dy.double(),
        "x": dS @ D.t(),
        "down": rows.t() @ dS.flatten(0, 1),
        "up": 0.5 * dy.double().flatten(0, 1).t() @ (rows @ D),
    }
    # Three roundings, of S or dS, of the product and of the result, each of half a unit in the last place.
    bound = 3 * torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 16 * torch.finfo(dtype).eps
    for got, true in ((y, expected), *((t[name].grad, wanted[name]) for name in t)):
        assert (got.double() - true).norm() <= bound * true.norm()
    assert y.dtype == dtype


@pytest.mark.parametrize(
    "needed", [n for k in (1, 2, 3) for n in itertools.combinations(("x", "base", "down", "up"), k)]
)
def test_gives_the_gradients_that_are_asked_for(needed):
    t = drawn(torch.float64)
    whole = {name: v.detach().clone().requires_grad_() for name, v in t.items()}
    nk.functional.low_rank_add(**whole).square().sum().backward()
    t = {name: v.detach().requires_grad_(name in needed) for name, v in t.items()}
    nk.functional.low_rank_add(**t).square().sum().backward()
    for name in t:
        assert t[name].grad is None if name not in needed else torch.equal(t[name].grad, whole[name].grad)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.float16], ids=str)
def test_the_result_has_the_dtype_of_the_base(base_dtype):
    t = drawn(torch.bfloat16, base_dtype)
    y = nk.functional.low_rank_add(**t)
    y.sum().backward()
    assert (y.dtype, t["x"].grad.dtype, t["base"].grad.dtype) == (base_dtype, torch.bfloat16, base_dtype)
    expected, _, _ = truth(t, None, torch.bfloat16, 1.0)
    assert (y.double() - expected).norm() <= 2 * torch.finfo(torch.bfloat16).eps * expected.norm()


def test_is_the_branch_of_low_rank_linear_with_its_dropout():
    t = drawn(torch.float64)
    W = torch.randn(23, 19, dtype=torch.float64)
    x, down, up = t["x"], t["down"], t["up"]
    torch.manual_seed(0)
    whole = nk.functional.low_rank_linear(x, W, down, up, scaling=2.0, dropout=0.4, training=True)
    torch.manual_seed(0)
    base = torch.nn.functional.linear(x, W)
    parts = nk.functional.low_rank_add(x, base, down, up, scaling=2.0, dropout=0.4, training=True)
    dy = torch.randn_like(parts)
    torch.testing.assert_close(whole, parts)
    torch.testing.assert_close(*(torch.autograd.grad(y, (x, down, up), dy) for y in (whole, parts)))


def test_leaves_the_base_as_it_is_and_takes_no_tokens():
    t = drawn(torch.float32, tokens=(0,))
    assert nk.functional.low_rank_add(**t).shape == (0, 23)
    t = drawn(torch.float32)
    before = t["base"].detach().clone()
    nk.functional.low_rank_add(**t)
    assert torch.equal(t["base"], before)


def test_opcheck():
    t = drawn(torch.float32)
    for seed, dropout in ((None, 0.0), (torch.tensor([5]), 0.3)):
        torch.library.opcheck(
            torch.ops.neat_kernels.low_rank_add.default, (*t.values(), seed, 0.5, dropout, None, "torch")
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    {
        "x": ({"x": torch.randn(3, 5, 18)}, r"x must be \[\.\.\., 19\].*got \(3, 5, 18\)"),
        "base": ({"base": torch.randn(3, 23)}, r"base must be \(3, 5, 23\), got \(3, 23\)"),
        "ranks": ({"up": torch.randn(23, 5)}, r"got \(19, 4\) and \(23, 5\)"),
        "integers": ({"base": torch.ones(3, 5, 23, dtype=torch.int8)}, "base must be float64.*got torch.int8"),
        "device": ({"base": torch.empty(3, 5, 23, device="meta")}, "got meta"),
        "dropout": ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        "branch": ({"compute_dtype": torch.bfloat16}, "compute_dtype must be None"),
        "backend": ({"backend": "cuda"}, "backend must be one of"),
    }.values(),
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        nk.functional.low_rank_add(**{**drawn(torch.float32), **changes})
