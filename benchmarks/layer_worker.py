"""One fresh process of layer_ratio: builds, checks and times the contenders of one case, and prints JSON."""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import torch

from benchmarks.contenders import CONTENDERS, Contender, Layer
from benchmarks.measure import WrongResultError, check, interleaved_samples, sample_ms, weight_copies
from benchmarks.problem import Problem, make_problem, tolerance
from benchmarks.shapes import LayerShape


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Check and time the contenders of one case.

    Args:
        case: shape, dtype, device, threads, seconds (for each contender) and contenders, in the order of their turns.

    Returns:
        For each contender its status ("timed", "skipped", "wrong" or "failed"), with the samples in ms or the reason.
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
    for name, samples in interleaved_samples(built, problem, case["seconds"]).items():
        report[name]["samples_ms"] = samples
    return {"tolerance": tolerance(problem), "weight_copies": copies, "contenders": report}


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
