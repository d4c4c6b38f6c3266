"""One fresh process of layer_ratio: builds, checks and times the contenders of one case, and prints JSON."""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.contenders import CONTENDERS, Contender, Layer
from benchmarks.measure import (
    WrongResultError,
    check,
    graphed,
    interleaved_samples,
    peak_bytes,
    sample_ms,
    weight_copies,
)
from benchmarks.problem import Problem, make_problem, tolerance
from benchmarks.shapes import LayerShape


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Check and time the contenders of one case.

    Args:
        case: shape, dtype, device, threads, seconds (for each contender) and contenders, in the order of their turns.

    Returns:
        For each contender its status ("timed", "skipped", "wrong" or "failed"), with the samples in ms or the reason;
        on a GPU also the samples of CUDA graphs, or why there are none, and the peak of allocated bytes.
    """
    torch.set_num_threads(case["threads"])
    problem = make_problem(LayerShape.parse(case["shape"]), getattr(torch, case["dtype"]), torch.device(case["device"]))
    copies = weight_copies(problem)
    report: dict[str, Any] = {}
    built: dict[str, list[Layer]] = {}
    for name in case["contenders"]:
        report[name], layers = _prepare(CONTENDERS[name], problem, copies)
        if layers:
            built[name] = layers
    passes = dict.fromkeys(built, copies)
    eager = {name: functools.partial(sample_ms, layers, problem) for name, layers in built.items()}
    for name, samples in interleaved_samples(eager, passes, case["seconds"]).items():
        report[name]["samples_ms"] = samples
    if problem.weight.device.type == "cuda":
        for name, layers in built.items():
            report[name]["peak_bytes"] = peak_bytes(layers[0], problem)
        graphs = _graphs(built, problem, report)
        for name, samples in interleaved_samples(graphs, passes, case["seconds"]).items():
            report[name]["graph_samples_ms"] = samples
    return {"tolerance": tolerance(problem), "weight_copies": copies, "contenders": report}


def _graphs(built: dict[str, list[Layer]], problem: Problem, report: dict[str, Any]) -> dict[str, Callable[[], float]]:
    graphs = {}
    for name, layers in built.items():
        try:
            graphs[name] = graphed(layers, problem)
        except Exception as error:  # what cannot be captured keeps its eager time
            traceback.print_exc()
            report[name]["no_graph"] = f"{type(error).__name__}: {error}"
    return graphs


def _prepare(contender: Contender, problem: Problem, copies: int) -> tuple[dict[str, Any], list[Layer]]:
    reason = contender.unavailable()
    if reason is not None:
        return {"status": "skipped", "reason": reason}, []
    try:
        layers = [contender.build(problem) for _ in range(copies)]
        errors = check(contender, layers[0], problem)
    except WrongResultError as error:
        return {"status": "wrong", "reason": str(error)}, []
    except Exception as error:  # one contender that cannot run here must not cost the others their times
        traceback.print_exc()
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}, []
    if copies > 1:
        sample_ms(layers, problem)  # the check has warmed up only the first copy
    return {"status": "timed", "adapter_dtype": layers[0].adapter_dtype, "errors": errors}, layers


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
