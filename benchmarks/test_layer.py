"""pytest-benchmark: forward + backward of one layer, every contender held to float64 before it is timed.

python -m pytest benchmarks --benchmark-json FILE
"""

from __future__ import annotations

import functools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from neat_kernels.bench.contenders import CONTENDERS
from neat_kernels.bench.measure import check, sample_ms, weight_copies
from neat_kernels.bench.problem import Problem, make_problem
from neat_kernels.bench.shapes import SHAPES, LayerShape

_ROUNDS = 10
# Without AVX-512 torch multiplies bf16 matrices on a CPU a hundred times slower than fp32 ones.
_CPU_HALF = LayerShape(256, 512, 512, 16)
_CASES = [
    *(pytest.param("cpu", shape, "float32", id=f"cpu-{shape}-float32") for shape in SHAPES["cpu"]),
    pytest.param("cpu", _CPU_HALF, "bfloat16", id=f"cpu-{_CPU_HALF}-bfloat16"),
    *(
        pytest.param("cuda", shape, "bfloat16", id=f"cuda-{shape}-bfloat16", marks=pytest.mark.gpu)
        for shape in (*SHAPES["gpu-large"], *SHAPES["gpu-small"])
    ),
]


@functools.lru_cache(maxsize=1)
def _problem(device: str, shape: LayerShape, dtype: str) -> Problem:
    return make_problem(shape, getattr(torch, dtype), torch.device(device))


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize(("device", "shape", "dtype"), _CASES)
def test_layer(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    device: str,
    shape: LayerShape,
    dtype: str,
    contender: str,
) -> None:
    """Time one contender on one shape."""
    entry = CONTENDERS[contender]
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not entry.differs_in(dtype):
        pytest.skip(f"the same contender as without the suffix in {dtype}")
    reason = entry.unavailable()
    if reason is not None:
        pytest.skip(reason)
    problem = _problem(device, shape, dtype)
    layers = [entry.build(problem) for _ in range(weight_copies(problem))]
    benchmark.group = f"{device}-{shape}-{dtype}"
    benchmark.extra_info |= {"errors": check(entry, layers[0], problem), "layers_per_round": len(layers)}
    benchmark.pedantic(sample_ms, args=(layers, problem), rounds=_ROUNDS, warmup_rounds=1)
