"""pytest-benchmark: one transformer block, every linear layer of it adapted."""

from __future__ import annotations

import functools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.pedantic import skip_unless_it_runs, time_contender
from neat_kernels.bench.block import ADAPTED, BlockProblem, contender, make_block_problem
from neat_kernels.bench.measure import Mode

pytest.importorskip("transformers")


@functools.lru_cache(maxsize=1)
def _problem(device: str, model: str, tokens: int, dtype: str) -> BlockProblem:
    return make_block_problem(model, tokens, 16, getattr(torch, dtype), torch.device(device))


@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize(
    ("device", "model", "tokens", "dtype"),
    [
        pytest.param("cpu", "llama-3.2-1b", 128, "float32", id="cpu-llama-3.2-1b"),
        pytest.param("cuda", "llama-3.2-3b", 3072, "bfloat16", id="cuda-llama-3.2-3b", marks=pytest.mark.gpu),
    ],
)
def test_block(
    benchmark: BenchmarkFixture, device: str, model: str, tokens: int, dtype: str, mode: Mode, name: str
) -> None:
    """Time one contender's block."""
    one = contender(name)
    skip_unless_it_runs(device, dtype, one)
    benchmark.group = f"block-{mode}-{device}-{model}-{tokens}-{dtype}"
    time_contender(benchmark, one, _problem(device, model, tokens, dtype), mode)
