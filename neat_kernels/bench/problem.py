"""The inputs that every contender is given, and the float64 answer that every contender is held to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from neat_kernels.bench.shapes import LayerShape

Update = Literal["none", "lora", "neat"]

# Half the norm of W: an adapter that is dropped or misapplied moves every result far beyond any rounding.
_UPDATE_NORM = 0.5
# A feature this close to relu's kink may fall on its other side in fp32, which is no error of a contender.
_KINK = 1e-5


@dataclass(frozen=True)
class Problem:
    """One layer's frozen weight, adapter, input and upstream gradient.

    Args:
        weight: W [N,K], frozen.
        bias: [N], frozen.
        x: [M,K], requires a gradient.
        dy: [M,N], the gradient that arrives from above.
        adapters: for each kind of update its A ([r,K] for LoRA, [r,N] for Neat) and B [N,r], with values that
            the problem's dtype holds exactly, kept in float32 so that a contender may store them in either.
        answers: what `answer` has computed already.
    """

    shape: LayerShape
    weight: Tensor
    bias: Tensor
    x: Tensor
    dy: Tensor
    adapters: dict[Update, tuple[Tensor, Tensor]]
    answers: dict[Update, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of W, x and dy."""
        return self.weight.dtype


def make_problem(shape: LayerShape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Problem:
    """Draw a problem of `shape`; the same seed gives the same problem.

    Args:
        shape: the layer.
        dtype: of W, bias, x and dy.
        device: where the tensors live; they are drawn on the CPU, so that every device gets the same ones.
        seed: of the draw.

    Returns:
        The problem, its B non-zero.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(dtype)

    K, N, r = shape.in_features, shape.out_features, shape.r
    weight = draw(N, K, scale=K**-0.5)
    bias = draw(N)
    x = draw(shape.tokens, K)
    dy = draw(shape.tokens, N)
    lora_A = draw(r, K, scale=K**-0.5)
    wide = weight.double()
    neat_A = draw(r, N, scale=N**-0.5)
    while (kinked := _rows_at_kink(wide, neat_A)).any():
        neat_A[kinked] = draw(int(kinked.sum()), N, scale=N**-0.5)
    adapters: dict[Update, tuple[Tensor, Tensor]] = {}
    drawn: list[tuple[Update, Tensor]] = [("lora", lora_A), ("neat", neat_A)]
    for update, A in drawn:
        B = draw(N, r)
        ratio = _UPDATE_NORM * wide.norm() / _delta(update, wide, A.double(), B.double()).norm()
        adapters[update] = (A.float().to(device), (B * ratio).to(dtype).float().to(device))
    return Problem(shape, weight.to(device), bias.to(device), x.to(device).requires_grad_(), dy.to(device), adapters)


def answer(problem: Problem, update: Update) -> dict[str, Tensor]:
    """What one forward and backward must give, computed in float64 through a dense ΔW.

    y = x·(W + ΔW)ᵀ + bias;  ΔW = B·A (LoRA), B·relu(A·W) (Neat)

    Args:
        problem: the inputs.
        update: which ΔW.

    Returns:
        y, dx and, where the update has them, dA and dB.
    """
    if update not in problem.answers:
        problem.answers[update] = _answer(problem, update)
    return problem.answers[update]


def _answer(problem: Problem, update: Update) -> dict[str, Tensor]:
    weight, bias, x, dy = (t.detach().double() for t in (problem.weight, problem.bias, problem.x, problem.dy))
    leaves = {"dx": x.requires_grad_()}
    if update == "none":
        y = torch.nn.functional.linear(x, weight, bias)
    else:
        A, B = (t.double().requires_grad_() for t in problem.adapters[update])
        leaves |= {"dA": A, "dB": B}
        y = torch.nn.functional.linear(x, weight + _delta(update, weight, A, B), bias)
    gradients = torch.autograd.grad(y, tuple(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def tolerance(problem: Problem) -> float:
    """The largest relative error in the Frobenius norm at which a contender still counts as right.

    Eight roundings to the problem's dtype, more than any path through the layer has, and eight times the random
    walk of an fp32 accumulation over the longest reduction.
    """
    unit_roundoff = torch.finfo(problem.dtype).eps / 2
    longest = max(problem.shape.tokens, problem.shape.in_features, problem.shape.out_features)
    return 8 * unit_roundoff + 8 * 2.0**-24 * math.sqrt(longest)


def _delta(update: Update, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return B @ A if update == "lora" else B @ torch.relu(A @ weight)


def _rows_at_kink(weight: Tensor, A: Tensor) -> Tensor:
    Z = (A.double() @ weight).abs()
    return (Z <= _KINK * Z.max()).any(dim=1)
