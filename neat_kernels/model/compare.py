"""Predictions beside the measurements of `neat-kernels bench` and `python -m benchmarks.layer_ratio`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from neat_kernels.model import peers
from neat_kernels.model.cpu import measured_cpu, torch_backend
from neat_kernels.model.devices import DEVICES, Device, reported_as
from neat_kernels.model.predict import total
from neat_kernels.model.work import HALF, Layer, Step
from neat_kernels.result_file import read_result_file
from neat_kernels.vocabulary import check_choice

_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# Contenders whose adapter is in fp32, and those whose adapter is in the dtype of the weight.
_WIDE, _NARROW = ("frozen", "neat", "peft_lora"), ("neat_half", "peft_lora_half")


class Compared(NamedTuple):
    """One contender of one case: predicted and measured milliseconds of forward and backward; None is not modelled."""

    case: str
    contender: str
    predicted: float | None
    measured: float

    @property
    def ratio(self) -> float | None:
        """Predicted as a fraction of measured."""
        return None if self.predicted is None else self.predicted / self.measured


class Results(NamedTuple):
    """What a result file holds of use here."""

    device: str
    capability: str
    cases: list[dict[str, Any]]


def read_results(path: Path) -> Results:
    """A result file of `neat-kernels bench` or `python -m benchmarks.layer_ratio`.

    Raises:
        ValueError: it is not there, or is not such a file.
    """
    return read_result_file(path, "a result file of benchmarks.layer_ratio", _results)


def _results(content: dict[str, Any]) -> Results:
    cases = content["cases"]
    for case in cases:
        _layer(case, "frozen")
        _ = (case["device"], int(case["threads"]), {name: float(ms) for name, ms in _measured(case).items()})
    return Results(content["provenance"]["device"], content["provenance"]["cpu_capability"], cases)


def _measured(case: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds by contender; under CUDA graphs if there are such times, for the model leaves out the host."""
    summary: dict[str, Any] = case["summary"]
    measured: dict[str, Any] = summary.get("graphs", summary)["ms"]
    return measured


def compare(results: Results, device_of: Callable[[dict[str, Any]], Device] | None = None) -> list[Compared]:
    """Every contender of every case, predicted and measured.

    Args:
        results: the measurements.
        device_of: from a case to the device to predict for; by default the one that the results name, or this CPU with
            its ceilings measured now.

    Returns:
        The pairs, in the file's order.

    Raises:
        ValueError: the model does not know the device.
    """
    rows = []
    for case in results.cases:
        device = device_of(case) if device_of is not None else _device(results, case)
        name = f"{case['shape']} {case['dtype']}" + (", CUDA graphs" if "graphs" in case["summary"] else "")
        for contender, measured in _measured(case).items():
            step = _step(case, contender, device)
            predicted = None if step is None else 1e3 * total(step.launches, device).seconds
            rows.append(Compared(name, contender, predicted, measured))
    return rows


def _device(results: Results, case: dict[str, Any]) -> Device:
    if case["device"] == "cpu":
        return measured_cpu(_SHORT[case["dtype"]], case["threads"])
    device = reported_as(results.device)
    if device is None:
        raise ValueError(f"expected results of a device the model knows ({', '.join(DEVICES)}), got {results.device!r}")
    return device


def _layer(case: dict[str, Any], contender: str) -> Layer:
    tokens, in_features, out_features, r = (int(size) for size in case["shape"].split("x"))
    check_choice("dtype", case["dtype"], tuple(_SHORT))
    dtype = _SHORT[case["dtype"]]
    adapter = dtype if contender in _NARROW else "fp32"
    return Layer(tokens, in_features, out_features, r, dtype, adapter, bias=True)


def _step(case: dict[str, Any], contender: str, device: Device) -> Step | None:
    """What a contender of the benchmarks runs, None if the model has no such thing."""
    if contender not in _WIDE + _NARROW or case.get("mode", "training") != "training" or case.get("block"):
        return None
    layer = _layer(case, contender)
    if contender == "frozen":
        return peers.frozen(layer)
    if contender.startswith("peft_lora"):
        return peers.peft_lora(layer)
    if not device.arch:
        return None if contender in _NARROW else torch_backend(layer, _casts_blocks(layer, device))
    from neat_kernels.model.steps import chosen_plan, training

    return training(layer, device, chosen_plan(layer, device))


def _casts_blocks(layer: Layer, device: Device) -> bool:
    # The torch backend asks the hardware; here its speed tells, also for a machine that is elsewhere.
    return layer.dtype in HALF and device.throughput(layer.dtype) < device.throughput("fp32")
