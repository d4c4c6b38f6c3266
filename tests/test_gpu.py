"""What only a GPU shows of the torch backend; skipped without one."""

import pytest
import torch
from budget import assert_within_budget, branch_rounding, draw_case, evaluate
from cuda_graphs import capture

import neat_kernels as nk
from neat_kernels.torch_backend.dropout import keep_mask
from neat_kernels.vocabulary import HALF_DTYPES, ORIENTATIONS

pytestmark = pytest.mark.gpu

SHAPES = [(1, 17, 5, 3), (37, 127, 3, 16), (64, 48, 80, 33), (600, 512, 1031, 16)]


def check(case, **more):
    case = case.map(lambda t: t.cuda())
    fused = evaluate(nk.functional.neat_linear, case, backend="torch", **more)
    eager = evaluate(nk.reference.neat_linear, case, **more)
    extra = branch_rounding(case) if case.x.dtype in HALF_DTYPES else None
    assert_within_budget(fused, eager, case, extra)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_gradient(dtype, orientation, shape):
    check(draw_case(*shape, dtype=dtype, orientation=orientation, depth=1))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("compute_dtype", [None, torch.float32], ids=str)
def test_fp32_adapter_over_a_bf16_weight(orientation, compute_dtype):
    case = draw_case(45, 96, 72, 6, dtype=torch.bfloat16, adapter_dtype=torch.float32, orientation=orientation)
    check(case, compute_dtype=compute_dtype)


def test_features_ignore_the_tf32_setting():
    weight, A = torch.randn(256, 512, device="cuda"), torch.randn(16, 256, device="cuda")
    exact = nk.functional.neat_features(weight.double(), A.double(), activation="sin2pi")
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        H = nk.functional.neat_features(weight, A, activation="sin2pi")
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    # |Z| is about 16: fp32 rounding moves 2*pi*Z by some 1e-5, TF32 rounding by some 1e-1.
    assert (H.double() - exact).abs().max() < 1e-3


def test_the_dropout_mask_is_the_cpus():
    seed = torch.tensor([0x0123456789ABCDEF])
    on_gpu = keep_mask(seed.cuda(), slice(5, 400), 311, 0.3)
    assert torch.equal(on_gpu.cpu(), keep_mask(seed, slice(5, 400), 311, 0.3))


def test_a_training_step_in_a_cuda_graph():
    layer = nk.FusedNeatLinear(64, 96, r=8, device="cuda")
    torch.nn.init.normal_(layer.neat_B)
    x = torch.randn(32, 64, device="cuda", requires_grad=True)

    def step():
        return torch.autograd.grad(layer(x).square().sum(), [x, layer.neat_A, layer.neat_B])

    graph, captured = capture(step)
    with torch.no_grad():
        x.normal_()
    graph.replay()
    for replayed, eager in zip(captured, step(), strict=True):
        torch.testing.assert_close(replayed, eager)
