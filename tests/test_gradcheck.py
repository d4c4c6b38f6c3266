"""Hand-written backward against finite differences in float64, over orientations, depths and activations."""

import itertools

import pytest
import torch
from budget import draw_case

import neat_kernels as nk
from neat_kernels.vocabulary import ACTIVATIONS, ORIENTATIONS


@pytest.mark.parametrize(
    ("orientation", "depth", "activation"), list(itertools.product(ORIENTATIONS, range(3), ACTIVATIONS)), ids=str
)
def test_every_gradient(orientation, depth, activation):
    case = draw_case(4, 5, 6, 3, dtype=torch.float64, orientation=orientation, depth=depth, activation=activation)
    leaves = [t.requires_grad_() for t in case.leaves().values()]

    def layer(x, A, B, bias, *chain):
        return nk.functional.neat_linear(
            x,
            case.weight,
            A,
            B,
            bias,
            encoders=chain[:depth],
            decoders=chain[depth:],
            orientation=orientation,
            activation=activation,
            scaling=0.7,
        )

    assert torch.autograd.gradcheck(layer, leaves, fast_mode=False)


def test_every_gradient_under_dropout(monkeypatch):
    monkeypatch.setattr("neat_kernels.functional.draw_seed", lambda x: torch.tensor([17]))
    case = draw_case(4, 5, 6, 3, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in case.leaves().values()]

    def layer(x, A, B, bias):
        return nk.functional.neat_linear(x, case.weight, A, B, bias, dropout=0.4, training=True)

    assert torch.autograd.gradcheck(layer, leaves)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_reference_is_twice_differentiable_and_has_forward_mode(orientation):
    case = draw_case(3, 4, 5, 2, dtype=torch.float64, orientation=orientation, depth=1, activation="tanh")
    leaves = [t.requires_grad_() for t in case.leaves().values()]

    def layer(x, A, B, bias, E, D):
        return nk.reference.neat_linear(
            x, case.weight, A, B, bias, encoders=[E], decoders=[D], orientation=orientation, activation="tanh"
        )

    assert torch.autograd.gradcheck(layer, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer, leaves)


def test_double_backward_through_the_fused_path_is_refused():
    case = draw_case(3, 4, 5, 2, dtype=torch.float64)
    A = case.A.requires_grad_()
    y = nk.functional.neat_linear(case.x.requires_grad_(), case.weight, A, case.B)
    (dx,) = torch.autograd.grad(y.square().sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.sum().backward()


def test_forward_mode_through_the_fused_path_is_refused():
    case = draw_case(3, 4, 5, 2)
    for name in ("x", "A", "B"):
        arguments = {"x": case.x, "A": case.A, "B": case.B}

        def layer(t, name=name, arguments=arguments):
            return nk.functional.neat_linear(weight=case.weight, **{**arguments, name: t})

        with pytest.raises(RuntimeError, match="forward-mode"):
            torch.func.jvp(layer, (arguments[name],), (torch.ones_like(arguments[name]),))
