"""The files that launches and plans read: what is in them, and how an entry gets there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from neat_kernels.environment import versions
from neat_kernels.files import write_atomically
from neat_kernels.kernels import launch, measured
from neat_kernels.kernels.configs import Config
from neat_kernels.model import measured as measured_plans
from neat_kernels.usage import UsageError

_DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00")
_VERSIONS = ("torch", "triton", "neat-kernels")


class Source(NamedTuple):
    """Where an entry comes from."""

    command: str
    commit: str
    date: str
    versions: dict[str, str]

    def is_that_of(self, other: Mapping[str, Any]) -> bool:
        """Whether an entry was measured with the same code: what another day or command changes is no reason."""
        return other["commit"] == self.commit and other["versions"] == self.versions

    def covers(self, words: str, since: str) -> bool:
        """Whether an entry that has only words for its source was measured with the same code, not before `since`."""
        dates = _DATE.findall(words)
        return words.endswith(self.code) and bool(dates) and dates[-1] >= since

    @property
    def code(self) -> str:
        """Commit and versions in words."""
        return f"commit {self.commit}, " + ", ".join(f"{name} {version}" for name, version in self.versions.items())

    def __str__(self) -> str:
        return f"{self.command}, {self.date}, {self.code}"


def source(command: str) -> Source:
    """What is measured now, by `command`."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    found = versions()
    return Source(command, commit(), now, {name: found[name] for name in _VERSIONS})


def commit() -> str:
    """NEAT_KERNELS_COMMIT, which a copied tree is given; else git's, "+changes" if the package differs from it."""
    given = os.environ.get("NEAT_KERNELS_COMMIT")
    if given:
        return given
    package = Path(__file__).resolve().parent.parent
    known = _git(package, "ls-files", "--", "__init__.py")
    head = _git(package, "rev-parse", "HEAD") if known else None
    if not head:
        return "unknown"
    # What the tuner writes beside the kernels is no change of the code.
    changed = _git(package, "status", "--porcelain", "--", ".", ":!kernels/measured_*.json")
    return head + ("+changes" if changed else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


class Folder:
    """The folder of both files.

    Args:
        path: of the folder.

    Raises:
        UsageError: nothing can be written there, or a file is there that is none of them.
    """

    def __init__(self, path: Path) -> None:
        self.configs, self.plans = path / measured.PATH.name, path / measured_plans.PATH.name
        try:
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise UsageError(f"--output-dir must be a folder that can be written to, got {path}: {error}") from error
        try:
            self.config_entries(), self.plan_entries()
        except ValueError as error:
            raise UsageError(str(error)) from error

    def config_entries(self) -> list[dict[str, Any]]:
        """The configurations so far."""
        return launch.measured_entries(self.configs)

    def plan_entries(self) -> list[dict[str, Any]]:
        """The plans so far."""
        return measured_plans.entries(self.plans)

    def add_config(self, key: measured.Key, config: Config, origin: Source) -> None:
        """Write a configuration; it takes the place of another with its key, all other entries stay."""
        kept = [entry for entry in self.config_entries() if measured.key_of(entry) != key]
        kept.append({**key._asdict(), "config": config._asdict(), "source": origin._asdict()})
        _write(self.configs, "configurations", sorted(kept, key=measured.key_of))

    def add_plan(self, device: str, dtype: str, fused_up_to: int, origin: Source) -> None:
        """Write a plan in the same way."""
        kept = [entry for entry in self.plan_entries() if (entry["device"], entry["dtype"]) != (device, dtype)]
        kept.append({"device": device, "dtype": dtype, "fused_up_to": fused_up_to, "source": str(origin)})
        _write(self.plans, "plans", sorted(kept, key=lambda entry: (entry["device"], entry["dtype"])))


def _write(path: Path, name: str, entries: list[dict[str, Any]]) -> None:
    write_atomically(path, (json.dumps({name: entries}, indent=1, ensure_ascii=False) + "\n").encode())
