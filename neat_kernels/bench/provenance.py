"""Where a result comes from: machine, versions, commit, date, command. Every result file carries it.

python -m neat_kernels.bench.provenance                                  print it
python -m neat_kernels.bench.provenance name                             the device's name, fit for a file name
python -m neat_kernels.bench.provenance write FILE OUTCOME COMMAND...    a result file for a command that writes none
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from neat_kernels._version import __version__
from neat_kernels.files import write_atomically

# The folder that holds the package: the repository's, unless the package is installed.
ROOT = Path(__file__).resolve().parent.parent.parent
_PACKAGES = ("torch", "triton", "peft", "transformers", "numpy", "pytest", "pytest-benchmark")


def provenance(command: str | None = None) -> dict[str, Any]:
    """The facts that a reader needs to judge or repeat a result.

    Args:
        command: how the result was made; by default this process's command line.

    Returns:
        A dict that JSON can hold.
    """
    return {
        "device": gpu_name() or cpu_name(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": os.cpu_count(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), "neat-kernels": __version__, **_versions()},
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command or " ".join(["python", *sys.orig_argv[1:]]),
    }


def gpu_name() -> str | None:
    """The name of the first CUDA device, or None without one."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def cpu_name() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()


def write_json(path: Path, content: dict[str, Any], indent: int | None = 1) -> None:
    """Write `content` to `path` under a temporary name first, so that a reader never meets half a file.

    Lists of numbers stand on one line each: they are samples, of which there are many.
    """
    text = json.dumps(content, indent=indent, allow_nan=False)
    text = re.sub(r"\[\n\s*(-?[\d.e+-]+(?:,\n\s*-?[\d.e+-]+)*)\n\s*\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (text + "\n").encode())


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"torch": torch.__version__}
    for package in _PACKAGES[1:]:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _commit() -> str:
    """NEAT_KERNELS_COMMIT, which a copied tree is given; else git's, "+changes" if the tree differs from it."""
    given = os.environ.get("NEAT_KERNELS_COMMIT")
    if given:
        return given
    # An installed package may lie inside another project's repository, whose commit says nothing of it.
    top = _output("git", "-C", str(ROOT), "rev-parse", "--show-toplevel")
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if head is None or top is None or Path(top).resolve() != ROOT:
        return "unknown"
    # Results that are written on the way change nothing that is measured.
    changes = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return head + ("+changes" if changes else "")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _main(arguments: list[str]) -> None:
    if arguments == ["name"]:
        print(re.sub(r"[^a-z0-9]+", "-", (gpu_name() or cpu_name()).lower()).strip("-"))
    elif arguments[:1] == ["write"] and len(arguments) > 3:
        write_json(Path(arguments[1]), {"provenance": provenance(" ".join(arguments[3:])), "outcome": arguments[2]})
    elif not arguments:
        print(json.dumps(provenance(), indent=1))
    else:
        raise SystemExit(f"expected no argument, 'name', or 'write FILE OUTCOME COMMAND...'; got {arguments}")


if __name__ == "__main__":
    _main(sys.argv[1:])
