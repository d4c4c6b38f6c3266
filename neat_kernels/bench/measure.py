"""Hold a contender to the float64 answer, then time its forward, its backward, both, or inference."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from neat_kernels.bench.contenders import Contender, Layer
from neat_kernels.bench.problem import Problem

Mode = Literal["training", "forward", "backward", "inference"]
MODES: tuple[Mode, ...] = get_args(Mode)
LABELS: dict[str, str] = {
    "training": "forward + backward",
    "forward": "forward, in training",
    "backward": "backward",
    "inference": "inference, features cached",
}
# With more tokens than this a CPU spends its time on the product, wherever W comes from.
_FEW_TOKENS = 64
# Of a tiny weight; its time is the host's, not the memory's.
_MOST_COPIES = 256
# Where Linux describes the last cache before memory of a CPU.
_CPU_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


class WrongResultError(AssertionError):
    """A contender's result is not the layer's: a time for it would mean nothing."""


def run(layer: Layer, problem: Problem) -> Tensor:
    """One forward and backward from cleared gradients; returns y."""
    clear_gradients(layer, problem)
    y = layer.forward(problem.x)
    y.backward(problem.dy)
    return y


def infer(layer: Layer, problem: Problem) -> Tensor:
    """One forward without gradients, by the features of the cache where the layer has one."""
    with torch.no_grad():
        return layer.forward(problem.x)


def call_of(mode: Mode) -> Callable[[Layer, Problem], Tensor]:
    """What a sample of the mode times, but for backward, whose forward is not timed."""
    return {"training": run, "inference": infer, "forward": _forward, "backward": run}[mode]


def _forward(layer: Layer, problem: Problem) -> Tensor:
    return layer.forward(problem.x)


def clear_gradients(layer: Layer, problem: Problem) -> None:
    """Drop the gradients of x and of the parameters."""
    problem.x.grad = None
    for parameter in layer.trainable.values():
        parameter.grad = None


def check(contender: Contender, layer: Layer, problem: Problem, mode: Mode = "training") -> dict[str, float]:
    """Compare y, and in training every gradient, with the float64 answer.

    Args:
        contender: tells which answer.
        layer: the built contender.
        problem: the inputs.
        mode: what will be timed; leaves the layer in that mode.

    Returns:
        The relative errors in the Frobenius norm.

    Raises:
        WrongResultError: one of them is above the tolerance of the problem.
    """
    got: dict[str, Tensor | None]
    layer.train(mode != "inference")
    if mode == "inference":
        infer(layer, problem)
        # The second reads what the first has cached.
        got = {"y": infer(layer, problem)}
        if layer.given is not None:
            with torch.no_grad():
                got["y of features given"] = layer.given(problem.x)
    else:
        got = {"y": run(layer, problem).detach(), "dx": problem.x.grad}
        got |= {name: parameter.grad for name, parameter in layer.trainable.items()}
    expected = problem.answer(contender.update)
    if mode != "inference":
        got = {name: got.get(name) for name in expected}
    errors: dict[str, float] = {}
    limits: dict[str, float] = {}
    for name, value in got.items():
        exact = expected[name.removesuffix(" of features given")]
        limits[name] = problem.tolerance(contender.update, name.removesuffix(" of features given"))
        errors[name] = math.inf if value is None else float((value.double() - exact).norm() / exact.norm())
    wrong = [name for name, error in errors.items() if not error <= limits[name]]
    if wrong:
        listed = ", ".join(f"{name} {errors[name]:.1e} (at most {limits[name]:.1e})" for name in wrong)
        raise WrongResultError(f"relative error against float64: {listed}")
    return errors


def weight_copies(problem: Problem) -> int:
    """How many layers to rotate through so that no cache can hold their weights from one call to the next.

    Four times the cache: a GPU's L2, or a CPU's last one, there with few tokens only. Of a tiny weight there are fewer.
    """
    if problem.x.device.type == "cuda":
        cache = torch.cuda.get_device_properties(problem.x.device).L2_cache_size
    elif problem.x.device.type == "cpu" and problem.shape.tokens <= _FEW_TOKENS:
        cache = _cpu_cache()
    else:
        return 1
    return min(_MOST_COPIES, math.ceil(4 * cache / problem.weight_bytes))


def _cpu_cache() -> int:
    """Bytes of the last cache; 32 MiB where the system does not tell."""
    try:
        text = _CPU_CACHE.read_text().strip()
    except OSError:
        return 32 << 20
    units = {"K": 10, "M": 20, "G": 30}
    return int(text[:-1]) << units[text[-1]] if text[-1:] in units else int(text)


def sample_ms(layers: Sequence[Layer], problem: Problem, mode: Mode = "training") -> float:
    """Milliseconds of one call in the given mode, the mean over one pass through `layers`."""
    if mode == "backward":
        return backwards_ms(forwards(layers, problem), problem) / len(layers)
    call = call_of(mode)

    def one_pass() -> None:
        for layer in layers:
            call(layer, problem)

    return _pass_ms(one_pass, problem) / len(layers)


def forwards(layers: Sequence[Layer], problem: Problem) -> list[Tensor]:
    """y of every layer, from cleared gradients."""
    made = []
    for layer in layers:
        clear_gradients(layer, problem)
        made.append(layer.forward(problem.x))
    return made


def backwards_ms(made: Sequence[Tensor], problem: Problem) -> float:
    """Milliseconds of the backwards of what `forwards` has made."""

    def one_pass() -> None:
        for y in made:
            # The gradient of x is one for all layers: each writes it, none adds to another's.
            problem.x.grad = None
            y.backward(problem.dy)

    return _pass_ms(one_pass, problem)


def graphed(layers: Sequence[Layer], problem: Problem, mode: Mode = "training") -> Callable[[], float]:
    """What `sample_ms` gives, of a pass that a CUDA graph replays, without the host's part of it.

    A graph reads no cache of features: in inference it takes them as they are given.
    """
    call = call_of(mode)

    def one_pass() -> None:
        for layer in layers:
            if mode == "inference" and layer.given is not None:
                with torch.no_grad():
                    layer.given(problem.x)
            else:
                call(layer, problem)

    stream = torch.cuda.Stream(problem.x.device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        one_pass()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_pass()
    graph.replay()
    return lambda: _pass_ms(graph.replay, problem) / len(layers)


def _pass_ms(one_pass: Callable[[], None], problem: Problem) -> float:
    if problem.x.device.type != "cuda":
        start = time.perf_counter()
        one_pass()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    one_pass()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


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
