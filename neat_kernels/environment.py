"""What is installed, what it runs on, and whether it computes the right thing there."""

from __future__ import annotations

import platform
from importlib import metadata

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from neat_kernels._version import __version__

PACKAGES = ("torch", "triton", "transformers", "peft")


def versions() -> dict[str, str]:
    """The versions of Python, this package and what it works with; found without importing any but torch."""
    found = {"python": platform.python_version(), "neat-kernels": __version__}
    found |= {package: installed(package) for package in PACKAGES}
    # Its metadata leave out which CUDA it was built for.
    return found | {"torch": str(torch.__version__)}


def installed(package: str) -> str:
    """The version of a package, or the words "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[torch.device]:
    """The CPU and every accelerator that can be used."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    there = [torch.device("cpu")]
    if kind is not None:
        there += [torch.device(kind.type, index) for index in range(torch.accelerator.device_count())]
    return there


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cpu":
        return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        return f"{device} ({properties.name}, {memory}, compute capability {properties.major}.{properties.minor})"
    if device.type == "xpu":
        return f"{device} ({torch.xpu.get_device_name(device)})"
    return str(device)


def print_environment(console: Console) -> None:
    """Print versions, devices, and each backend and csrc with the reason why it cannot run, if it cannot."""
    from neat_kernels import cpu
    from neat_kernels.plan import available_backends

    table = Table.grid(padding=(0, 2))
    table.add_row("platform", platform.platform())
    for package, version in versions().items():
        table.add_row(package, version)
    for device in devices():
        table.add_row("device", escape(device_name(device)))
    parts = {f"backend {backend}": reason for backend, reason in available_backends().items()}
    for part, reason in {**parts, "csrc": cpu.obstacle()}.items():
        state = "[green]available[/]" if reason is None else f"[yellow]not available[/]: {escape(reason)}"
        table.add_row(part, state)
    console.print(table)


def print_self_check(console: Console) -> bool:
    """Print each case of the self-check with its largest error; return whether all of them passed.

    Args:
        console: where to print.

    Returns:
        False if a case failed, or if none ran.
    """
    from neat_kernels.selfcheck import self_check

    table = Table(
        box=SIMPLE,
        title="Self-check of neat_linear: output and every gradient against float64",
        caption="error: ‖computed − exact‖ / ‖exact‖ of the tensor closest to its limit, which is\n"
        "1.5 × the error of plain torch operations in the same dtype + 8 unit roundoffs",
        caption_justify="left",
    )
    for column in ("backend", "dtype", "layer", "tensor", "error", "limit", ""):
        table.add_column(column)
    outcomes = list(self_check())
    for outcome in outcomes:
        table.add_row(
            f"{outcome.backend}, {outcome.device}",
            str(outcome.dtype).removeprefix("torch."),
            str(outcome.case),
            outcome.tensor,
            f"{outcome.error:.1e}",
            f"{outcome.limit:.1e}",
            "[green]ok[/]" if outcome.passed else f"[red]FAILED[/] {escape(outcome.failure)}",
        )
    console.print(table)
    return bool(outcomes) and all(outcome.passed for outcome in outcomes)
