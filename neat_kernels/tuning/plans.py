"""The reduction up to which the fused base GEMM is the faster, from times of the token side in both plans."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from neat_kernels.kernels import low_rank
from neat_kernels.torch_backend.low_rank import Branch, Needs
from neat_kernels.tuning.problems import Sizes, copies_of
from neat_kernels.tuning.timing import Prepare, Problem

TOKENS, RANK = 8192, 16
LENGTHS = (512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
QUICK_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


class Times(NamedTuple):
    """Median seconds of forward and backward in each plan."""

    fused: float
    cublas: float


def limit(times: Mapping[int, Times]) -> int:
    """The length up to which fused is taken so that, over the lengths that were timed, the ratios' product is least.

    0 takes it nowhere. A single length where noise decided moves the limit little.
    """
    lengths = sorted(times)
    ratios = (math.log(times[length].fused / times[length].cublas) for length in lengths)
    sums = list(itertools.accumulate(ratios, initial=0.0))
    return [0, *lengths][sums.index(min(sums))]


def measure(
    lengths: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    prepare: Prepare,
    rounds: int,
    measured: Callable[[int], None] = lambda length: None,
    tokens: int = TOKENS,
) -> dict[int, Times]:
    """The times of square layers by their size, `measured` told after each."""
    found = {}
    for length in lengths:
        problems = {plan: build(Sizes(tokens, length, length), dtype, device, plan) for plan in Times._fields}
        _check(problems, length)
        ready = {plan: prepare(problem) for plan, problem in problems.items()}
        samples: dict[str, list[float]] = {plan: [] for plan in problems}
        for _ in range(rounds):
            for plan, sample in ready.items():
                samples[plan].append(sample())
        found[length] = Times(*(statistics.median(samples[plan]) for plan in Times._fields))
        measured(length)
    return found


def _check(problems: Mapping[str, Problem], length: int) -> None:
    from neat_kernels.tuning.search import agree

    fused, cublas = (problems[plan].call(0) for plan in Times._fields)
    # Where cuBLAS accumulates, the low-rank product is rounded once more.
    if not all(agree(*pair, problems["fused"].terms) for pair in zip(fused, cublas, strict=True)):
        raise RuntimeError(
            f"expected the plans fused and cublas to agree at a reduction of {length}, got other numbers"
        )


def build(sizes: Sizes, dtype: torch.dtype, device: torch.device, plan: str) -> Problem:
    """Forward and backward of the token side in one plan, on seeded inputs that both plans share the values of."""
    generator = torch.Generator(device).manual_seed(0)
    branch = Branch(1.0, 0.0, None, f"triton:{plan}:{plan}")
    needs = Needs(True, dtype, dtype, dtype)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)

    def inputs() -> tuple[Tensor, ...]:
        M, K, N = sizes
        shrink = K**-0.5
        return (draw(M, K), draw(M, N), draw(N, K, scale=shrink), draw(N), draw(K, RANK, scale=shrink), draw(N, RANK))

    layers = [inputs() for _ in range(copies_of(sizes, device))]

    def call(i: int) -> Sequence[Tensor]:
        x, dy, W, bias, D, U = layers[i]
        y, S = low_rank.forward(x, W, bias, D, U, None, branch)
        dx, dD, dU, dbias = low_rank.backward(dy, x, W, D, U, S, None, branch, needs)
        return y, dx, dD, dU, dbias

    return Problem(call, len(layers), max(sizes), device)
