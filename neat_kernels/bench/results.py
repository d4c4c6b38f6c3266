"""Result files of `neat-kernels bench` and `python -m benchmarks.layer_ratio`, which are one format."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from neat_kernels.bench.contenders import BASELINE
from neat_kernels.bench.measure import MODES
from neat_kernels.bench.shapes import LayerShape
from neat_kernels.result_file import read_result_file

Case = dict[str, Any]
EXPECTED = "a result file of `neat-kernels bench` or benchmarks.layer_ratio"


class Key(NamedTuple):
    """What was timed: a case is another one if any of these differs."""

    mode: str
    shape: str
    dtype: str
    device: str
    threads: int
    block: str


class Results(NamedTuple):
    """A result file."""

    provenance: dict[str, Any]
    cases: list[Case]


def read_results(path: Path) -> Results:
    """Read a result file; files from before there were modes hold training.

    Raises:
        ValueError: it is not there, or is not such a file.
    """
    return read_result_file(path, EXPECTED, _results)


def _results(content: dict[str, Any]) -> Results:
    cases = [{**case, "mode": case.get("mode", "training")} for case in content["cases"]]
    for case in cases:
        _check(case)
    _ = content["provenance"]["device"], content["provenance"]["versions"]
    return Results(content["provenance"], cases)


def _check(case: Case) -> None:
    if key(case).mode not in MODES:
        raise ValueError(f"a mode of {', '.join(MODES)}")
    LayerShape.parse(case["shape"])
    if BASELINE not in case["summary"]["ms"]:
        raise ValueError(f"times of {BASELINE}")
    for name in case["summary"]["ms"]:
        _ = {word: float(value) for word, value in case["summary"]["ratios"][f"{name}/{BASELINE}"].items()}
        if not per_process(case, name):
            raise ValueError(f"samples of {name}")


def key(case: Case) -> Key:
    """What a case has timed."""
    return Key(case["mode"], case["shape"], case["dtype"], case["device"], int(case["threads"]), case.get("block", ""))


def per_process(case: Case, name: str, samples: str = "samples_ms") -> list[float]:
    """The median milliseconds of a contender in each process that has samples of it."""
    entries = [run["contenders"].get(name, {}) for run in case["runs"]]
    return [statistics.median(entry[samples]) for entry in entries if entry.get(samples)]


def ratios(case: Case, name: str, samples: str = "samples_ms") -> list[float]:
    """A contender's median as a ratio to the floor's of the same process, for each process."""
    both = zip(per_process(case, name, samples), per_process(case, BASELINE, samples), strict=False)
    return [own / floor for own, floor in both]


def sample_kinds(cases: Iterable[Case]) -> list[str]:
    """The kinds of samples that the cases have: eager, and under CUDA graphs."""
    found = {kind for case in cases for run in case["runs"] for entry in run["contenders"].values() for kind in entry}
    return [kind for kind in ("samples_ms", "graph_samples_ms") if kind in found]
