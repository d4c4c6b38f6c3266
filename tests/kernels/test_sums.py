"""Sums that one stage leaves to another: dD in partial sums, which the kernel of the chain or the sum of dA takes."""

import pytest
import torch
from harness import DEVICE, INTERPRETED, check, draw, fused, use_multiprocessors, use_plan, use_seed

from neat_kernels.kernels import launch
from neat_kernels.kernels.reduce import Parts, Sum, reduce
from neat_kernels.vocabulary import ORIENTATIONS

# 9 tiles of tokens in pieces of 5 and 4.
TOKENS = 523
# W [N,K] and orientation; the last has dA in pieces, too.
MATRICES = [((5, 13), "out"), ((5, 13), "in"), ((523, 13), "in")]
CHAIN = {"encoders.0", "decoders.0"}


@pytest.fixture(autouse=True)
def _pieces(monkeypatch):
    use_multiprocessors(monkeypatch, 1000)
    if INTERPRETED:
        assert launch.split(1, TOKENS, 64, DEVICE) == (2, 5)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("plan", ["fused", "cublas"])
def test_pieces_of_the_tokens(plan, orientation, depth, dropout, adapter_dtype, monkeypatch):
    use_plan(monkeypatch, plan)
    case = draw(
        TOKENS, 5, 13, 3, dtype=torch.bfloat16, adapter_dtype=adapter_dtype, orientation=orientation, depth=depth
    )
    use_seed(monkeypatch, case, dropout)
    check(case, plan=plan)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(("matrix", "orientation"), MATRICES, ids=str)
def test_a_frozen_parameter_changes_no_other_gradient(matrix, orientation, depth, monkeypatch):
    case = draw(TOKENS, *matrix, 3, orientation=orientation, depth=depth, bias=False)
    use_seed(monkeypatch, case, 0.5)
    expected = check(case)
    for frozen in ({"x", "A"}, {"x", "B"}, CHAIN, {"x", "A"} | CHAIN, {"x", "B"} | CHAIN, {"x", "A", "B"}):
        trained = set(case.leaves()) - frozen
        if trained:
            results = fused(case, frozen)
            assert set(results) == {"y", *(f"d{name}" for name in trained)}
            for name, value in results.items():
                assert torch.equal(value, expected[name]), (name, frozen)


def test_three_sums_of_their_own_sizes_dtypes_and_scalings():
    sums = []
    for shape, scaling, dtype in (
        ((3, 7, 5), 0.5, torch.float32),
        ((9, 521), -2.0, torch.bfloat16),
        ((1, 1), 3.0, torch.float32),
    ):
        partial = torch.randn(shape, device=DEVICE)
        sums.append(Sum(partial, torch.empty(shape[1:], dtype=dtype, device=DEVICE), scaling))
    with launch.on(DEVICE):
        reduce(None, *sums)
    for partial, out, scaling in sums:
        exact = scaling * partial.double().sum(0)
        unit = torch.finfo(out.dtype).eps / 2
        # One rounding to out's dtype, and one in fp32 for each addition.
        allowed = unit * exact.abs() + 2.0**-23 * abs(scaling) * partial.double().abs().sum(0) * len(partial)
        assert (out.double() - exact).abs().le(allowed).all()


@pytest.mark.parametrize(
    ("pieces", "scaling", "dtype"),
    [(2, 1.0, torch.float32), (1, 2.0, torch.float32), (1, 1.0, torch.bfloat16), (1, 1.0, torch.float32)],
    ids=str,
)
def test_a_single_partial_sum_is_the_sum_if_nothing_changes_it(pieces, scaling, dtype):
    parts = Parts(torch.ones(pieces, 2, 3, device=DEVICE), scaling)
    out, left = parts.into(dtype)
    assert (left is None) == (out.data_ptr() == parts.partial.data_ptr())
    assert (left is None) == (pieces == 1 and scaling == 1.0 and dtype == torch.float32)
    with launch.on(DEVICE):
        assert torch.equal(parts.total(dtype), torch.full((2, 3), pieces * scaling, dtype=dtype, device=DEVICE))
