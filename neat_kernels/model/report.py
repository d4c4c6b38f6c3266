"""Predictions as tables and as JSON. Every table says that it is one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from neat_kernels.model.compare import Compared
from neat_kernels.model.devices import Device
from neat_kernels.model.gemm import triton_efficiency
from neat_kernels.model.predict import Comparison, Total, predict
from neat_kernels.model.steps import aligned_loads
from neat_kernels.model.work import Layer, Step

LABEL = "predicted, not measured"


def print_device(device: Device, console: Console) -> None:
    """The limits that the predictions rest on, and their sources."""
    half, fp32 = (device.throughput(unit) / 1e12 for unit in ("bf16", "fp32"))
    console.print(
        f"[bold]{device.name}[/]: {device.bandwidth / 1e12:.3g} of {device.peak_bandwidth / 1e12:.3g} TB/s, "
        f"{half:.0f} of {device.peak['half'] / 1e12:.0f} TFLOP/s in half precision, {fp32:.0f} in fp32, "
        f"{1e6 * device.gap:g} µs a launch. Everything below is [bold]{LABEL}[/].",
        highlight=False,
    )
    for what, source in (
        *device.sources.items(),
        ("Triton GEMM", triton_efficiency(device.arch, 4096, aligned_loads(device)).source),
    ):
        console.print(f"  {what}: {escape(source)}", style="dim", highlight=False)


def print_kernels(layer: Layer, step: Step, device: Device, console: Console) -> None:
    """Every launch of a step."""
    table = _table(f"{step.name}, {_sizes(layer)}: {LABEL}")
    for column in ("", "kernel"):
        table.add_column(column)
    for column in ("MB read", "MB written", "GFLOP", "µs"):
        table.add_column(column, justify="right")
    table.add_column("bound by")
    for phase, works in (("forward", step.forward), ("backward", step.backward)):
        for i, work in enumerate(works):
            predicted = predict(work, device)
            table.add_row(
                phase if i == 0 else "",
                work.kernel,
                f"{work.bytes_read / 1e6:.2f}",
                f"{work.bytes_written / 1e6:.2f}",
                f"{work.flops / 1e9:.2f}",
                f"{1e6 * predicted.seconds:.1f}",
                predicted.bound,
            )
    console.print(table)


def print_comparison(layer: Layer, rows: Sequence[Comparison], device: Device, console: Console) -> None:
    """Every way to run the layer beside the frozen linear."""
    table = _table(f"{_sizes(layer)} on {device.name}: {LABEL}")
    table.add_column("")
    for column in ("launches", "MB", "GFLOP", "forward µs", "in all µs", "/ frozen"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.step.name,
            str(row.whole.launches),
            f"{row.whole.bytes / 1e6:.1f}",
            f"{row.whole.flops / 1e9:.1f}",
            f"{1e6 * row.forward.seconds:.1f}",
            f"{1e6 * row.whole.seconds:.1f}",
            f"{row.ratio:.2f}",
        )
    console.print(table)
    W = layer.in_features * layer.out_features * layer.itemsize
    if W <= device.cache:
        console.print(
            f"  W ({W / 2**20:.0f} MiB) fits into the {device.cache / 2**20:.0f} MiB of cache: the bytes are those of "
            "a W that comes from memory.",
            style="dim",
        )


def print_compared(rows: Sequence[Compared], console: Console) -> None:
    """Predicted and measured times, and each as a ratio to the frozen linear."""
    table = Table(box=SIMPLE, title="Predictions beside measurements: forward and backward of one layer")
    for column in ("case", "contender"):
        table.add_column(column)
    for column in ("measured ms", "predicted ms", "predicted / measured", "measured / frozen", "predicted / frozen"):
        table.add_column(column, justify="right")
    floors = {row.case: row for row in rows if row.contender == "frozen"}
    for row in rows:
        floor = floors.get(row.case)
        table.add_row(
            row.case,
            row.contender,
            f"{row.measured:.3f}",
            "not modelled" if row.predicted is None else f"{row.predicted:.3f}",
            "" if row.ratio is None else f"{row.ratio:.2f}",
            "" if floor is None else f"{row.measured / floor.measured:.3f}",
            "" if floor is None or not row.predicted or not floor.predicted else _ratio(row.predicted, floor.predicted),
        )
    console.print(table)
    off = [abs(math.log(row.ratio)) for row in rows if row.ratio]
    if off:
        console.print(f"Predicted times are off by a factor of {math.exp(sum(off) / len(off)):.2f} (geometric mean).")


def _ratio(one: float, other: float) -> str:
    return f"{one / other:.3f}"


def content(device: Device, cases: Sequence[tuple[Layer, str, Sequence[Comparison]]]) -> dict[str, Any]:
    """What --json writes."""
    return {
        "kind": LABEL,
        "device": {
            "name": device.name,
            "bandwidth": device.bandwidth,
            "peak_bandwidth": device.peak_bandwidth,
            "peak": device.peak,
            "reached": device.reached,
            "gap": device.gap,
            "triton_gemm": triton_efficiency(device.arch, 4096, aligned_loads(device)).source,
            "sources": device.sources,
        },
        "cases": [
            {
                "shape": layer.shape,
                "r": layer.r,
                "dtype": layer.dtype,
                "adapter_dtype": layer.adapter_dtype,
                "plan": plan,
                "steps": [_step(row, device) for row in rows],
            }
            for layer, plan, rows in cases
        ],
    }


def _step(row: Comparison, device: Device) -> dict[str, Any]:
    return {
        "name": row.step.name,
        "ratio_to_frozen": row.ratio,
        "forward": _total(row.forward),
        "in_all": _total(row.whole),
        "kernels": [
            {
                "kernel": work.kernel,
                "phase": phase,
                "reads": work.reads,
                "writes": work.writes,
                "flops": work.flops,
                "unit": work.unit,
                "seconds": predict(work, device).seconds,
                "bound": predict(work, device).bound,
            }
            for phase, works in (("forward", row.step.forward), ("backward", row.step.backward))
            for work in works
        ],
    }


def _total(total: Total) -> dict[str, float]:
    return total._asdict()


def _sizes(layer: Layer) -> str:
    return f"M={layer.tokens}, {layer.in_features}→{layer.out_features}, r={layer.r}, {layer.dtype}"


def _table(title: str) -> Table:
    return Table(box=SIMPLE, title=title, title_style="bold")
