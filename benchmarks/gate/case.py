"""One case of the gate: host code, run for one target, and the kernels that it launched held to what was meant."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from benchmarks.gate.fake_driver import Launch, capture
from benchmarks.gate.machine_code import KernelReport, inspect
from benchmarks.gate.rules import Expectations, violations

# A kernel that many cases launch is read once in a process.
_INSPECTED: dict[str, KernelReport] = {}


@dataclass(frozen=True)
class Case:
    """Host code that launches kernels.

    Args:
        name: unique.
        run: makes CPU tensors and calls the host code on them.
        subset: whether the quick run has it.
        targets: the names of the targets that it is for; () for all.
    """

    name: str
    run: Callable[[], object]
    subset: bool = False
    targets: tuple[str, ...] = ()


class Suite(Protocol):
    """A module of cases.

    CASES are the cases, MEANT says for every kernel, by its name in a Launch, what one launch of it is meant to be.
    """

    CASES: list[Case]
    MEANT: Mapping[str, Callable[[Launch], Expectations]]


def load(module: str) -> Suite:
    """The cases of a module."""
    return cast(Suite, importlib.import_module(module))


def run(module: str, name: str, target: str) -> dict[str, Any]:
    """Run one case for one target.

    Args:
        module: of the cases.
        name: of the case.
        target: of the device.

    Returns:
        The case, its launches (a report of each kernel, how often it is launched, and the first grid), its violations.
    """
    suite = load(module)
    case = next(case for case in suite.CASES if case.name == name)
    result: dict[str, Any] = {"case": name, "target": target, "launches": [], "violations": []}
    try:
        # On an error of ptxas Triton prints the whole kernel.
        with contextlib.redirect_stdout(io.StringIO()), capture(target) as launches:
            case.run()
    except Exception as error:
        result["violations"].append(f"{name}, {target}: does not compile: {_first_lines(error)}")
        return result
    counts = Counter(launch.compiled.hash for launch in launches)
    first = {launch.compiled.hash: launch for launch in reversed(launches)}
    for launch in (first[compiled] for compiled in counts):
        report, found = _judge(launch, suite.MEANT)
        number = counts[launch.compiled.hash]
        result["launches"].append({"kernel": report.as_json(), "number": number, "grid": list(launch.grid)})
        result["violations"] += [f"{name}, {target}, {launch.kernel}: {text}" for text in found]
    if not launches:
        result["violations"].append(f"{name}, {target}: expected launches, got none")
    return result


def _judge(launch: Launch, meant: Mapping[str, Callable[[Launch], Expectations]]) -> tuple[KernelReport, list[str]]:
    report = _INSPECTED.get(launch.compiled.hash)
    if report is None:
        report = _INSPECTED[launch.compiled.hash] = inspect(launch)
    if launch.kernel not in meant:
        return report, ["nothing is said of what was meant: add it to MEANT"]
    return report, violations(report, meant[launch.kernel](launch))


def _first_lines(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
