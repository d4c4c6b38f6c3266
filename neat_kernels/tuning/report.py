"""What the tuner prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from neat_kernels.kernels.configs import Config
from neat_kernels.kernels.launch import Target
from neat_kernels.tuning.command import Item, Request

if TYPE_CHECKING:
    from neat_kernels.tuning.files import Folder
    from neat_kernels.tuning.session import Measured


def print_list(listed: Sequence[Item], device: str, console: Console) -> None:
    """Every item that would be measured, with the number of its configurations or lengths."""
    console.print(f"What tune would measure on {escape(device)}; nothing was run", highlight=False)
    table = Table(box=SIMPLE)
    table.add_column("item")
    table.add_column("configurations, or lengths", justify="right")
    for item in listed:
        table.add_row(str(item), str(item.configs))
    console.print(table)
    console.print(_estimate(listed), highlight=False)


def print_pending(target: Target, pending: Sequence[Item], wanted: int, request: Request, console: Console) -> None:
    """What is about to be measured, and how long that may take."""
    console.print(
        f"[bold]{escape(target.name)}[/] ({target.arch}), into {escape(str(request.folder))}", highlight=False
    )
    if len(pending) < wanted:
        console.print(
            f"{wanted - len(pending)} of {wanted} are measured already by this version (--again repeats them)",
            highlight=False,
        )
    console.print(f"{_estimate(pending)}; nothing begins after {request.minutes:g} minutes", highlight=False)


def _estimate(listed: Sequence[Item]) -> str:
    minutes = sum(item.seconds for item in listed) / 60
    return f"{len(listed)} items, about {minutes:.0f} minutes (assumed: {_ASSUMED})"


_ASSUMED = "3 s to compile, check and time a configuration, or a length in both plans"


def print_summary(came: Measured, folder: Folder, console: Console) -> None:
    """What was chosen, what was dropped and why, and where it is written."""
    if came.outcomes:
        _print_configs(came, console)
    for dtype, (limit, times) in came.limits.items():
        ratios = ", ".join(f"{length}: {one.fused / one.cublas:.3f}" for length, one in times.items())
        console.print(f"plans in {dtype}: fused up to {limit} (fused / cublas: {ratios})", highlight=False)
    if came.outcomes:
        console.print(f"written: {escape(str(folder.configs))}", highlight=False, soft_wrap=True)
    if came.limits:
        console.print(f"written: {escape(str(folder.plans))}", highlight=False, soft_wrap=True)
    if came.left:
        console.print(f"{len(came.left)} items left: the same command goes on with them", highlight=False)


def _print_configs(came: Measured, console: Console) -> None:
    table = Table(box=SIMPLE, title="Launch configurations, as m×n×k, warps, stages")
    for column in ("stage", "r up to", "before", "chosen"):
        table.add_column(column)
    for column in ("µs before", "µs", "dropped"):
        table.add_column(column, justify="right")
    for one in came.outcomes:
        same = one.chosen == one.present
        times = (f"{1e6 * one.seconds[config]:.1f}" for config in (one.present, one.chosen))
        chosen = "the same" if same else f"[green]{_short(one.chosen)}[/]"
        table.add_row(
            one.key.stage, str(one.key.block_r), _short(one.present), chosen, *times, str(len(one.dropped) or "")
        )
    console.print(table)
    for one in came.outcomes:
        for config, reason in one.dropped.items():
            what = f"dropped: {one.key.stage}, r ≤ {one.key.block_r}, {_short(config)}: {reason}"
            console.print(escape(what), style="dim", highlight=False, soft_wrap=True)


def _short(config: Config) -> str:
    tile = "×".join(str(size) for size in config[:3])
    return f"{tile}, {config.num_warps}, {config.num_stages}{', persistent' if config.persistent else ''}"
