"""A training step of a whole model: ours, PEFT's LoRA and PEANuT, the frozen model and full fine-tuning.

    python -m benchmarks.model_step --output FILE.json

Each contender runs in processes of its own, and must give the frozen model's loss before it is timed, its B being zero.
A step is forward, backward and AdamW over what is trained; of the frozen model forward and backward to the embeddings.
The figure printed is the median over the processes, each of which gives the median of its steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.model_contenders import CONTENDERS, TOLERANCE, measure
from benchmarks.models import MODELS, Model
from neat_kernels.bench.model_results import summarize
from neat_kernels.bench.provenance import ROOT, provenance, write_json

_SETTINGS = ("model", "targets", "dtype", "device", "threads", "steps")


def main(arguments: list[str] | None = None) -> int:
    """Run the contenders, print their table, write the results; 1 if one was wrong or failed."""
    options = _parse(arguments)
    if options.worker:
        print(json.dumps(measure(options.worker, options)))
        return 0
    facts = provenance()
    print(f"{facts['device']}, {options.threads} CPU threads, commit {facts['commit']}")
    model = MODELS[options.model]
    print(f"{options.model}, {options.targets}, r={model.r}, {model.batch} × {model.length} tokens, {options.dtype}")
    settings = {name: getattr(options, name) for name in _SETTINGS} | {"r": model.r, "tokens": model.tokens}
    runs = _done_before(options, facts, settings)
    content = {"provenance": facts, **settings, "processes": options.processes, "runs": runs}
    deadline, longest = time.monotonic() + options.limit, 0.0
    complete = True
    for i in range(options.processes):
        for name in options.contenders:
            done = runs.setdefault(name, [])
            if len(done) > i or any("failed" in run for run in done):
                continue
            start = time.monotonic()
            if start + longest > deadline:
                complete = False
                continue
            done.append(_fresh_process(name, options))
            longest = max(longest, time.monotonic() - start)
            content["summary"] = summarize(runs, model.tokens)
            if options.output is not None:
                write_json(options.output, content)
    _print(options, model, runs)
    if not complete:
        print("\nnot complete: the same command with --resume goes on from here")
        return 1
    return 1 if any("failed" in run for done in runs.values() for run in done) else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-4x1024")
    parser.add_argument("--targets", choices=["default", "all-linear"], default="default")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a process (default: 2)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each process (default: 5)")
    parser.add_argument("--processes", type=int, default=1, help="fresh processes of each contender (default: 1)")
    parser.add_argument("--limit", type=float, default=540, help="start no further process after so many seconds")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    parser.add_argument("--resume", action="store_true", help="keep what that file has of the same commit and device")
    parser.add_argument("--worker", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch {torch.__version__} finds no CUDA device")
    if options.resume and options.output is None:
        parser.error("--resume needs --output, the file to go on with")
    return options


def _done_before(options: argparse.Namespace, facts: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """With --resume, the runs of the output that were measured with these settings, here and on this commit."""
    if not (options.resume and options.output.is_file()):
        return {}
    before = json.loads(options.output.read_text())
    same = all(before["provenance"][key] == facts[key] for key in ("commit", "device", "versions"))
    same &= all(before.get(name) == value for name, value in settings.items())
    runs: dict[str, list[dict[str, Any]]] = before["runs"] if same else {}
    return {name: [run for run in done if "failed" not in run] for name, done in runs.items()}


def _fresh_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.model_step", "--worker", name]
    for option in _SETTINGS:
        command += [f"--{option}", str(getattr(options, option))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        return {"failed": next(iter(done.stderr.strip().splitlines()[-1:]), f"exit status {done.returncode}")}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _print(options: argparse.Namespace, model: Model, runs: dict[str, Any]) -> None:
    found = summarize(runs, model.tokens)
    print(f"{'':24}{'trained':>13}{'ms/step':>10}{'min .. max':>20}{'/ frozen':>10}{'tokens/s':>10}{'peak, MiB':>11}")
    for name in options.contenders:
        failed = next((run["failed"] for run in runs[name] if "failed" in run), None)
        if failed is not None:
            print(f"{name:24}failed: {failed}")
            continue
        if name not in found:
            print(f"{name:24}not run: the limit of {options.limit:.0f} s was reached")
            continue
        one = found[name]
        spread = f"{one['min']:.1f} .. {one['max']:.1f}"
        peak = "–" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 2**20:,.0f}"
        ratio = "–" if one["ratio"] is None else f"{one['ratio']:.2f}"
        print(f"{name:24}{one['trained']:13,}{one['ms']:10.1f}{spread:>20}{ratio:>10}", end="")
        print(f"{one['tokens_per_second']:10,.0f}{peak:>11}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
