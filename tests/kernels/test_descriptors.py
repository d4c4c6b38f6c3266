"""The base GEMM on tensor descriptors, and when the kernel on pointers takes its place."""

from dataclasses import replace

import pytest
import torch
from harness import check, draw, interpreter_only, use_multiprocessors, use_plan, use_seed

from neat_kernels.kernels import bound, gemm, gemm_descriptor, launch

HALF, SINGLE = torch.bfloat16, torch.float32
# Rows of 16-byte multiples in half precision; ragged against every tile.
ALIGNED = (37, 72, 136, 5)

pytestmark = pytest.mark.skipif(
    not launch.has_descriptors(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    reason="the device has no tensor descriptors",
)


@pytest.fixture
def descriptors(monkeypatch):
    """Shapes of A in the calls of the kernel on descriptors."""
    use_plan(monkeypatch, "fused")
    seen = []

    def spy(call):
        run = gemm_descriptor.on_descriptors(call)

        def watched(A, *rest):
            seen.append(tuple(A.shape))
            run(A, *rest)

        return watched

    bound.forget()
    monkeypatch.setattr(gemm, "on_descriptors", spy)
    yield seen
    bound.forget()


@pytest.mark.parametrize("orientation", ["out", "in"])
@pytest.mark.parametrize("r", [1, 16, 40])
@pytest.mark.parametrize("dtype", [HALF, torch.float16], ids=str)
def test_aligned_tensors_take_it(descriptors, dtype, r, orientation):
    M, N, K, _ = ALIGNED
    check(draw(M, N, K, r, dtype=dtype, orientation=orientation))
    assert descriptors == [(M, K), (M, N)]


@pytest.mark.parametrize("tokens", [1, 31, 32, 33])
def test_any_number_of_tokens(descriptors, tokens):
    _, N, K, r = ALIGNED
    check(draw(tokens, N, K, r, dtype=HALF))
    assert descriptors == [(tokens, K), (tokens, N)]


@pytest.mark.parametrize(
    ("shape", "taken"),
    [
        ((33, 72, 1031, 5), []),
        ((33, 1031, 72, 5), []),
        ((33, 68, 136, 5), []),
        ((0, 72, 136, 5), []),
    ],
    ids=str,
)
def test_rows_that_are_not_aligned_take_pointers(descriptors, shape, taken):
    check(draw(*shape, dtype=HALF))
    assert descriptors == taken


@pytest.mark.parametrize("what", ["x", "dy", "weight"])
def test_a_base_that_is_not_aligned_takes_pointers(descriptors, what):
    case = draw(*ALIGNED, dtype=HALF)
    tensor = getattr(case, what)
    shifted = torch.empty(tensor.numel() + 1, dtype=HALF, device=tensor.device)[1:].view_as(tensor).copy_(tensor)
    check(replace(case, **{what: shifted}))
    M, N, K, _ = ALIGNED
    assert descriptors == {"x": [(M, N)], "dy": [(M, K)], "weight": []}[what]


def test_rows_that_overlap_take_pointers(descriptors):
    case = draw(*ALIGNED, dtype=HALF)
    M, N, K, _ = ALIGNED
    check(replace(case, x=case.x[:1].expand(M, K)))
    assert descriptors == [(M, N)]


@pytest.mark.parametrize("columns", [144, 140])
def test_a_slice_of_wider_rows(descriptors, columns):
    case = draw(*ALIGNED, dtype=HALF)
    M, N, K, _ = ALIGNED
    x = torch.zeros(M, columns, dtype=HALF, device=case.x.device)[:, :K].copy_(case.x)
    check(replace(case, x=x))
    assert descriptors == ([(M, K), (M, N)] if columns == 144 else [(M, N)])


def test_a_weight_that_is_stored_transposed(descriptors):
    case = draw(*ALIGNED, dtype=HALF)
    M, N, K, _ = ALIGNED
    check(replace(case, weight=case.weight.t().contiguous().t()))
    assert descriptors == [(M, K), (M, N)]


@pytest.mark.parametrize("compute_dtype", [None, SINGLE], ids=str)
def test_under_dropout(descriptors, compute_dtype, monkeypatch):
    case = draw(*ALIGNED, dtype=HALF, adapter_dtype=SINGLE, compute_dtype=compute_dtype)
    use_seed(monkeypatch, case, 0.4)
    check(case)
    assert len(descriptors) == 2


@interpreter_only
@pytest.mark.parametrize("multiprocessors", [1, 2, 5])
def test_programs_that_take_several_tiles(descriptors, multiprocessors, monkeypatch):
    use_multiprocessors(monkeypatch, multiprocessors)
    monkeypatch.setattr(launch, "_INTERPRETED", launch._INTERPRETED._replace(persistent=True))
    check(draw(*ALIGNED, dtype=HALF))
    assert len(descriptors) == 2


def test_the_same_sums_as_the_kernel_on_pointers(descriptors, monkeypatch):
    case = draw(*ALIGNED, dtype=HALF)
    ours = check(case)
    assert len(descriptors) == 2
    monkeypatch.setattr(launch, "has_descriptors", lambda device: False)
    bound.forget()
    theirs = check(case)
    assert len(descriptors) == 2
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name])
