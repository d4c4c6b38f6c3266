"""`neat-kernels tune`: what it is asked, what it measures in which order, and what it says."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from neat_kernels.usage import UsageError

PLANS = "plans"
STAGES = (
    *("gemm", "gemm-descriptor", "rows", "columns", "down", "up-backward", "finish"),
    *("stacked", "crossed", "small-down", "small-finish", "merge", "chain", PLANS),
)
_MINUTES = 60.0
# Compilation, checking and timing of one configuration, and of one length in both plans.
_CONFIG_SECONDS, _LENGTH_SECONDS = 3.0, 3.0
_ROUNDS, _QUICK_ROUNDS = 9, 5
# The family that a list is for where no device is.
_LISTED_ARCH = "sm_90"


@dataclass(frozen=True)
class Request:
    """What to measure: `stages`, a part of them if `quick`, into `folder`, for at most `minutes`."""

    stages: tuple[str, ...]
    quick: bool
    folder: Path
    minutes: float
    again: bool

    @property
    def rounds(self) -> int:
        """Samples of each configuration."""
        return _QUICK_ROUNDS if self.quick else _ROUNDS


class Item(NamedTuple):
    """One thing to measure, after which it is written: a table at a width of tile, or the plans of a dtype."""

    table: str
    block_r: int
    configs: int

    @property
    def is_plan(self) -> bool:
        """Whether `table` is a dtype."""
        return self.block_r == 0

    @property
    def seconds(self) -> float:
        """How long it may take, assumed."""
        return self.configs * (_LENGTH_SECONDS if self.is_plan else _CONFIG_SECONDS)

    def __str__(self) -> str:
        return f"plans in {self.table}" if self.is_plan else f"{self.table}, r ≤ {self.block_r}"


def run(options: Mapping[str, Any], console: Console) -> None:
    """Answer the command's options, of which those that were not given are None.

    Raises:
        UsageError: an option is malformed, or there is nothing to measure on.
        TuningError: something could not be measured.
    """
    if importlib.util.find_spec("triton") is None:
        raise UsageError("tune measures the Triton kernels, which needs Triton: pip install triton")
    from neat_kernels.tuning.report import print_list

    request = _request(options)
    if options["dry_run"]:
        for name in ("minutes", "output_dir", "again"):
            if options[name] not in (None, False):
                raise UsageError(f"--dry-run lists everything that there is: expected no --{name.replace('_', '-')}")
        target, words = _listed_target()
        print_list(items(request, target), words, console)
        return
    device = _device()
    from neat_kernels.tuning.session import Session

    Session(request, device, _command_line(), console).run()


def _request(options: Mapping[str, Any]) -> Request:
    from neat_kernels.kernels import measured

    stages = tuple(options["stage"] or STAGES)
    for stage in stages:
        if stage not in STAGES:
            raise UsageError(f"--stage must be among {', '.join(STAGES)}; got {stage!r}")
    minutes = _MINUTES if options["minutes"] is None else options["minutes"]
    if not 0 < minutes < 24 * 60:
        raise UsageError(f"--minutes must be above 0 and below {24 * 60}, got {minutes:g}")
    folder = options["output_dir"] or measured.PATH.parent
    return Request(stages, options["quick"], folder, minutes, options["again"])


def _command_line() -> str:
    return shlex.join(["neat-kernels", *sys.argv[1:]])


def _device() -> torch.device:
    from neat_kernels.plan import device_obstacle

    if not torch.cuda.is_available():
        raise UsageError("tune measures on the device at hand: expected a CUDA or ROCm device, found none (--dry-run)")
    import triton

    if triton.knobs.runtime.interpret:
        raise UsageError("tune times compiled kernels: expected an environment without TRITON_INTERPRET")
    device = torch.device("cuda", torch.cuda.current_device())
    obstacle = device_obstacle(device)
    if obstacle is not None:
        raise UsageError(obstacle)
    if not torch.cuda.get_device_properties(device).name:
        raise UsageError(f"expected a device whose driver reports a name to file results under, got none for {device}")
    return device


def _listed_target() -> tuple[Any, str]:
    from neat_kernels.kernels import launch

    if torch.cuda.is_available():
        target = launch.target(torch.device("cuda", torch.cuda.current_device()))
        return target, f"{target.name} ({target.arch})"
    return launch.Target(_LISTED_ARCH, 1), f"a device of {_LISTED_ARCH}, since there is none here"


def items(request: Request, target: Any) -> list[Item]:
    """What a request means for a device: the tables that it can take, by widths of tile, then the plans."""
    return [*_tables(request, target), *_plans(request)]


def _tables(request: Request, target: Any) -> list[Item]:
    from neat_kernels.kernels import launch, measured
    from neat_kernels.tuning.candidates import candidates, stage_of
    from neat_kernels.tuning.problems import HALF

    found = []
    for table in launch.tables():
        stage = stage_of(table)
        if stage.replace(" ", "-").replace("_", "-") not in request.stages:
            continue
        if stage == "gemm descriptor" and not launch.has_descriptors(target):
            continue
        if request.quick and "dropout" in table:
            continue
        for block_r in measured.BLOCKS_R[:1] if request.quick else measured.BLOCKS_R:
            present = launch.config(table, target, block_r, HALF.itemsize)
            found.append(Item(table, block_r, 1 + len(candidates(table, present))))
    return found


def _plans(request: Request) -> list[Item]:
    from neat_kernels.tuning.plans import LENGTHS, QUICK_LENGTHS

    if PLANS not in request.stages:
        return []
    if request.quick:
        return [Item("bfloat16", 0, len(QUICK_LENGTHS))]
    return [Item(dtype, 0, len(LENGTHS)) for dtype in ("bfloat16", "float16")]
