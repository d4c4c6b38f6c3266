"""Where a value is rounded, and where it is not: one small number that survives only in fp32."""

import pytest
import torch
from harness import DEVICE, use_plan

import neat_kernels as nk

HALVES = (torch.bfloat16, torch.float16)
# 1 + LITTLE is 1 in either half dtype, and LITTLE alone is exact.
LITTLE = 2.0**-12
# What is left of (1 + LITTLE) - 1: nothing if the branch is half, all of it if the branch is fp32.
LEFT = {None: 0.0, torch.float32: LITTLE}


def matrix(rows, dtype=torch.float32):
    return torch.tensor(rows, dtype=torch.float32, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("compute_dtype", [None, torch.float32], ids=str)
class TestTheBranchDtype:
    def y(self, dtype, compute_dtype, x, weight, down, up):
        return nk.functional.low_rank_linear(
            matrix(x, dtype),
            matrix(weight, dtype),
            matrix(down),
            matrix(up),
            compute_dtype=compute_dtype,
            backend="triton",
        ).item()

    def test_of_down(self, dtype, compute_dtype):
        y = self.y(dtype, compute_dtype, [[1.0]], [[-1.0]], [[1 + LITTLE]], [[1.0]])
        assert y == LEFT[compute_dtype]

    def test_of_up(self, dtype, compute_dtype):
        y = self.y(dtype, compute_dtype, [[1.0]], [[-1.0]], [[1.0]], [[1 + LITTLE]])
        assert y == LEFT[compute_dtype]

    def test_of_S(self, dtype, compute_dtype):
        y = self.y(dtype, compute_dtype, [[1.0, LITTLE]], [[-1.0, 0.0]], [[1.0], [1.0]], [[1.0]])
        assert y == LEFT[compute_dtype]

    def gradients(self, dtype, compute_dtype, down=1.0, up=(1.0, 1.0), dy=(1.0, LITTLE)):
        """dx and dD of one token, where the frozen part of dx is -dy[0]."""
        x, factor = matrix([[1.0]], dtype).requires_grad_(), matrix([[down]]).requires_grad_()
        weight, up = matrix([[-1.0], [0.0]], dtype), matrix([[up[0]], [up[1]]])
        y = nk.functional.low_rank_linear(x, weight, factor, up, compute_dtype=compute_dtype, backend="triton")
        dx, ddown = torch.autograd.grad(y, [x, factor], matrix([list(dy)], dtype))
        return dx.item(), ddown.item()

    def test_of_dS(self, dtype, compute_dtype):
        assert self.gradients(dtype, compute_dtype) == (LEFT[compute_dtype], 1 + LEFT[compute_dtype])

    def test_of_down_in_dx(self, dtype, compute_dtype):
        assert self.gradients(dtype, compute_dtype, down=1 + LITTLE, dy=(1.0, 0.0))[0] == LEFT[compute_dtype]

    def test_of_up_in_dS(self, dtype, compute_dtype):
        _, ddown = self.gradients(dtype, compute_dtype, up=(1 + LITTLE, 1.0), dy=(1.0, 0.0))
        assert ddown == 1 + LEFT[compute_dtype]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
class TestTheFeaturesAreFp32:
    def test_over_an_fp32_A(self, dtype):
        H = nk.functional.neat_features(
            matrix([[1.0]], dtype), matrix([[1 + LITTLE]]), activation="identity", backend="triton"
        )
        assert H.item() == 1 + LITTLE

    def test_as_a_sum_of_halves(self, dtype):
        weight, A = matrix([[1.0], [LITTLE]], dtype), matrix([[1.0, 1.0]], dtype)
        H = nk.functional.neat_features(weight, A, activation="identity", backend="triton")
        assert H.item() == 1 + LITTLE

    @pytest.mark.parametrize("depth", [0, 1])
    def test_their_backward(self, dtype, depth):
        A = matrix([[1.0]]).requires_grad_()
        chain = [matrix([[1.0]])] * depth
        H = nk.functional.neat_features(
            matrix([[1.0]], dtype), A, encoders=chain, decoders=chain, activation="identity", backend="triton"
        )
        (dA,) = torch.autograd.grad(H, A, matrix([[1 + LITTLE]]))
        # With a pair of identities H = Z + Z.
        assert dA.item() == (1 + depth) * (1 + LITTLE)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("plan", "expected"), [("fused", LITTLE), ("cublas", 0.0)])
def test_the_fused_plan_rounds_the_output_once(plan, expected, dtype, monkeypatch):
    # s·S·Uᵀ = 1 + 2⁻¹² comes from exact halves; cuBLAS accumulates onto it in y's dtype.
    use_plan(monkeypatch, plan)
    x, weight = matrix([[1.0]], dtype), matrix([[-1.0]], dtype)
    y = nk.functional.low_rank_linear(x, weight, matrix([[1.0, LITTLE]]), matrix([[1.0, 1.0]]), backend="triton")
    assert y.item() == expected


def test_a_gradient_is_rounded_once_to_its_parameters_dtype():
    # Σ dy = 1 + 2⁻⁸ + 2⁻¹⁶ lies just over a tie of bf16, and at it if a partial sum were rounded.
    dy = matrix([[1.0], [2.0**-8], [2.0**-16]], torch.bfloat16)
    bias = matrix([0.0], torch.bfloat16).requires_grad_()
    x, weight = matrix([[0.0]] * 3, torch.bfloat16), matrix([[0.0]], torch.bfloat16)
    y = nk.functional.low_rank_linear(x, weight, matrix([[0.0]]), matrix([[0.0]]), bias, backend="triton")
    (dbias,) = torch.autograd.grad(y, bias, dy)
    assert dbias.item() == 1 + 2.0**-7
