"""`neat-kernels bench --model`: what it is asked, and the order in which it answers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from neat_kernels.files import write_atomically
from neat_kernels.model.devices import Device, named
from neat_kernels.model.predict import Comparison, compare_steps
from neat_kernels.model.work import HALF, ITEMSIZE, Layer, is_small_batch
from neat_kernels.plan import most_of_a_small_batch
from neat_kernels.usage import UsageError

# The project's budgets are set for these: two large layers, one that is bound by launches, one of few tokens.
SHAPES = ("8192x4096x4096", "8192x4096x14336", "2048x768x768", "16x4096x4096")
PLANS = ("auto", "fused", "cublas", "small")


@dataclass(frozen=True)
class Request:
    """What to predict: `layers` on `device` in the plans of `plan`, written to `json` too where that is given."""

    device: Device
    layers: tuple[Layer, ...]
    plan: str
    json: Path | None


def run(options: Mapping[str, Any], console: Console) -> None:
    """Answer the command's options, of which those that were not given are None.

    Raises:
        UsageError: an option is malformed, or would have no effect.
    """
    unread = [name for name in ("preset", "threads", "compare") if options[name] is not None]
    if unread:
        what = f"the preset {options['preset']!r}" if unread[0] == "preset" else f"--{unread[0]}"
        hint = "; predictions stand beside the measurements of --measured FILE" if unread[0] == "compare" else ""
        raise UsageError(f"{what} is not read with --model, which measures nothing{hint}")
    if importlib.util.find_spec("triton") is None:
        raise UsageError(
            "the model asks the kernels how they would be launched, which needs Triton: pip install triton"
        )
    try:
        if options["measured"] is not None:
            _compare(options, console)
        else:
            _predict(_request(options), console)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def _compare(options: Mapping[str, Any], console: Console) -> None:
    unread = [name for name in ("device", "shape", "r", "dtype", "plan", "json") if options[name] is not None]
    unread += ["overwrite"] if options["overwrite"] else []
    if unread:
        raise UsageError(f"--{unread[0]} is not read with --measured: the file says what to predict")
    from neat_kernels.model.compare import compare, read_results
    from neat_kernels.model.report import print_compared

    results = read_results(options["measured"])
    console.print(f"Measured on {escape(results.device)} ({results.capability})", highlight=False)
    if any(case["device"] == "cpu" for case in results.cases):
        console.print(f"Predicted from the ceilings that {escape(_this_cpu())} shows now", highlight=False)
    print_compared(compare(results), console)


def _this_cpu() -> str:
    import torch

    return f"this CPU ({torch.backends.cpu.get_cpu_capability()})"


def _request(options: Mapping[str, Any]) -> Request:
    plan = options["plan"] or "auto"
    if plan not in PLANS:
        raise UsageError(f"--plan must be one of {', '.join(PLANS)}; got {plan!r}")
    dtype = options["dtype"] or "bf16"
    if dtype not in ITEMSIZE:
        raise UsageError(f"--dtype must be one of {', '.join(ITEMSIZE)}; got {dtype!r}")
    if plan == "fused" and dtype not in HALF:
        raise UsageError("--plan fused takes half precision: the kernels leave an fp32 GEMM to cuBLAS")
    r = 16 if options["r"] is None else options["r"]
    shapes = options["shape"] or SHAPES
    _check_file(options["json"], options["overwrite"])
    device = named("H200" if options["device"] is None else options["device"])
    layers = tuple(Layer(*_parse(shape), r, dtype) for shape in shapes)
    large = next((layer for layer in layers if plan == "small" and not is_small_batch(layer)), None)
    if large is not None:
        most = most_of_a_small_batch(large.orientation, r)
        raise UsageError(
            f"--plan small takes half precision and at r={r} up to {most} tokens; got {large.shape} in {dtype}"
        )
    return Request(device, layers, plan, options["json"])


def _check_file(file: Path | None, overwrite: bool) -> None:
    if file is None:
        if overwrite:
            raise UsageError("--overwrite is read with --json only, which was not given")
        return
    if not file.parent.is_dir() or file.is_dir():
        raise UsageError(f"--json must be a file in a folder that is there, got {file}")
    if file.exists() and not overwrite:
        raise UsageError(f"--json {file} is there already: choose another, or add --overwrite")


def _parse(shape: str) -> tuple[int, int, int]:
    if not re.fullmatch(r"\d+x\d+x\d+", shape, re.ASCII):
        raise UsageError(f"--shape must be TOKENSxINxOUT, such as {SHAPES[0]}; got {shape!r}")
    tokens, in_features, out_features = (int(size) for size in shape.split("x"))
    return tokens, in_features, out_features


def _predict(request: Request, console: Console) -> None:
    from neat_kernels.model.report import content, print_comparison, print_device, print_kernels
    from neat_kernels.model.steps import chosen_plan, training

    print_device(request.device, console)
    cases = []
    for layer in request.layers:
        plan = chosen_plan(layer, request.device) if request.plan == "auto" else request.plan
        print_kernels(layer, training(layer, request.device, plan), request.device, console)
        rows = _comparison(layer, request.device, plan, request.plan == "auto")
        print_comparison(layer, rows, request.device, console)
        if request.plan == "auto":
            console.print(f"  chosen plan: {plan}", highlight=False)
        cases.append((layer, plan, rows))
    if request.json is not None:
        written = json.dumps(content(request.device, cases), indent=1) + "\n"
        write_atomically(request.json, written.encode())


def _comparison(layer: Layer, device: Device, plan: str, every_plan: bool) -> Sequence[Comparison]:
    from neat_kernels.model.peers import frozen, peft_lora
    from neat_kernels.model.steps import inference, plans, training

    ours = dict.fromkeys((plan, *plans(layer))) if every_plan else (plan,)
    steps = [frozen(layer), *(training(layer, device, one) for one in ours)]
    narrow = dataclasses.replace(layer, adapter_dtype=layer.dtype)
    steps += [peft_lora(narrow)] if narrow == layer else [peft_lora(narrow), peft_lora(layer)]
    steps.append(inference(layer, device, plan))
    return compare_steps(steps, steps[0], device)
