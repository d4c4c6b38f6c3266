"""One adapted layer or block as a ratio to the frozen one, over fresh processes: training, its parts, or inference.

    python -m benchmarks.layer_ratio --output layer_ratio.json

Within a process the contenders take turns, and a process's ratio is the median time over the frozen linear's median
in that same process. The figure printed is the median over the processes, with the lowest and the highest, and what
one call allocates at most and saves for backward. On a GPU the same follows under CUDA graphs, without the host's part.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from neat_kernels.bench import BenchError
from neat_kernels.bench.block import ADAPTED, BLOCKS, parse_block
from neat_kernels.bench.contenders import BASELINE, CONTENDERS, check_company
from neat_kernels.bench.measure import LABELS, MODES
from neat_kernels.bench.processes import COMPARED, fresh_process, is_sound, summarize
from neat_kernels.bench.provenance import provenance, write_json
from neat_kernels.bench.shapes import REFERENCE_SHAPE, SHAPES, parse_shapes

_DEFAULT = (BASELINE, "neat", "neat_half", "peft_lora", "peft_peanut")


def main(arguments: list[str] | None = None) -> int:
    """Run every case, print its table, write the results; 1 if a contender was wrong or failed, or if nothing ran."""
    options = _parse(arguments)
    facts = provenance()
    print(f"{facts['device']} (CPU {facts['cpu_capability']}), {options.threads} CPU threads, commit {facts['commit']}")
    print(", ".join(f"{package} {version or '(not installed)'}" for package, version in facts["versions"].items()))
    done = _done_before(options, facts)
    cases = _cases(options)
    runs: list[list[dict[str, Any]]] = [
        next((old["runs"][: options.processes] for old in done if {key: old.get(key) for key in case} == case), [])
        for case in cases
    ]

    def write() -> None:
        if options.output is not None and any(runs):
            found = [
                {**case, "runs": ran, "summary": summarize(ran)} for case, ran in zip(cases, runs, strict=True) if ran
            ]
            write_json(options.output, {"provenance": facts, "processes": options.processes, "cases": found})

    ended = _measure(cases, runs, options, write)
    for case, ran in zip(cases, runs, strict=True):
        if ran:
            _print_case(case, ran, summarize(ran))
        else:
            print(f"\n{case['shape']} {case['dtype']}: not run, the limit of {options.limit:.0f} s was reached")
    complete = all(len(ran) == options.processes for ran in runs)
    if not complete:
        print("\nnot complete: the same command with --resume goes on from here")
    return 0 if ended and complete and all(map(is_sound, runs)) else 1


def _measure(
    cases: list[dict[str, Any]],
    runs: list[list[dict[str, Any]]],
    options: argparse.Namespace,
    write: Callable[[], None],
) -> bool:
    """Add the runs that are missing, and write after each process; False if a process ended without its results."""
    deadline, longest, ended = time.monotonic() + options.limit, 0.0, True
    numbers = range(len(cases))
    for group in [list(numbers)] if options.together else [[i] for i in numbers]:
        for process in range(options.processes):
            lacking = [i for i in group if len(runs[i]) <= process]
            start = time.monotonic()
            if not lacking or start + longest > deadline:
                continue

            def done(index: int, run: dict[str, Any], lacking: list[int] = lacking) -> None:
                runs[lacking[index]].append(run)
                _tell(cases[lacking[index]])

            try:
                # A process that dies, as of an illegal access on a GPU, costs neither what it has done nor the others.
                fresh_process([cases[i] for i in lacking], process, done)
            except BenchError as error:
                print(f"\n{error}", file=sys.stderr, flush=True)
                ended = False
            longest = max(longest, time.monotonic() - start)
            write()
    return ended


def _tell(case: dict[str, Any]) -> None:
    what = " ".join(filter(None, (case["mode"], case["block"], case["shape"], case["dtype"])))
    print(f"measured in one process more: {what}", file=sys.stderr, flush=True)


def _cases(options: argparse.Namespace) -> list[dict[str, Any]]:
    return [
        {
            "mode": mode,
            "block": block,
            "shape": str(shape),
            "dtype": dtype,
            "device": options.device,
            "threads": options.threads,
            "seconds": options.seconds,
            "contenders": [
                c for c in options.contenders if CONTENDERS[c].differs_in(dtype) and (c in ADAPTED or not block)
            ],
        }
        for mode in options.modes
        for block, shape in options.what
        for dtype in options.dtypes
    ]


def _done_before(options: argparse.Namespace, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """With --resume, the output's cases with their sound runs, if they are of this commit, device and versions."""
    if not (options.resume and options.output.is_file()):
        return []
    before = json.loads(options.output.read_text())
    same = all(before["provenance"][key] == facts[key] for key in ("commit", "device", "versions"))
    cases: list[dict[str, Any]] = before.get("cases", []) if same else []
    return [{**case, "runs": [run for run in case["runs"] if is_sound([run])]} for case in cases]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=parse_shapes,
        default=[],
        help=f"TOKENSxINxOUTxR, LAYER@TOKENS or MODEL@TOKENS of the registry, or a set: {', '.join(SHAPES)} "
        f"(default: {REFERENCE_SHAPE}, unless there are blocks)",
    )
    parser.add_argument(
        "--blocks",
        nargs="+",
        type=parse_block,
        default=[],
        help=f"MODEL@TOKENS or MODEL@TOKENSxR of {', '.join(BLOCKS)}",
    )
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument("--modes", nargs="+", default=["training"], choices=MODES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a process (default: 2)")
    parser.add_argument("--processes", type=int, default=5, help="fresh processes per case (default: 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="timed per contender and process (default: 2)")
    parser.add_argument("--limit", type=float, default=540, help="start no further process after so many seconds")
    parser.add_argument("--together", action="store_true", help="measure all cases in each process, not one alone")
    parser.add_argument("--contenders", nargs="+", default=list(_DEFAULT), choices=list(CONTENDERS))
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    parser.add_argument("--resume", action="store_true", help="keep what that file has of the same commit and device")
    options = parser.parse_args(arguments)
    if options.resume and options.output is None:
        parser.error("--resume needs --output, the file to go on with")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch {torch.__version__} finds no CUDA device")
    shapes = [shape for group in options.shapes for shape in group]
    options.what = [*(("", shape) for shape in shapes), *options.blocks] or [("", REFERENCE_SHAPE)]
    options.contenders = list(dict.fromkeys([BASELINE, *options.contenders]))
    try:
        check_company(options.contenders)
    except ValueError as error:
        parser.error(str(error))
    return options


def _print_case(case: dict[str, Any], runs: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    tokens, in_features, out_features, r = case["shape"].split("x")
    what = f"block of {case['block']}" if case["block"] else f"{in_features}->{out_features}"
    print(f"\nM={tokens}, {what}, r={r}, {case['dtype']}, {case['device']}, ", end="")
    print(
        f"{LABELS[case['mode']]}, {len(runs)} fresh processes, each result held to {runs[0]['tolerance']:.1e}", end=""
    )
    print(" of float64")
    _print_times(case, runs, "samples_ms", summary)
    if "graphs" in summary:
        print("under CUDA graphs")
        _print_times(case, runs, "graph_samples_ms", summary["graphs"])
    for key, title in (("peak_bytes", "peak of a call"), ("saved_bytes", "saved for backward")):
        counts = (f"{CONTENDERS[name].label} {count / 2**20:.1f}" for name, count in summary.get(key, {}).items())
        print(f"{title}, MiB: {', '.join(counts)}" if key in summary else "", flush=True)


def _print_times(case: dict[str, Any], runs: list[dict[str, Any]], samples: str, times: dict[str, Any]) -> None:
    print(f"{'':30}{'adapter':>10}{'ms':>10}  {'/ frozen':>8}{'min .. max':>16}{'samples':>9}")
    for name in case["contenders"]:
        entries = [run["contenders"][name] for run in runs]
        failed = next((entry for entry in entries if samples not in entry), None)
        if failed is not None:
            reason = failed.get("no_graph") if failed["status"] == "timed" else failed["reason"]
            print(f"{CONTENDERS[name].label:30}{failed['status']}, no times here: {reason}")
            continue
        ratio = times["ratios"][f"{name}/{BASELINE}"]
        counts = sum(len(entry[samples]) for entry in entries)
        spread = f"{ratio['min']:.2f} .. {ratio['max']:.2f}"
        print(f"{CONTENDERS[name].label:30}{entries[0]['adapter_dtype'] or '-':>10}{times['ms'][name]:10.3f}", end="")
        print(f"  {ratio['median']:8.2f}{spread:>16}{counts:9}")
    for one, other in COMPARED:
        ratio = times["ratios"].get(f"{one}/{other}")
        if ratio is not None:
            labels = f"{CONTENDERS[one].label} / {CONTENDERS[other].label}"
            print(f"{labels:52}{ratio['median']:8.2f}  {ratio['min']:.2f} .. {ratio['max']:.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
