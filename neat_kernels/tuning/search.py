"""Which configuration of one stage is the fastest of those that give the right result."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neat_kernels.kernels import launch
from neat_kernels.kernels.configs import Config
from neat_kernels.kernels.measured import Key
from neat_kernels.tuning.timing import Prepare, Problem, is_faster


@dataclass(frozen=True)
class Outcome:
    """What came of one stage.

    Args:
        key: of the stage.
        present: the configuration that was in force.
        chosen: the fastest, which is the present one unless another was faster by more than the spread.
        seconds: the median of every configuration that was timed.
        dropped: why a candidate was not timed.
    """

    key: Key
    present: Config
    chosen: Config
    seconds: dict[Config, float]
    dropped: dict[Config, str]


def search(
    key: Key, present: Config, tried: Sequence[Config], problem: Problem, prepare: Prepare, rounds: int
) -> Outcome:
    """Check the candidates against the present configuration, time those that agree with it, and choose.

    Args:
        key: of the stage.
        present: the configuration in force; where it fails, so does the search.
        tried: the candidates.
        problem: runs the stage.
        prepare: gets a problem ready to be timed.
        rounds: samples of each configuration, taken in turn.

    Returns:
        What was chosen. The fastest of many is lucky too: it is timed against the present one a second time.
    """
    expected = _results(key, present, problem)
    faults = {config: _fault(key, config, problem, expected) for config in tried}
    right = [config for config, fault in faults.items() if fault is None]
    ready = {config: _ready(key, config, problem, prepare) for config in (present, *right)}
    samples = _samples(ready, rounds)
    seconds = {config: statistics.median(taken) for config, taken in samples.items()}
    chosen = min(seconds, key=lambda config: seconds[config])
    if chosen != present and is_faster(samples[chosen], samples[present]):
        samples = _samples({config: ready[config] for config in (present, chosen)}, rounds)
    if chosen != present and not is_faster(samples[chosen], samples[present]):
        chosen = present
    return Outcome(key, present, chosen, seconds, {config: fault for config, fault in faults.items() if fault})


def _results(key: Key, config: Config, problem: Problem) -> list[Tensor]:
    with launch.trying(key, config):
        results = list(problem.call(0))
    if problem.device.type == "cuda":
        torch.cuda.synchronize(problem.device)
    return results


def _fault(key: Key, config: Config, problem: Problem, expected: Sequence[Tensor]) -> str | None:
    """Why a candidate is no candidate, or None. Whatever the compiler or the driver raise is a reason."""
    try:
        results = _results(key, config, problem)
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "")
        return f"{type(error).__name__}: {first_line}"
    if not all(agree(*pair, problem.terms) for pair in zip(results, expected, strict=True)):
        return "wrong result"
    return None


def agree(result: Tensor, expected: Tensor, terms: int) -> bool:
    """Whether two results differ by rounding alone, in every element.

    |result − expected| ≤ 8·(u + √terms·2⁻²⁴)·(|expected| + rms(expected)), u the unit roundoff of the result: a sum of
    `terms` terms in another order, and roundings of operands and result that fall the other way.
    """
    if expected.numel() == 0:
        return result.shape == expected.shape
    unit = torch.finfo(expected.dtype).eps / 2
    limit = 8 * (unit + math.sqrt(terms) * 2**-24)
    wide = expected.float()
    bound = limit * (wide.abs() + wide.square().mean().sqrt())
    return bool(((result.float() - wide).abs() <= bound).all())


def _ready(key: Key, config: Config, problem: Problem, prepare: Prepare) -> Callable[[], float]:
    with launch.trying(key, config):
        return prepare(problem)


def _samples(ready: Mapping[Config, Callable[[], float]], rounds: int) -> dict[Config, list[float]]:
    """Samples of each configuration, in turn: a change of the clock meets all of them."""
    samples: dict[Config, list[float]] = {config: [] for config in ready}
    for _ in range(rounds):
        for config, sample in ready.items():
            samples[config].append(sample())
    return samples
