"""Lets pytest-benchmark's JSON say where its numbers come from."""

from __future__ import annotations

from typing import Any

import pytest

from neat_kernels.bench.provenance import provenance


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Add device, versions, commit, date and command."""
    machine_info["provenance"] = provenance()
