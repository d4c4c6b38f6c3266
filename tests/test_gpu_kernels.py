"""What only a GPU shows of the Triton backend: tensor cores, 64-bit offsets, streams, graphs. Skipped without one.

The tests in tests/kernels run on a GPU too, unchanged; these come on top of them.
"""

import pytest
import torch
from budget import UNIT_TF32X3, assert_within_budget, branch_rounding, draw_case, evaluate
from cuda_graphs import capture

import neat_kernels as nk
from neat_kernels.torch_backend.low_rank import Branch, Needs
from neat_kernels.torch_backend.merge import round_stochastically
from neat_kernels.vocabulary import HALF_DTYPES, ORIENTATIONS

pytestmark = pytest.mark.gpu

# Several tiles of every configuration, ragged against all of them; the last is not 16-byte aligned.
SHAPES = [(2048, 1024, 768, 16), (515, 2304, 1536, 33), (300, 1031, 1031, 8)]


@pytest.fixture(params=["fused", "cublas"])
def plan(request, monkeypatch):
    monkeypatch.setattr("neat_kernels.plan.choose_gemm", lambda device, dtype, length: request.param)
    return request.param


def on_gpu(*shape, **options):
    return draw_case(*shape, **options).map(lambda t: t.cuda())


def check(case, plan, **more):
    fused = evaluate(nk.functional.neat_linear, case, backend="triton", **more)
    eager = evaluate(nk.reference.neat_linear, case, **more)
    rounded_twice = plan == "cublas" and case.x.dtype in HALF_DTYPES
    unit = UNIT_TF32X3 if case.x.dtype == torch.float32 else None
    assert_within_budget(fused, eager, case, branch_rounding(case) if rounded_twice else None, unit)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_every_gradient_on_tensor_cores(plan, dtype, orientation, shape):
    check(on_gpu(*shape, dtype=dtype, orientation=orientation), plan)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_gradient_in_fp32(orientation, shape):
    check(on_gpu(*shape, orientation=orientation), "cublas")


@pytest.mark.parametrize("r", [32, 64, 128])
@pytest.mark.parametrize("activation", ["tanh", "sin2pi", "gelu"])
def test_the_chain(activation, r):
    check(on_gpu(512, 768, 1024, r, dtype=torch.bfloat16, depth=2, activation=activation), "fused")


@pytest.mark.parametrize("compute_dtype", [None, torch.float32], ids=str)
def test_fp32_adapters_over_a_bf16_weight(plan, compute_dtype):
    case = on_gpu(600, 768, 1024, 16, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    check(case, plan, compute_dtype=compute_dtype)


def test_features_ignore_the_tf32_setting(monkeypatch):
    weight, A = torch.randn(256, 512, device="cuda"), torch.randn(16, 256, device="cuda")
    exact = nk.functional.neat_features(weight.double(), A.double(), activation="sin2pi", backend="torch")
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    H = nk.functional.neat_features(weight, A, activation="sin2pi", backend="triton")
    # |Z| is about 16: fp32 rounding moves 2*pi*Z by some 1e-5, TF32 rounding by some 1e-1.
    assert (H.double() - exact).abs().max() < 1e-3


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_two_runs_give_the_same_bits(plan, dropout):
    case = on_gpu(4096, 1024, 2048, 16, dtype=torch.bfloat16, depth=1)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(evaluate(nk.functional.neat_linear, case, backend="triton", dropout=dropout, training=True))
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def merge(*args):
    from neat_kernels.kernels import merge

    return merge.merge(*args)


def token_side(x, weight, D, U, dy, backend="triton:fused:fused"):
    from neat_kernels.kernels import low_rank

    branch = Branch(0.5, 0.0, None, backend)
    y, S = low_rank.forward(x, weight, None, D, U, None, branch)
    needs = Needs(True, torch.float32, torch.float32, torch.float32)
    return y, *low_rank.backward(dy, x, weight, D, U, S, None, branch, needs)


def test_offsets_beyond_31_bits():
    # 2²⁰ + 5 rows of 2,080 columns: 2.2e9 elements in y and dy, 4.4 GB each; all tokens but the last 37 are zero.
    tokens, kept, out_features, in_features, r = 2**20 + 5, 37, 2080, 2072, 16
    assert tokens * in_features > 2**31
    cuda = {"device": "cuda", "dtype": torch.bfloat16}
    weight = torch.randn(out_features, in_features, **cuda)
    D, U = torch.randn(in_features, r, device="cuda"), torch.randn(out_features, r, device="cuda")
    x, dy = torch.zeros(tokens, in_features, **cuda), torch.zeros(tokens, out_features, **cuda)
    x[-kept:].normal_()
    dy[-kept:].normal_()
    y, dx, dD, dU, dbias = token_side(x, weight, D, U, dy)
    alone = token_side(x[-kept:].clone(), weight, D, U, dy[-kept:].clone())
    assert torch.equal(y[-kept:], alone[0])
    assert torch.equal(dx[-kept:], alone[1])
    assert not y[:-kept].any()
    assert not dx[:-kept].any()
    for sums, expected in zip((dD, dU, dbias), alone[2:], strict=True):
        torch.testing.assert_close(sums, expected)


@pytest.mark.parametrize("shape", [(1024, 768, 16), (2304, 1536, 33), (1031, 1031, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_merge_on_tensor_cores(dtype, shape):
    N, K, r = shape
    W = torch.randn(N, K, device="cuda").to(dtype)
    D, U = torch.randn(K, r, device="cuda"), torch.randn(N, r, device="cuda")
    merged, finite = merge(W, D, U, 0.5, None)
    assert finite
    exact = W.double() + 0.5 * U.double() @ D.double().t()
    size = W.double().abs() + 0.5 * U.double().abs() @ D.double().abs().t()
    error = (merged.double() - exact).abs()
    # r products and sums, the scaling and W in fp32; three TF32 products keep 22 bits of a factor.
    relative = (r + 3) * 2.0**-24 + 3 * 2.0**-22
    assert (error <= relative * size + torch.finfo(dtype).eps / 2 * merged.double().abs()).all()


@pytest.mark.parametrize("seed", [None, 2**62 + 5])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_merge_beyond_31_bits(transposed, seed):
    # 2²⁰ + 5 rows of 2,080 columns: 2.2e9 elements, 4.4 GB; the torch backend merges the last 37 rows alone.
    rows, kept, columns = 2**20 + 5, 37, 2080
    assert rows * columns > 2**31
    W = torch.zeros(columns, rows, device="cuda", dtype=torch.bfloat16).t() if transposed else None
    W = torch.zeros(rows, columns, device="cuda", dtype=torch.bfloat16) if W is None else W
    W[-kept:] = (1 + torch.randint(0, 128, (kept, columns), device="cuda") / 128).bfloat16()
    D = torch.randint(-16, 17, (columns, 3), device="cuda") / 8
    U = torch.zeros(rows, 3, device="cuda")
    U[-kept:] = torch.randint(-16, 17, (kept, 3), device="cuda") / 8
    key = None if seed is None else torch.tensor([seed], device="cuda")
    merged, finite = merge(W, D, U, 0.5, key)
    assert finite
    assert merged.stride() == W.stride()
    assert not merged[:-kept].any()
    total = W[-kept:].float() + 0.5 * U[-kept:].double().mm(D.double().t()).float()
    index = torch.arange((rows - kept) * columns, rows * columns, device="cuda").view(kept, columns)
    expected = total.bfloat16() if key is None else round_stochastically(total, key, index)
    assert torch.equal(merged[-kept:], expected)


def test_a_stream_that_is_not_the_default():
    case = on_gpu(256, 256, 256, 8, dtype=torch.bfloat16)
    expected = evaluate(nk.functional.neat_linear, case, backend="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        case.x.mul_(1.0)
        got = evaluate(nk.functional.neat_linear, case, backend="triton")
    stream.synchronize()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_the_device_of_x_and_not_the_current_one():
    case = draw_case(64, 48, 80, 4, dtype=torch.bfloat16)
    expected = evaluate(nk.functional.neat_linear, case.map(lambda t: t.to("cuda:0")), backend="triton")
    got = evaluate(nk.functional.neat_linear, case.map(lambda t: t.to("cuda:1")), backend="triton")
    for name, value in expected.items():
        assert got[name].device == torch.device("cuda:1")
        assert torch.equal(value.cpu(), got[name].cpu()), name


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_training_step_in_a_cuda_graph(plan, dropout):
    layer = nk.FusedNeatLinear(256, 384, r=8, depth=1, device="cuda", dtype=torch.bfloat16, backend="triton")
    layer.dropout = dropout
    torch.nn.init.normal_(layer.neat_B)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    leaves = [x, layer.neat_A, layer.neat_B]

    def step():
        y = layer(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]

    graph, captured = capture(step)
    with torch.no_grad():
        x.normal_()
    graph.replay()
    if dropout:
        first = captured[0].clone()
        graph.replay()
        assert not torch.equal(captured[0], first), "every replay draws another mask"
        return
    for replayed, eager in zip(captured, step(), strict=True):
        assert torch.equal(replayed, eager)
