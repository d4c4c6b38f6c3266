"""Result files of `python -m benchmarks.model_step`: whole models, their step times and memory."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neat_kernels.bench.contenders import BASELINE, CONTENDERS
from neat_kernels.result_file import read_result_file

EXPECTED = "a result file of benchmarks.model_step"
_LABELS = {BASELINE: "frozen model", "full": "full fine-tuning", "peft_lora_liger": "PEFT LoRA, Liger's kernels"}


def label(name: str) -> str:
    """What tables call a contender."""
    return _LABELS.get(name) or CONTENDERS[name].label


def summarize(runs: Mapping[str, Sequence[dict[str, Any]]], tokens: int) -> dict[str, Any]:
    """What the processes of each contender come to.

    Args:
        runs: for each contender what its processes measured.
        tokens: of a step.

    Returns:
        For each that did not fail: the median over the processes in ms with the least and the most, the ratio to the
        frozen model's (None without it), tokens a second, parameters trained and the peak of bytes held.
    """
    sound = {name: done for name, done in runs.items() if done and not any("failed" in run for run in done)}
    medians = {name: [statistics.median(run["ms"]) for run in done] for name, done in sound.items()}
    floor = statistics.median(medians[BASELINE]) if BASELINE in medians else None
    found = {}
    for name, done in sound.items():
        ms = statistics.median(medians[name])
        found[name] = {
            "trained": done[0]["trained"],
            "ms": ms,
            "min": min(medians[name]),
            "max": max(medians[name]),
            "ratio": None if floor is None else ms / floor,
            "tokens_per_second": 1e3 * tokens / ms,
            "peak_bytes": done[0]["peak_bytes"],
        }
    return found


def read_model_results(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        ValueError: it is not there, or is not such a file.
    """
    return read_result_file(path, EXPECTED, _checked)


def _checked(content: dict[str, Any]) -> dict[str, Any]:
    _ = content["provenance"]["device"], content["provenance"]["versions"]
    _ = content["model"], content["targets"], content["dtype"], int(content["r"]), int(content["tokens"])
    for name, one in content["summary"].items():
        _ = label(name), [float(one[word]) for word in ("ms", "min", "max")], one["peak_bytes"], one["trained"]
    return content
