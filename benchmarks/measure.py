"""Hold a contender to the float64 answer, then time its forward and backward."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.contenders import Contender, Layer
from benchmarks.problem import Problem, answer, tolerance


class WrongResultError(AssertionError):
    """A contender's result is not the layer's: a time for it would mean nothing."""


def run(layer: Layer, problem: Problem) -> Tensor:
    """One forward and backward from cleared gradients; returns y."""
    _clear_gradients(layer, problem)
    y = layer.forward(problem.x)
    y.backward(problem.dy)
    return y


def _clear_gradients(layer: Layer, problem: Problem) -> None:
    problem.x.grad = None
    for parameter in layer.trainable.values():
        parameter.grad = None


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

    def one_pass() -> None:
        for layer in layers:
            run(layer, problem)

    return _pass_ms(one_pass, problem) / len(layers)


def graphed(layers: Sequence[Layer], problem: Problem) -> Callable[[], float]:
    """What `sample_ms` gives, of a pass that a CUDA graph replays, without the host's part of it."""
    stream = torch.cuda.Stream(problem.x.device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for layer in layers:
            run(layer, problem)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            run(layer, problem)
    graph.replay()
    return lambda: _pass_ms(graph.replay, problem) / len(layers)


def _pass_ms(one_pass: Callable[[], None], problem: Problem) -> float:
    if problem.weight.device.type != "cuda":
        start = time.perf_counter()
        one_pass()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    one_pass()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak_bytes(layer: Layer, problem: Problem) -> int:
    """The most that one forward and backward of a warm layer has allocated at a time on a GPU, y and gradients too."""
    _clear_gradients(layer, problem)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(layer, problem)
    return torch.cuda.max_memory_allocated() - before


def interleaved_samples(
    samplers: Mapping[str, Callable[[], float]], passes: Mapping[str, int], seconds: float, at_most: int = 50
) -> dict[str, list[float]]:
    """Time contenders in turn, so that a change in the machine's speed meets all of them.

    Args:
        samplers: each contender's, which take a sample in ms.
        passes: how many times the sample a contender's turn takes.
        seconds: after this much time a contender takes no further turn; everyone gets one.
        at_most: turns each.

    Returns:
        The samples of each contender in ms.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(at_most):
        for name, sample in samplers.items():
            if not samples[name] or sum(samples[name]) * passes[name] < seconds * 1e3:
                samples[name].append(sample())
    return samples
