"""The kernels that one forward and backward of a layer launches, with the time of each, and the device's ceilings.

    python -m benchmarks.kernel_times --output kernel_times.json

The profiler times kernels on the device, so that what the host does between two launches counts for none of them. The
weights rotate as in layer_ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from neat_kernels.bench.contenders import CONTENDERS, check_company
from neat_kernels.bench.measure import check, run, weight_copies
from neat_kernels.bench.problem import Problem, make_problem
from neat_kernels.bench.provenance import provenance, write_json
from neat_kernels.bench.shapes import SHAPES, parse_shapes
from neat_kernels.tuning.timing import Problem as Timed
from neat_kernels.tuning.timing import prepare

_DEFAULT = [(shape,) for name in ("gpu-large", "gpu-small") for shape in SHAPES[name]]
# Large enough that no cache holds a part of them.
_COPY_BYTES, _GEMM_SIZE = 4 * 2**30, 8192
_PASSES, _ROUNDS = 20, 9


def main(arguments: list[str] | None = None) -> int:
    """Print and write microseconds by kernel; 1 if a contender was wrong or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=parse_shapes, default=_DEFAULT, help="TOKENSxINxOUTxR, or a set")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--contenders", nargs="+", default=["frozen", "neat", "neat_half"], choices=list(CONTENDERS))
    parser.add_argument("--ceilings", action="store_true", help="measure the ceilings alone")
    parser.add_argument("--output", type=Path, required=True, help="write the results to this JSON file")
    options = parser.parse_args(arguments)
    try:
        check_company(options.contenders)
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error(f"expected a CUDA device, torch {torch.__version__} finds none")
    device = torch.device("cuda", torch.cuda.current_device())
    results: dict[str, Any] = {"provenance": provenance(), "dtype": options.dtype, "ceilings": _ceilings(device)}
    print(", ".join(f"{name} {value:.3g}" for name, value in results["ceilings"].items()))
    results["cases"], sound = [], True
    if options.ceilings:
        write_json(options.output, results)
        return 0
    for shape in (one for group in options.shapes for one in group):
        problem = make_problem(shape, getattr(torch, options.dtype), device)
        for name in options.contenders:
            try:
                kernels = _kernels(name, problem)
            except Exception as error:  # the other contenders' times are worth having
                print(f"\n{shape} {name}: {type(error).__name__}: {error}")
                sound = False
                continue
            _print(f"{shape} {CONTENDERS[name].label}", kernels)
            results["cases"].append({"shape": str(shape), "contender": name, "kernels": kernels})
            write_json(options.output, results)
    return 0 if sound else 1


def _ceilings(device: torch.device) -> dict[str, float]:
    """What the device reaches: bytes copied a second, read and written, and FLOPs a second of a large GEMM."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b, c = (torch.randn(_GEMM_SIZE, _GEMM_SIZE, device=device, dtype=torch.bfloat16) for _ in range(3))

    def seconds(call: Callable[[], Tensor]) -> float:
        call()
        sample = prepare(Timed(lambda i: (call(),), 1, 1, device))
        return statistics.median(sample() for _ in range(_ROUNDS))

    return {
        "copy bytes/s": 2 * _COPY_BYTES / seconds(lambda: target.copy_(source)),
        "bf16 GEMM FLOP/s": 2 * _GEMM_SIZE**3 / seconds(lambda: torch.mm(a, b, out=c)),
    }


def _kernels(name: str, problem: Problem) -> list[dict[str, Any]]:
    """The kernels of one pass in the order of their first launch: name, launches, median microseconds of a launch."""
    contender = CONTENDERS[name]
    layers = [contender.build(problem) for _ in range(weight_copies(problem))]
    check(contender, layers[0], problem)
    for layer in layers:
        run(layer, problem)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for i in range(_PASSES):
            run(layers[i % len(layers)], problem)
        torch.cuda.synchronize()
    launches: dict[str, list[float]] = defaultdict(list)
    for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
        if event.device_type.name == "CUDA":
            launches[event.name].append(event.time_range.elapsed_us())
    return [
        {"kernel": kernel, "launches": len(times) / _PASSES, "us": statistics.median(times)}
        for kernel, times in launches.items()
    ]


def _print(title: str, kernels: list[dict[str, Any]]) -> None:
    total = sum(kernel["launches"] * kernel["us"] for kernel in kernels)
    print(f"\n{title}: {total:.1f} µs in {sum(kernel['launches'] for kernel in kernels):.1f} launches")
    for kernel in kernels:
        print(f"  {kernel['launches']:5.2f} × {kernel['us']:8.2f} µs  {kernel['kernel'][:100]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
