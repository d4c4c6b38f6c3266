"""Hold a contender to the float64 answer, then time its forward and backward."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.contenders import Contender, Layer
from benchmarks.problem import Problem, answer, tolerance


class WrongResultError(AssertionError):
    """A contender's result is not the layer's: a time for it would mean nothing."""


def run(layer: Layer, problem: Problem) -> Tensor:
    """One forward and backward from cleared gradients; returns y."""
    problem.x.grad = None
    for parameter in layer.trainable.values():
        parameter.grad = None
    y = layer.forward(problem.x)
    y.backward(problem.dy)
    return y


def check(contender: Contender, layer: Layer, problem: Problem) -> dict[str, float]:
    """Compare y and every gradient with the float64 answer.

    Args:
        contender: tells which answer.
        layer: the built contender.
        problem: the inputs.

    Returns:
        The relative errors in the Frobenius norm.

    Raises:
        WrongResultError: one of them is above the problem's tolerance.
    """
    got = {"y": run(layer, problem).detach(), "dx": problem.x.grad}
    got |= {name: parameter.grad for name, parameter in layer.trainable.items()}
    errors = {}
    for name, expected in answer(problem, contender.update).items():
        value = got[name]
        errors[name] = math.inf if value is None else float((value.double() - expected).norm() / expected.norm())
    limit = tolerance(problem)
    wrong = {name: error for name, error in errors.items() if not error <= limit}
    if wrong:
        listed = ", ".join(f"{name} {error:.1e}" for name, error in wrong.items())
        raise WrongResultError(f"relative error against float64 at most {limit:.1e} expected, got {listed}")
    return errors


def weight_copies(problem: Problem) -> int:
    """How many layers to rotate through so that a GPU's L2 cannot hold their weights from one call to the next."""
    if problem.weight.device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(problem.weight.device).L2_cache_size
    return max(1, math.ceil(4 * cache / (problem.weight.numel() * problem.weight.element_size())))


def sample_ms(layers: Sequence[Layer], problem: Problem) -> float:
    """Milliseconds of one forward and backward, the mean over one pass through `layers`."""
    if problem.weight.device.type != "cuda":
        start = time.perf_counter()
        for layer in layers:
            run(layer, problem)
        return (time.perf_counter() - start) * 1e3 / len(layers)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for layer in layers:
        run(layer, problem)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / len(layers)


def interleaved_samples(
    built: Mapping[str, Sequence[Layer]], problem: Problem, seconds: float, at_most: int = 50
) -> dict[str, list[float]]:
    """Time contenders in turn, so that a change in the machine's speed meets all of them.

    Args:
        built: each contender's layers.
        problem: the inputs.
        seconds: after this much time a contender takes no further turn; everyone gets one.
        at_most: turns each.

    Returns:
        The samples of each contender in ms.
    """
    samples: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(at_most):
        for name, layers in built.items():
            if not samples[name] or sum(samples[name]) * len(layers) < seconds * 1e3:
                samples[name].append(sample_ms(layers, problem))
    return samples
