"""Compile every kernel as its host code launches it, for every target, and hold its machine code to what was meant.

    python -m benchmarks.gate --output FILE.json

Needs no GPU. FILE.json has everything, FILE.md the tables. Exit status 1 if a kernel is not what was meant.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.gate.case import Suite, load, run
from benchmarks.gate.report import distinct_kernels, write_markdown
from benchmarks.gate.sass import ptxas_versions
from benchmarks.gate.targets import TARGETS
from neat_kernels.bench.provenance import provenance, write_json


def main(arguments: list[str] | None = None) -> int:
    """Run the gate; 1 if there are violations."""
    options = _parse(arguments)
    suite = load(options.cases)
    work = [
        (options.cases, case.name, target)
        for target in options.targets
        for case in suite.CASES
        if (case.subset or not options.subset) and target in (case.targets or TARGETS)
    ]
    cases = _run_all(work, options.jobs)
    found = [violation for case in cases for violation in case["violations"]]
    if not options.subset:
        found += _never_launched(suite, cases)
    kernels = distinct_kernels(cases)
    content = {
        "provenance": provenance(),
        "ptxas": ptxas_versions([TARGETS[name] for name in options.targets]),
        "targets": options.targets,
        "subset": options.subset,
        "violations": found,
        "kernels": kernels,
        "cases": cases,
    }
    # Indented, a full report has a hundred thousand lines; the tables beside it are for reading.
    write_json(options.output, content, indent=None)
    write_markdown(options.output.with_suffix(".md"), content)
    print(f"{len(cases)} cases, {len(kernels)} kernels, {len(found)} violations; {options.output}")
    for violation in found:
        print(f"  {violation}")
    return 1 if found or not cases else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the report, *.json")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--subset", action="store_true", help="only the cases of the quick run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--cases", default="benchmarks.gate.cases", help="module of the cases (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.output.suffix != ".json":
        parser.error(f"--output: expected a name that ends in .json, got {options.output}")
    return options


def _run_all(work: list[tuple[str, str, str]], jobs: int) -> list[dict[str, Any]]:
    """Every case for its target, in order; spawned processes, since the driver is replaced for a whole process."""
    with _processes(jobs) as pool:
        futures = [pool.submit(run, *item) for item in work]
        progress = tqdm(zip(futures, work, strict=True), total=len(work), unit="case", disable=not sys.stderr.isatty())
        return [_result(future, item) for future, item in progress]


def _result(future: Future[dict[str, Any]], item: tuple[str, str, str]) -> dict[str, Any]:
    """A case's result. A compiler that aborts takes the whole pool along: each case left is then run by itself."""
    try:
        return future.result()
    except BrokenProcessPool:
        pass
    try:
        with _processes(1) as pool:
            return pool.submit(run, *item).result()
    except BrokenProcessPool:
        _, case, target = item
        died = f"{case}, {target}: does not compile: the compiler ended its process"
        return {"case": case, "target": target, "launches": [], "violations": [died]}


def _processes(number: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(number, mp_context=multiprocessing.get_context("spawn"))


def _never_launched(suite: Suite, cases: list[dict[str, Any]]) -> list[str]:
    launched = {launch["kernel"]["kernel"] for case in cases for launch in case["launches"]}
    return [f"{kernel}: no case launches it" for kernel in suite.MEANT if kernel not in launched]


if __name__ == "__main__":
    sys.exit(main())
