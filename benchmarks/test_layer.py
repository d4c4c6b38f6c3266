"""pytest-benchmark: one layer in training, its forward and backward apart, in inference and in decoding.

python -m pytest benchmarks --benchmark-json FILE
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.pedantic import skip_unless_it_runs, time_contender
from neat_kernels.bench.contenders import CONTENDERS
from neat_kernels.bench.measure import MODES, Mode
from neat_kernels.bench.problem import Problem, make_problem
from neat_kernels.bench.shapes import SHAPES, LayerShape

# Without a bf16 product in hardware torch multiplies bf16 matrices on a CPU a hundred times slower than fp32 ones.
_CPU_HALF = LayerShape(256, 512, 512, 16)


def _cases(mode: Mode, device: str, dtype: str, shapes: Iterable[LayerShape]) -> list[object]:
    marks = [pytest.mark.gpu] if device == "cuda" else []
    return [pytest.param(mode, device, s, dtype, id=f"{mode}-{device}-{s}-{dtype}", marks=marks) for s in shapes]


_DECODED = {
    device: (SHAPES[name][0], SHAPES[name][-1])
    for device, name in {"cpu": "decoding-1b", "cuda": "decoding-8b"}.items()
}
_CASES = [
    *_cases("training", "cpu", "float32", SHAPES["cpu"][1:]),
    *(case for mode in MODES for case in _cases(mode, "cpu", "bfloat16", [_CPU_HALF])),
    *_cases("inference", "cpu", "float32", _DECODED["cpu"]),
    *(case for mode in MODES for case in _cases(mode, "cuda", "bfloat16", SHAPES["gpu-large"][:1])),
    *_cases("training", "cuda", "bfloat16", (SHAPES["gpu-large"][1], *SHAPES["gpu-small"])),
    *_cases("inference", "cuda", "bfloat16", _DECODED["cuda"]),
]


@functools.lru_cache(maxsize=1)
def _problem(device: str, shape: LayerShape, dtype: str) -> Problem:
    return make_problem(shape, getattr(torch, dtype), torch.device(device))


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize(("mode", "device", "shape", "dtype"), _CASES)
def test_layer(
    benchmark: BenchmarkFixture, mode: Mode, device: str, shape: LayerShape, dtype: str, contender: str
) -> None:
    """Time one contender on one shape."""
    skip_unless_it_runs(device, dtype, CONTENDERS[contender])
    benchmark.group = f"{mode}-{device}-{shape}-{dtype}"
    time_contender(benchmark, CONTENDERS[contender], _problem(device, shape, dtype), mode)
