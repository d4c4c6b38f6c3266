"""The closed sets of names that the public API takes, and the checks that every entry point shares."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

ACTIVATIONS = ("relu", "sin2pi", "sin", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "identity")
ORIENTATIONS = ("out", "in")
BACKENDS = ("auto", "torch", "triton")
ROUNDINGS = ("nearest", "stochastic")
COMPUTE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF_DTYPES = (torch.bfloat16, torch.float16)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_int(name: str, value: int, minimum: int) -> None:
    """Raise unless `value` is an int (bool is none) of at least `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_dropout(value: float) -> None:
    """Raise unless `value` is a number with 0 <= value < 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"dropout must be a float, got {type(value).__name__}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {value}")


def check_scaling(value: float) -> None:
    """Raise unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"scaling must be a float, got {type(value).__name__}")
    # Comparisons, which a compiler traces; math.isfinite it does not. NaN is in no range.
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise ValueError(f"scaling must be finite, got {str(value)[:40]}")


def check_compute_dtype(value: torch.dtype | None) -> None:
    """Raise unless `value` is None or a floating dtype that the layer can compute in."""
    if value is not None and value not in COMPUTE_DTYPES:
        raise ValueError(f"compute_dtype must be None or one of {', '.join(map(str, COMPUTE_DTYPES))}; got {value!r}")


def nearest(name: str, known: Iterable[str], count: int = 5) -> list[str]:
    """The `count` known names closest in spelling to `name`, closest first."""
    return difflib.get_close_matches(name, list(dict.fromkeys(known)), n=count, cutoff=0.0)


def arrange(orientation: str, of_H: Any, of_B: Any) -> tuple[Any, Any]:
    """What belongs to H and to B as what belongs to D and U, or back: the exchange is its own inverse."""
    return (of_H, of_B) if orientation == "out" else (of_B, of_H)


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The accumulation dtype: float64 if any operand is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that x computes in: autocast's where it is on (float64 is exempt, as in F.linear), else its own."""
    device = x.device.type
    if x.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def is_sharded(t: Tensor) -> bool:
    """Whether a tensor is a part of one that several processes hold, told without importing torch.distributed."""
    return type(t).__name__ == "DTensor"
