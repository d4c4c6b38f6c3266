"""Cases measured in fresh processes, one after the other, and what their samples come to.

Within a process the contenders take turns, and a process's ratio is the median time over the frozen linear's median in
that same process. A figure is the median over the processes, with the lowest and the highest.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from neat_kernels.bench import BenchError
from neat_kernels.bench.contenders import BASELINE
from neat_kernels.bench.worker import MARK

Case = dict[str, Any]
Run = dict[str, Any]
# Pairs whose ratio within a process is of interest besides that to the floor.
COMPARED = tuple((ours, theirs) for ours in ("neat", "neat_half") for theirs in ("peft_lora", "peft_peanut"))


def fresh_processes(
    cases: Sequence[Case],
    processes: int,
    deadline: float,
    told: Callable[[Case], None] = lambda case: None,
    quiet: bool = False,
) -> list[list[Run]]:
    """Measure every case in each of several processes, which run one after the other.

    Args:
        cases: what to measure, as `neat_kernels.bench.worker` takes it, but for `memory`.
        processes: how many; each has another contender at the head of the turns. Memory is measured in the first.
        deadline: of time.monotonic(). No process begins that would end beyond it, as far as those before it tell.
        told: is called with every case that a process has done.
        quiet: keep what the processes write to stderr for the message of an error.

    Returns:
        The runs of each case, as many as there were processes.

    Raises:
        BenchError: a process ended without the results of all cases.
    """
    runs: list[list[Run]] = [[] for _ in cases]

    def done(index: int, run: Run) -> None:
        runs[index].append(run)
        told(cases[index])

    longest = 0.0
    for number in range(processes):
        start = time.monotonic()
        if start + longest > deadline:
            break
        fresh_process(cases, number, done, quiet)
        longest = max(longest, time.monotonic() - start)
    return runs


def fresh_process(cases: Sequence[Case], number: int, done: Callable[[int, Run], None], quiet: bool = False) -> None:
    """Measure every case in one process; what is done before an error is told.

    Args:
        cases: as `fresh_processes` takes them.
        number: of the process among several.
        done: is called with the index and the run of each case, as soon as there is one.
        quiet: as in `fresh_processes`.

    Raises:
        BenchError: the process ended without the results of all cases.
    """
    _process(
        [{**case, "memory": number == 0, "contenders": rotated(case["contenders"], number)} for case in cases],
        done,
        quiet,
    )


def rotated(names: list[str], by: int) -> list[str]:
    """The names in their order, beginning with another one."""
    head = by % len(names)
    return names[head:] + names[:head]


def _process(cases: list[Case], done: Callable[[int, Run], None], quiet: bool) -> None:
    command = [sys.executable, "-m", "neat_kernels.bench.worker", json.dumps(cases)]
    # It finds the modules that this process finds.
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    environment = {**os.environ, "PYTHONPATH": path}
    count = 0
    with tempfile.TemporaryFile("w+") as errors:
        log = errors if quiet else None
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as worker:
            try:
                for line in worker.stdout or ():
                    if line.startswith(MARK):
                        done(count, json.loads(line.removeprefix(MARK)))
                        count += 1
            except BaseException:
                worker.kill()
                raise
        errors.seek(0)
        last = errors.read().strip().splitlines()[-1:]
    if worker.returncode or count < len(cases):
        missing = cases[min(count, len(cases) - 1)]
        raise BenchError(
            f"expected the results of {missing['shape']} in {missing['dtype']}; the process that measures ended with "
            f"exit status {worker.returncode}{', killed: out of memory?' if worker.returncode == -9 else ''}"
            + "".join(f": {line}" for line in last)
        )


def summarize(runs: list[Run]) -> dict[str, Any]:
    """What the runs of one case come to: times, ratios with their spread, memory.

    Returns:
        `ms` and `ratios` of the eager samples; where there are any, the same of `graphs`; and the bytes that the first
        process measured.
    """
    summary = _times(runs, "samples_ms")
    graphs = _times(runs, "graph_samples_ms")
    if graphs["ms"]:
        summary["graphs"] = graphs
    for memory in ("peak_bytes", "saved_bytes"):
        counts = {name: entry[memory] for name, entry in runs[0]["contenders"].items() if memory in entry}
        if counts:
            summary[memory] = counts
    return summary


def _times(runs: list[Run], samples: str) -> dict[str, Any]:
    """Medians and ratios of what every run has samples of."""
    medians = {
        name: [statistics.median(run["contenders"][name][samples]) for run in runs]
        for name in runs[0]["contenders"]
        if all(samples in run["contenders"][name] for run in runs)
    }
    pairs = [(name, BASELINE) for name in medians] + list(COMPARED)
    return {
        "ms": {name: statistics.median(values) for name, values in medians.items()},
        "ratios": {
            f"{one}/{other}": _spread([a / b for a, b in zip(medians[one], medians[other], strict=True)])
            for one, other in pairs
            if one in medians and other in medians
        },
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def is_sound(runs: list[Run]) -> bool:
    """Whether no contender was wrong or failed."""
    return all(entry["status"] in ("timed", "skipped") for run in runs for entry in run["contenders"].values())
