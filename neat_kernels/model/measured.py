"""Plans of the base GEMM that were measured, from a file beside the kernels.

    {"plans": [{"device": "NVIDIA H200", "dtype": "bfloat16", "fused_up_to": 2048,
                "source": "the command, commit and date that measured it"}]}

`device` is the name that the driver reports, `fused_up_to` the longest reduction for which fused was the faster.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from neat_kernels.kernels import measured
from neat_kernels.kernels.measured import listed

PATH = measured.PATH.with_name("measured_plans.json")
_FIELDS = {"device": str, "dtype": str, "fused_up_to": int, "source": str}
_SHORT = {"bf16": "bfloat16", "fp16": "float16"}


class Measured(NamedTuple):
    """One measured limit."""

    fused_up_to: int
    source: str


def measured_plan(device: str, dtype: str, path: Path = PATH) -> Measured | None:
    """The measured limit of a device, by the name that its driver reports, and a dtype as torch names it; or None.

    Raises:
        ValueError: the file is there and does not hold what it must.
    """
    found = [entry for entry in entries(path) if entry["device"] == device and entry["dtype"] == dtype]
    if len(found) > 1:
        raise ValueError(f"{path}: expected one plan for {device} in {dtype}, got {len(found)}")
    return Measured(found[0]["fused_up_to"], found[0]["source"]) if found else None


def measured_limit(reported: str, dtype: str, path: Path = PATH) -> int | None:
    """The shortest measured limit of the devices whose names match a pattern, in "bf16" or "fp16"; or None."""
    known = [e for e in entries(path) if re.fullmatch(reported, e["device"]) and e["dtype"] == _SHORT[dtype]]
    return min((entry["fused_up_to"] for entry in known), default=None)


def entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a file, none where there is no file.

    Raises:
        ValueError: the file is there and does not hold what it must.
    """
    plans = listed(path, "plans")
    for entry in plans:
        types = {name: type(value) for name, value in entry.items()} if isinstance(entry, dict) else None
        if types != _FIELDS or entry["dtype"] not in _SHORT.values() or entry["fused_up_to"] < 0:
            expected = "device, dtype (bfloat16 or float16), fused_up_to (an integer, 0 or more) and source"
            raise ValueError(f"{path}: expected plans with {expected}, got {entry!r}")
    return plans
