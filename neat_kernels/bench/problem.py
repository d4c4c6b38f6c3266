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


@dataclass(frozen=True, eq=False)
class Problem:
    """One layer's frozen weight, adapter, input and upstream gradient.

    Args:
        weight: W [N,K], frozen.
        bias: [N], frozen.
        x: [M,K], requires a gradient.
        dy: [M,N], the gradient that arrives from above.
        adapters: for each kind of update its A ([r,K] for LoRA, [r,N] for Neat) and B [N,r], with values that
            the problem's dtype holds exactly, kept in float32 so that a contender may store them in either.
        answers: those that were computed already.
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

    @property
    def weight_bytes(self) -> int:
        """Bytes of the frozen weights."""
        return self.weight.nbytes

    def answer(self, update: Update) -> dict[str, Tensor]:
        """What one forward and backward must give, computed in float64 through a dense ΔW.

        y = x·(W + ΔW)ᵀ + bias;  ΔW = B·A (LoRA), B·relu(A·W) (Neat)

        Args:
            update: which ΔW.

        Returns:
            y, dx and, where the update has them, dA and dB.
        """
        if update not in self.answers:
            self.answers[update] = self._answer(update)
        return self.answers[update]

    def tolerance(self, update: Update, name: str) -> float:
        """The largest relative error in the Frobenius norm at which a contender still counts as right.

        Eight roundings to the problem's dtype, more than any path through the layer has, and eight times the random
        walk of an fp32 accumulation over the longest reduction.

        Args:
            update: which ΔW; of one layer every one has the same.
            name: of the result, likewise.
        """
        longest = max(self.shape.tokens, self.shape.in_features, self.shape.out_features)
        return 8 * unit_roundoff(self.dtype) + 8 * unit_roundoff(torch.float32) * math.sqrt(longest)

    def _answer(self, update: Update) -> dict[str, Tensor]:
        weight, bias, x, dy = (t.detach().double() for t in (self.weight, self.bias, self.x, self.dy))
        leaves = {"dx": x.requires_grad_()}
        if update == "none":
            y = torch.nn.functional.linear(x, weight, bias)
        else:
            A, B = (t.double().requires_grad_() for t in self.adapters[update])
            leaves |= {"dA": A, "dB": B}
            y = torch.nn.functional.linear(x, weight + delta(update, weight, A, B), bias)
        gradients = torch.autograd.grad(y, tuple(leaves.values()), dy)
        return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def make_problem(shape: LayerShape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Draw a problem of `shape`, the same one at every call.

    Args:
        shape: the layer.
        dtype: of W, bias, x and dy.
        device: where the tensors live; they are drawn on the CPU, so that every device gets the same ones.

    Returns:
        The problem, its B non-zero.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(dtype)

    K, N, r = shape.in_features, shape.out_features, shape.r
    weight = draw(N, K, scale=K**-0.5)
    bias = draw(N)
    x = draw(shape.tokens, K)
    dy = draw(shape.tokens, N)
    adapters = {update: (A.to(device), B.to(device)) for update, (A, B) in draw_adapters(weight, r, generator).items()}
    return Problem(shape, weight.to(device), bias.to(device), x.to(device).requires_grad_(), dy.to(device), adapters)


def draw_adapters(weight: Tensor, r: int, generator: torch.Generator) -> dict[Update, tuple[Tensor, Tensor]]:
    """A and B of each kind of update for W [N,K], in float32 with values that W's dtype holds exactly.

    ΔW has half the norm of W, and no feature is near relu's kink.
    """
    N, K = weight.shape
    wide = weight.double()

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(weight.dtype)

    lora_A = draw(r, K, scale=K**-0.5)
    neat_A = draw(r, N, scale=N**-0.5)
    while (kinked := _rows_at_kink(wide, neat_A)).any():
        neat_A[kinked] = draw(int(kinked.sum()), N, scale=N**-0.5)
    drawn: list[tuple[Update, Tensor]] = [("lora", lora_A), ("neat", neat_A)]
    adapters: dict[Update, tuple[Tensor, Tensor]] = {}
    for update, A in drawn:
        B = draw(N, r)
        ratio = _UPDATE_NORM * wide.norm() / delta(update, wide, A.double(), B.double()).norm()
        adapters[update] = (A.float(), (B * ratio).to(weight.dtype).float())
    return adapters


def delta(update: Update, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """ΔW = B·A (LoRA), B·relu(A·W) (Neat)."""
    return B @ A if update == "lora" else B @ torch.relu(A @ weight)


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def _rows_at_kink(weight: Tensor, A: Tensor) -> Tensor:
    Z = (A.double() @ weight).abs()
    return (Z <= _KINK * Z.max()).any(dim=1)
