"""y and every gradient of the fused layer against float64, within the error budget of tests/budget.py."""

import pytest
import torch
from budget import assert_within_budget, branch_rounding, draw_case, evaluate
from hypothesis import given, settings
from hypothesis import strategies as st

import neat_kernels as nk
from neat_kernels.torch_backend import low_rank
from neat_kernels.vocabulary import ACTIVATIONS, HALF_DTYPES, ORIENTATIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RAGGED = [
    (1, 1, 1, 1),
    (1, 17, 5, 3),
    (13, 7, 131, 8),
    (37, 127, 3, 16),
    (64, 48, 80, 33),
    (5, 4, 6, 11),
    (600, 31, 29, 4),
]


def check(case, **more):
    fused = evaluate(nk.functional.neat_linear, case, backend="torch", **more)
    eager = evaluate(nk.reference.neat_linear, case, **more)
    dtype = case.x.dtype
    blocks = low_rank.casts_blocks(case.x.device, dtype) or dtype not in HALF_DTYPES
    assert_within_budget(fused, eager, case, None if blocks else branch_rounding(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@settings(max_examples=10)
@given(
    tokens=st.integers(1, 70),
    out_features=st.integers(1, 150),
    in_features=st.integers(1, 150),
    r=st.integers(1, 40),
    depth=st.integers(0, 2),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    scaling=st.sampled_from([1.0, 0.25, -2.0]),
)
def test_any_shape(dtype, orientation, tokens, out_features, in_features, r, depth, activation, bias, scaling):
    check(
        draw_case(
            tokens,
            out_features,
            in_features,
            r,
            dtype=dtype,
            orientation=orientation,
            depth=depth,
            activation=activation,
            bias=bias,
            scaling=scaling,
        )
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_ragged_shapes_on_both_plans(base_gemm, shape, orientation, dtype):
    check(draw_case(*shape, dtype=dtype, orientation=orientation, depth=1))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compute_dtype", [None, torch.float32], ids=str)
def test_fp32_adapter_over_a_half_weight(base_gemm, dtype, orientation, compute_dtype):
    case = draw_case(45, 96, 72, 6, dtype=dtype, adapter_dtype=torch.float32, orientation=orientation, depth=2)
    check(case, compute_dtype=compute_dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_that_span_many_row_blocks(base_gemm, dtype):
    # 1 MiB of fp32 holds 145 rows of 1,800 columns: W, x and dy each take several blocks with a ragged last one.
    check(draw_case(1100, 700, 1800, 5, dtype=dtype, orientation="out"))


@pytest.mark.parametrize("dropout", [0.1, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_uses_the_same_mask_as_the_reference(base_gemm, dtype, dropout, monkeypatch):
    seed = torch.tensor([0x0123456789ABCDEF])
    monkeypatch.setattr("neat_kernels.functional.draw_seed", lambda x: seed)
    case = draw_case(530, 40, 33, 4, dtype=dtype)
    training = {"training": True, "dropout": dropout}
    fused = evaluate(nk.functional.neat_linear, case, backend="torch", **training)
    case.options.update(training, seed=seed)
    assert_within_budget(fused, evaluate(nk.reference.neat_linear, case), case)


def strided(t):
    return torch.randn(t.shape[0], 2 * t.shape[1]).to(t.dtype)[:, ::2].copy_(t)


@pytest.mark.parametrize("layout", ["transposed weight", "strided", "expanded dy", "offset"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout_of_the_operands(base_gemm, layout, dtype):
    case = draw_case(21, 30, 26, 4, dtype=dtype)
    if layout == "transposed weight":
        case.weight = case.weight.t().contiguous().t()
    elif layout == "strided":
        case.x, case.weight, case.dy = strided(case.x), strided(case.weight), strided(case.dy)
    elif layout == "expanded dy":
        case.dy = case.dy[:1, :1].expand_as(case.dy)
    else:
        buffer = torch.empty(case.x.numel() + 1, dtype=dtype)
        case.x = buffer[1:].view_as(case.x).copy_(case.x)
    check(case)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_activation_in_fp32(activation, orientation):
    check(draw_case(33, 65, 47, 8, orientation=orientation, activation=activation, depth=1))


def test_sin2pi_is_right_for_large_arguments():
    # 2*pi*z in fp32 is off by 4e-4 at z = 5000; z - rint(z) loses nothing.
    z = torch.linspace(-5000, 5000, 997)
    H = nk.functional.neat_features(torch.ones(1, 1), z[:, None], activation="sin2pi", orientation="in")
    exact = torch.sin(2 * torch.pi * (z.double() - z.double().round()))
    assert (H[0].double() - exact).abs().max() < 1e-6
