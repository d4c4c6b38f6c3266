"""The registered operators: schemas, fake kernels and autograd registrations, whatever gradients are asked for."""

import itertools

import pytest
import torch

import neat_kernels
from neat_kernels.vocabulary import ORIENTATIONS

OPS = torch.ops.neat_kernels
SEED = torch.tensor([99])


def tensors(dtype=torch.float32, requires_grad=True, adapter_dtype=None):
    shapes = {"x": (6, 9), "bias": (7,), "down": (9, 3), "up": (7, 3)}
    made = {name: torch.randn(shape, dtype=adapter_dtype or dtype) for name, shape in shapes.items()}
    made = {name: t.requires_grad_(requires_grad) for name, t in made.items()}
    for name in ("x", "bias"):
        made[name] = made[name].detach().to(dtype).requires_grad_(requires_grad)
    return made, torch.randn(7, 9, dtype=dtype)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_features_pass_opcheck(orientation, depth, weight_dtype):
    weight = torch.randn(7, 9, dtype=weight_dtype)
    A = torch.randn(3, 7 if orientation == "out" else 9, requires_grad=True)
    chain = torch.randn(2 * depth, 3, 3, requires_grad=True) if depth else None
    torch.library.opcheck(OPS.features.default, (weight, A, chain, orientation, "silu", "torch"))


@pytest.mark.parametrize("need_dA", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("need_dchain", [False, True])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_features_backward_passes_opcheck(orientation, need_dA, need_dchain):
    rows = 9 if orientation == "out" else 7
    weight, Z, dH, chain = torch.randn(7, 9), torch.randn(rows, 3), torch.randn(rows, 3), torch.randn(4, 3, 3)
    torch.library.opcheck(
        OPS.features_backward.default, (dH, weight, Z, chain, orientation, "gelu", need_dA, need_dchain, "torch")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("compute_dtype", [None, torch.float32], ids=str)
def test_low_rank_linear_passes_opcheck(dtype, dropout, compute_dtype):
    if dtype == torch.float64 and compute_dtype is not None:
        compute_dtype = torch.float64
    t, weight = tensors(dtype)
    seed = SEED if dropout else None
    torch.library.opcheck(
        OPS.low_rank_linear.default,
        (t["x"], weight, t["bias"], t["down"], t["up"], seed, 0.5, dropout, compute_dtype, "torch"),
        # AOT's comparison with eager holds bf16 to fp32's tolerance; numbers belong to test_budget.py.
        test_utils=[
            "test_schema",
            "test_autograd_registration",
            "test_faketensor",
            *(["test_aot_dispatch_dynamic"] if dtype != torch.bfloat16 else []),
        ],
    )


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)), ids=str)
def test_low_rank_linear_backward_passes_opcheck(needs):
    need_dx, need_ddown, need_dup, need_dbias = needs
    t, weight = tensors(requires_grad=False, adapter_dtype=torch.bfloat16)
    dtypes = [torch.bfloat16 if need else None for need in (need_ddown, need_dup)]
    torch.library.opcheck(
        OPS.low_rank_linear_backward.default,
        (
            torch.randn(6, 7),
            t["x"] if need_ddown else None,
            weight if need_dx else None,
            t["down"] if need_dx else None,
            t["up"] if need_dx or need_ddown else None,
            torch.randn(6, 3) if need_dup else None,
            None,
            0.5,
            0.0,
            None,
            need_dx,
            *dtypes,
            torch.float32 if need_dbias else None,
            "torch",
        ),
    )


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_neat_linear_passes_opcheck(orientation, depth, dropout):
    t, weight = tensors()
    columns = 7 if orientation == "out" else 9
    A, B = (torch.randn(shape, requires_grad=True) for shape in ((3, columns), (columns, 3)))
    chain = torch.randn(2 * depth, 3, 3, requires_grad=True) if depth else None
    seed = SEED if dropout else None
    torch.library.opcheck(
        OPS.neat_linear.default,
        (t["x"], weight, t["bias"], A, B, chain, seed, orientation, "silu", 0.5, dropout, torch.float32, "torch"),
    )


@pytest.mark.parametrize("leading", [(), (2, 3), (2, 1, 3)], ids=str)
def test_tokens_of_any_rank_pass_opcheck(leading):
    t, weight = tensors()
    x = torch.randn(*leading, 9, requires_grad=True)
    A, B = (torch.randn(shape, requires_grad=True) for shape in ((3, 7), (7, 3)))
    options = (None, 0.5, 0.0, torch.float32, "torch")
    torch.library.opcheck(OPS.low_rank_linear.default, (x, weight, t["bias"], t["down"], t["up"], *options))
    network = (A, B, None, None, "out", "silu")
    torch.library.opcheck(OPS.neat_linear.default, (x, weight, t["bias"], *network, *options[1:]))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=5)), ids=str)
def test_neat_linear_backward_passes_opcheck(needs, orientation):
    """Given exactly what autograd saves for these needs."""
    need_dx, need_dA, need_dB, need_dchain, need_dbias = needs
    need_dH = need_dA or need_dchain
    need_dD, need_dU = (need_dH, need_dB) if orientation == "out" else (need_dB, need_dH)
    read_D, read_U = need_dx, need_dx or need_dD
    read_H, read_B = (read_D, read_U) if orientation == "out" else (read_U, read_D)
    rows, columns = (9, 7) if orientation == "out" else (7, 9)

    def given(wanted, *shape):
        return torch.randn(shape) if wanted else None

    torch.library.opcheck(
        OPS.neat_linear_backward.default,
        (
            torch.randn(6, 7),
            given(need_dD, 6, 9),
            given(need_dx or need_dA, 7, 9),
            given(read_B, columns, 3),
            given(need_dH, 2, 3, 3),
            given(need_dU, 6, 3),
            given(read_H, rows, 3),
            given(need_dH, rows, 3),
            None,
            orientation,
            "gelu",
            0.5,
            0.0,
            None,
            need_dx,
            torch.bfloat16 if need_dA else None,
            torch.bfloat16 if need_dB else None,
            need_dchain,
            torch.float32 if need_dbias else None,
            "torch",
        ),
    )


def test_a_trainable_weight_is_refused_by_the_operators_too():
    t, weight = tensors()
    weight.requires_grad_()
    with pytest.raises(RuntimeError, match="requires_grad_\\(False\\)"):
        OPS.low_rank_linear(t["x"], weight, None, t["down"], t["up"], None, 1.0, 0.0, None, "torch")
    with pytest.raises(RuntimeError, match="requires_grad_\\(False\\)"):
        OPS.features(weight, torch.randn(3, 7), None, "out", "relu", "torch")
    A, B = torch.randn(3, 7), torch.randn(7, 3)
    with pytest.raises(RuntimeError, match="requires_grad_\\(False\\)"):
        OPS.neat_linear(t["x"], weight, None, A, B, None, None, "out", "relu", 1.0, 0.0, None, "torch")


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of this package's operators that ran, with their arguments."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "neat_kernels":
            self.seen.append((func._opname, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("trained", [(), ("x",), ("A",), ("B",), ("bias",), ("encoders",), ("A", "x")], ids=str)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_gradients_nobody_asked_for_are_not_computed(trained, orientation):
    columns = 7 if orientation == "out" else 9
    shapes = {"x": (6, 9), "A": (3, columns), "B": (columns, 3), "bias": (7,), "encoders": (3, 3)}
    leaves = {name: torch.randn(shape).requires_grad_(name in trained) for name, shape in shapes.items()}
    decoder = torch.randn(3, 3)
    given = {**leaves, "encoders": [leaves["encoders"]], "decoders": [decoder]}
    with Calls() as calls:
        y = neat_kernels.functional.neat_linear(weight=torch.randn(7, 9), orientation=orientation, **given)
        if trained:
            y.sum().backward()
    backward = [args for name, args in calls.seen if name == "neat_linear_backward"]
    assert len(backward) == bool(trained)
    for name in leaves:
        assert (leaves[name].grad is not None) == (name in trained)
    if trained:
        need_dx, dA, dB, need_dchain, dbias = backward[0][14:19]
        asked = {
            "x": need_dx,
            "A": dA is not None,
            "B": dB is not None,
            "encoders": need_dchain,
            "bias": dbias is not None,
        }
        assert {name for name, wanted in asked.items() if wanted} == set(trained)
