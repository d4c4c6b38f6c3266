"""One fresh process of a benchmark: builds, checks and times the contenders of its cases, and prints each as JSON.

python -m neat_kernels.bench.worker '[CASE, …]'
"""

from __future__ import annotations

import functools
import gc
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

from neat_kernels.bench.contenders import CONTENDERS, Contender, Layer, check_company
from neat_kernels.bench.measure import (
    Mode,
    WrongResultError,
    check,
    graphed,
    interleaved_samples,
    sample_ms,
    weight_copies,
)
from neat_kernels.bench.memory import peak_bytes, saved_bytes
from neat_kernels.bench.problem import Problem, make_problem
from neat_kernels.bench.shapes import LayerShape

# What a line with a case's results begins with: libraries print too.
MARK = "neat-kernels result: "
# Of a sample: far below what two samples differ by.
_DIGITS = 5


def main(arguments: list[str]) -> None:
    """Measure the cases that the only argument lists, and print the results of each as soon as it has them."""
    for case in json.loads(arguments[0]):
        print(f"\n{MARK}{json.dumps(measure(case))}", flush=True)


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Check and time the contenders of one case.

    Args:
        case: mode, block (a model of BLOCKS, where a block is timed), shape, dtype, device, threads, seconds (for each
            contender), memory (whether to measure it) and contenders, in the order of their turns.

    Returns:
        For each contender its status ("timed", "skipped", "wrong" or "failed"), with the samples in ms or the reason,
        the peak of allocated bytes, and in training those saved for backward; on a GPU also the samples of CUDA
        graphs, or why there are none.

    Raises:
        ValueError: the contenders cannot run in one process.
    """
    check_company(case["contenders"])
    torch.set_num_threads(case["threads"])
    mode: Mode = case["mode"]
    problem, contender = _problem(case)
    copies = weight_copies(problem)
    report: dict[str, Any] = {}
    built: dict[str, list[Layer]] = {}
    for name in case["contenders"]:
        report[name], layers = _prepare(contender(name), problem, copies, mode)
        if layers:
            built[name] = layers
    tolerance = problem.tolerance("none", "y")
    problem.answers.clear()
    gc.collect()
    passes = dict.fromkeys(built, copies)
    eager = {name: functools.partial(sample_ms, layers, problem, mode) for name, layers in built.items()}
    for name, samples in interleaved_samples(eager, passes, case["seconds"]).items():
        report[name]["samples_ms"] = _rounded(samples)
    if case["memory"]:
        for name, layers in built.items():
            report[name]["peak_bytes"] = peak_bytes(layers[0], problem, mode)
            if mode != "inference":
                report[name]["saved_bytes"] = saved_bytes(layers[0], problem)
    if problem.x.device.type == "cuda" and mode != "backward":
        graphs = _graphs(built, problem, mode, report)
        for name, samples in interleaved_samples(graphs, passes, case["seconds"]).items():
            report[name]["graph_samples_ms"] = _rounded(samples)
    return {"tolerance": tolerance, "weight_copies": copies, "contenders": report}


def _problem(case: dict[str, Any]) -> tuple[Problem, Callable[[str], Contender]]:
    """The problem of a case, a layer's or a block's, and the contenders for it by their names."""
    shape = LayerShape.parse(case["shape"])
    dtype, device = getattr(torch, case["dtype"]), torch.device(case["device"])
    if not case.get("block"):
        return make_problem(shape, dtype, device), CONTENDERS.__getitem__
    from neat_kernels.bench import block

    return block.make_block_problem(case["block"], shape.tokens, shape.r, dtype, device), block.contender


def _rounded(samples: list[float]) -> list[float]:
    return [float(f"{sample:.{_DIGITS}g}") for sample in samples]


def _graphs(
    built: dict[str, list[Layer]], problem: Problem, mode: Mode, report: dict[str, Any]
) -> dict[str, Callable[[], float]]:
    graphs = {}
    for name, layers in built.items():
        if mode == "inference" and layers[0].caches and layers[0].given is None:
            report[name]["no_graph"] = "a graph reads no cache of features"
            continue
        try:
            graphs[name] = graphed(layers, problem, mode)
        except Exception as error:  # what cannot be captured keeps its eager time
            traceback.print_exc()
            report[name]["no_graph"] = f"{type(error).__name__}: {error}"
    return graphs


def _prepare(contender: Contender, problem: Problem, copies: int, mode: Mode) -> tuple[dict[str, Any], list[Layer]]:
    try:
        reason = contender.unavailable()
        if reason is not None:
            return {"status": "skipped", "reason": reason}, []
        layers = [contender.build(problem) for _ in range(copies)]
        errors = check(contender, layers[0], problem, mode)
        for layer in layers[1:]:
            layer.train(mode != "inference")
        # The check has warmed up the first copy only.
        sample_ms(layers, problem, mode)
    except WrongResultError as error:
        return {"status": "wrong", "reason": str(error)}, []
    except Exception as error:  # one contender that cannot run here must not cost the others their times
        traceback.print_exc()
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}, []
    return {"status": "timed", "adapter_dtype": layers[0].adapter_dtype, "errors": errors}, layers


if __name__ == "__main__":
    main(sys.argv[1:])
