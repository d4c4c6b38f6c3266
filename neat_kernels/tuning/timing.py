"""How a problem is timed, and when a difference is more than noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Long enough for the resolution of an event, short enough for thousands of samples.
_WINDOW_MS = 5.0


class Problem(NamedTuple):
    """Something to time.

    Fields:
        call: runs it on inputs number i, and returns its results.
        copies: how many inputs there are, together more than the device's caches hold.
        terms: of the longest sum behind a result.
        device: where it runs.
    """

    call: Callable[[int], Sequence[Tensor]]
    copies: int
    terms: int
    device: torch.device


# What gets a problem ready that has run once before, and returns what takes a sample: the seconds of one call.
Prepare = Callable[[Problem], Callable[[], float]]


def prepare(problem: Problem) -> Callable[[], float]:
    """A sample is the mean over a window on a CUDA device.

    The calls are replayed from a graph: many of them are shorter than the host takes to launch them.
    """
    with torch.cuda.device(problem.device):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(problem.copies):
                problem.call(i)
        graph.replay()
        replays = max(1, math.ceil(_WINDOW_MS / max(1e-3, _replay_ms(graph, 1))))

    def sample() -> float:
        with torch.cuda.device(problem.device):
            return _replay_ms(graph, replays) / (replays * problem.copies) / 1e3

    return sample


def _replay_ms(graph: torch.cuda.CUDAGraph, times: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def spread(samples: Sequence[float]) -> float:
    """The distance between the quartiles; 0 of a single sample."""
    if len(samples) < 2:
        return 0.0
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return third - first


def is_faster(samples: Sequence[float], than: Sequence[float]) -> bool:
    """Whether the medians differ by more than either spread."""
    return statistics.median(than) - statistics.median(samples) > max(spread(samples), spread(than))
