"""Forward + backward of one adapted layer as a ratio to the frozen linear, over fresh processes.

    python -m benchmarks.layer_ratio --output layer_ratio.json

Within a process the contenders take turns, and a process's ratio is the median time over the frozen linear's median
in that same process. The figure printed is the median over the processes, with the lowest and the highest. On a GPU
the same follows under CUDA graphs, without the host's part, with the peak of what one pass allocates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import CONTENDERS
from benchmarks.provenance import ROOT, provenance, write_json
from benchmarks.shapes import REFERENCE_SHAPE, SHAPES, parse_shapes

_BASELINE = "frozen"
_DEFAULT = ("frozen", "neat", "neat_half", "peft_lora", "peft_peanut")
_COMPARED = (("neat", "peft_lora"), ("neat", "peft_peanut"), ("neat_half", "peft_lora"), ("neat_half", "peft_peanut"))


def main(arguments: list[str] | None = None) -> int:
    """Run every case, print its table, write the results; 1 if a contender was wrong or failed, or if nothing ran."""
    options = _parse(arguments)
    facts = provenance()
    print(f"{facts['device']} (CPU {facts['cpu_capability']}), {options.threads} CPU threads, commit {facts['commit']}")
    print(", ".join(f"{package} {version or '(not installed)'}" for package, version in facts["versions"].items()))
    deadline = time.monotonic() + options.limit
    cases, sound = [], True
    for shape in options.shapes:
        for dtype in options.dtypes:
            case = {
                "shape": str(shape),
                "dtype": dtype,
                "device": options.device,
                "threads": options.threads,
                "seconds": options.seconds,
                "contenders": [c for c in options.contenders if CONTENDERS[c].differs_in(dtype)],
            }
            runs = _fresh_processes(case, options.processes, deadline)
            if not runs:
                print(f"\n{shape} {dtype}: not run, the limit of {options.limit} s was reached")
                continue
            summary = _summarize(runs)
            _print_case(case, runs, summary)
            sound &= _is_sound(runs)
            cases.append({**case, "runs": runs, "summary": summary})
            if options.output is not None:
                write_json(options.output, {"provenance": facts, "processes": options.processes, "cases": cases})
    return 0 if sound and cases else 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=parse_shapes,
        default=[(REFERENCE_SHAPE,)],
        help=f"TOKENSxINxOUTxR, or a set: {', '.join(SHAPES)} (default: {REFERENCE_SHAPE})",
    )
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a process (default: 2)")
    parser.add_argument("--processes", type=int, default=5, help="fresh processes per case (default: 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="timed per contender and process (default: 2)")
    parser.add_argument("--limit", type=float, default=540, help="start no further process after so many seconds")
    parser.add_argument("--contenders", nargs="+", default=list(_DEFAULT), choices=list(CONTENDERS))
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch {torch.__version__} finds no CUDA device")
    options.shapes = [shape for group in options.shapes for shape in group]
    options.contenders = list(dict.fromkeys([_BASELINE, *options.contenders]))
    return options


def _fresh_processes(case: dict[str, Any], processes: int, deadline: float) -> list[dict[str, Any]]:
    """Run `case` in one process after the other, each with another contender at the head of the turns."""
    runs: list[dict[str, Any]] = []
    longest = 0.0
    for i in range(processes):
        start = time.monotonic()
        if start + longest > deadline:
            break
        head = i % len(case["contenders"])
        turns = case["contenders"][head:] + case["contenders"][:head]
        command = [sys.executable, "-m", "benchmarks.layer_worker", json.dumps({**case, "contenders": turns})]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        longest = max(longest, time.monotonic() - start)
    return runs


def _summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    summary = _times(runs, "samples_ms")
    graphs = _times(runs, "graph_samples_ms")
    if graphs["ms"]:
        summary["graphs"] = graphs
        summary["peak_bytes"] = {
            name: max(run["contenders"][name]["peak_bytes"] for run in runs) for name in summary["ms"]
        }
    return summary


def _times(runs: list[dict[str, Any]], samples: str) -> dict[str, Any]:
    """Medians and ratios of what every run has samples of."""
    medians = {
        name: [statistics.median(run["contenders"][name][samples]) for run in runs]
        for name in runs[0]["contenders"]
        if all(samples in run["contenders"][name] for run in runs)
    }
    pairs = [(name, _BASELINE) for name in medians] + list(_COMPARED)
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


def _is_sound(runs: list[dict[str, Any]]) -> bool:
    return all(entry["status"] in ("timed", "skipped") for run in runs for entry in run["contenders"].values())


def _print_case(case: dict[str, Any], runs: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    tokens, in_features, out_features, r = case["shape"].split("x")
    print(f"\nM={tokens}, {in_features}->{out_features}, r={r}, {case['dtype']}, {case['device']}, ", end="")
    print(f"forward + backward, {len(runs)} fresh processes, each result held to {runs[0]['tolerance']:.1e} of float64")
    _print_times(case, runs, "samples_ms", summary)
    if "graphs" in summary:
        print("under CUDA graphs")
        _print_times(case, runs, "graph_samples_ms", summary["graphs"])
        peaks = (f"{CONTENDERS[name].label} {count / 2**20:.1f}" for name, count in summary["peak_bytes"].items())
        print(f"peak of a pass, MiB: {', '.join(peaks)}", flush=True)


def _print_times(case: dict[str, Any], runs: list[dict[str, Any]], samples: str, times: dict[str, Any]) -> None:
    print(f"{'':30}{'adapter':>10}{'ms':>10}  {'/ frozen':>8}{'min .. max':>16}{'samples':>9}")
    for name in case["contenders"]:
        entries = [run["contenders"][name] for run in runs]
        failed = next((entry for entry in entries if samples not in entry), None)
        if failed is not None:
            reason = failed.get("no_graph") if failed["status"] == "timed" else failed["reason"]
            print(f"{CONTENDERS[name].label:30}{failed['status']}, no times here: {reason}")
            continue
        ratio = times["ratios"][f"{name}/{_BASELINE}"]
        counts = sum(len(entry[samples]) for entry in entries)
        spread = f"{ratio['min']:.2f} .. {ratio['max']:.2f}"
        print(f"{CONTENDERS[name].label:30}{entries[0]['adapter_dtype'] or '-':>10}{times['ms'][name]:10.3f}", end="")
        print(f"  {ratio['median']:8.2f}{spread:>16}{counts:9}")
    for one, other in _COMPARED:
        ratio = times["ratios"].get(f"{one}/{other}")
        if ratio is not None:
            labels = f"{CONTENDERS[one].label} / {CONTENDERS[other].label}"
            print(f"{labels:52}{ratio['median']:8.2f}  {ratio['min']:.2f} .. {ratio['max']:.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
