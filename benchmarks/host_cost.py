"""Time the Python of a layer's forward and backward: what the host does before, between and after the launches.

    python -m benchmarks.host_cost --output FILE.json

Needs no GPU: kernels are compiled for a target, and a launch does nothing. The plan is fused, so that no GEMM of
torch's runs on the CPU. With --device cuda it launches, and what a launch costs the host comes on top; --profile prints
where the time goes.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import functools
import pstats
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import neat_kernels as nk
from benchmarks.gate.fake_driver import capture
from benchmarks.gate.targets import TARGETS
from neat_kernels.bench.provenance import provenance, write_json

# Few tokens and small matrices: host code does the same for any size.
_M, _N, _K, _R = 512, 1024, 1536, 16
_ROUNDS, _CALLS = 30, 50
# Functions of a profile.
_SHOWN = 20


def main(arguments: list[str] | None = None) -> int:
    """Print and write microseconds a call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--target", choices=TARGETS, default="sm_90", help="without a device (default: sm_90)")
    parser.add_argument("--device", choices=["none", "cuda"], default="none", help="what launches (default: none)")
    parser.add_argument("--profile", action="store_true", help="print the functions that take most of the time")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no CUDA device")
    real = options.device == "cuda"
    with contextlib.nullcontext() if real else _nothing_runs(options.target):
        calls = _calls(torch.device("cuda" if real else "cpu"))
        found = {name: _microseconds(call) for name, call in calls.items()}
        if options.profile:
            for name, call in calls.items():
                print(name)
                _profile(call)
    for name, value in found.items():
        print(f"{name:34} {value['median']:7.1f} µs (fastest round {value['fastest']:.1f})")
    place = {"device": "cuda"} if real else {"target": options.target}
    write_json(options.output, {"provenance": provenance(), **place, "microseconds": found})
    return 0


@contextlib.contextmanager
def _nothing_runs(target: str) -> Iterator[None]:
    def choose(device: torch.device, dtype: torch.dtype, length: int) -> str:
        return "fused"

    def obstacle(device: torch.device) -> None:
        return None

    with (
        mock.patch("neat_kernels.plan.choose_gemm", choose),
        mock.patch("neat_kernels.plan.device_obstacle", obstacle),
        capture(target, record=False),
    ):
        yield


def _calls(device: torch.device) -> dict[str, Callable[[], Any]]:
    """The forward and the backward of a layer whose x, A and B need gradients, and the forward with features given."""
    on_device = functools.partial(torch.randn, device=device)
    weight, bias, x = (on_device(shape, dtype=torch.bfloat16) for shape in ((_N, _K), (_N,), (_M, _K)))
    x.requires_grad_()
    A, B, D = (on_device(shape).requires_grad_() for shape in ((_R, _N), (_N, _R), (_K, _R)))

    def forward() -> torch.Tensor:
        return nk.functional.neat_linear(x, weight, A, B, bias, backend="triton")

    def inference() -> torch.Tensor:
        with torch.no_grad():
            return nk.functional.low_rank_linear(x, weight, D, B, bias, backend="triton")

    y = forward()
    dy = torch.ones_like(y)

    def backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y, (x, A, B), dy, retain_graph=True)

    return {"forward": forward, "backward": backward, "inference, features given": inference}


def _microseconds(call: Callable[[], Any]) -> dict[str, float]:
    call()
    rounds = []
    for _ in range(_ROUNDS):
        if torch.cuda.is_available():
            # A full queue of launches would make the host wait.
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(_CALLS):
            call()
        rounds.append((time.perf_counter() - start) / _CALLS * 1e6)
    return {"median": statistics.median(rounds), "fastest": min(rounds), "slowest": max(rounds)}


def _profile(call: Callable[[], Any]) -> None:
    profiler = cProfile.Profile()
    with profiler:
        for _ in range(_CALLS):
            call()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(_SHOWN)


if __name__ == "__main__":
    raise SystemExit(main())
