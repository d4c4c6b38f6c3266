"""Operands wherever they lie in memory: transposed, cut from larger buffers, off alignment, expanded."""

import pytest
import torch
from harness import check, draw, fused, interpreter_only, use_plan
from triton.runtime import interpreter

import neat_kernels as nk
from neat_kernels.vocabulary import ORIENTATIONS

SHAPE = (37, 45, 70, 5)


def transposed(t):
    return t.t().contiguous().t()


def slice_of_a_wider_buffer(t):
    buffer = t.new_full((t.shape[0] + 4, t.shape[1] + 7), float("nan"))
    return buffer[3:-1, 5:-2].copy_(t)


def every_second_column(t):
    buffer = t.new_full((t.shape[0], 2 * t.shape[1]), float("nan"))
    return buffer[:, ::2].copy_(t)


def off_alignment(t):
    buffer = t.new_full((t.numel() + 2,), float("nan"))
    return buffer[1:-1].view_as(t).copy_(t)


LAYOUTS = [transposed, slice_of_a_wider_buffer, every_second_column, off_alignment]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("operand", ["x", "weight", "dy", "A", "B"])
@pytest.mark.parametrize(
    ("orientation", "dtype"), [("out", torch.bfloat16), ("in", torch.float32)], ids=lambda v: str(v)
)
def test_matrices(orientation, dtype, operand, layout):
    case = draw(*SHAPE, dtype=dtype, orientation=orientation)
    plain = getattr(case, operand)
    setattr(case, operand, layout(plain))
    assert getattr(case, operand).stride() != plain.stride() or layout is off_alignment
    check(case)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_all_at_once(orientation):
    case = draw(*SHAPE, dtype=torch.float16, orientation=orientation, depth=1)
    case.x, case.weight, case.dy = every_second_column(case.x), transposed(case.weight), transposed(case.dy)
    case.A, case.B = slice_of_a_wider_buffer(case.A), transposed(case.B)
    case.encoders, case.decoders = [transposed(case.encoders[0])], [every_second_column(case.decoders[0])]
    check(case)


@interpreter_only
@pytest.mark.parametrize("operand", ["x", "weight", "dy"])
def test_rows_farther_apart_than_an_int32_can_say(operand, monkeypatch):
    # The last row starts at element 2³¹ + 2. Nothing but the three rows is ever touched, hence no copy of the storage.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    case = draw(3, 3, 5, 2, dtype=torch.bfloat16)
    plain = getattr(case, operand)
    buffer = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    setattr(case, operand, buffer.as_strided(plain.shape, (2**30 + 1, 1)).copy_(plain))
    check(case)


@pytest.mark.parametrize("stride", [(0, 1), (1, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("operand", ["x", "dy"])
def test_expanded_tokens(operand, stride):
    case = draw(*SHAPE, dtype=torch.bfloat16)
    t = getattr(case, operand)
    row = t[:1] if stride[0] == 0 else t
    setattr(case, operand, (row if stride[1] else row[:, :1]).expand_as(t))
    check(case)


def test_the_gradient_of_a_sum():
    case = draw(*SHAPE)
    x = case.x.requires_grad_()
    nk.functional.neat_linear(x, case.weight, case.A, case.B, backend="triton").sum().backward()
    case.dy, case.bias = torch.ones_like(case.dy), None
    assert torch.equal(x.grad, fused(case, activation="relu")["dx"])


@pytest.mark.parametrize("layout", ["every second", "expanded", "off alignment"])
@pytest.mark.parametrize("plan", ["fused", "cublas"])
def test_bias(plan, layout, monkeypatch):
    use_plan(monkeypatch, plan)
    case = draw(*SHAPE)
    bias = case.bias
    if layout == "every second":
        case.bias = bias.new_full((2 * len(bias),), float("nan"))[::2].copy_(bias)
    elif layout == "expanded":
        case.bias = bias[:1].expand_as(bias)
    else:
        case.bias = off_alignment(bias)
    check(case, plan=plan)


@pytest.mark.parametrize("shape", [(70,), (1, 70), (2, 3, 70), (2, 2, 3, 70), (2, 0, 70)], ids=str)
def test_tokens_of_any_rank(shape):
    case = draw(*SHAPE, depth=1)
    case.x = torch.randn(shape, device=case.x.device)
    case.dy = torch.randn((*shape[:-1], 45), device=case.x.device)
    results = fused(case)
    assert results["y"].shape == case.dy.shape
    assert results["dx"].shape == shape
    case.x, case.dy = case.x.reshape(-1, 70), case.dy.reshape(-1, 45)
    for name, value in fused(case).items():
        assert torch.equal(value, results[name].reshape(value.shape)), name
