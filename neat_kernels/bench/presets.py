"""What `neat-kernels bench` measures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from neat_kernels.bench.contenders import CONTENDERS
from neat_kernels.bench.measure import Mode
from neat_kernels.bench.shapes import SHAPES, LayerShape, layer
from neat_kernels.torch_backend.gemm import half_gemm_is_native

_QUICK = ("frozen", "neat", "peft_lora", "peft_peanut", "formula", "lora_by_hand")
# Every contender that shares a process with others.
_ALL = tuple(name for name, contender in CONTENDERS.items() if not contender.alone)


@dataclass(frozen=True)
class Preset:
    """How much is measured.

    Args:
        processes: fresh ones for every case.
        seconds: timed for each contender of a case in each process.
        limit: after so many seconds no process begins.
        apart: whether every case has processes of its own; else each process measures all of them.
        contenders: who takes part.
    """

    processes: int
    seconds: float
    limit: float
    apart: bool
    contenders: tuple[str, ...]


PRESETS = {
    "quick": Preset(processes=5, seconds=0.2, limit=165, apart=False, contenders=_QUICK),
    "full": Preset(processes=5, seconds=1.0, limit=6 * 3600, apart=True, contenders=_ALL),
}


def layers_of(preset: str, device: torch.device) -> list[tuple[Mode, LayerShape]]:
    """The layers of a preset, in training and in inference."""
    if preset == "quick":
        token = layer("llama-3.2-1b.q_proj", 1)
        large, small = (
            ((layer("llama-3-8b.q_proj", 8192),), SHAPES["gpu-small"])
            if device.type == "cuda"
            else ((layer("roberta-base.query", 2048), layer("llama-3.2-1b.k_proj", 1024)), (layer("vit-b.query", 197),))
        )
        return [*_in("training", (*large, *small)), *_in("inference", (small[-1], token))]
    names = ("gpu-large", "gpu-small", "decoding-8b") if device.type == "cuda" else ("cpu-eight", None, "decoding-1b")
    trained = [shape for name in names[:2] if name is not None for shape in SHAPES[name]]
    decoded = SHAPES[str(names[2])]
    return [*_in("training", trained), *_in("inference", trained), *_in("inference", decoded)]


def _in(mode: Mode, shapes: Iterable[LayerShape]) -> Iterator[tuple[Mode, LayerShape]]:
    return ((mode, shape) for shape in shapes)


def dtypes_of(device: torch.device) -> tuple[str, ...]:
    """bf16, and on a CPU fp32; a CPU that multiplies bf16 in a scalar loop takes minutes for a single product."""
    if device.type == "cuda":
        return ("bfloat16",)
    return ("float32", "bfloat16") if half_gemm_is_native(torch.bfloat16) else ("float32",)


def cases(
    layers: Iterable[tuple[Mode, LayerShape]],
    dtypes: Iterable[str],
    device: torch.device,
    threads: int,
    preset: Preset,
) -> list[dict[str, Any]]:
    """The cases, as `neat_kernels.bench.worker` takes them."""
    asked = tuple(dtypes)
    return [
        {
            "mode": mode,
            "block": "",
            "shape": str(shape),
            "dtype": dtype,
            "device": str(device),
            "threads": threads,
            "seconds": preset.seconds,
            "contenders": [name for name in preset.contenders if CONTENDERS[name].differs_in(dtype)],
        }
        for mode, shape in dict.fromkeys(layers)
        for dtype in asked
    ]
