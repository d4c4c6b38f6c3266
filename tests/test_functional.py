"""The functional API: what it refuses and how it says so, and that its three functions agree with each other."""

import pytest
import torch

import neat_kernels as nk
from neat_kernels.torch_backend.gemm import transposed_times

N, K, R = 7, 9, 3


def arguments(**changes):
    made = {
        "x": torch.randn(4, K),
        "weight": torch.randn(N, K),
        "A": torch.randn(R, N),
        "B": torch.randn(N, R),
        "bias": torch.randn(N),
    }
    return {**made, **changes}


REFUSED = {
    "x of another width": ({"x": torch.randn(4, K + 1)}, r"x must be \[\.\.\., 9\].*got \(4, 10\)"),
    "x without dimensions": ({"x": torch.tensor(1.0)}, r"x must be \[\.\.\., 9\].*got \(\)"),
    "x in another dtype": ({"x": torch.randn(4, K).double()}, "float32 outside autocast, got torch.float64"),
    "integer x": ({"x": torch.ones(4, K, dtype=torch.int64)}, "x must be float64.*got torch.int64"),
    "trainable weight": ({"weight": torch.randn(N, K, requires_grad=True)}, "must be frozen, got requires_grad=True"),
    "1-D weight": ({"weight": torch.randn(N)}, r"\[out_features, in_features\], got shape \(7,\)"),
    "int8 weight": ({"weight": torch.ones(N, K, dtype=torch.int8)}, "weight must be float64.*got torch.int8"),
    "float8 weight": ({"weight": torch.ones(N, K).to(torch.float8_e4m3fn)}, "weight must be float64.*got torch.float8"),
    "meta weight": ({"weight": torch.empty(N, K, device="meta")}, "must hold data, got a tensor on the meta device"),
    "A for the other orientation": ({"orientation": "in"}, r"A must be \[r, 9\].*'in', got \(3, 7\)"),
    "empty A": ({"A": torch.randn(0, N)}, r"A must be \[r, 7\].*got \(0, 7\)"),
    "integer A": ({"A": torch.ones(R, N, dtype=torch.int32)}, "A must be float64.*got torch.int32"),
    "B of another rank": ({"B": torch.randn(N, R + 1)}, r"B must be \[7, 3\].*got \(7, 4\)"),
    "B in another dtype": ({"B": torch.randn(N, R).half()}, "in A's torch.float32, got .* in torch.float16"),
    "bias of another size": ({"bias": torch.randn(N + 1)}, r"bias must be \[7\], got \(8,\)"),
    "bias in another dtype": ({"bias": torch.randn(N).half()}, "bias must have the weight's dtype"),
    "A elsewhere": ({"A": torch.empty(R, N, device="meta")}, "A must be on the weight's device cpu, got meta"),
    "x elsewhere": ({"x": torch.empty(4, K, device="meta")}, "x must be on the weight's device cpu, got meta"),
    "unknown orientation": ({"orientation": "up"}, "orientation must be one of 'out', 'in'; got 'up'"),
    "unknown activation": ({"activation": "mish"}, "activation must be one of 'relu'.*got 'mish'"),
    "unknown backend": ({"backend": "cuda"}, "backend must be one of 'auto', 'torch', 'triton'; got 'cuda'"),
    "unpaired chain": ({"encoders": [torch.randn(R, R)]}, "must pair up, got 1 and 0"),
    "chain of another rank": (
        {"encoders": [torch.randn(R, R)], "decoders": [torch.randn(R, R + 1)]},
        r"decoders\[0\] must be \[3, 3\].*got \(3, 4\)",
    ),
    "infinite scaling": ({"scaling": float("inf")}, "scaling must be finite, got inf"),
    "dropout of one": ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    "narrower branch": ({"compute_dtype": torch.bfloat16}, "compute_dtype must be None, the input's torch.float32"),
    "integer branch": ({"compute_dtype": torch.int8}, "compute_dtype must be None or one of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        nk.functional.neat_linear(**arguments(**changes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"orientation": "Out"}, "orientation must be one of 'out', 'in'; got 'Out'"),
        ({"activation": "mish"}, "activation must be one of"),
        ({"encoders": [torch.eye(R)] * 2, "decoders": [torch.eye(R)]}, "must pair up, got 2 and 1"),
    ],
)
def test_the_reference_refuses_what_would_be_another_function(options, message):
    with pytest.raises(ValueError, match=message):
        nk.reference.neat_features(torch.randn(N, N), torch.randn(R, N), **options)


def test_an_explicit_backend_never_falls_back():
    with pytest.raises(nk.BackendUnavailableError, match=r"backend='triton' was requested.*but"):
        nk.functional.neat_linear(**arguments(backend="triton"))


@pytest.mark.parametrize("orientation", ["out", "in"])
def test_neat_is_features_and_a_low_rank_linear(orientation):
    columns = N if orientation == "out" else K
    a = arguments(A=torch.randn(R, columns), B=torch.randn(columns, R))
    H = nk.functional.neat_features(a["weight"], a["A"], orientation=orientation, activation="tanh")
    down, up = (H, a["B"]) if orientation == "out" else (a["B"], H)
    assert torch.equal(
        nk.functional.low_rank_linear(a["x"], a["weight"], down, up, a["bias"], scaling=0.5),
        nk.functional.neat_linear(**a, orientation=orientation, activation="tanh", scaling=0.5),
    )


def test_low_rank_linear_is_a_lora_layer():
    x, weight = torch.randn(4, K, dtype=torch.float64), torch.randn(N, K, dtype=torch.float64)
    lora_A, lora_B = torch.randn(R, K, dtype=torch.float64), torch.randn(N, R, dtype=torch.float64)
    y = nk.functional.low_rank_linear(x, weight, lora_A.t(), lora_B, scaling=2.0)
    torch.testing.assert_close(y, x @ (weight + 2.0 * lora_B @ lora_A).t())


@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 3, K), (2, 1, 3, 2, K), (0, K), (2, 0, K)], ids=str)
def test_input_of_any_rank(shape):
    a = arguments(x=torch.randn(shape, requires_grad=True), A=torch.randn(R, N, requires_grad=True))
    y = nk.functional.neat_linear(**a)
    assert y.shape == (*shape[:-1], N)
    y.sum().backward()
    assert a["x"].grad.shape == shape
    if y.numel() == 0:
        assert not a["A"].grad.any()


def update(weight, A, B, activation):
    """ΔW of an "in" layer as a matrix, through the public functions."""
    H = nk.functional.neat_features(weight, A, orientation="in", activation=activation)
    eye = torch.eye(weight.shape[1], dtype=weight.dtype)
    y = nk.functional.low_rank_linear(eye, torch.zeros_like(weight), B, H)
    return y.t()


@pytest.mark.parametrize("rank", [1, 3])
def test_relu_of_width_two_r_projects_any_update_onto_the_column_space(rank):
    # relu(WΨ)·B* - relu(-WΨ)·B* = WΨ·B*, and with Ψ = W⁺A* that is WW⁺·A*B*.
    weight = torch.randn(12, 5, dtype=torch.float64)
    left, right = torch.randn(12, rank, dtype=torch.float64), torch.randn(rank, 5, dtype=torch.float64)
    psi = torch.linalg.pinv(weight) @ left
    A, B = torch.cat([psi, -psi], 1).t(), torch.cat([right, -right]).t()
    projection = weight @ torch.linalg.pinv(weight)
    torch.testing.assert_close(update(weight, A, B, "relu"), projection @ left @ right, rtol=0, atol=1e-12)


def test_sin2pi_of_width_r_reproduces_any_rank_r_product_over_a_wide_weight():
    weight = torch.randn(5, 12, dtype=torch.float64)
    left, right = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    scale = left.abs().max() * 1.01
    angle = torch.asin(left / scale) / (2 * torch.pi)
    A = (torch.linalg.pinv(weight) @ angle).t()
    got = update(weight, A, (scale * right).t(), "sin2pi")
    torch.testing.assert_close(got, left @ right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("columns", [31, 32, 40])
def test_a_narrow_product_is_the_same_in_either_form(columns, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    a, p = torch.randn(50, 23), torch.randn(50, columns)
    exact = p.double().t() @ a.double()
    got = transposed_times(a, p, torch.float32)
    assert got.shape == (columns, 23)
    assert (got - exact).norm() <= 1e-6 * exact.norm()
