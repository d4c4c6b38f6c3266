"""One contender under pytest-benchmark."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from neat_kernels.bench.contenders import Contender
from neat_kernels.bench.measure import Mode, backwards_ms, check, forwards, sample_ms, weight_copies
from neat_kernels.bench.memory import peak_bytes, saved_bytes
from neat_kernels.bench.problem import Problem

_ROUNDS = 10


def skip_unless_it_runs(device: str, dtype: str, contender: Contender) -> None:
    """Skip the test where the device is missing, or the contender is, or is another one's double."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not contender.differs_in(dtype):
        pytest.skip(f"the same contender as without the suffix in {dtype}")
    if contender.alone:
        pytest.skip("needs a process of its own: python -m benchmarks.layer_ratio --contenders " + contender.name)
    reason = contender.unavailable()
    if reason is not None:
        pytest.skip(reason)


def time_contender(benchmark: BenchmarkFixture, contender: Contender, problem: Problem, mode: Mode) -> None:
    """Hold a contender to float64, then let pytest-benchmark time passes through its copies.

    A round is one pass through as many layers as `layers_per_round` tells; `ms` has the milliseconds of one layer, by
    events on a GPU.
    """
    layers = [contender.build(problem) for _ in range(weight_copies(problem))]
    errors = check(contender, layers[0], problem, mode)
    for layer in layers[1:]:
        layer.train(mode != "inference")
    samples: list[float] = []
    if mode == "backward":
        benchmark.pedantic(
            lambda made: samples.append(backwards_ms(made, problem) / len(layers)),
            setup=lambda: ((forwards(layers, problem),), {}),
            rounds=_ROUNDS,
            warmup_rounds=1,
        )
    else:
        benchmark.pedantic(lambda: samples.append(sample_ms(layers, problem, mode)), rounds=_ROUNDS, warmup_rounds=1)
    # The first is the warm-up.
    benchmark.extra_info |= {"errors": errors, "layers_per_round": len(layers), "ms": samples[1:]}
    benchmark.extra_info["peak_bytes"] = peak_bytes(layers[0], problem, mode)
    if mode != "inference":
        benchmark.extra_info["saved_bytes"] = saved_bytes(layers[0], problem)
